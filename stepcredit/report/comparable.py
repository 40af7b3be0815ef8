"""Which runs are compared, what was left out, and what speaks against comparing them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from stepcredit.display.runs import Method, Run, differences, methods
from stepcredit.errors import UserError, did_you_mean
from stepcredit.report.curves import TOKENS, Curve, curve_of

MUST_AGREE = ("task.", "eval.num_problems", "eval.num_samples", "sampler.max_new_tokens", "sampler.temperature")


@dataclass(frozen=True)
class MethodCurves:
    """A method's runs that have the metric, by rising seed."""

    label: str
    curves: tuple[Curve, ...]

    @cached_property
    def seeds(self) -> list[str]:
        return [str(curve.seed) for curve in self.curves]


def curves_by_method(runs: Sequence[Run], metric: str) -> tuple[list[MethodCurves], list[str]]:
    """The methods with their curves, and notes on the runs that are left out or have a single value.

    Raises:
        UserError: no run has the metric, or the baseline has none.
    """
    curves = {run.name: curve_of(run, metric) for run in runs}
    if not any(curves.values()):
        raise _no_metric(runs, metric)
    notes = _notes(curves, metric)
    curves = {name: curve for name, curve in curves.items() if curve is None or curve.end > 0}
    compared: list[MethodCurves] = []
    for number, method in enumerate(methods(runs)):
        own = [curve for run in method.runs if (curve := curves.get(run.name)) is not None]
        if not own and number == 0:
            raise UserError(
                f"the baseline {method.label} ({_run_names(method)}) has no {metric} after training began; name a run "
                "of another method first, or take another --metric"
            )
        if own:
            compared.append(MethodCurves(method.label, tuple(sorted(own, key=_by_seed))))
            notes += _repeated_seeds(compared[-1])
    return compared, notes


def _notes(curves: dict[str, Curve | None], metric: str) -> list[str]:
    without, untrained, single = [], [], []
    for name, curve in curves.items():
        if curve is None:
            without.append(name)
        elif curve.end <= 0:
            untrained.append(name)
        elif not curve.is_line:
            single.append(f"{name} at {curve.end:,.0f} tokens")
    notes = []
    if without:
        notes.append(f"without {metric}, left out: {', '.join(without)}")
    if untrained:
        notes.append(f"{metric} from before training alone, left out: {', '.join(untrained)}")
    if single:
        notes.append(f"one evaluation only, which stands for the final value, no curve: {', '.join(single)}")
    return notes


def _by_seed(curve: Curve) -> tuple[bool, int, str, str]:
    """A key for sorting: by seed, runs with the same seed by name."""
    number = curve.seed if isinstance(curve.seed, int) else None
    return number is None, number or 0, str(curve.seed), curve.run.name


def _repeated_seeds(method: MethodCurves) -> list[str]:
    seeds = sorted({seed for seed in method.seeds if method.seeds.count(seed) > 1 and seed != "None"})
    if not seeds:
        return []
    several = f"several runs of seed {', '.join(seeds)}"
    return [f"{method.label}: {several}, which are not independent; intervals are too narrow"]


def _no_metric(runs: Sequence[Run], metric: str) -> UserError:
    known = {name for run in runs for row in run.rows for name in row if "/" in name and run.column(name, TOKENS)[0]}
    if not known:
        return UserError(f"no metrics in {', '.join(run.name for run in runs)}; {_first_remark(runs)}")
    return UserError(f"--metric: no run has '{metric}'; {did_you_mean(metric, known)}")


def _first_remark(runs: Sequence[Run]) -> str:
    remarks = (remark for run in runs for remark in run.remarks if "metrics.jsonl" in remark)
    return next(remarks, "the rows of metrics.jsonl have no tokens/total")


def check_budget(curves: Sequence[Curve], metric: str, budget: float, given: bool) -> None:
    """Every run must have values before the budget and after it.

    Args:
        given: the budget is the user's.

    Raises:
        UserError: naming the run that has none.
    """
    what = "--at" if given else "the budget"
    shortest = min(curves, key=lambda curve: curve.end)
    if budget > shortest.end:
        raise UserError(
            f"--at: {budget:,.0f} sampled tokens are beyond the end of {shortest.run.name}, whose last {metric} is at "
            f"{shortest.end:,.0f}; give at most that, or leave the run out"
        )
    latest = max(curves, key=lambda curve: float(curve.tokens[0]) if curve.is_line else 0.0)
    if latest.is_line and budget < latest.tokens[0]:
        raise UserError(
            f"{what}: {budget:,.0f} sampled tokens are before the first {metric} of {latest.run.name}, at "
            f"{latest.tokens[0]:,.0f}; " + ("give more" if given else f"leave it out, or {shortest.run.name}")
        )


def warnings(compared: Sequence[MethodCurves]) -> list[str]:
    """Options that make the numbers of different methods incomparable, with their values."""
    runs = [(method.label, curve.run) for method in compared for curve in method.curves if curve.run.config]
    conflicts = []
    for name in differences([run for _, run in runs]):
        if name != "model" and not name.startswith(MUST_AGREE):
            continue
        labels_by_value: dict[str, list[str]] = {}
        for label, run in runs:
            value = run.config.get(name)
            labels = labels_by_value.setdefault(value if isinstance(value, str) else json.dumps(value), [])
            if label not in labels:
                labels.append(label)
        conflicts.append(f"{name} ({'; '.join(f'{value}: {_some(each)}' for value, each in labels_by_value.items())})")
    return [f"not comparable, the methods differ in {', '.join(conflicts)}"] if conflicts else []


def remarks_on(runs: Sequence[Run]) -> list[str]:
    """The remarks on the runs, each once with the runs that it is about."""
    names_by_remark: dict[str, list[str]] = {}
    for run in runs:
        for remark in run.remarks:
            names_by_remark.setdefault(remark, []).append(run.name)
    return [f"{_some(names)}: {remark}" for remark, names in names_by_remark.items()]


def common_option(curves: Sequence[Curve], option: str) -> int | None:
    """The value that all runs have; None where they differ."""
    values = {curve.run.config.get(option) for curve in curves}
    value = values.pop() if len(values) == 1 else None
    return value if isinstance(value, int) else None


def _run_names(method: Method) -> str:
    return _some(run.name for run in method.runs)


def _some(names: Iterable[str]) -> str:
    """The first of these names, and how many more there are."""
    ordered = list(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")
