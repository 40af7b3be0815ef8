"""Rollouts that are sampled in windows: what has not ended goes on in the next iteration."""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch

from stepcredit.config import Config
from stepcredit.credit import CreditFunction, needs_of
from stepcredit.credit.choose import terms_of
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.growth.rollouts import Rollouts
from stepcredit.growth.window import AGE, Carried, sample_window, whole_tree, window_tree, with_past
from stepcredit.losses.objective import Objective
from stepcredit.policy.forward import Policy
from stepcredit.run.clock import Clock
from stepcredit.run.source import Batch, InStep, Position, Source
from stepcredit.samplers.base import SamplerInWindows
from stepcredit.samplers.table import name_of, sampler_traits
from stepcredit.seeds import TRAINING, sampling_seed

log = logging.getLogger("stepcredit")


class Windowed:
    """Samples at most `window` new tokens of each completion in an iteration, and carries on what has not ended.

    As many completions are sampled in each iteration as without a window: new groups take the places of those that
    ended. A token keeps the version of the weights, and the log-probability, that it was sampled with.

    Credit that takes unfinished completions (`gae`) is given to the new tokens of every window at once. Other credit
    needs whole groups: one is trained on in the iteration in which its last completion ends, with all its tokens; where
    none does, the iteration samples another window.

    Args:
        seed: of the run.
        count: groups that are sampled at a time, of `group_size` completions.
        at_once: windows are trained on one by one, not groups when they have ended.
    """

    def __init__(self, rollouts: Rollouts, seed: int, count: int, group_size: int, window: int, at_once: bool) -> None:
        self.rollouts, self.seed, self.count, self.group_size = rollouts, seed, count, group_size
        self.window, self.at_once = window, at_once
        self.position = Position()
        self.version = 0
        self._known: set[int] = set()  # places of groups whose problems the task has drawn in this process

    def next(self) -> Batch:
        """The next batch; the position stays where it is until the batch is trained on."""
        clock, position = Clock(), self.position
        groups, lost = self._with_problems(position.carried)
        sums = dict.fromkeys(("rows", "begun", "finished", "rounds", "tokens"), 0)
        forest = None
        while forest is None:
            groups, position = self._filled(groups, position)
            rows = [row for group in groups for row in group.open]
            sums["rounds"] += 1
            sums["rows"] += len(rows)
            sums["begun"] += sum(len(group.open) for group in groups if not group.begun)
            groups, forest = self._sample(clock, groups)
            sums["tokens"] += sum(sum(group.drawn) for group in groups)
            sums["finished"] += len(rows) - sum(len(group.open) for group in groups)
            groups = [group for group in groups if group.open]
        position = replace(position, carried=tuple(groups))
        forest = forest.with_tree(version=torch.full((forest.num_trees,), self.version))
        metrics = {f"window/{name}": float(sums[name]) for name in ("rows", "begun", "finished", "rounds")}
        metrics |= {"tokens/sampled": float(sums["tokens"]), "window/lost": float(lost)}
        return Batch(forest, position, metrics | _measures(forest, groups), self.version, clock.seconds)

    def sync(self, policy: Policy, version: int) -> None:
        """Sample with these weights from now on."""
        self.rollouts.sampler.sync(policy)
        self.version = version

    def _with_problems(self, carried: Sequence[Carried]) -> tuple[list[Carried], int]:
        """Groups of a checkpoint with problems as the task draws them, and completions whose problems have changed."""
        groups, lost = [], 0
        for group in carried:
            if group.place not in self._known:
                (problem,) = self.rollouts.task.draw(group.number, 1)
                if self.rollouts.encode(problem) != list(group.tree.prompt_ids):
                    lost += len(group.open)
                    log.warning(
                        "problem '%s' has another prompt than when its completions began; they are left out, and "
                        "counted as window/lost",
                        group.tree.problem.id,
                    )
                    continue
                group = replace(group, tree=replace(group.tree, problem=problem))
                self._known.add(group.place)
            groups.append(group)
        return groups, lost

    def _filled(self, groups: Sequence[Carried], position: Position) -> tuple[list[Carried], Position]:
        """The groups with new ones, as many as the completions that still go on leave room for."""
        going = sum(len(group.open) for group in groups)
        missing = max(0, self.count * self.group_size - going) // self.group_size
        new = []
        for step in range(missing):
            number, place = position.drawn + step, position.sampled + step
            (problem,) = self.rollouts.task.draw(number, 1)
            prompt = self.rollouts.encode(problem)
            new.append(Carried.begin(problem, prompt, number, place, self.group_size))
            self._known.add(place)
        after = replace(position, drawn=position.drawn + missing, sampled=position.sampled + missing)
        return [*groups, *new], after

    def _sample(self, clock: Clock, groups: Sequence[Carried]) -> tuple[list[Carried], Forest | None]:
        """The groups after a window, in order, and what can be trained on, judged; each process samples its share."""
        rollouts, ranks = self.rollouts, self.rollouts.ranks
        mine = ranks.share(groups)
        forest = None
        if mine:
            seeds = [sampling_seed(self.seed, TRAINING, group.place) for group in mine]
            with clock("time/sample"):
                sampler = cast(SamplerInWindows, rollouts.sampler)
                mine = sample_window(sampler, mine, rollouts.params, seeds, self.window, self.version)
            make = window_tree if self.at_once else whole_tree
            ready = [group for group in mine if self.at_once or not group.open]
            if ready:
                forest = Forest.from_trees([make(group, self.version) for group in ready])
                forest = forest.with_tree(place=torch.tensor([group.place for group in ready]))
                with clock("time/judge"):
                    forest = rollouts.judge(forest)
        with clock("time/gather"):
            shares = ranks.gather((mine, forest))
        grown = sorted((group for part, _ in shares for group in part), key=lambda group: group.place)
        forests = [part for _, part in shares if part is not None]
        if not forests:
            return grown, None
        joined = Forest.join(forests) if len(forests) > 1 else forests[0]
        joined = joined.in_order(joined.tree["place"].argsort())
        return grown, with_past(joined) if self.at_once else joined


