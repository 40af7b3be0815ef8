"""Shapers and estimators of an iteration in their order, before the credit."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from stepcredit.estimators.base import Estimator
from stepcredit.estimators.table import Observers
from stepcredit.forest import Forest
from stepcredit.shaping.base import RAW, Shaper, fresh_states, judged_leaves
from stepcredit.shaping.choose import with_raw_rewards

log = logging.getLogger("stepcredit")

States = list[dict[str, float]]


class Observed(NamedTuple):
    """
    Attributes:
        states: of the shapers, for the next iteration.
        metrics: of shapers and estimators.
    """

    forest: Forest
    states: States
    metrics: dict[str, float]


def observe(
    forest: Forest,
    shapers: Sequence[Shaper],
    states: Sequence[Mapping[str, float]],
    estimators: Mapping[str, Estimator],
    observers: Observers,
) -> Observed:
    """Shapers in their order, each behind the estimators of the columns that it reads; then the other estimators.

    An estimator that no shaper needs sees shaped rewards and masks. States are those of before the batch; the caller
    takes the new ones when the iteration has begun, so that one that is sampled again does not count twice.
    """
    metrics: dict[str, float] = {}
    waiting = dict(estimators)
    after: States = []

    def run(names: Sequence[str]) -> None:
        nonlocal forest
        for name in names:
            estimator = waiting.pop(name, None)
            if estimator is not None:
                forest = estimator.observe(forest)
                metrics.update(estimator.metrics)

    if shapers:
        forest = with_raw_rewards(forest)
    for shaper, state in zip(shapers, states, strict=True):
        run(observers.before(shaper.needs.columns))
        shaped = shaper(forest, state)
        forest = shaped.forest
        after.append(dict(shaped.state))
        metrics.update(shaped.metrics)
    if shapers and not torch.equal(forest.segment["reward"], forest.segment[RAW]):
        raw = forest.segment[RAW][judged_leaves(forest)]
        metrics["reward/raw"] = float(raw.mean()) if len(raw) else 0.0
    run(list(waiting))
    return Observed(forest, after, metrics)


def shaper_state(shapers: Sequence[Shaper], states: States) -> list[dict[str, Any]]:
    """For a checkpoint: the shapers that have a state."""
    pairs = zip(shapers, states, strict=True)
    return [{"name": shaper.name, "state": state} for shaper, state in pairs if shaper.needs.state]


def restored_states(shapers: Sequence[Shaper], saved: Sequence[Mapping[str, Any]]) -> States:
    """The inverse of `shaper_state`; a shaper that the run did not have yet starts anew, and the log says so."""
    left = list(saved)
    states = fresh_states(shapers)
    for state, shaper in zip(states, shapers, strict=True):
        if not shaper.needs.state:
            continue
        mine = next((each for each in left if each["name"] == shaper.name), None)
        if mine is None:
            log.warning("--resume: the run had no shaper '%s' before; its state begins empty", shaper.name)
        else:
            left.remove(mine)
            state.update(mine["state"])
    return states
