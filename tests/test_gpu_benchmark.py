"""`benchmarks/gpu.py` on a CPU: its stages run, and a file of results grows case by case."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"

sys.path.insert(0, str(ROOT / "benchmarks"))
from gpu_stages.bench import Bench  # noqa: E402
from gpu_stages.check import require, visible_in  # noqa: E402
from gpu_stages.shapes import tree_of  # noqa: E402

from stepcredit.policy.packing import Packing  # noqa: E402


def stage(name: str, file: Path, *words: str) -> tuple[int, dict]:
    command = [sys.executable, str(SCRIPT), "--stage", name, "--device", "cpu", "--shapes", "tiny", "--json", str(file)]
    done = subprocess.run(
        [*command, "--repeats", "1", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert file.exists(), done.stderr
    return done.returncode, json.loads(file.read_text())


@pytest.mark.slow
def test_check_and_update_write_their_cases(tmp_path):
    file = tmp_path / "gpu.json"
    code, results = stage("check", file, "--only", "schemas", "attention", "head", "greedy", "adapters")
    assert code == 0, results["check"]
    cases = results["check"]
    assert cases["greedy"]["equal"] == cases["greedy"]["of"] == 2
    assert 0 < cases["attention, head size 64, 7 queries a key"]["at 129"] < 2e-2
    assert cases["train, adapters"]["iterations"] == 2 and cases["torchrun, fsdp with adapters"]["nonfinite"] == 0
    code, results = stage("update", file, "--only", "rates", "tiny, group", "optimiser")
    assert code == 0 and results["check"] == cases  # what was there is kept
    group = results["update"]["tiny, group 8 x 16 behind 32"]
    assert group["positions"] == 2 * (32 + 8 * 15) and group["utilisation"] > 0
    assert results["update"]["tiny, group 8 x 16 behind 32, rows"]["arithmetic"] > 1.5


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench("check", torch.device("cpu"), ["tiny"], file=tmp_path / "gpu.json")


def test_a_case_that_fails_is_noted_and_the_next_one_runs(bench, capsys):
    def fails() -> dict:
        raise ArithmeticError("not equal")

    bench.case("first", fails)
    bench.case("second", lambda: {"value": 2.0})
    kept = json.loads(bench.file.read_text())["check"]
    assert bench.failed == ["first"] and kept["second"]["value"] == 2.0
    assert kept["first"]["error"] == "ArithmeticError: not equal" and "fails" in kept["first"]["traceback"]
    again = Bench("check", torch.device("cpu"), ["tiny"], file=bench.file)
    again.case("first", lambda: {"value": 1.0})  # it had failed
    again.case("second", fails)  # it is there
    assert again.failed == [] and again.cases["first"]["value"] == 1.0
    assert "first ..." in capsys.readouterr().out


def test_out_of_memory_halves_the_size_and_says_so(bench, capsys):
    def run(size: int) -> dict:
        if size > 5:
            raise MemoryError
        return {"seconds": 1.0}

    assert bench.halving(run, 16, "rows") == {"seconds": 1.0, "rows": 4, "rows_out_of_memory": 16}
    assert "out of memory with rows 16; 8 now" in capsys.readouterr().out
    with pytest.raises(MemoryError):
        bench.halving(run, 16, "rows", least=8)
    with pytest.raises(ZeroDivisionError):
        bench.halving(lambda size: {"value": 1 / 0}, 16, "rows")


def test_results_of_another_machine_are_not_mixed(bench):
    bench.file.write_text(json.dumps({"machine": {"name": "another"}}))
    with pytest.raises(SystemExit, match="another"):
        Bench("check", torch.device("cpu"), ["tiny"], file=bench.file)


def test_an_error_beyond_the_bound_or_not_a_number_is_a_failure():
    require({"output": 0.001}, 0.01)
    for wrong in (0.02, float("nan")):
        with pytest.raises(ArithmeticError, match="output"):
            require({"output": wrong}, 0.01)


@pytest.mark.parametrize("length", [1, 2, 5, 6, 40, 129])
def test_trees_for_attention_have_the_length_and_see_their_paths_alone(length):
    packing, _ = Packing.of_forest(tree_of(length))
    visible = visible_in(packing)
    assert len(visible) == max(length, 1) or length < 6
    assert visible.tril().equal(visible) and visible.diagonal().all()
    if length > 12:
        assert not visible.equal(torch.ones_like(visible).tril())  # branches do not see each other
