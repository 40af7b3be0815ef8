"""Methods against each other at equal sampled tokens, with bootstrap intervals over their seeds."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations_with_replacement

import numpy
from numpy.typing import NDArray

from stepcredit.display.runs import SEED, Method, Run, differences, methods
from stepcredit.errors import UserError, did_you_mean

Array = NDArray[numpy.float64]

TOKENS = "tokens/total"
LENGTH, ENTROPY = "completion/length", "policy/entropy"
WINDOW = 5  # iterations at both ends whose means are compared
ENUMERATED, RESAMPLES = 6, 10_000  # seeds up to which all resamples are counted; resamples drawn of more
TINY = 1e-9  # rounding, when a target is reached exactly
MUST_AGREE = ("task.", "eval.num_problems", "eval.num_samples", "sampler.max_new_tokens", "sampler.temperature")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the bounds of its 95% interval; None with one seed, which has no spread."""

    value: float
    low: float | None = None
    high: float | None = None


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
    def whole(self) -> bool:
        """Whether it is a curve: a single evaluation is a final value and nothing more."""
        return len(self.tokens) > 1

    def final(self, budget: float) -> float:
        """The value at the budget, on the straight line between neighbouring evaluations."""
        return float(numpy.interp(budget, self.tokens, self.values))

    def area(self, start: float, budget: float) -> float | None:
        """Mean over the sampled tokens from start to budget: the integral of the straight lines over their length."""
        if not self.whole or start >= budget:
            return None
        tokens = grid([self], start, budget)
        values = numpy.interp(tokens, self.tokens, self.values)
        return float(((values[1:] + values[:-1]) / 2 * numpy.diff(tokens)).sum() / (budget - start))


@dataclass(frozen=True)
class Group:
    """A method's runs that have the metric, by rising seed."""

    label: str
    curves: tuple[Curve, ...]

    @cached_property
    def seeds(self) -> list[str]:
        return [str(curve.seed) for curve in self.curves]


@dataclass(frozen=True)
class Single:
    """One run's numbers; `area` is None where it has one evaluation only."""

    name: str
    seed: object
    tokens: float
    final: float
    area: float | None


