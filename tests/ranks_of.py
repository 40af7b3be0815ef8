"""Runs that must be the same: on several processes, or in several goes."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
APART = ("time/", "tokens/per_second")  # no two runs share them
CUT = ("tokens/computed", "tokens/sharing")  # depend on how a step is cut


def launch(jobs: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The exit codes of the processes of each job, which `ranks.py` describes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    done = subprocess.run(
        [sys.executable, str(HERE / "ranks.py")],
        input=json.dumps(jobs),
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def run_on(folders: Mapping[int, Path], words: Sequence[str]) -> None:
    """Train with these words, into a folder for each number of processes."""
    codes = launch(
        [
            {"words": ["train", *words, "--run-dir", str(folder)], "size": size, "log": f"{folder}.log"}
            for size, folder in folders.items()
        ]
    )
    logs = "\n".join(Path(f"{folder}.log.0").read_text() for folder in folders.values())
    assert all(code in (0, 1) for of_job in codes for code in of_job), logs


def same_metrics(one: Path, other: Path, rounding: float = 0.0) -> list[dict[str, Any]]:
    """The metrics of the first run, after they were compared with the other's: to the bit, or within rounding."""
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (one, other)]
    assert [row["iteration"] for row in rows[0]] == [row["iteration"] for row in rows[1]]
    for mine, others in zip(*rows, strict=True):
        assert mine.keys() == others.keys()
        for name, value in mine.items():
            if not name.startswith(APART) and not (rounding and name in CUT):
                expected = pytest.approx(others[name], abs=rounding, rel=rounding) if rounding else others[name]
                assert value == expected, (mine["iteration"], name)
    return rows[0]
