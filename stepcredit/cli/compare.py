"""`stepcredit compare`: methods against each other at equal sampled tokens, on screen, as Markdown and as JSON."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepcredit.cli.arguments import output_file, read_number, split
from stepcredit.errors import UserError

if TYPE_CHECKING:
    from stepcredit.report.bootstrap import Estimate
    from stepcredit.report.compare import Comparison, MethodNumbers

HELP = """\
usage: stepcredit compare RUN [RUN ...] [--metric NAME] [--at TOKENS] [--target X] [--markdown FILE] [--json FILE]

Methods at equal sampled tokens: final value, mean over the tokens (area under the curve), tokens to a target, changes
of length and entropy, and of mixed data the final value by source; with 95% bootstrap intervals over seeds. RUN is a
run folder or a folder of run folders. Runs that differ in nothing but their seed are one method; the first method is
the baseline of the others.

  --metric NAME         of metrics.jsonl, eval/accuracy when not given; docs/metrics.md lists them
  --at TOKENS           sampled tokens at which the runs are compared; what all of them reach when not given
  --target X            value to reach, as in metrics.jsonl (0.45 is 45%); the baseline's final mean when not given
  --markdown FILE       write the tables as Markdown; - for the screen, instead of the usual tables
  --json FILE           write the numbers of methods and runs as JSON

docs/compare.md defines every number.