@dataclass(frozen=True)
class Row:
    """A method's numbers.

    Attributes:
        tokens: of its runs, where their last values of the metric stand: the fewest and the most.
        final: at the budget.
        area: mean over sampled tokens from the start to the budget; None where no run has a curve.
        final_difference, area_difference: to the baseline, None for the baseline itself.
        paired: the differences are of runs with the same seed.
        to_target: sampled tokens at which the mean curve of the seeds first reaches the target; None: not by then.
        best: highest value of that mean curve up to the budget; None where no run has a curve.
        efficiency: the baseline's tokens to the target over this method's.
        length, entropy: mean of the first and of the last iterations up to the budget.
    """

    label: str
    runs: tuple[Single, ...]
    tokens: tuple[float, float]
    final: Estimate
    area: Estimate | None
    final_difference: Estimate | None
    area_difference: Estimate | None
    paired: bool
    to_target: float | None
    best: float | None
    efficiency: float | None
    length: tuple[float, float] | None
    entropy: tuple[float, float] | None


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        start, budget: sampled tokens between which the curves are compared.
        ends: the run whose last value stands at the fewest tokens.
        most: tokens of the last value of the run that goes furthest.
        num_problems, num_samples: of an evaluation, where all runs have the same; None otherwise.
        warnings: why the methods may not be comparable.
        notes: what was left out, what is missing or damaged.
    """

    metric: str
    start: float
    budget: float
    ends: str
    most: float
    target: float
    rows: tuple[Row, ...]
    num_problems: int | None
    num_samples: int | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def compare(
    runs: Sequence[Run], metric: str = "eval/accuracy", at: float | None = None, target: float | None = None
) -> Comparison:
    """The methods of these runs; the first one is the baseline.

    Args:
        at: budget of sampled tokens; the largest that every run reaches when None.
        target: value of the metric; the baseline's mean at the budget when None.

    Raises:
        UserError: no run has the metric, the baseline has none, or a run has no value at the budget.
    """
    groups, notes = _groups(runs, metric)
    curves = [curve for group in groups for curve in group.curves]
    shortest = min(curves, key=lambda curve: curve.end)
    budget = shortest.end if at is None else at
    _check_budget(curves, metric, budget, at is not None)
    start = max((float(curve.tokens[0]) for curve in curves if curve.whole), default=0.0)
    baseline = groups[0]
    if target is None:
        target = sum(curve.final(budget) for curve in baseline.curves) / len(baseline.curves)
    rows = [_row(group, None if group is baseline else baseline, start, budget, target) for group in groups]
    rows = [_with_efficiency(row, rows[0].to_target) for row in rows]
    kept = [curve.run for curve in curves]
    return Comparison(
        metric=metric,
        start=start,
        budget=budget,
        ends=shortest.run.name,
        most=max(curve.end for curve in curves),
        target=target,
        rows=tuple(rows),
        num_problems=_common(kept, "eval.num_problems"),
        num_samples=_common(kept, "eval.num_samples"),
        warnings=tuple(_warnings(groups)),
        notes=tuple(notes + _remarks(runs)),
    )


# ---------------------------------------------------------------------- curves


def curve_of(run: Run, metric: str) -> Curve | None:
    """None where the run has no value of the metric. Of two values at the same tokens the later counts."""
    tokens, values = run.column(metric, TOKENS)
    found = dict(sorted(dict(zip(tokens, values, strict=True)).items()))
    if not found:
        return None
    return Curve(run, numpy.array(list(found), dtype=float), numpy.array(list(found.values()), dtype=float))


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
    above = numpy.flatnonzero(values >= target - TINY)
    if not len(above):
        return None
    right = int(above[0])
    if right == 0:
        return float(tokens[0])
    share = (target - values[right - 1]) / (values[right] - values[right - 1])
    return float(tokens[right - 1] + (tokens[right] - tokens[right - 1]) * min(share, 1.0))


def ends_of(run: Run, metric: str, budget: float) -> tuple[float, float] | None:
    """Mean of the first and of the last iterations up to the budget: five each, fewer where they would overlap."""
    places, found = run.column(metric, TOKENS)
    values = [value for place, value in zip(places, found, strict=True) if place <= budget]
    size = min(WINDOW, len(values) // 2)
    return (_mean(values[:size]), _mean(values[-size:])) if size else None


# ---------------------------------------------------------------------- intervals


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean with its 95% percentile bootstrap interval, seeds drawn with return."""
    if len(values) < 2:
        return Estimate(_mean(values))
    means, counts = resampled(values) if len(values) <= ENUMERATED else (drawn(values), None)
    return Estimate(_mean(values), *interval(means, counts))


def difference(values: Sequence[float], baseline: Sequence[float], paired: bool) -> Estimate:
    """mean(values) - mean(baseline): seeds drawn together where they are paired, of each alone otherwise."""
    if paired:
        return over_seeds([one - other for one, other in zip(values, baseline, strict=True)])
    value = _mean(values) - _mean(baseline)
    if min(len(values), len(baseline)) < 2:
        return Estimate(value)
    if max(len(values), len(baseline)) > ENUMERATED:
        return Estimate(value, *interval(drawn(values, 1) - drawn(baseline, 2)))
    (one, ones), (other, others) = resampled(values), resampled(baseline)
    return Estimate(value, *interval(numpy.subtract.outer(one, other).ravel(), numpy.outer(ones, others).ravel()))


def resampled(values: Sequence[float]) -> tuple[Array, NDArray[numpy.int64]]:
    """The means of all n^n resamples of n values, those with the same members once, and how often each occurs.

    A resample in which value i stands k_i times occurs n! / (k_1! ... k_n!) times.

    >>> resampled([0.0, 1.0])[0].tolist(), resampled([0.0, 1.0])[1].tolist()
    ([0.0, 0.5, 1.0], [1, 2, 1])
    """
    size = len(values)
    drawn = list(combinations_with_replacement(range(size), size))
    means = [_mean([values[place] for place in places]) for places in drawn]
    counts = [
        math.factorial(size) // math.prod(math.factorial(places.count(place)) for place in set(places))
        for places in drawn
    ]
    return numpy.array(means), numpy.array(counts, dtype=numpy.int64)


