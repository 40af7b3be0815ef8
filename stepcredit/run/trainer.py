"""The training loop: sample, judge, observe, learn, report."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.ops import kl_k1
from stepcredit.growth.seeds import sampling_seed
from stepcredit.learn.learner import Call, Learner
from stepcredit.learn.placement import WHOLE, Placement
from stepcredit.losses.objective import TOKEN_SUMS
from stepcredit.policy.batching import unshared_positions
from stepcredit.policy.forward import Policy
from stepcredit.run.build import Parts, build_adapters, build_models, build_rollouts, build_window
from stepcredit.run.checkpoint import load_checkpoint, load_learner, save_checkpoint
from stepcredit.run.collecting import Position, collect
from stepcredit.run.evaluate import evaluate
from stepcredit.run.interrupt import Interrupted, StopRequest
from stepcredit.run.metrics import forest_metrics
from stepcredit.run.state import random_state, set_random_state
from stepcredit.run.tracking import Records, open_tracker
from stepcredit.samplers.table import check_training

log = logging.getLogger("stepcredit")

TRAINING = 0  # stream of sampling seeds


class Clock:
    """Seconds of each phase of an iteration."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def metrics(self, tokens: float) -> dict[str, float]:
        total = sum(self.seconds.values())
        return self.seconds | {"time/iteration": total, "tokens/per_second": tokens / total}


@dataclass
class Work:
    """An iteration that is under way: its finished forest, and what the optimiser steps taken so far gave."""

    forest: Forest
    position: Position  # in the problems, behind this iteration's
    clock: Clock
    observed: dict[str, float]  # metrics from before the first optimiser step
    learnt: list[dict[str, float]] = field(default_factory=list)

    def metrics(self, config: Config) -> dict[str, float]:
        metrics = forest_metrics(self.forest, config) | self.observed | average(self.learnt)
        metrics["tokens/sampled"] += self.observed.get("tokens/left_out", 0.0)
        return metrics | self.clock.metrics(metrics["tokens/sampled"])


