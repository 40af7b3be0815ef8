"""One HTML file of runs: everything in it, nothing fetched, opens from disk.

The page holds an index (runs, metrics, what was saved) and one chunk for each saved iteration, each compressed; the
browser unpacks a chunk when it is looked at. `assets/` is the page's own code, plotly draws the curves.
"""

import base64
import gzip
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy

from stepcredit import __version__
from stepcredit.config import CreditConfig
from stepcredit.display.rollouts import COLUMNS, SavedGroup, read_groups
from stepcredit.display.runs import Method, Run, differences, methods
from stepcredit.display.token_texts import token_texts_of, visible
from stepcredit.errors import UserError
from stepcredit.report.credits import CreditComparison, compare_credits, label_of_run
from stepcredit.run.health import replay

SCRIPTS = ("chunk.js", "dom.js", "curves.js", "rollouts.js", "trees.js", "credits.js", "setup.js", "app.js")
FINISHES = {"stop": 0, "length": 1, "cut": 2, "open": 3}
MIB = 2**20

PANELS = {  # section: metric -> title and unit
    "Outcome": {
        "eval/accuracy": ("Held-out accuracy, sampled", "%"),
        "eval/accuracy_greedy": ("Held-out accuracy, greedy", "%"),
        "eval/loss": ("Held-out loss", ""),
        "reward/mean": ("Mean reward", ""),
        "pair/accuracy": ("Pairs in the right order", "%"),
        "pair/margin": ("Margin of the pairs", ""),
    },
    "Policy": {
        "completion/length": ("Completion length", "tokens"),
        "completion/truncated": ("Truncated completions", "%"),
        "policy/entropy": ("Entropy", "nats a token"),
        "policy/kl_ref": ("KL to the reference", "nats a token"),
        "policy/kl_ref_update": ("KL to the reference, in the update", "nats a token"),
        "policy/kl_old": ("KL of the update to the samples", "nats a token"),
        "policy/clip_fraction": ("Clipped tokens", "%"),
        "optim/grad_norm": ("Gradient norm", ""),
    },
    "Credit": {
        "credit/std": ("Placement of the advantages", ""),
        "credit/outcome_rms": ("Size of the outcome part", "rms"),
        "credit/process_rms": ("Size of the process part", "rms"),
        "group/uniform": ("Groups without outcome credit", "%"),
        "group/kept": ("Sibling groups kept", "%"),
        "prm/auc": ("Reward model: right above wrong", "AUC"),
        "prm/loss": ("Reward model: cross-entropy", "nats"),
        "critic/explained_variance": ("Critic: share of the returns' variance explained", ""),
        "critic/auc": ("Critic: right above wrong", "AUC"),
        "filter/passed": ("Problems that passed the filter", "%"),
    },
    "Time and work": {
        "time/iteration": ("Iteration", "s"),
        "time/sample": ("Sampling", "s"),
        "time/judge": ("Judging", "s"),
        "time/observe": ("Other models, credit", "s"),
        "time/learn": ("Update", "s"),
        "tokens/per_second": ("Sampled tokens a second", ""),
        "tokens/sharing": ("Positions saved by sharing", "times"),
    },
}
BY_SOURCE = (  # what metrics of sources begin with, title and unit
    ("eval/accuracy/", "held-out accuracy, sampled", "%"),
    ("reward/mean/", "mean reward", ""),
    ("completion/length/", "completion length", "tokens"),
)
PHASES = ("time/sample", "time/judge", "time/gather", "time/observe", "time/learn")


@dataclass(frozen=True)
class WrittenPage:
    """The size of the file in bytes, and what was left out of the page."""

    size: int
    remarks: list[str]


