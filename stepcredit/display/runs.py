"""Run folders in any state: whole, still running, killed, damaged or of an older version.

What can be read is read; `Run.remarks` says what cannot.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stepcredit.errors import UserError

SEED = "train.seed"
# Runs that differ in nothing but these options are of one method.
NOT_METHOD = ("run_dir", SEED, "rollouts.", "track.", "checkpoint.", "distributed.")


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        path: the folder.
        name: how it is shown; different for each run that is read together.
        config: option (`section.name`) to value, as it was resolved; empty where config.yaml cannot be read.
        rows: the lines of metrics.jsonl by rising iteration, each with `seconds` (training since the start, evaluation
            left out); 0 is the state before training.
        files: saved rollouts by iteration.
        versions: of the packages that wrote the last checkpoint.
        remarks: what is missing or damaged.
    """

    path: Path
    name: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    files: dict[int, Path]
    versions: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def algorithm(self) -> str:
        return str(self.config.get("algorithm", "unknown"))

    def column(self, metric: str, against: str = "iteration") -> tuple[list[float], list[float]]:
        """The values of a metric where it has any, and where they stand.

        Args:
            against: `iteration`, `tokens/total` or `seconds`.
        """
        rows = [row for row in self.rows if _is_number(row.get(metric)) and _is_number(row.get(against))]
        return [row[against] for row in rows], [row[metric] for row in rows]


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs in these folders; a folder that holds run folders stands for all of them.

    Raises:
        UserError: a folder is missing or holds no run.
    """
    folders: list[Path] = []
    for given in paths:
        path = Path(given)
        if not path.exists():
            raise UserError(f"'{given}': no such run folder{_runs_beside(path)}")
        if not path.is_dir():
            raise UserError(f"'{given}' is a file; give the folder of a run, such as runs/grpo-1")
        inside = [path] if _is_run(path) else sorted(child for child in path.iterdir() if _is_run(child))
        if not inside:
            what = "is empty" if not any(path.iterdir()) else "holds no run (config.yaml, metrics.jsonl or rollouts/)"
            raise UserError(f"'{given}' {what}; a run that has only just started writes its files within seconds")
        known = {folder.resolve() for folder in folders}
        folders += [folder for folder in inside if folder.resolve() not in known]
    return [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def read_run(path: Path, name: str) -> Run:
    """One run folder, however much of it there is."""
    remarks: list[str] = []
    config = _config(path / "config.yaml", remarks)
    rows = list(_rows(path / "metrics.jsonl", remarks))
    files = _rollouts(path / "rollouts")
    last, wanted = rows[-1]["iteration"] if rows else 0, config.get("train.iterations")
    if isinstance(wanted, int) and last < wanted:
        remarks.append(f"ended, or is still running, after iteration {last} of {wanted}")
    if not files:
        remarks.append("no saved rollouts, so there is no credit to look at (rollouts.every, rollouts.max_trees)")
    return Run(path, name, config, rows, files, _versions(path), remarks)


# ---------------------------------------------------------------------- runs that differ by their seed alone


@dataclass(frozen=True)
class Method:
    """Runs whose configs are the same but for the seed and for what does not act on training."""

    label: str
    runs: tuple[Run, ...]


def methods(runs: Sequence[Run]) -> list[Method]:
    """The runs by method, in the order in which they were given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(method_options(run), sort_keys=True) if run.config else run.name, []).append(run)
    labels = _labels(list(groups.values()))
    return [Method(label, tuple(group)) for label, group in zip(labels, groups.values(), strict=True)]


def method_options(run: Run) -> dict[str, Any]:
    """The options that make the run's method, with their values."""
    return {name: value for name, value in run.config.items() if not name.startswith(NOT_METHOD)}


def differences(runs: Sequence[Run]) -> list[str]:
    """Options that are not the same in all these runs, in the order of the config."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    return [name for name in names if len({json.dumps(run.config.get(name)) for run in runs}) > 1]


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The algorithm, and what sets the method apart from others of the same algorithm."""
    labels = []
    for group in groups:
        first = group[0]
        peers = [other[0] for other in groups if other[0].algorithm == first.algorithm]
        options = [name for name in differences(peers) if not name.startswith(NOT_METHOD)]
        shown = [f"{name} {_short(first.config.get(name))}" for name in options[:3]]
        labels.append(" · ".join([first.algorithm, *shown]) if first.config else first.name)
    return [
        label if labels.count(label) == 1 else f"{label} ({group[0].name})"
        for label, group in zip(labels, groups, strict=True)
    ]


# ---------------------------------------------------------------------- reading


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "rollouts"))


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    length = 1
    while length < max(map(len, parts), default=0) and len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def _runs_beside(path: Path) -> str:
    """The run folders that there are instead, as the end of a message."""
    try:
        names = sorted(child.name for child in path.parent.iterdir() if _is_run(child))
    except OSError:
        return ""
    more = " ..." if len(names) > 8 else ""
    return f"; '{path.parent}' has {', '.join(names[:8])}{more}" if names else ""


def _config(path: Path, remarks: list[str]) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        loaded = None
    if not isinstance(loaded, dict):
        remarks.append("config.yaml is missing or damaged; options and names of methods are not known")
        return {}
    return dict(_flat(loaded))


def _flat(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _rows(path: Path, remarks: list[str]) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        remarks.append("metrics.jsonl is missing, so there are no curves")
        return
    rows: dict[int, dict[str, Any]] = {}
    damaged = 0
    for line in lines:
        try:
            row = json.loads(line)
            rows[int(row["iteration"])] = row
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            damaged += 1
    if damaged:
        remarks.append(f"metrics.jsonl: {damaged} of {len(lines)} lines cannot be read and are left out")
    if not rows:
        remarks.append("metrics.jsonl has no iteration yet")
    seconds = 0.0
    for iteration in sorted(rows):
        for name in ("time/iteration", "time/prepare"):
            spent = rows[iteration].get(name)
            seconds += float(spent) if spent is not None and _is_number(spent) else 0.0
        yield rows[iteration] | {"seconds": seconds}


def _rollouts(folder: Path) -> dict[int, Path]:
    files = {}
    for path in sorted(folder.glob("*.jsonl*")):
        number = path.name.split(".")[0]
        if number.isdigit():
            files[int(number)] = path
    return files


def _versions(path: Path) -> dict[str, str]:
    for manifest in sorted(path.glob("checkpoints/*/manifest.json"), reverse=True):
        try:
            return dict(json.loads(manifest.read_text(encoding="utf-8"))["versions"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
