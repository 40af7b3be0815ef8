"""Means over seeds and their differences, with 95% percentile bootstrap intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy
from numpy.typing import NDArray

Array = NDArray[numpy.float64]

MAX_ENUMERATED = 6  # seeds up to which all resamples are counted
NUM_RESAMPLES = 10_000  # drawn for more seeds
QUANTILES = (0.025, 0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the bounds of its 95% interval; None with one seed, which has no spread."""

    value: float
    low: float | None = None
    high: float | None = None


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean with its 95% percentile bootstrap interval, seeds drawn with replacement."""
    if len(values) < 2:
        return Estimate(mean(values))
    if len(values) > MAX_ENUMERATED:
        return Estimate(mean(values), *interval(random_means(values)))
    return Estimate(mean(values), *interval(*all_means(values)))


def difference(values: Sequence[float], baseline: Sequence[float], paired: bool) -> Estimate:
    """mean(values) - mean(baseline): seeds drawn together where they are paired, of each alone otherwise."""
    if paired:
        return over_seeds([value - other for value, other in zip(values, baseline, strict=True)])
    value = mean(values) - mean(baseline)
    if min(len(values), len(baseline)) < 2:
        return Estimate(value)
    if max(len(values), len(baseline)) > MAX_ENUMERATED:
        return Estimate(value, *interval(random_means(values, 1) - random_means(baseline, 2)))
    (means, counts), (other_means, other_counts) = all_means(values), all_means(baseline)
    differences = numpy.subtract.outer(means, other_means).ravel()
    return Estimate(value, *interval(differences, numpy.outer(counts, other_counts).ravel()))


def all_means(values: Sequence[float]) -> tuple[Array, NDArray[numpy.int64]]:
    """The means of all n^n resamples of n values, those with the same members once, and how often each occurs.

    A resample in which value i stands k_i times occurs n! / (k_1! ... k_n!) times.

    >>> all_means([0.0, 1.0])[0].tolist(), all_means([0.0, 1.0])[1].tolist()
    ([0.0, 0.5, 1.0], [1, 2, 1])
    """
    size = len(values)
    resamples = list(combinations_with_replacement(range(size), size))
    means = [mean([values[place] for place in places]) for places in resamples]
    counts = [
        math.factorial(size) // math.prod(math.factorial(places.count(place)) for place in set(places))
        for places in resamples
    ]
    return numpy.array(means), numpy.array(counts, dtype=numpy.int64)


def random_means(values: Sequence[float], seed: int = 0) -> Array:
    """The means of random resamples, the same ones every time."""
    generator = numpy.random.default_rng(seed)
    places = generator.integers(len(values), size=(NUM_RESAMPLES, len(values)))
    return numpy.array(values)[places].mean(axis=1)


def interval(means: Array, counts: NDArray[numpy.int64] | None = None) -> tuple[float, float]:
    """The 2.5% and the 97.5% point: the smallest mean that at least that share of the resamples does not exceed.

    Args:
        counts: resamples that have each mean; one each when None.
    """
    order = numpy.argsort(means)
    reached = numpy.cumsum(numpy.ones(len(means), dtype=numpy.int64) if counts is None else counts[order])
    low, high = (means[order[numpy.searchsorted(reached, share * reached[-1])]] for share in QUANTILES)
    return float(low), float(high)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
