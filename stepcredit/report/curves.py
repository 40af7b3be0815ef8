"""Curves of a metric over sampled tokens: at a budget, their area, their mean, and where they reach a target."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from stepcredit.display.runs import SEED, Run

Array = NDArray[numpy.float64]

TOKENS = "tokens/total"
WINDOW = 5  # iterations at both ends whose means are compared
ROUNDING = 1e-9  # of a target that is reached exactly


@dataclass(frozen=True)
class Curve:
    """The metric of one run over its sampled tokens, which rise strictly.

    Attributes:
        tokens, values: [evaluations], at least one.
    """

    run: Run
    tokens: Array
    values: Array

    @property
    def end(self) -> float:
        return float(self.tokens[-1])

    @property
    def seed(self) -> object:
        return self.run.config.get(SEED)

    @property
    def is_line(self) -> bool:
        """Whether there is a line: a single evaluation is a final value and nothing more."""
        return len(self.tokens) > 1

    def final(self, budget: float) -> float:
        """The value at the budget, on the straight line between neighbouring evaluations."""
        return float(numpy.interp(budget, self.tokens, self.values))

    def area(self, start: float, budget: float) -> float | None:
        """Mean over the sampled tokens from start to budget: the integral of the straight lines over their length."""
        if not self.is_line or start >= budget:
            return None
        tokens = grid([self], start, budget)
        values = numpy.interp(tokens, self.tokens, self.values)
        return float(((values[1:] + values[:-1]) / 2 * numpy.diff(tokens)).sum() / (budget - start))


def curve_of(run: Run, metric: str) -> Curve | None:
    """None where the run has no value of the metric. Of two values at the same tokens the later counts."""
    tokens, values = run.column(metric, TOKENS)
    points = dict(sorted(dict(zip(tokens, values, strict=True)).items()))
    if not points:
        return None
    return Curve(run, numpy.array(list(points), dtype=float), numpy.array(list(points.values()), dtype=float))


def grid(curves: Sequence[Curve], start: float, budget: float) -> Array:
    """Start, budget, and every place between them where one of the curves has a value."""
    inside = [curve.tokens[(curve.tokens > start) & (curve.tokens < budget)] for curve in curves]
    return numpy.unique(numpy.concatenate([numpy.array([start, budget]), *inside]))


def mean_curve(curves: Sequence[Curve], start: float, budget: float) -> tuple[Array, Array]:
    """Tokens and the mean of the curves there, exact: between these places all of them are straight."""
    tokens = grid(curves, start, budget)
    return tokens, numpy.mean([numpy.interp(tokens, curve.tokens, curve.values) for curve in curves], axis=0)


def first_reach(tokens: Array, values: Array, target: float) -> float | None:
    """Tokens at which straight lines between the values are first at the target or above; None where they never are.

    In the first stretch (x0, y0) to (x1, y1) with y0 < target <= y1: x0 + (x1 - x0) (target - y0) / (y1 - y0). A curve
    that begins at the target or above has reached it with its first value.
    """
    above = numpy.flatnonzero(values >= target - ROUNDING)
    if not len(above):
        return None
    right = int(above[0])
    if right == 0:
        return float(tokens[0])
    share = (target - values[right - 1]) / (values[right] - values[right - 1])
    return float(tokens[right - 1] + (tokens[right] - tokens[right - 1]) * min(share, 1.0))


def start_and_end(run: Run, metric: str, budget: float) -> tuple[float, float] | None:
    """Mean of the first and of the last iterations up to the budget: five each, fewer where they would overlap."""
    places, values = run.column(metric, TOKENS)
    inside = [value for place, value in zip(places, values, strict=True) if place <= budget]
    size = min(WINDOW, len(inside) // 2)
    return (sum(inside[:size]) / size, sum(inside[-size:]) / size) if size else None
