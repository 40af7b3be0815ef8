"""The training loop: sample, judge, observe, learn, report."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from stepcredit.build import Parts, build_models, build_rollouts
from stepcredit.checkpoint import save_checkpoint
from stepcredit.config import Config
from stepcredit.evaluate import evaluate
from stepcredit.forest import Forest
from stepcredit.growth import flat, sampling_seed
from stepcredit.metrics import forest_metrics
from stepcredit.ops import kl_k1
from stepcredit.policy.batching import cut
from stepcredit.policy.forward import Policy
from stepcredit.tracking import Tracker

log = logging.getLogger("stepcredit")

TRAINING = 0  # stream of sampling seeds


class Trainer:
    """A run, checked before the first token is sampled.

    Args:
        config: resolved.
        parts: what `build_parts` made of the config.
        policy: what is trained; as it is now it is the reference.
        run_dir: where the run writes; made when it starts.
    """

    def __init__(self, config: Config, parts: Parts, policy: Policy, run_dir: Path, console: Console) -> None:
        self.config, self.policy, self.run_dir, self.console = config, policy, run_dir, console
        self.shapers, self.assign, self.objective = parts.shapers, parts.assign, parts.objective
        self.rollouts = build_rollouts(config, parts, policy)
        self.models = build_models(config, parts, policy)
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=config.optim.learning_rate,
            betas=config.optim.betas,
            weight_decay=config.optim.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(learning_rate_factor, config))
        self.done = 0
        self.held_out = self.rollouts.task.held_out(config.eval.num_problems)
        self._check()

    def run(self) -> bool:
        """Train to the end. False when nothing was learnt."""
        config, started = self.config, time.monotonic()
        with Tracker(self.run_dir, self.console, config, self.done) as tracker:
            if self.done == 0:
                tracker.report(0, self.evaluate())
            for iteration in range(self.done + 1, config.train.iterations + 1):
                clock = Clock()
                with clock("time/sample"):
                    forest = self.grow(iteration)
                with clock("time/judge"):
                    forest = self.rollouts.judge(forest)
                    for shaper in self.shapers:
                        forest = shaper(forest)
                with clock("time/observe"):
                    for model in self.models:
                        forest = model.observe(forest)
                    forest = self.assign(self.penalised(forest))
                with clock("time/learn"):
                    learnt = [self.learn(step) for step in self.optimizer_steps(forest, iteration)]
                    self.schedule.step()
                self.done = iteration
                last = iteration == config.train.iterations
                metrics = forest_metrics(forest) | average(learnt) | clock.metrics(forest)
                if last or (config.eval.every and iteration % config.eval.every == 0):
                    metrics |= self.evaluate()
                tracker.report(iteration, metrics, self.weighted(forest))
                if last or (config.checkpoint.every and iteration % config.checkpoint.every == 0):
                    save_checkpoint(self.run_dir, iteration, self.policy, self.state(), config.checkpoint.keep)
        return tracker.summary(time.monotonic() - started)

    # ------------------------------------------------------------------ the five words

    def grow(self, iteration: int) -> Forest:
        """Sample this iteration's problems."""
        count = self.config.train.problems_per_iteration
        start = (iteration - 1) * count
        problems = self.rollouts.task.draw(start, count)
        seeds = [sampling_seed(self.config.train.seed, TRAINING, start + number) for number in range(count)]
        rollouts = self.rollouts
        size = self.config.growth.group_size
        return flat(rollouts.sampler, problems, rollouts.encode, size, rollouts.params, seeds)

    def penalised(self, forest: Forest) -> Forest:
        """Token rewards less the k1 penalty, when the KL term acts in the reward."""
        if not self.objective.kl_in_reward:
            return forest
        penalty = self.objective.kl_coef * kl_k1(forest.token["old_logprobs"], forest.token["ref_logprobs"])
        rewards = forest.token["token_rewards"] if "token_rewards" in forest.token else torch.zeros_like(penalty)
        return forest.with_token(token_rewards=rewards - penalty * forest.token_sampled)

    def optimizer_steps(self, forest: Forest, iteration: int) -> Iterator[Forest]:
        """The weighted forests of this iteration's optimiser steps; trees are dealt to minibatches anew each epoch."""
        optim = self.config.optim
        for epoch in range(optim.num_epochs):
            if optim.num_minibatches == 1:
                yield self.weighted(forest)
                continue
            generator = torch.Generator().manual_seed(
                sampling_seed(self.config.train.seed, TRAINING, iteration * 1000 + epoch)
            )
            order = torch.randperm(forest.num_trees, generator=generator)
            for trees in order.tensor_split(optim.num_minibatches):
                if len(trees):
                    yield self.weighted(forest.select_trees(trees))

    def weighted(self, forest: Forest) -> Forest:
        return forest.with_token(weights=self.objective.weights(forest))

    def learn(self, step: Forest) -> dict[str, float]:
        """One optimiser step; a step without gradient changes nothing."""
        needed = self.objective.has_gradient(step)
        segments = torch.zeros(step.num_segments, dtype=torch.bool)
        segments[step.token["segment"][needed]] = True
        if not bool(segments.any()):
            return {"optim/skipped": 1.0, "optim/learning_rate": float(self.schedule.get_last_lr()[0])}
        sums: dict[str, float] = {"tokens/computed": 0.0}
        loss_sum = 0.0
        for part in cut(step.select(segments), self.config.optim.max_tokens_per_micro_batch):
            owned = part.with_token(weights=part.token["weights"] * part.token["owned"])
            scores = self.policy(owned, self.rollouts.params.temperature, entropy_grad=self.objective.entropy_coef != 0)
            loss, values = self.objective.loss(scores, owned)
            loss.backward()
            loss_sum += float(loss.detach())
            for name, value in values.items():
                pick = max if name.endswith("_max") else lambda a, b: a + b
                sums[name] = pick(sums.get(name, 0.0), float(value))
            sums["tokens/computed"] += part.num_tokens + len(part.prompt_ids)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        counted = float((step.token["weights"] != 0).sum())
        means = {k: v / counted if k in ("policy/clip_fraction", "policy/kl_old") else v for k, v in sums.items()}
        rate = float(self.schedule.get_last_lr()[0])
        return {
            "optim/loss": loss_sum,
            "optim/grad_norm": float(norm),
            "optim/learning_rate": rate,
            "optim/skipped": 0.0,
        } | means

    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy; the same problems and seeds every time."""
        started = time.monotonic()
        if not self.held_out:
            return {}
        config = self.config.eval
        result = evaluate(self.rollouts, self.held_out, config.num_samples, config.greedy, seed=0)
        return result.metrics | {"time/eval": time.monotonic() - started}

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights. Problems and seeds follow from the iteration alone."""
        return {
            "iteration": self.done,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "models": [model.state_dict() for model in self.models],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.done = state["iteration"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for model, saved in zip(self.models, state["models"], strict=True):
            model.load_state_dict(saved)

    def _check(self) -> None:
        """Fail now rather than after an hour."""
        if self.rollouts.params.truncates:
            log.warning("top_p or top_k cuts the distribution that is sampled; log-probabilities are of the full one")
        for problem in [*self.rollouts.task.draw(0, self.config.train.problems_per_iteration), *self.held_out]:
            self.rollouts.encode(problem)


def learning_rate_factor(config: Config, iteration: int) -> float:
    """Share of `optim.learning_rate` at an iteration counted from 0: linear warm-up, then the schedule."""
    progress = min(1.0, iteration / config.train.iterations)
    warm = min(1.0, (iteration + 1) / (config.optim.warmup + 1))
    after = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return warm * after[config.optim.schedule]


class Clock:
    """Seconds of each phase of an iteration."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started

    def metrics(self, forest: Forest) -> dict[str, float]:
        total = sum(self.seconds.values())
        return self.seconds | {"time/iteration": total, "tokens/per_second": float(forest.token_sampled.sum()) / total}


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean over optimiser steps; counts and maxima keep their meaning."""
    merged: dict[str, float] = {}
    for name in {name for row in rows for name in row}:
        values = [row[name] for row in rows if name in row]
        merged[name] = (
            sum(values)
            if name.startswith("tokens/")
            else max(values)
            if name.endswith("_max")
            else sum(values) / len(values)
        )
    return merged
