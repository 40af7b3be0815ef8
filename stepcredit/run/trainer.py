"""The training loop: sample, judge, observe, learn, report."""

import time
from pathlib import Path

from rich.console import Console

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.learn.learner import Learner
from stepcredit.learn.loading import adapt
from stepcredit.learn.placement import UNSHARDED, Placement
from stepcredit.learn.schedule import learning_rate
from stepcredit.learn.text import load_text
from stepcredit.learn.update import PolicyUpdate
from stepcredit.losses.entropy import EntropyControl, with_top_entropy
from stepcredit.plan.advice import with_fitting_budget
from stepcredit.policy.forward import Policy
from stepcredit.run.build import Parts, build_estimators, build_rollouts
from stepcredit.run.by_source import reported_sources
from stepcredit.run.checkpoint import load_checkpoint, load_learner, newest_checkpoint, save_checkpoint
from stepcredit.run.checks import check_agreement, check_gold, check_sampling
from stepcredit.run.clock import Clock
from stepcredit.run.evaluate import held_out_metrics
from stepcredit.run.interrupt import Interrupted, StopRequest
from stepcredit.run.observing import observe
from stepcredit.run.preparing import prepare_all
from stepcredit.run.recorded import held_out_loss, score_of
from stepcredit.run.resume import restore, run_state
from stepcredit.run.source import Source
from stepcredit.run.tracking import Records, open_tracker
from stepcredit.run.windowed import build_source
from stepcredit.run.work import Work
from stepcredit.samplers.base import rest
from stepcredit.samplers.table import check_training
from stepcredit.shaping.base import fresh_states