def drawn(values: Sequence[float], stream: int = 0) -> Array:
    """The means of random resamples, the same ones every time."""
    generator = numpy.random.default_rng(stream)
    return numpy.array(values)[generator.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)


def interval(means: Array, counts: NDArray[numpy.int64] | None = None) -> tuple[float, float]:
    """The 2.5% and the 97.5% point: the smallest mean that at least that share of the resamples does not exceed."""
    order = numpy.argsort(means)
    reached = numpy.cumsum(numpy.ones(len(means), dtype=numpy.int64) if counts is None else counts[order])
    low, high = (means[order[numpy.searchsorted(reached, share * reached[-1])]] for share in (0.025, 0.975))
    return float(low), float(high)


# ---------------------------------------------------------------------- numbers of a method


def _row(group: Group, baseline: Group | None, start: float, budget: float, target: float) -> Row:
    singles = tuple(
        Single(curve.run.name, curve.seed, curve.end, curve.final(budget), curve.area(start, budget))
        for curve in group.curves
    )
    areas = [single.area for single in singles if single.area is not None]
    paired = baseline is not None and _paired(group, baseline)
    final_difference = area_difference = None
    if baseline is not None:
        final_difference = difference(
            [single.final for single in singles], [curve.final(budget) for curve in baseline.curves], paired
        )
        others = [area for curve in baseline.curves if (area := curve.area(start, budget)) is not None]
        if areas and others:
            every = len(areas) == len(group.curves) and len(others) == len(baseline.curves)
            area_difference = difference(areas, others, paired and every)
    whole = [curve for curve in group.curves if curve.whole]
    tokens, values = mean_curve(whole, start, budget) if whole and start <= budget else (None, None)
    return Row(
        label=group.label,
        runs=singles,
        tokens=(min(single.tokens for single in singles), max(single.tokens for single in singles)),
        final=over_seeds([single.final for single in singles]),
        area=over_seeds(areas) if areas else None,
        final_difference=final_difference,
        area_difference=area_difference,
        paired=paired,
        to_target=None if tokens is None or values is None else first_reach(tokens, values, target),
        best=None if values is None else float(values.max()),
        efficiency=None,
        length=_change(group, LENGTH, budget),
        entropy=_change(group, ENTROPY, budget),
    )


def _with_efficiency(row: Row, baseline: float | None) -> Row:
    if not baseline or not row.to_target:
        return row
    return replace(row, efficiency=baseline / row.to_target)


def _paired(group: Group, baseline: Group) -> bool:
    """Both have the same seeds, each once."""
    return len(set(group.seeds)) == len(group.seeds) > 1 and group.seeds == baseline.seeds


def _change(group: Group, metric: str, budget: float) -> tuple[float, float] | None:
    found = [change for curve in group.curves if (change := ends_of(curve.run, metric, budget)) is not None]
    return (_mean([before for before, _ in found]), _mean([after for _, after in found])) if found else None


# ---------------------------------------------------------------------- what is compared, and what is not


def _groups(runs: Sequence[Run], metric: str) -> tuple[list[Group], list[str]]:
    """The methods with their curves, and notes on the runs that are left out or have a single value."""
    curves = {run.name: curve_of(run, metric) for run in runs}
    if not any(curves.values()):
        raise _no_metric(runs, metric)
    notes, before, without, short = [], [], [], []
    for run in runs:
        curve = curves[run.name]
        if curve is None:
            without.append(run.name)
        elif curve.end <= 0:
            before.append(run.name)
            curves[run.name] = None
        elif not curve.whole:
            short.append(f"{run.name} at {curve.end:,.0f} tokens")
    if without:
        notes.append(f"without {metric}, left out: {', '.join(without)}")
    if before:
        notes.append(f"{metric} from before training alone, left out: {', '.join(before)}")
    if short:
        notes.append(f"one evaluation only, which stands for the final value, no curve: {', '.join(short)}")
    groups = []
    for number, method in enumerate(methods(runs)):
        found = [curve for run in method.runs if (curve := curves[run.name]) is not None]
        if not found and number == 0:
            raise UserError(
                f"the baseline {method.label} ({_names(method)}) has no {metric} after training began; name a run of "
                "another method first, or take another --metric"
            )
        if found:
            groups.append(Group(method.label, tuple(sorted(found, key=_order))))
            notes += _twice(groups[-1])
    return groups, notes


