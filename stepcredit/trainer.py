"""The training loop: sample, judge, observe, learn, report."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from stepcredit.auxiliary import AuxModel, OldPolicy, Reference
from stepcredit.checkpoint import save_checkpoint
from stepcredit.config import Config
from stepcredit.credit import CREDIT, assign, check_options, needs_of
from stepcredit.errors import UserError
from stepcredit.evaluate import evaluate
from stepcredit.forest import Forest
from stepcredit.growth import flat, sampling_seed
from stepcredit.imports import by_name
from stepcredit.judging import Judge
from stepcredit.metrics import forest_metrics
from stepcredit.objective import Objective, check
from stepcredit.ops import kl_k1
from stepcredit.policy.batching import parts
from stepcredit.policy.forward import Policy
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.transformers import TransformersSampler
from stepcredit.shaping import SHAPERS
from stepcredit.tasks import build_task
from stepcredit.tasks.prompts import PromptFormat
from stepcredit.tracking import Tracker
from stepcredit.verifiers import reward_function

TRAINING = 0  # stream of sampling seeds


class Trainer:
    """A run: everything that the config names, built and checked before the first token is sampled.

    Args:
        config: resolved.
        policy: what is trained.
        run_dir: an existing folder.
        state: of a checkpoint to continue from.
    """

    def __init__(
        self, config: Config, policy: Policy, run_dir: Path, console: Console, state: dict | None = None
    ) -> None:
        self.config, self.policy, self.run_dir = config, policy, run_dir
        self.task = build_task(config.task, config.train.seed)
        self.encode = PromptFormat(
            policy.tokenizer, config.task.system_prompt, config.task.max_prompt_tokens, config.task.template_options
        )
        self.judge = build_judge(config, self.task.reward_functions, policy)
        self.shapers = [by_name("shapers", name, SHAPERS) for name in config.shapers]
        self.params = sampling_params(config)
        self.sampler = TransformersSampler(policy, config.sampler.max_rows)
        self.credit = by_name("credit.name", config.credit.name, CREDIT)
        check_options(config.credit.name, self.credit, config.credit.options)
        self.objective = build_objective(config)
        self.models = self._build_models()
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=config.optim.learning_rate,
            betas=config.optim.betas,
            weight_decay=config.optim.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.done = 0
        self.held_out = self.task.held_out(config.eval.num_problems)
        for problem in [*self.task.draw(0, 1), *self.held_out]:
            self.encode(problem)  # fail now rather than after an hour
        if state:
            self._load(state)
        self.tracker = Tracker(
            run_dir, console, self.done + 1, config.train.iterations, config.rollouts.every, config.rollouts.max_trees
        )

    def run(self) -> bool:
        """Train to the end. False when nothing was learnt."""
        config, started = self.config, time.monotonic()
        with self.tracker as tracker:
            if self.done == 0:
                tracker.report(0, self.evaluate())
            for iteration in range(self.done + 1, config.train.iterations + 1):
                clock = Clock()
                with clock("time/sample"):
                    forest = self.grow(iteration)
                with clock("time/judge"):
                    forest = self.judge(forest)
                    for shaper in self.shapers:
                        forest = shaper(forest)
                with clock("time/observe"):
                    for model in self.models:
                        forest = model.observe(forest)
                    forest = self.assign_credit(forest)
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
                    save_checkpoint(self.run_dir, iteration, self.policy, self._state(), config.checkpoint.keep)
        return tracker.summary(time.monotonic() - started)

    # ------------------------------------------------------------------ the five words

    def grow(self, iteration: int) -> Forest:
        """Sample this iteration's problems."""
        count = self.config.train.problems_per_iteration
        start = (iteration - 1) * count
        problems = self.task.draw(start, count)
        seeds = [sampling_seed(self.config.train.seed, TRAINING, start + number) for number in range(count)]
        return flat(self.sampler, problems, self.encode, self.config.growth.group_size, self.params, seeds)

    def assign_credit(self, forest: Forest) -> Forest:
        """KL in the reward where asked for, then advantages."""
        if self.objective.kl_in_reward:
            penalty = self.objective.kl_coef * kl_k1(forest.token["old_logprobs"], forest.token["ref_logprobs"])
            rewards = forest.token["token_rewards"] if "token_rewards" in forest.token else torch.zeros_like(penalty)
            forest = forest.with_token(token_rewards=rewards - penalty * forest.token_sampled)
        return assign(forest, self.config.credit.name, self.credit, self.config.credit.options)

    def optimizer_steps(self, forest: Forest, iteration: int) -> Iterator[Forest]:
        """The forests of this iteration's optimiser steps, with their weights: trees dealt to minibatches, each epoch anew."""
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
            return {"optim/skipped": 1.0, "optim/learning_rate": self.schedule.get_last_lr()[0]}
        sums: dict[str, float] = {"tokens/computed": 0.0}
        loss_sum = 0.0
        for part in parts(step.select(segments), self.config.optim.max_tokens_per_micro_batch):
            owned = part.with_token(weights=part.token["weights"] * part.token["owned"])
            scores = self.policy(owned, self.params.temperature, entropy_grad=self.objective.entropy_coef != 0)
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
        rate = self.schedule.get_last_lr()[0]
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
        result = evaluate(
            self.sampler, self.held_out, self.encode, self.judge, self.params, config.num_samples, config.greedy, seed=0
        )
        return result.metrics | {"time/eval": time.monotonic() - started}

    # ------------------------------------------------------------------ building and state

    def _build_models(self) -> list[AuxModel]:
        needed = set(needs_of(self.credit).columns)
        optim = self.config.optim
        if self.objective.needs_reference:
            needed.add("ref_logprobs")
        if self.objective.kl_in_reward or optim.num_epochs * optim.num_minibatches > 1:
            needed.add("old_logprobs")
        makers = {"old_logprobs": OldPolicy, "ref_logprobs": Reference}
        given = {"rollout_logprobs", "entropy", "token_rewards"}
        if unknown := needed - makers.keys() - given:
            raise UserError(
                f"credit '{self.config.credit.name}' needs {', '.join(sorted(unknown))}, which nothing here provides"
            )
        temperature, budget = self.params.temperature, optim.max_tokens_per_micro_batch
        return [maker(self.policy, temperature, budget) for column, maker in makers.items() if column in needed]

    def _rate(self, iteration: int) -> float:
        optim, total = self.config.optim, self.config.train.iterations
        warm = min(1.0, (iteration + 1) / (optim.warmup + 1))
        progress = min(1.0, iteration / total)
        if optim.schedule == "linear":
            return warm * (1 - progress)
        if optim.schedule == "cosine":
            return warm * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * progress))))
        return warm

    def _state(self) -> dict:
        return {
            "iteration": self.done,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "models": [model.state_dict() for model in self.models],
            "tokens_sampled": self.tracker.tokens_sampled,
        }

    def _load(self, state: dict) -> None:
        self.done = state["iteration"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for model, saved in zip(self.models, state["models"], strict=True):
            model.load_state_dict(saved)


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


def build_judge(config: Config, task_functions: tuple[str, ...], policy: Policy) -> Judge:
    """The config's reward functions, or the task's own."""
    names = config.reward.functions or list(task_functions)
    weights = config.reward.weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise UserError(f"reward.weights: {len(weights)} weights for {len(names)} functions ({', '.join(names)})")
    return Judge({name: reward_function(name) for name in names}, weights, policy.tokenizer)


def sampling_params(config: Config) -> SamplingParams:
    sampler = config.sampler
    stop = None if sampler.stop_token_ids is None else tuple(sampler.stop_token_ids)
    return SamplingParams(sampler.temperature, sampler.top_p, sampler.top_k, sampler.max_new_tokens, stop)


def build_objective(config: Config) -> Objective:
    given = config.objective
    objective = Objective(
        surrogate=given.surrogate,
        clip_low=given.clip_low,
        clip_high=given.clip_high,
        dual_clip=given.dual_clip,
        aggregate=given.aggregate,
        kl_estimator=given.kl.estimator,
        kl_coef=given.kl.coef,
        entropy_coef=given.entropy_coef,
        constant=float(config.sampler.max_new_tokens),
    )
    check(objective)
    return objective


def weights_fingerprint(policy: Policy) -> Tensor:
    """All weights as one vector, to compare runs."""
    return torch.cat([parameter.detach().flatten().cpu() for parameter in policy.parameters()])