class Trainer:
    """A run, checked before the first token is sampled.

    Args:
        config: resolved.
        parts: what `build_parts` made of the config.
        policy: what is trained; as it is now it is the reference.
        placement: how models lie on the processes that share the run.
    """

    def __init__(
        self, config: Config, parts: Parts, policy: Policy, console: Console, placement: Placement = UNSHARDED
    ) -> None:
        device = placement.device if placement.sharded else policy.device
        config = with_fitting_budget(config, device, placement.ranks.size, placement.strategy)
        self.config, self.parts, self.policy, self.console = config, parts, policy, console
        self.sampling = check_training(config)
        adapt(config, policy)
        self.rollouts = build_rollouts(config, parts, policy, placement)
        self.fingerprint = self.rollouts.task.fingerprint()  # before anything is left out
        self.estimators = build_estimators(config, parts, policy, self.rollouts, placement)
        optim, train = config.optim, config.train
        self.learner = Learner(placement.place(policy), placement, optim, optim.max_tokens_per_micro_batch)
        self.policy_update = PolicyUpdate(
            self.learner,
            parts.objective,
            optim,
            self.rollouts.params.temperature,
            train.seed,
            load_text(config.ptx, policy, train.seed),
        )
        self.source: Source = build_source(config, parts.credit, self.rollouts)
        self.ranks, self.stop = placement.ranks, StopRequest(placement.ranks)
        self.shaper_states, self.entropy = fresh_states(parts.shapers), EntropyControl(config.objective)
        self.done, self.resumed, self.preparing = 0, False, 0.0
        self.work: Work | None = None
        self.nonfinite = 0  # optimiser steps in a row that were skipped
        self.held_out = self.rollouts.task.held_out(config.eval.num_problems)
        self.sources = reported_sources(self.rollouts.task.sources(), self.held_out, config.track.max_sources)
        check_sampling(self.rollouts, self.held_out)
        check_gold(self.rollouts.judge, self.rollouts.task, config.reward)

    def run(self, run_dir: Path) -> bool:
        """Train to the end, writing into an existing folder. False when nothing was learnt.

        Raises:
            Interrupted: by a signal; what there was is saved.
        """
        started, done = time.monotonic(), self.done if self.resumed else None
        tokenizer = self.policy.tokenizer
        if not self.resumed:
            self.prepare(run_dir)
        with self.stop, open_tracker(self.ranks, run_dir, self.console, self.config, done, tokenizer) as tracker:
            self.rollouts.sampler.on_progress = self.stop.check_if_alone
            try:
                if tracker.reported is None:
                    tracker.report(0, self.evaluate() | self.prepared())
                for iteration in range(self.done + 1, self.config.train.iterations + 1):
                    self.stop.check()
                    work = self.work = self.work or self.begin()
                    self.policy_update.objective = self.parts.objective.with_entropy_coef(self.entropy.used)
                    self.stop.check()
                    for number, step in enumerate(self.policy_update.steps(work.forest, iteration)):
                        if number >= len(work.learnt):
                            self.update(work, step, iteration, tracker)
                    self.source.sync(self.policy, iteration)
                    metrics = work.metrics(self.config, self.sources) | self.rollouts.sampler.metrics
                    metrics |= self.evaluate() if self.due(iteration, self.config.eval.every) else {}
                    tracker.report(iteration, metrics, self.policy_update.weighted(work.forest))
                    self.done, self.source.position, self.work = iteration, work.position, None
                    if self.due(iteration, self.config.checkpoint.every):
                        self.save(run_dir, score_of(metrics))
            except Interrupted:
                self.save(run_dir)
                raise
        return self.ranks.on_main(lambda: tracker.summary(time.monotonic() - started))

    def prepare(self, run_dir: Path) -> None:
        """What estimators do before training; a run that is stopped in it is saved and goes on there."""
        started = time.monotonic()
        with self.stop:
            self.rollouts.sampler.on_progress = self.stop.check_if_alone
            try:
                prepare_all(self.estimators.values(), run_dir, self.console, self.stop.check)
            except Interrupted:
                if newest_checkpoint(run_dir) is None:
                    self.save(run_dir)
                raise
        self.preparing = time.monotonic() - started

    def prepared(self) -> dict[str, float]:
        """Tokens that estimators have sampled, where there are any; they count as sampled by the run."""
        tokens = float(sum(estimator.take_sampled() for estimator in self.estimators.values()))
        if not tokens:
            return {}
        return {"tokens/prepared": tokens, "tokens/sampled": tokens, "time/prepare": self.preparing}

    def begin(self) -> Work:
        """Sample, judge and observe an iteration's problems, and give the credit."""
        batch = self.source.next()
        rest(self.rollouts.sampler)
        forest, observed, clock = batch.forest, dict(batch.metrics), Clock(batch.seconds)
        shapers, states = self.parts.shapers, self.shaper_states
        with clock("time/observe"):
            forest, states, metrics = observe(forest, shapers, states, self.estimators, self.parts.observers)
            observed |= metrics
            check_agreement(forest, self.config, self.sampling, self.policy)
            forest = self.parts.assign(forest)
            observed |= self.entropy.begin(forest)
            forest = with_top_entropy(forest, self.config.objective.entropy_top)
        self.shaper_states = states
        observed |= {name: value for name, value in self.prepared().items() if name != "tokens/sampled"}
        return Work(forest, batch.position, clock, observed)

    def update(self, work: Work, step: Forest, iteration: int, tracker: Records) -> None:
        """One optimiser step of an iteration."""
        with work.clock("time/learn"):
            rate = learning_rate(self.config.optim, iteration, self.config.train.iterations)
            self.learner.set(lr=rate)
            held = any(estimator.holds_policy for estimator in self.estimators.values())
            metrics = {"optim/held": 1.0} if held else self.policy_update.take(step)
            metrics["optim/learning_rate"] = rate
        self.nonfinite = self.nonfinite + 1 if metrics.get("optim/nonfinite") else 0
        if self.nonfinite >= self.config.optim.max_nonfinite:
            path = tracker.save_rollouts(f"nonfinite-{iteration:06d}", iteration, step)
            raise UserError(
                f"iteration {iteration}: {self.nonfinite} optimiser steps in a row had a loss or gradient that is not "
                f"finite; the rollouts are in {path}. Look at their rewards and log-probabilities, or lower "
                "--learning-rate"
            )
        work.learnt.append(metrics)
        self.stop.check()

    def evaluate(self) -> dict[str, float]:
        if self.rollouts.recorded:
            estimators, assign = self.estimators.values(), self.parts.assign
            return held_out_loss(self.rollouts, self.held_out, estimators, assign, self.policy_update)
        return held_out_metrics(self.rollouts, self.held_out, self.config.eval, self.sources)

    def due(self, iteration: int, every: int) -> bool:
        return iteration == self.config.train.iterations or bool(every and iteration % every == 0)

    def save(self, run_dir: Path, score: float | None = None) -> None:
        """Write a checkpoint; between the steps of an iteration its name has their number behind a dot."""
        name = f"{self.done:06d}" + (f".{len(self.work.learnt):03d}" if self.work else "")
        save_checkpoint(run_dir, name, self.learners(), run_state(self), self.config.checkpoint.keep, score)

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: the weights and everything else."""
        state = self.ranks.on_main(lambda: load_checkpoint(checkpoint))
        self.prepare(checkpoint.parents[1])
        for name, learner in self.learners().items():
            load_learner(learner, checkpoint, name)
        restore(self, state)
        self.source.sync(self.policy, self.done)

    def learners(self) -> dict[str, Learner]:
        """What learns, by the folder of a checkpoint that it is saved in; the policy is the checkpoint itself."""
        trained = {name.removesuffix("_logprobs"): each.trained for name, each in self.estimators.items()}
        return {"": self.learner} | {name: learner for name, learner in trained.items() if learner is not None}
