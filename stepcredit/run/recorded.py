"""Evaluation of runs whose completions come from the data: the loss on held-out rows, and of pairs the order."""

import time
from collections.abc import Callable, Iterable, Sequence

from stepcredit.estimators.base import Estimator
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem
from stepcredit.growth.rollouts import Rollouts
from stepcredit.learn.update import PolicyUpdate

PAIR = "pair/"


def held_out_loss(
    rollouts: Rollouts,
    problems: Sequence[Problem],
    estimators: Iterable[Estimator],
    assign: Callable[[Forest], Forest],
    update: PolicyUpdate,
) -> dict[str, float]:
    """`eval/loss`, and of pairs `eval/accuracy`, `eval/margin` and log-ratios; nothing without rows.

    Args:
        estimators: add what the loss reads; those that learn are left out.
        assign: the credit, which says which side is the better one.
        update: has the policy and the objective.
    """
    started = time.monotonic()
    if not problems:
        return {}
    mine = rollouts.ranks.share(list(problems))
    own = rollouts.grow(rollouts.sampler, mine, rollouts.encode, rollouts.params, [0] * len(mine)) if mine else None
    forest = Forest.interleave([part for part in rollouts.ranks.gather(own) if part is not None])
    for estimator in estimators:
        if estimator.trained is None:
            forest = estimator.observe(forest)
    measured = update.measure(assign(forest))
    pairs = {name.removeprefix(PAIR): value for name, value in measured.items() if name.startswith(PAIR)}
    metrics = {"loss": measured["optim/loss"]} | pairs
    return {f"eval/{name}": value for name, value in metrics.items()} | {"time/eval": time.monotonic() - started}


def score_of(metrics: dict[str, float]) -> float | None:
    """By which a checkpoint is the best: held-out accuracy, else the lowest loss; None without an evaluation."""
    loss = metrics.get("eval/loss")
    return metrics.get("eval/accuracy", None if loss is None else -loss)