class Trainer:
    """A run, checked before the first token is sampled.

    Args:
        config: resolved.
        parts: what `build_parts` made of the config.
        policy: what is trained; as it is now it is the reference.
        placement: how models lie on the processes that share the run.
    """

    def __init__(
        self, config: Config, parts: Parts, policy: Policy, console: Console, placement: Placement = WHOLE
    ) -> None:
        self.config, self.policy, self.console, self.ranks = config, policy, console, placement.ranks
        self.shapers, self.assign, self.objective = parts.shapers, parts.assign, parts.objective
        self.sampling = check_training(config)
        build_adapters(config, policy)
        self.rollouts = build_rollouts(config, parts, policy, placement)
        self.models = build_models(config, parts, policy, placement)
        optim = config.optim
        self.learner = Learner(placement.place(policy), placement, optim, optim.max_tokens_per_micro_batch)
        self.window = build_window(config)
        self.done, self.position = 0, Position()
        self.work: Work | None = None
        self.nonfinite = 0  # optimiser steps in a row that were skipped
        self.stop = StopRequest(self.ranks)
        self.resumed = False
        self.held_out = self.rollouts.task.held_out(config.eval.num_problems)
        self._check()

    def run(self, run_dir: Path) -> bool:
        """Train to the end, writing into an existing folder. False when nothing was learnt.

        Raises:
            Interrupted: by a signal; what there was is saved.
        """
        last, started = self.config.train.iterations, time.monotonic()
        done, tokenizer = self.done if self.resumed else None, self.policy.tokenizer
        with self.stop, open_tracker(self.ranks, run_dir, self.console, self.config, done, tokenizer) as tracker:
            self.rollouts.sampler.on_progress = self.stop.check_here
            try:
                if tracker.reported is None:
                    tracker.report(0, self.evaluate())
                for iteration in range(self.done + 1, last + 1):
                    self.stop.check()
                    work = self.work = self.work or self.begin()
                    self.stop.check()
                    for number, step in enumerate(self.optimizer_steps(work.forest, iteration)):
                        if number >= len(work.learnt):
                            self.update(work, step, iteration, tracker)
                    self.rollouts.sampler.sync(self.policy)
                    metrics = work.metrics(self.config) | self.rollouts.sampler.metrics
                    metrics |= self.evaluate() if self.due(iteration, self.config.eval.every) else {}
                    tracker.report(iteration, metrics, self.weighted(work.forest))
                    self.done, self.position, self.work = iteration, work.position, None
                    if self.due(iteration, self.config.checkpoint.every):
                        self.save(run_dir, metrics.get("eval/accuracy"))
            except Interrupted:
                self.save(run_dir)
                raise
        return self.ranks.first(lambda: tracker.summary(time.monotonic() - started))

    # ------------------------------------------------------------------ the parts of an iteration

    def begin(self) -> Work:
        """Sample, judge and observe an iteration's problems, and give the credit."""
        clock = Clock()
        batch = collect(self.position, self.config.train.problems_per_iteration, self.window, partial(self.grow, clock))
        forest, observed = batch.forest, dict(batch.metrics)
        for shaper in self.shapers:
            forest = shaper(forest)
        with clock("time/observe"):
            for model in self.models.values():
                forest = model.observe(forest)
                observed |= model.metrics
            self.compare(forest)
            forest = self.assign(self.penalised(forest))
        return Work(forest, batch.position, clock, observed)

    def compare(self, forest: Forest) -> None:
        """Stop when a sampler outside this program samples from another model than the one trained here."""
        if not self.sampling.elsewhere:
            return
        if "rollout_logprobs" not in forest.token:
            raise UserError(
                f"sampler: the segments of '{self.config.sampler.name}' lack the column rollout_logprobs, so nothing "
                "tells whether it samples from the model that is trained here; give it to every segment"
            )
        far = (forest.token["old_logprobs"] - forest.token["rollout_logprobs"]).abs() * forest.token_sampled
        mean = float(far.sum() / forest.token_sampled.sum().clamp(min=1))
        tolerance = self.config.sampler.server.tolerance or (0.05 if self.policy.autocast else 0.005)  # bf16, fp32
        if not mean <= tolerance:
            beyond = float((far[forest.token_sampled] > tolerance).float().mean())
            raise UserError(
                f"sampler: log-probabilities of the sampled tokens differ from the trainer's by {mean:.3g} nats on "
                f"average (at most {float(far.max()):.3g}, {beyond:.0%} of the tokens beyond "
                f"sampler.server.tolerance {tolerance:g}). {self.sampling.other_model}"
            )

    def update(self, work: Work, step: Forest, iteration: int, tracker: Records) -> None:
        """One optimiser step of an iteration."""
        with work.clock("time/learn"):
            rate = self.set_learning_rate(iteration)
            found = self.learn(step) | {"optim/learning_rate": rate}
        self.nonfinite = self.nonfinite + 1 if found.get("optim/nonfinite") else 0
        if self.nonfinite >= self.config.optim.max_nonfinite:
            path = tracker.save_rollouts(f"nonfinite-{iteration:06d}", iteration, step)
            raise UserError(
                f"iteration {iteration}: {self.nonfinite} optimiser steps in a row had a loss or gradient that is not "
                f"finite; the rollouts are in {path}. Look at their rewards and log-probabilities, or lower "
                "--learning-rate"
            )
        work.learnt.append(found)
        self.stop.check()

    def due(self, iteration: int, every: int) -> bool:
        return iteration == self.config.train.iterations or bool(every and iteration % every == 0)

    def save(self, run_dir: Path, score: float | None = None) -> None:
        """Write a checkpoint; between the steps of an iteration its name has their number behind a dot."""
        name = f"{self.done:06d}" + (f".{len(self.work.learnt):03d}" if self.work else "")
        save_checkpoint(run_dir, name, self.learners(), self.state_dict(), self.config.checkpoint.keep, score)

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: the weights and everything else."""
        state = self.ranks.first(lambda: load_checkpoint(checkpoint))
        for name, learner in self.learners().items():
            load_learner(learner, checkpoint, name)
        self.rollouts.sampler.sync(self.policy)
        self.load_state_dict(state)

    def learners(self) -> dict[str, Learner]:
        """What learns, by the folder of a checkpoint that it is saved in; the policy is the checkpoint itself."""
        models = {name.removesuffix("_logprobs"): model.trained for name, model in self.models.items()}
        return {"": self.learner} | {name: learner for name, learner in models.items() if learner is not None}

    def grow(self, clock: Clock, numbers: Sequence[int], places: Sequence[int]) -> Forest:
        """Sample and judge these training problems, with seeds for these places in the run; each process its share."""
        rollouts, seed = self.rollouts, self.config.train.seed
        mine = self.ranks.share(list(zip(numbers, places, strict=True)))
        problems = [problem for number, _ in mine for problem in rollouts.task.draw(number, 1)]
        seeds = [sampling_seed(seed, TRAINING, place) for _, place in mine]
        forest = None
        if mine:
            with clock("time/sample"):
                forest = rollouts.grow(rollouts.sampler, problems, rollouts.encode, rollouts.params, seeds)
            with clock("time/judge"):
                forest = rollouts.judge(forest)
        with clock("time/gather"):
            return Forest.interleave([part for part in self.ranks.gather(forest) if part is not None])

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
        self.learner.set(lr=rate)
        return rate

    def learn(self, step: Forest) -> dict[str, float]:
        """One optimiser step, part by part; a step without gradient changes nothing."""
        segments = torch.zeros(step.num_segments, dtype=torch.bool)
        segments[step.token["segment"][self.objective.has_gradient(step)]] = True
        if not bool(segments.any()):
            return {"optim/skipped": 1.0}
        whole, step = step, step.select(segments)
        by_node = self.objective.unit == "segment"
        unshared = unshared_positions(whole, segments) if by_node else unshared_positions(step)
        rows, counted = self.accumulate(step)
        norm, finite = self.learner.step(sound=all(math.isfinite(row["optim/loss"]) for row in rows))
        flags = {"optim/grad_norm": norm, "optim/skipped": 0.0, "optim/nonfinite": float(not finite)}
        return sum_parts(rows, counted) | flags | {"tokens/unshared": float(unshared)}

    def accumulate(self, step: Forest) -> tuple[list[dict[str, float]], int]:
        """Add up the gradient of an optimiser step; the metrics of its parts and the number of weighted tokens."""

        def loss(part: Forest, call: Call) -> tuple[Tensor, tuple[dict[str, float], int]]:
            weights = part.token["weights"] * part.token["owned"]
            owned = part.with_token(weights=weights, owned=weights != 0)
            scores = call(owned, self.rollouts.params.temperature, self.objective.entropy_coef != 0)
            loss, values = self.objective.loss(scores, owned)
            positions = float(self.policy.num_positions(part))
            values |= {"optim/loss": float(loss.detach()), "tokens/computed": positions}
            return loss, (values, int((weights != 0).sum()))

        _, own = self.learner.accumulate(step, loss)
        found = [row for rows in self.ranks.gather(own) for row in rows]
        return [values for values, _ in found], sum(counted for _, counted in found)

    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy; the same problems and seeds every time."""
        started = time.monotonic()
        if not self.held_out:
            return {}
        config = self.config.eval
        result = evaluate(self.rollouts, self.held_out, config.num_samples, config.greedy, seed=0)
        return result.metrics | {"time/eval": time.monotonic() - started}

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights. Problems and seeds follow from the number drawn."""
        state: dict[str, Any] = {
            "iteration": self.done,
            "position": vars(self.position),
            "models": {name: model.state_dict() for name, model in self.models.items()},
            "random": random_state(),
            "max_tokens": self.learner.max_tokens,
            "nonfinite": self.nonfinite,
            "config": self.config.model_dump(mode="json", exclude={"run_dir"}),
        }
        if self.work is not None:
            state["work"] = {
                "forest": self.work.forest.state_dict(),
                "position": vars(self.work.position),
                "seconds": self.work.clock.seconds,
                "observed": self.work.observed,
                "learnt": self.work.learnt,
                "steps": self._steps(),
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.position, self.resumed = state["iteration"], position(state["position"]), True
        for name, model in self.models.items():
            if name in state["models"]:
                model.load_state_dict(state["models"][name])
        set_random_state(state["random"])
        self.learner.max_tokens = min(self.learner.max_tokens, state["max_tokens"])
        self.nonfinite = 0 if state["nonfinite"] >= self.config.optim.max_nonfinite else state["nonfinite"]
        if "work" in state:
            work = state["work"]
            if work["steps"] != self._steps():
                raise UserError(
                    "--resume: the run stopped between the optimiser steps of an iteration, so optim.num_epochs and "
                    "optim.num_minibatches must stay as they were until it is over"
                )
            clock = Clock()
            clock.seconds = work["seconds"]
            forest = Forest.from_state(work["forest"])
            self.work = Work(forest, position(work["position"]), clock, work["observed"], work["learnt"])

    def _steps(self) -> list[int]:
        return [self.config.optim.num_epochs, self.config.optim.num_minibatches]

    def _check(self) -> None:
        """Fail now rather than after an hour."""
        if self.rollouts.params.truncates:
            log.warning("top_p or top_k cuts the distribution that is sampled; log-probabilities are of the full one")
        for problem in self.held_out:
            self.rollouts.encode(problem)
        self._check_gold()

    def _check_gold(self) -> None:
        """Refuse to train against a reward that does not know the right answers."""
        given = self.config.reward
        drawn = {problem.id: problem for problem in self.rollouts.task.draw(0, given.gold_check)}
        problems = list(drawn.values())  # of few rows the draw would have some twice
        for name, check in self.rollouts.judge.check_gold(problems).items() if problems else ():
            if not check.failed:
                continue
            share = 1 - len(check.failed) / check.total
            problem, why = check.failed[0]
            text = f"reward function '{name}' accepts {share:.0%} of {check.total} gold answers; '{problem.id}': {why}"
            if share < given.gold_threshold:
                raise UserError(
                    f"{text}. That is under reward.gold_threshold ({given.gold_threshold:.0%}); see all with "
                    "'stepcredit score --gold', or train all the same with --reward.gold-check 0"
                )
            log.warning("%s", text)


def position(saved: dict[str, Any]) -> Position:
    return Position(**saved | {"queue": tuple(saved["queue"])})


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
    if "tokens/computed" in merged:
        merged["tokens/sharing"] = merged["tokens/unshared"] / merged["tokens/computed"]
    return merged