def write_page(
    runs: Sequence[Run],
    out: Path,
    credits: Sequence[str | CreditConfig] = (),
    max_mib: float = 10.0,
    on_progress: Callable[[str], None] = lambda what: None,
) -> WrittenPage:
    """Write the report of these runs.

    Args:
        credits: credit functions to compare on the saved rollouts; empty: all that fit.
        max_mib: for the saved rollouts; the first, the last and evenly spread iterations are taken until it is full.

    Raises:
        UserError: a credit function does not fit, or a package is not installed.
    """
    plotly, environment = _libraries()
    remarks: list[str] = []
    chunks: list[str] = []
    index = _index(methods(runs), runs)
    entries = dict(zip((run.name for run in runs), index["runs"], strict=True))
    room = max_mib * MIB
    token_texts = {run.name: token_texts_of(run) for run in runs if run.files}
    for run, iteration in _order(runs):
        on_progress(f"{run.name}, iteration {iteration}")
        entry = entries[run.name]
        try:
            groups = read_groups(run, iteration, token_texts[run.name])
        except UserError as error:
            entry["remarks"].append(f"left out: {error}")
            continue
        count, chunk = _fit(run, groups, credits, room)
        if chunk is None:
            entry["left_out"] += 1
            continue
        room -= len(chunk)
        entry["rollouts"].append({"iteration": iteration, "chunk": len(chunks), "groups": count, "of": len(groups)})
        chunks.append(chunk)
    for entry in index["runs"]:
        entry["rollouts"].sort(key=lambda saved: saved["iteration"])
        if entry["left_out"]:
            text = f"{entry['left_out']} saved iterations are left out to keep the page small (--max-mb)"
            entry["remarks"].append(text)
            remarks.append(f"{entry['name']}: {text}")
    page = environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs[:3]) + (" ..." if len(runs) > 3 else ""),
        version=__version__,
        style=_asset("page.css"),
        script="\n".join(_asset(name) for name in SCRIPTS),
        index=_packed(json.dumps(index, allow_nan=False, separators=(",", ":")).encode()),
        chunks=chunks,
        plotly=_packed(plotly.encode()),
    )
    partial = out.with_name(f".part-{out.name}")
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)
    return WrittenPage(out.stat().st_size, remarks)


def _libraries() -> tuple[str, Any]:
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError(f"the report needs {error.name}: pip install 'stepcredit[report]'") from error
    return get_plotlyjs(), Environment(loader=FunctionLoader(_asset), autoescape=True, undefined=StrictUndefined)


def _asset(name: str) -> str:
    return (resources.files("stepcredit.report") / "assets" / name).read_text(encoding="utf-8")


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode("ascii")


# ---------------------------------------------------------------------- the index


def _index(all_methods: Sequence[Method], runs: Sequence[Run]) -> dict[str, Any]:
    number = {run.name: place for place, method in enumerate(all_methods) for run in method.runs}
    return {
        "version": __version__,
        "columns": COLUMNS,
        "panels": [
            {"section": section, "metric": metric, "title": title, "unit": unit}
            for section, panels in PANELS.items()
            for metric, (title, unit) in panels.items()
        ]
        + _source_panels(runs),
        "phases": PHASES,
        "methods": [visible(method.label) for method in all_methods],
        "differences": differences(runs) if len(runs) > 1 else [],
        "runs": [_entry(run, number[run.name]) for run in runs],
    }


