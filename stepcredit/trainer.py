"""The training loop: sample, judge, observe, learn, report."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from stepcredit.objective import TOKEN_SUMS
from stepcredit.ops import kl_k1
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
    """

    def __init__(self, config: Config, parts: Parts, policy: Policy, console: Console) -> None:
        self.config, self.policy, self.console = config, policy, console
        self.shapers, self.assign, self.objective = parts.shapers, parts.assign, parts.objective
        self.rollouts = build_rollouts(config, parts, policy)
        self.models = build_models(config, parts, policy)
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=config.optim.learning_rate,
            betas=config.optim.betas,
            weight_decay=config.optim.weight_decay,
        )
        self.done = self.drawn = 0  # iterations, and training problems, so far
        self.held_out = self.rollouts.task.held_out(config.eval.num_problems)
        self._check()

    def run(self, run_dir: Path) -> bool:
        """Train to the end, writing into an existing folder. False when nothing was learnt."""
        config, started = self.config, time.monotonic()
        with Tracker(run_dir, self.console, config, self.done, self.policy.tokenizer.batch_decode) as tracker:
            if self.done == 0:
                tracker.report(0, self.evaluate())
            for iteration in range(self.done + 1, config.train.iterations + 1):
                clock = Clock()
                with clock("time/sample"):
                    forest = self.grow()
                with clock("time/judge"):
                    forest = self.rollouts.judge(forest)
                    for shaper in self.shapers:
                        forest = shaper(forest)
                with clock("time/observe"):
                    for model in self.models:
                        forest = model.observe(forest)
                    forest = self.assign(self.penalised(forest))
                with clock("time/learn"):
                    rate = self.set_learning_rate(iteration)
                    learnt = [self.learn(step) for step in self.optimizer_steps(forest, iteration)]
                    self.rollouts.sampler.sync(self.policy)
                self.done = iteration
                last = iteration == config.train.iterations
                metrics = forest_metrics(forest) | average(learnt) | clock.metrics(forest)
                metrics["optim/learning_rate"] = rate
                if last or (config.eval.every and iteration % config.eval.every == 0):
                    metrics |= self.evaluate()
                tracker.report(iteration, metrics, self.weighted(forest))
                if last or (config.checkpoint.every and iteration % config.checkpoint.every == 0):
                    save_checkpoint(run_dir, iteration, self.policy, self.state(), config.checkpoint.keep)
        return tracker.summary(time.monotonic() - started)

    # ------------------------------------------------------------------ the five words

    def grow(self) -> Forest:
        """Sample this iteration's problems."""
        count, start = self.config.train.problems_per_iteration, self.drawn
        self.drawn += count
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
                sampling_seed(self.config.train.seed, TRAINING, -1 - iteration * 1000 - epoch)
            )
            order = torch.randperm(forest.num_trees, generator=generator)
            for trees in order.tensor_split(optim.num_minibatches):
                if len(trees):
                    yield self.weighted(forest.select_trees(trees))

    def weighted(self, forest: Forest) -> Forest:
        return forest.with_token(weights=self.objective.weights(forest))

    def set_learning_rate(self, iteration: int) -> float:
        """The rate of this iteration: linear warm-up, then the schedule."""
        optim = self.config.optim
        progress = (iteration - 1) / self.config.train.iterations
        shape = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        rate = optim.learning_rate * min(1.0, iteration / (optim.warmup + 1)) * shape[optim.schedule]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def learn(self, step: Forest) -> dict[str, float]:
        """One optimiser step, part by part; a step without gradient changes nothing."""
        segments = torch.zeros(step.num_segments, dtype=torch.bool)
        segments[step.token["segment"][self.objective.has_gradient(step)]] = True
        if not bool(segments.any()):
            return {"optim/skipped": 1.0}
        rows, counted = [], 0
        for part in self.policy.parts(step.select(segments), self.config.optim.max_tokens_per_micro_batch):
            weights = part.token["weights"] * part.token["owned"]
            owned = part.with_token(weights=weights, owned=weights != 0)
            scores = self.policy(owned, self.rollouts.params.temperature, self.objective.entropy_coef != 0)
            loss, values = self.objective.loss(scores, owned)
            loss.backward()
            counted += int((owned.token["weights"] != 0).sum())
            positions = float(self.policy.num_positions(part))
            rows.append(values | {"optim/loss": float(loss.detach()), "tokens/computed": positions})
        norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.optim.grad_clip))
        finite = math.isfinite(norm)
        if finite:  # otherwise the step would destroy the weights
            self.optimizer.step()
        self.optimizer.zero_grad()
        flags = {"optim/grad_norm": norm, "optim/skipped": 0.0, "optim/nonfinite": float(not finite)}
        return sum_parts(rows, counted) | flags

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
        """What a checkpoint holds beside the weights. Problems and seeds follow from the number drawn."""
        return {
            "iteration": self.done,
            "drawn": self.drawn,
            "optimizer": self.optimizer.state_dict(),
            "models": [model.state_dict() for model in self.models],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.done, self.drawn = state["iteration"], state["drawn"]
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:  # what the config says now holds, not what it said then
            group["betas"], group["weight_decay"] = self.config.optim.betas, self.config.optim.weight_decay
        for model, saved in zip(self.models, state["models"], strict=True):
            model.load_state_dict(saved)

    def _check(self) -> None:
        """Fail now rather than after an hour."""
        if self.rollouts.params.truncates:
            log.warning("top_p or top_k cuts the distribution that is sampled; log-probabilities are of the full one")
        for problem in [*self.rollouts.task.known(), *self.held_out]:
            self.rollouts.encode(problem)


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


def sum_parts(rows: list[dict[str, float]], counted: int) -> dict[str, float]:
    """Over the parts of an optimiser step: sums over tokens become means over its `counted` weighted tokens."""
    merged: dict[str, float] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        merged[name] = max(values) if name.endswith("_max") else sum(values)
        if name in TOKEN_SUMS:
            merged[name] /= counted
    return merged


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    """Over the optimiser steps of an iteration: token counts add up, maxima stay maxima, the rest is a mean."""
    merged: dict[str, float] = {}
    for name in sorted({name for row in rows for name in row}):
        values = [row[name] for row in rows if name in row]
        total = sum(values)
        merged[name] = (
            total if name.startswith("tokens/") else max(values) if name.endswith("_max") else total / len(values)
        )
    return merged
