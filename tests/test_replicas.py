"""Learners on several processes: one gradient, one set of weights, also when one of them runs out of memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FAILS = {  # process and pass, of three; the largest parts of the two have 33 and 31 positions
    "first pass": ([(1, 1)], 15),
    "second pass": ([(1, 2)], 15),
    "last pass": ([(0, 3)], 16),
    "both processes": ([(0, 1), (1, 2)], 15),
}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"size": 2, "fails": fails} for name, (fails, _) in FAILS.items()},
    **{f"from {smaller}": {"size": 2, "max_tokens": smaller} for smaller in (15, 16)},
    "alone": {"size": 1},
    "two": {"size": 2},
    "three": {"size": 3},
    "never": {"size": 2, "fails": [(1, -1)]},
    "fused": {"size": 2, "fused": True},
    "fused shards": {"size": 2, "strategy": "fsdp", "fused": True},
    "shards": {"size": 2, "fails": [(0, 2), (1, 2)], "strategy": "fsdp"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """What each process of each case found (`learners.py`), with its weights and its log."""
    folder = tmp_path_factory.mktemp("learners")
    usual = {"strategy": "ddp", "max_tokens": 40, "fails": []}
    cases = [usual | case | {"out": str(folder / name)} for name, case in CASES.items()]
    done = subprocess.run(
        [sys.executable, str(HERE / "learners.py")],
        input=json.dumps(cases),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [[0] * case["size"] for case in cases], done.stderr
    return {name: [found(folder / name, rank) for rank in range(case["size"])] for name, case in CASES.items()}


def found(out: Path, rank: int) -> dict[str, Any]:
    one: dict[str, Any] = json.loads(Path(f"{out}.{rank}.json").read_text())
    weights = Path(f"{out}.{rank}.pt")
    one["weights"] = torch.load(weights) if weights.exists() else None
    one["log"] = Path(f"{out}.{rank}.log").read_text()
    return one


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Of all weights, relative to their norm."""
    assert one.keys() == two.keys()
    far = sum(float((one[name] - two[name]).square().sum()) for name in one) ** 0.5
    return far / sum(float(value.square().sum()) for value in one.values()) ** 0.5


@pytest.mark.parametrize("name", FAILS)
def test_when_one_process_runs_out_of_memory_all_begin_the_step_again(runs, name) -> None:
    """The result is that of a run that began with the smaller budget, to the last bit."""
    _, smaller = FAILS[name]
    cut, whole = runs[name], runs[f"from {smaller}"]
    assert [one["passes"] for one in runs["two"]] == [9, 9]
    for one in cut:
        assert one["max_tokens"] == smaller and one["error"] is None
        assert one["log"].count(f"out of memory: micro-batches have at most {smaller} tokens from now on") == 1
        assert one["passes"] > whole[0]["passes"]
    assert not whole[0]["log"] and whole[0]["norms"] == cut[0]["norms"] == cut[1]["norms"]
    for one in (cut[1], *whole):
        assert all(value.equal(one["weights"][name]) for name, value in cut[0]["weights"].items())


def test_processes_sum_their_gradients(runs) -> None:
    """Two give what one gives, and three, also with a fused AdamW, whole or in shards.

    A parameter without a gradient anywhere goes on without one.
    """
    alone, two, three = (runs[name] for name in ("alone", "two", "three"))
    fused, shards = runs["fused"], runs["fused shards"]
    assert two[0]["norms"][3] == two[1]["norms"][3] == [[3.0, 3.0], [7.0, 7.0], None]
    assert three[0]["norms"][3] == [[6.0, 6.0], [7.0, 7.0], None]
    for one in (*two, *three, *fused, *shards):
        assert distance(alone[0]["weights"], one["weights"]) < 1e-5
        assert one["norms"][:3] == pytest.approx(alone[0]["norms"], rel=1e-4)


def test_a_completion_that_fits_nowhere_ends_all_processes(runs) -> None:
    for one in runs["never"]:
        assert "out of memory with a single completion" in one["error"] and one["weights"] is None


def test_in_shards_the_error_says_the_number_to_go_on_with(runs) -> None:
    """The others wait for each process in every layer, so none can leave its passes and begin again."""
    for one, smaller in zip(runs["shards"], (16, 15), strict=True):
        assert "out of memory with 40 tokens in a micro-batch" in one["error"] and one["max_tokens"] == 40
        assert f"--resume auto --optim.max-tokens-per-micro-batch {smaller}, or" in one["error"]
