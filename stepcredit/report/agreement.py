"""How well credit agrees with what steps are worth: Monte-Carlo advantages, with 95% bootstrap intervals.

The worth of a step is the change of value that it makes: the mean return of rollouts behind it less that of rollouts
before it. All numbers are over completions that are drawn anew with return, so that steps of one completion stay
together. The noise ceiling is what one half of the rollouts says of the other. Credit is compared with all of them, so
that it may be above that ceiling where halves are noisy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from stepcredit.growth.prefix_values import value_of
from stepcredit.report.bootstrap import QUANTILES

Array = NDArray[numpy.float64]

RESAMPLES = 1000
HALVES = slice(0, None, 2), slice(1, None, 2)  # of the rollouts of a prefix: every second, and the others
NOISE = 2.0  # standard errors within which an advantage is not told from 0
SAME = 1e-6  # smaller differences of credit are rounding


@dataclass(frozen=True)
class StepValues:
    """What rollouts say of the steps of a completion.

    Attributes:
        returns: of the rollouts before each step.
        inside: rewards inside each step.
        total: the outcome reward, the value after the last step.
    """

    returns: Sequence[Sequence[float]]
    inside: Sequence[float]
    total: float

    def advantages(self, part: slice = slice(None)) -> tuple[Array, Array]:
        """[steps] the change of value in each step, and its standard error; of a part of the rollouts."""
        found = numpy.array([value_of(row[part]) for row in self.returns])
        value, error = numpy.append(found[:, 0], self.total), numpy.append(found[:, 1], 0.0)
        return numpy.diff(value) + numpy.array(self.inside), numpy.hypot(error[1:], error[:-1])


@dataclass(frozen=True)
class Number:
    """A number and the bounds of its 95% interval; None where nothing was there to count."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Agreement:
    """
    Attributes:
        rank: Spearman's correlation of credit and advantage over all steps.
        rank_within: the mean over completions of the same within one; 0 where the credit is the same for all steps.
        sign: share of the steps whose advantage is beyond noise to which the credit gives the same sign.
        first_loss: share of the completions that lose value beyond noise whose lowest step is the first that does;
            equally low steps share the hit.
        chance: of `first_loss` for a step taken at random.
    """

    rank: Number
    rank_within: Number
    sign: Number
    first_loss: Number
    chance: float | None


@dataclass(frozen=True)
class Sizes:
    """Completions, their steps, steps whose advantage is beyond noise, and completions with a step that loses so."""

    completions: int
    steps: int
    beyond_noise: int
    losing: int


def sizes(measured: Sequence[StepValues]) -> Sizes:
    beyond = [_beyond(*each.advantages()) for each in measured]
    return Sizes(
        len(measured),
        sum(map(len, beyond)),
        int(sum(numpy.count_nonzero(row) for row in beyond)),
        sum(bool((row < 0).any()) for row in beyond),
    )


def agreement(measured: Sequence[StepValues], credit: Sequence[Array]) -> Agreement:
    """Of the credit that the steps of each completion are given."""
    return _agreement([each.advantages() for each in measured], credit)


def noise_ceiling(measured: Sequence[StepValues]) -> Agreement | None:
    """Of the advantages by one half of the rollouts with those by the other; None with a single rollout of a prefix."""
    if any(len(row) < 2 for each in measured for row in each.returns):
        return None
    halves = [[each.advantages(part) for part in HALVES] for each in measured]
    return _agreement([second for _, second in halves], [first for (first, _), _ in halves])


def _beyond(advantage: Array, error: Array) -> Array:
    """[steps] the sign of each advantage, 0 within noise."""
    return numpy.where(numpy.abs(advantage) > NOISE * error, numpy.sign(advantage), 0.0)


def _agreement(truth: Sequence[tuple[Array, Array]], credit: Sequence[Array]) -> Agreement:
    credit = [numpy.round(row, 6) for row in credit]
    advantages = [numpy.round(advantage, 6) for advantage, _ in truth]
    beyond = [_beyond(*row) for row in truth]
    right = [int(((numpy.sign(own) == sign) & (sign != 0)).sum()) for own, sign in zip(credit, beyond, strict=True)]
    told = [numpy.count_nonzero(sign) for sign in beyond]
    losing = [number for number, sign in enumerate(beyond) if (sign < 0).any()]
    hits = [_hit(credit[number], int((beyond[number] < 0).argmax())) for number in losing]
    within = [_spearman(own, advantage) or 0.0 for own, advantage in zip(credit, advantages, strict=True)]
    one = numpy.zeros(len(credit))
    found, has = one.copy(), one.copy()
    found[losing], has[losing] = hits, 1.0
    draws = numpy.random.default_rng(0).integers(len(credit), size=(RESAMPLES, len(credit)))
    return Agreement(
        _pooled(credit, advantages, draws),
        _share(numpy.array(within), numpy.ones(len(credit)), draws),
        _share(numpy.array(right, dtype=float), numpy.array(told, dtype=float), draws),
        _share(found, has, draws),
        float(numpy.mean([1 / len(credit[number]) for number in losing])) if losing else None,
    )


def _hit(credit: Array, first: int) -> float:
    """Whether the lowest step is this one; shared among equally low ones."""
    lowest = credit <= credit.min() + SAME
    return float(lowest[first]) / int(lowest.sum())


def _share(part: Array, whole: Array, draws: NDArray[numpy.int64]) -> Number:
    """The ratio of two sums over completions."""
    if not whole.sum():
        return Number(None)
    counted = whole[draws].sum(1)
    shares = part[draws].sum(1)[counted > 0] / counted[counted > 0]
    return Number(float(part.sum() / whole.sum()), *interval(shares))


def _pooled(credit: Sequence[Array], advantages: Sequence[Array], draws: NDArray[numpy.int64]) -> Number:
    value = _spearman(numpy.concatenate(credit), numpy.concatenate(advantages))
    if value is None:
        return Number(None)
    drawn = [
        _spearman(
            numpy.concatenate([credit[number] for number in row]),
            numpy.concatenate([advantages[number] for number in row]),
        )
        for row in draws
    ]
    return Number(value, *interval(numpy.array([each for each in drawn if each is not None])))


def interval(values: Array) -> tuple[float, float] | tuple[None, None]:
    if not len(values):
        return None, None
    low, high = numpy.quantile(values, QUANTILES)
    return float(low), float(high)


def _spearman(one: Array, other: Array) -> float | None:
    """Pearson's correlation of ranks, equal values with the mean of theirs; None where one of the two is constant."""
    first, second = _ranks(one), _ranks(other)
    first, second = first - first.mean(), second - second.mean()
    size = float(numpy.linalg.norm(first) * numpy.linalg.norm(second))
    return float(first @ second) / size if size > 0 else None


def _ranks(values: Array) -> Array:
    _, number, count = numpy.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = (numpy.cumsum(count) - (count - 1) / 2)[number]
    return ranks


def as_json(found: Agreement | None) -> Mapping[str, object] | None:
    if found is None:
        return None
    numbers = {name: getattr(found, name) for name in ("rank", "rank_within", "sign", "first_loss")}
    return {name: vars(number) for name, number in numbers.items()} | {"chance": found.chance}