def _measures(forest: Forest, carried: Sequence[Carried]) -> dict[str, float]:
    """What goes on or waits, and how old that is which is trained on."""
    first = forest.segment["start"][forest.segment["parent"] < 0]
    ages, learnt = forest.token[AGE][first], forest.token[AGE][~forest.past]
    return {
        "window/carried": float(sum(len(group.open) for group in carried)),
        "window/waiting": float(sum(len(group.tree.segments) - len(group.open) for group in carried)),
        "window/age": float(ages.mean()),
        "window/age_max": float(ages.max()),
        "window/stale": float((learnt > 0).float().mean()),
    }


# ---------------------------------------------------------------------- in a run


def build_source(config: Config, credit: CreditFunction, rollouts: Rollouts) -> Source:
    """Where the rollouts of a run come from."""
    given, seed = config.sampler, config.train.seed
    count = config.train.problems_per_iteration
    if not given.window:
        return InStep(rollouts, seed, count, config.filter if config.filter.enabled else None)
    at_once = needs_of(credit).unfinished
    return Windowed(rollouts, seed, count, config.growth.group_size, given.window, at_once)


def check_window(config: Config, credit: CreditFunction, objective: Objective) -> None:
    """Refuse what does not go together with sampling in windows, and say what it changes.

    Raises:
        UserError: naming the option, and what to take instead.
    """
    if not config.sampler.window:
        return
    what = f"sampler.window {config.sampler.window}"
    if config.growth.name != "flat":
        raise UserError(f"{what} goes on with completions of groups; growth.name is {config.growth.name}, take flat")
    if config.filter.enabled:
        raise UserError(
            f"{what}: groups end in different iterations, and the prompt filter fills a batch at once; take "
            "--filter.enabled false (and shapers, such as drop_uniform, in its place)"
        )
    if not sampler_traits(config).goes_on:
        raise UserError(
            f"{what}: the sampler '{name_of(config.sampler)}' cannot go on with a completion in its own random "
            "numbers; take --sampler.name transformers, or --sampler.window 0"
        )
    if not needs_of(credit).unfinished:
        _check_ratio(what, config, objective)
        return
    for term in terms_of(config.credit):
        default = inspect.signature(term.function).parameters.get("bootstrap")
        if default is not None and term.options.get("bootstrap", default.default) == "zero":
            raise UserError(
                f"{what}: {term.option}.bootstrap zero takes a completion that goes on for one that has ended and is "
                f"worth nothing; take --{term.option}.bootstrap hold_last or value"
            )
    if config.shapers:
        log.info(
            "%s: completions of a group end in different iterations, and shapers see those of an iteration alone", what
        )


def _check_ratio(what: str, config: Config, objective: Objective) -> None:
    """Tokens of older weights need a ratio of the loss, or importance weights."""
    if not objective.needs.ratio and config.objective.importance == "none":
        raise UserError(
            f"{what}: groups are trained on when they have ended, with tokens of older weights, and loss "
            f"'{config.loss.name}' has no ratio to these; take --objective.importance token, or a loss with a ratio "
            "(clip)"
        )