def _order(curve: Curve) -> tuple[bool, int, str, str]:
    """By seed, runs with the same seed by name."""
    number = curve.seed if isinstance(curve.seed, int) else None
    return number is None, number or 0, str(curve.seed), curve.run.name


def _twice(group: Group) -> list[str]:
    again = sorted({seed for seed in group.seeds if group.seeds.count(seed) > 1 and seed != "None"})
    text = (
        f"{group.label}: several runs of seed {', '.join(again)}, which are not independent; intervals are too narrow"
    )
    return [text] if again else []


def _no_metric(runs: Sequence[Run], metric: str) -> UserError:
    known = {name for run in runs for row in run.rows for name in row if "/" in name and run.column(name, TOKENS)[0]}
    if not known:
        return UserError(f"no metrics in {', '.join(run.name for run in runs)}; {_first_remark(runs)}")
    return UserError(f"--metric: no run has '{metric}'; {did_you_mean(metric, known)}")


def _first_remark(runs: Sequence[Run]) -> str:
    found = [remark for run in runs for remark in run.remarks if "metrics.jsonl" in remark]
    return found[0] if found else "the rows of metrics.jsonl have no tokens/total"


def _check_budget(curves: Sequence[Curve], metric: str, budget: float, given: bool) -> None:
    what = "--at" if given else "the budget"
    shortest = min(curves, key=lambda curve: curve.end)
    if budget > shortest.end:
        raise UserError(
            f"--at: {budget:,.0f} sampled tokens are beyond the end of {shortest.run.name}, whose last {metric} is at "
            f"{shortest.end:,.0f}; give at most that, or leave the run out"
        )
    latest = max(curves, key=lambda curve: float(curve.tokens[0]) if curve.whole else 0.0)
    if latest.whole and budget < latest.tokens[0]:
        raise UserError(
            f"{what}: {budget:,.0f} sampled tokens are before the first {metric} of {latest.run.name}, at "
            f"{latest.tokens[0]:,.0f}; " + ("give more" if given else f"leave it out, or {shortest.run.name}")
        )


def _warnings(groups: Sequence[Group]) -> list[str]:
    """Options that make the numbers of different methods incomparable, with their values."""
    runs = [(group.label, curve.run) for group in groups for curve in group.curves if curve.run.config]
    found = []
    for name in differences([run for _, run in runs]):
        if name != "model" and not name.startswith(MUST_AGREE):
            continue
        having: dict[str, dict[str, None]] = {}
        for label, run in runs:
            value = run.config.get(name)
            having.setdefault(value if isinstance(value, str) else json.dumps(value), {})[label] = None
        found.append(f"{name} ({'; '.join(f'{value}: {_some(labels)}' for value, labels in having.items())})")
    return [f"not comparable, the methods differ in {', '.join(found)}"] if found else []


def _remarks(runs: Sequence[Run]) -> list[str]:
    """The remarks on the runs, each once with the runs that it is about."""
    about: dict[str, list[str]] = {}
    for run in runs:
        for remark in run.remarks:
            about.setdefault(remark, []).append(run.name)
    return [f"{_some(names)}: {remark}" for remark, names in about.items()]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _names(method: Method) -> str:
    return _some(run.name for run in method.runs)


def _common(runs: Sequence[Run], option: str) -> int | None:
    found = {run.config.get(option) for run in runs}
    value = found.pop() if len(found) == 1 else None
    return value if isinstance(value, int) else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
