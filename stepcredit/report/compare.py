"""Methods against each other at equal sampled tokens, with bootstrap intervals over their seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stepcredit.display.runs import Run
from stepcredit.report.bootstrap import Estimate, difference, mean, over_seeds
from stepcredit.report.comparable import (
    MethodCurves,
    check_budget,
    common_option,
    curves_by_method,
    remarks_on,
    warnings,
)
from stepcredit.report.curves import curve_of, first_reach, mean_curve, start_and_end

LENGTH, ENTROPY = "completion/length", "policy/entropy"


@dataclass(frozen=True)
class RunNumbers:
    """One run's numbers; `area` is None where it has one evaluation only."""

    name: str
    seed: object
    tokens: float
    final: float
    area: float | None


@dataclass(frozen=True)
class MethodNumbers:
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
    runs: tuple[RunNumbers, ...]
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
class SourceNumbers:
    """The metric at the budget on the problems of one source, for each method; None where it has none."""

    source: str
    finals: tuple[Estimate | None, ...]


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        by_source: where runs report the metric for sources of mixed data.
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
    rows: tuple[MethodNumbers, ...]
    num_problems: int | None
    num_samples: int | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    by_source: tuple[SourceNumbers, ...] = ()


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
    methods, notes = curves_by_method(runs, metric)
    curves = [curve for method in methods for curve in method.curves]
    shortest = min(curves, key=lambda curve: curve.end)
    budget = shortest.end if at is None else at
    check_budget(curves, metric, budget, at is not None)
    start = max((float(curve.tokens[0]) for curve in curves if curve.is_line), default=0.0)
    baseline, *others = methods
    if target is None:
        target = mean([curve.final(budget) for curve in baseline.curves])
    rows = [_numbers(baseline, None, start, budget, target)]
    rows += [_numbers(method, baseline, start, budget, target) for method in others]
    return Comparison(
        metric=metric,
        start=start,
        budget=budget,
        ends=shortest.run.name,
        most=max(curve.end for curve in curves),
        target=target,
        rows=tuple(_with_efficiency(row, rows[0].to_target) for row in rows),
        num_problems=common_option(curves, "eval.num_problems"),
        num_samples=common_option(curves, "eval.num_samples"),
        warnings=tuple(warnings(methods)),
        notes=tuple(notes + remarks_on(runs)),
        by_source=tuple(_by_source(methods, metric, budget)),
    )


def _by_source(methods: Sequence[MethodCurves], metric: str, budget: float) -> list[SourceNumbers]:
    runs = [[curve.run for curve in method.curves] for method in methods]
    names = dict.fromkeys(name for of_method in runs for run in of_method for row in run.rows for name in row)
    numbers = []
    for name in (name for name in names if name.startswith(f"{metric}/")):
        finals = []
        for of_method in runs:
            curves = [curve for run in of_method if (curve := curve_of(run, name)) is not None]
            finals.append(over_seeds([curve.final(budget) for curve in curves]) if curves else None)
        numbers.append(SourceNumbers(name.removeprefix(f"{metric}/"), tuple(finals)))
    return numbers


def _numbers(
    method: MethodCurves, baseline: MethodCurves | None, start: float, budget: float, target: float
) -> MethodNumbers:
    runs = tuple(
        RunNumbers(curve.run.name, curve.seed, curve.end, curve.final(budget), curve.area(start, budget))
        for curve in method.curves
    )
    areas = [run.area for run in runs if run.area is not None]
    final_difference = area_difference = None
    if baseline is not None:
        final_difference, area_difference = _differences(method, baseline, start, budget)
    to_target, best = _target_and_best(method, start, budget, target)
    return MethodNumbers(
        label=method.label,
        runs=runs,
        tokens=(min(run.tokens for run in runs), max(run.tokens for run in runs)),
        final=over_seeds([run.final for run in runs]),
        area=over_seeds(areas) if areas else None,
        final_difference=final_difference,
        area_difference=area_difference,
        paired=baseline is not None and _is_paired(method, baseline),
        to_target=to_target,
        best=best,
        efficiency=None,
        length=_change(method, LENGTH, budget),
        entropy=_change(method, ENTROPY, budget),
    )


def _differences(
    method: MethodCurves, baseline: MethodCurves, start: float, budget: float
) -> tuple[Estimate, Estimate | None]:
    """Of the final values and of the areas; None where one of the methods has no curve."""
    paired = _is_paired(method, baseline)
    finals, other_finals = ([curve.final(budget) for curve in each.curves] for each in (method, baseline))
    areas, other_areas = (
        [area for curve in each.curves if (area := curve.area(start, budget)) is not None]
        for each in (method, baseline)
    )
    area_difference = None
    if areas and other_areas:
        complete = len(areas) == len(method.curves) and len(other_areas) == len(baseline.curves)
        area_difference = difference(areas, other_areas, paired and complete)
    return difference(finals, other_finals, paired), area_difference


def _target_and_best(
    method: MethodCurves, start: float, budget: float, target: float
) -> tuple[float | None, float | None]:
    """Where the mean curve first reaches the target, and its highest value."""
    lines = [curve for curve in method.curves if curve.is_line]
    if not lines or start > budget:
        return None, None
    tokens, values = mean_curve(lines, start, budget)
    return first_reach(tokens, values, target), float(values.max())


def _with_efficiency(row: MethodNumbers, baseline: float | None) -> MethodNumbers:
    if not baseline or not row.to_target:
        return row
    return replace(row, efficiency=baseline / row.to_target)


def _is_paired(method: MethodCurves, baseline: MethodCurves) -> bool:
    """Both have the same seeds, each once."""
    return len(set(method.seeds)) == len(method.seeds) > 1 and method.seeds == baseline.seeds


def _change(method: MethodCurves, metric: str, budget: float) -> tuple[float, float] | None:
    """Mean over the runs of a metric at their start and at their end."""
    pairs = [pair for curve in method.curves if (pair := start_and_end(curve.run, metric, budget)) is not None]
    return (mean([start for start, _ in pairs]), mean([end for _, end in pairs])) if pairs else None