def _source_panels(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Panels for the sources of mixed data: a panel for each metric of each source that runs report."""
    names = dict.fromkeys(name for run in runs for row in run.rows for name in row)
    return [
        {"section": "By source", "metric": name, "title": f"{visible(name.removeprefix(start))}: {what}", "unit": unit}
        for start, what, unit in BY_SOURCE
        for name in names
        if name.startswith(start)
    ]


def _entry(run: Run, method: int) -> dict[str, Any]:
    names = dict.fromkeys(name for row in run.rows for name in row)
    return {
        "name": visible(run.name),
        "method": method,
        "algorithm": visible(run.algorithm),
        "credit": visible(label_of_run(run)),
        "seed": run.config.get("train.seed"),
        "config": [[visible(name), visible(_text(value))] for name, value in run.config.items()],
        "versions": run.versions,
        "remarks": [visible(remark) for remark in run.remarks],
        "health": [visible(text) for text in health_of(run)],
        "metrics": {name: [_number(row.get(name)) for row in run.rows] for name in names},
        "rollouts": [],
        "left_out": 0,
    }


def health_of(run: Run) -> list[str]:
    """The warnings that the run gave, with their iterations."""
    health = replay(run.rows)
    warnings = [f"iteration {iteration}: {text}" for iteration, _, text in health.warnings]
    return [*warnings, health.verdict] if health.verdict else warnings


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(f"{value:.6g}") if abs(value) < 1e15 else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


# ---------------------------------------------------------------------- chunks of rollouts


def _order(runs: Sequence[Run]) -> Iterator[tuple[Run, int]]:
    """Saved iterations, last and first, then ever finer between them; one of each run in turn."""
    queues = [(run, _spread(sorted(run.files))) for run in runs]
    for turn in range(max((len(queue) for _, queue in queues), default=0)):
        yield from ((run, queue[turn]) for run, queue in queues if turn < len(queue))


def _spread(items: Sequence[int]) -> list[int]:
    """The items, ends first, then what halves the widest gap.

    >>> _spread([1, 2, 3, 4, 5])
    [5, 1, 3, 2, 4]
    """
    order = list(dict.fromkeys([*items[-1:], *items[:1]]))
    gaps = [(0, len(items) - 1)]
    while gaps:
        first, last = gaps.pop(0)
        middle = (first + last) // 2
        if first < middle:
            order.append(items[middle])
            gaps += [(first, middle), (middle, last)]
    return order


def _fit(
    run: Run, groups: list[SavedGroup], credits: Sequence[str | CreditConfig], room: float
) -> tuple[int, str | None]:
    """The chunk of as many of these groups as there is room for, half as many at each attempt."""
    count = len(groups)
    while count:
        chunk = _packed(chunk_of(groups[:count], compare_credits(run, groups[:count], credits)))
        if len(chunk) <= room:
            return count, chunk
        count //= 2 if len(chunk) < 4 * room else 4
    return 0, None


def chunk_of(groups: Sequence[SavedGroup], comparison: CreditComparison) -> bytes:
    """Groups as bytes: the length of a JSON header, the header, then columns of tokens.

    Columns are fp32 (the text of a token: its number in the header's `texts`, uint32), and of each all lowest bytes
    come first, then all second ones, and so on, which compresses better. A token that has no number has NaN.
    """
    vocabulary: dict[str, int] = {}
    texts = [text for group in groups for segment in group.texts for text in segment]
    numbers = [vocabulary.setdefault(text, len(vocabulary)) for text in texts]
    present = dict.fromkeys(name for group in groups for name in group.columns)
    names = [*(name for name in COLUMNS if name in present), *(name for name in present if name not in COLUMNS)]
    columns = [_column(groups, name) for name in names]
    columns += [score.numpy().astype("<f4") for score in comparison.scores.values()]
    header = {
        "texts": list(vocabulary),
        "tokens": len(numbers),
        "columns": [*names, *(f"credit:{name}" for name in comparison.scores)],
        "groups": [_group(group) for group in groups],
        "own": comparison.own,
        "credits": list(comparison.scores),
        "correlation": [[_number(value) for value in row] for row in comparison.correlation],
        "spread": {name: _number(value) for name, value in comparison.spread.items()},
        "first_error": {
            name: {key: _number(value) for key, value in vars(detection).items()}
            for name, detection in comparison.first_error.items()
        },
        "missing": {name: visible(why) for name, why in comparison.missing.items()},
    }
    encoded = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    arrays = [numpy.array(numbers, dtype="<u4"), *columns]
    planes = [array.view(numpy.uint8).reshape(-1, 4).T.tobytes() for array in arrays]
    return b"".join([struct.pack("<I", len(encoded)), encoded, *planes])


def _column(groups: Sequence[SavedGroup], name: str) -> numpy.ndarray:
    values: list[float] = []
    for group in groups:
        rows = group.columns.get(name, [None] * len(group.texts))
        for texts, row in zip(group.texts, rows, strict=True):
            values += row if row is not None else [numpy.nan] * len(texts)
    return numpy.array(values, dtype="<f4")


def _group(group: SavedGroup) -> dict[str, Any]:
    nodes = []
    for number, segment in enumerate(group.tree.segments):
        nodes.append(
            {
                "parent": segment.parent,
                "length": len(segment.token_ids),
                "reward": _number(segment.reward),
                "value": _number(group.values[number]),
                "finish": FINISHES[segment.finish],
                "pruned": group.pruned[number],
                "masked": segment.masked,
                "steps": group.steps[number],
                "wrong": group.wrong[number],
            }
        )
    answer = group.tree.problem.answer
    return {
        "id": visible(group.tree.problem.id),
        "question": group.question,
        "answer": None if answer is None else visible(str(answer)),
        "nodes": nodes,
    }