Examples
  stepcredit compare runs
  stepcredit compare runs/grpo-1 runs --metric eval/accuracy_greedy --at 200000
  stepcredit compare runs/grpo-1 runs/grpo-2 runs/spro-1 runs/spro-2 --target 0.45 --markdown compare.md"""

OPTIONS = {
    "metric": "eval/accuracy",
    "at": "200000",
    "target": "0.45",
    "markdown": "compare.md",
    "json": "compare.json",
}
WIDTH = 120  # of what goes into a file or a pipe
Grid = list[list[str]]  # rows of cells, the first one is the header


def main(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        print(HELP)
        return 0
    folders, own = split(words, OPTIONS, "compare")
    if own.get("json") == "-":
        raise UserError("--json: name a file; only --markdown takes -")
    if not folders:
        raise UserError("compare: name run folders, for example 'stepcredit compare runs/grpo-1 runs/spro-1'")
    at = read_number(own, "at", above=0) if "at" in own else None
    target = read_number(own, "target") if "target" in own else None
    on_screen = own.get("markdown") == "-"
    markdown, out = None if on_screen else output_file(own, "markdown"), output_file(own, "json")

    from stepcredit.display.runs import read_runs
    from stepcredit.report.compare import compare

    comparison = compare(read_runs(folders), own.get("metric", OPTIONS["metric"]), at, target)
    if on_screen:
        print(as_markdown(comparison), end="")
    else:
        _show(comparison)
    if markdown is not None:
        markdown.write_text(as_markdown(comparison), encoding="utf-8")
    if out is not None:
        out.write_text(json.dumps(asdict(comparison), indent=1) + "\n", encoding="utf-8")
    written = [str(path) for path in (markdown, out) if path is not None]
    if written:
        print(f"written: {', '.join(written)}", file=sys.stderr if on_screen else sys.stdout)
    return 0


# ---------------------------------------------------------------------- what is shown


def _show(comparison: "Comparison") -> None:
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    console.print(Text(_title(comparison)), style="bold", soft_wrap=True)
    for grid in _grids(comparison):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for place, name in enumerate(grid[0]):
            table.add_column(Text(name), justify="right" if place else "left", overflow="fold")
        for row in grid[1:]:
            table.add_row(*map(Text, row))
        console.print()
        console.print(table)
    console.print()
    for line in comparison.warnings:
        console.print(Text(f"warning: {line}"), style="yellow", soft_wrap=True)
    for line in [*_small_print(comparison), *(f"note: {note}" for note in comparison.notes)]:
        console.print(Text(line), soft_wrap=True)


def as_markdown(comparison: "Comparison") -> str:
    """Title, tables, then warnings, what the numbers mean, and notes as a list."""
    parts = [f"**{_title(comparison)}**"]
    for header, *rows in _grids(comparison):
        rule = ["---", *["---:"] * (len(header) - 1)]
        parts.append("\n".join(f"| {' | '.join(map(_cell, row))} |" for row in (header, rule, *rows)))
    lines = [f"**Warning:** {line}" for line in comparison.warnings] + _small_print(comparison)
    lines += [f"Note: {note}" for note in comparison.notes]
    parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def _title(comparison: "Comparison") -> str:
    count = f"{len(comparison.rows)} method" + ("s" if len(comparison.rows) > 1 else "")
    return f"{comparison.metric} of {count} at {comparison.budget:,.0f} sampled tokens"


def _grids(comparison: "Comparison") -> list[Grid]:
    """Two tables with a row for each method: the metric, and what it took; of mixed data one with a row a source."""
    unit = ", %" if _is_share(comparison) else ""
    values = [["method", "seeds", f"final{unit}", "difference", f"mean over tokens{unit}", "difference"]]
    target = f"tokens to {_value(comparison, comparison.target)}{'%' if unit else ''}"
    efforts = [["method", "tokens of the runs", target, "efficiency", "length", "entropy"]]
    for row in comparison.rows:
        values.append([
            row.label,
            str(len(row.runs)),
            _estimate(comparison, row.final),
            _estimate(comparison, row.final_difference, "+"),
            _estimate(comparison, row.area),
            _estimate(comparison, row.area_difference, "+"),
        ])  # fmt: skip
        efforts.append([
            row.label,
            _range(row.tokens),
            _reached(comparison, row),
            "-" if row.efficiency is None else f"{row.efficiency:.2f}x",
            _change(row.length, ".1f"),
            _change(row.entropy, ".3f"),
        ])  # fmt: skip
    return [values, efforts, *_sources_grid(comparison, unit)]


def _sources_grid(comparison: "Comparison", unit: str) -> list[Grid]:
    """The metric at the budget on each source, methods side by side; no table where the data are of one source."""
    if not comparison.by_source:
        return []
    header = [f"final by source{unit}", *(row.label for row in comparison.rows)]
    rows = [[each.source, *(_estimate(comparison, final) for final in each.finals)] for each in comparison.by_source]
    return [[header, *rows]]


def _small_print(comparison: "Comparison") -> list[str]:
    return [
        _budget(comparison),
        *_intervals(comparison),
        f"mean over tokens: area under the curve from {comparison.start:,.0f} tokens to the budget, divided by the "
        "tokens between; straight lines between the values",
        *_target(comparison),
        "length, entropy: mean of the first five iterations -> of the last five up to the budget",
        *_evaluations(comparison),
    ]


def _budget(comparison: "Comparison") -> str:
    budget = f"budget: {comparison.budget:,.0f} sampled tokens in each run"
    if comparison.budget < min(row.tokens[0] for row in comparison.rows):
        return f"{budget}, as given; the runs go on to {comparison.most:,.0f}"
    more = f"; the longest goes on to {comparison.most:,.0f}" if comparison.most > comparison.budget else ""
    return f"{budget}, where {comparison.ends} has its last value{more}"


def _intervals(comparison: "Comparison") -> list[str]:
    lines = []
    if any(len(row.runs) > 1 for row in comparison.rows):
        lines.append(
            "[low, high]: 95% percentile bootstrap over seeds; with two or three seeds a mean's goes from the lowest "
            "to the highest value, and covers less than 95%"
        )
    single = [row.label for row in comparison.rows if len(row.runs) == 1]
    if single:
        lines.append(f"one seed has no spread, so there is no interval: {', '.join(single)}")
    differences = [(row, row.final_difference) for row in comparison.rows[1:]]
    others = [row for row, difference in differences if difference is not None and difference.low is not None]
    paired = [row.label for row in others if row.paired]
    unpaired = [row.label for row in others if not row.paired]
    base = comparison.rows[0].label
    if paired:
        lines.append(f"difference to {base}, seeds drawn in pairs as they are the same: {', '.join(paired)}")
    if unpaired:
        lines.append(f"difference to {base}, seeds of both drawn independently: {', '.join(unpaired)}")
    return lines


def _target(comparison: "Comparison") -> list[str]:
    baseline = comparison.rows[0]
    lines = [
        "tokens to the target: where the mean curve of the seeds is first there or above, even if it falls again, up "
        f"to the budget; efficiency: the tokens of {baseline.label} over the method's; both without interval"
    ]
    if baseline.to_target == 0:
        lines.append(f"{baseline.label} has reached the target before training, so there is no efficiency")
    elif baseline.to_target is None:
        lines.append(f"{baseline.label} does not reach the target, so there is no efficiency")
    return lines


def _evaluations(comparison: "Comparison") -> list[str]:
    """What the spread over seeds says, and does not say, about the noise of evaluating on n problems."""
    if not comparison.metric.startswith("eval/"):
        return []
    if comparison.num_problems is None:
        return ["the evaluations are not of the same number of problems, or it is not known"]
    samples = f", {comparison.num_samples} samples each" if (comparison.num_samples or 1) > 1 else ""
    line = f"an evaluation is of {comparison.num_problems} problems{samples}"
    if not comparison.warnings:
        line += (
            ", the same problems and sampling seeds in every run: the interval has what differs between runs, not "
            "which problems were taken"
        )
    rate = comparison.rows[0].final.value
    if _is_share(comparison) and 0 <= rate <= 1 and comparison.num_problems > 0:
        error = 100 * math.sqrt(rate * (1 - rate) / comparison.num_problems)
        line += (
            f"; for {100 * rate:.1f}% on newly drawn problems the binomial standard error is up to {error:.1f} points"
        )
    return [line]


# ---------------------------------------------------------------------- cells


def _is_share(comparison: "Comparison") -> bool:
    """Whether the metric is a share, shown in per cent."""
    return comparison.metric.startswith("eval/") and comparison.metric.split("/")[1] not in ("length", "reward")


def _value(comparison: "Comparison", value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if _is_share(comparison) else f"{value:{sign}.4g}"


def _estimate(comparison: "Comparison", estimate: "Estimate | None", sign: str = "") -> str:
    if estimate is None:
        return "-"
    value = _value(comparison, estimate.value, sign)
    if estimate.low is None or estimate.high is None:
        return f"{value} -"
    return f"{value} [{_value(comparison, estimate.low, sign)}, {_value(comparison, estimate.high, sign)}]"


def _reached(comparison: "Comparison", row: "MethodNumbers") -> str:
    if row.best is None:
        return "-"
    if row.to_target is None:
        return f"not reached, best {_value(comparison, row.best)}"
    return f"{row.to_target:,.0f}"


def _range(tokens: tuple[float, float]) -> str:
    low, high = (f"{value:,.0f}" for value in tokens)
    return low if low == high else f"{low} to {high}"


def _change(change: tuple[float, float] | None, form: str) -> str:
    return "-" if change is None else f"{change[0]:{form}} -> {change[1]:{form}}"
