"""Whole training runs on a pretend CUDA device (`tests/pretend`): nothing is on another device than it should be."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend.build import build
from pretend.command import run_commands
from safetensors.torch import load_file

from stepcredit.cli.main import main
from stepcredit.run.checkpoint import newest_checkpoint

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

TESTS = Path(__file__).parent
EVEN = f"{TESTS.parent / 'benchmarks' / 'even.py'}:share_even"  # hardly ever the same for a group
COMMON = f"""--train.problems-per-iteration 2 --eval.num-problems 0 --checkpoint.every 1 --seed 1
    --sampler.max-new-tokens 10 --sampler.temperature 3 --sampler.max-rows 8
    --learning-rate 1e-3 --optim.schedule constant
    --reward.functions {EVEN} --reward.workers 0 --reward.gold-check 0"""
FP32 = "--train.dtype float32"
FLAT = "--group-size 3"
TREE = "--growth.num-branches 2 --growth.depth 2"
RUNS = {
    "grpo": f"--algorithm grpo {FLAT} --objective.kl.coef 0.01 --objective.entropy-coef 0.01 {FP32}",
    "grpo in bf16": f"--algorithm grpo {FLAT} --objective.kl.coef 0.01 --objective.entropy-coef 0.01",
    "spro": f"--algorithm spro {FLAT} {FP32}",
    "prime": f"--algorithm prime {FLAT} --prm.reference start {FP32}",
    "treerpo": f"--algorithm treerpo {TREE} {FP32}",
    "treerpo in bf16": f"--algorithm treerpo {TREE}",
    "adapters": f"--algorithm grpo {FLAT} --lora.rank 2 --objective.kl.coef 0.01 {FP32}",
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
APART = ("time/", "tokens/per_second")  # no two runs share them


def words(folder: Path, name: str, device: str, *more: str) -> list[str]:
    run = ["--run-dir", str(folder / name.replace(" ", "_")), "--device", device]
    return ["train", *COMMON.split(), *RUNS[name].split(), "--iterations", "2", *run, *more]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("pretend"))


@pytest.fixture(scope="module")
def on_cuda(library, tmp_path_factory) -> Path:
    """A folder with a run of each kind, one that was resumed, and what each did with the device."""
    folder = tmp_path_factory.mktemp("cuda")
    commands = {name: words(folder, name, "cuda") for name in RUNS}
    resumed = ("--run-dir", str(folder / "resumed"))
    commands["begun"] = words(folder, "grpo", "cuda", *resumed, "--iterations", "1")
    commands["resumed"] = words(folder, "grpo", "cuda", *resumed, "--resume", "auto")
    run_commands(library, folder, commands, ENVIRONMENT)
    return folder


@pytest.fixture(scope="module")
def waits(library) -> dict[str, Any]:
    return json.loads(run_module("pretend.waits", library))


def run_module(module: str, library: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, str(library)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(run)
    assert newest is not None
    return load_file(next(newest.glob("*model.safetensors")))


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Relative to the first."""
    assert one.keys() == two.keys()
    far = sum(float((one[name] - two[name]).square().sum()) for name in one) ** 0.5
    return far / sum(float(value.square().sum()) for value in one.values()) ** 0.5


def report(folder: Path, name: str) -> dict[str, Any]:
    found = json.loads((folder / f"{name}.json").read_text())
    assert found["code"] == 0, (folder / f"{name}.log").read_text()
    return found


def same(expected: Path, run: Path) -> None:
    """What two runs logged, and their weights, up to the rounding of another order of additions."""
    for one, two in zip(metrics(expected), metrics(run), strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            if not key.startswith(APART):
                assert two[key] == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-4)), key
    assert distance(weights(expected), weights(run)) < 1e-4


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_on_cuda(name, on_cuda):
    report(on_cuda, name)
    run = on_cuda / name.replace(" ", "_")
    rows = metrics(run)[1:]
    assert len(rows) == 2
    for row in rows:
        assert row["optim/grad_norm"] > 0 and row["optim/skipped"] == 0 and row["optim/nonfinite"] == 0
    first = run / "checkpoints" / "000001"
    before = load_file(next(first.glob("*model.safetensors")))
    assert distance(before, weights(run)) > 1e-4


@pytest.mark.parametrize("name", [name for name in RUNS if FP32 in RUNS[name]])
def test_in_fp32_it_learns_what_it_learns_on_the_cpu(name, on_cuda, tmp_path):
    assert main(words(tmp_path, name, "cpu")) == 0
    same(tmp_path / name, on_cuda / name)


def test_a_run_is_resumed_on_cuda(on_cuda):
    report(on_cuda, "begun")
    report(on_cuda, "resumed")
    same(on_cuda / "grpo", on_cuda / "resumed")


def test_the_pretend_device_finds_what_it_is_there_to_find(library):
    run_module("pretend.checks", library)


def test_a_micro_batch_waits_for_the_device_three_times_at_most(waits):
    assert waits["micro_batch"]["number"] > 2
    assert waits["micro_batch"]["each"] <= 3, waits["micro_batch"]["where"]


def test_decode_steps_wait_for_the_device_at_checks_alone(waits):
    """Which rows have ended is looked up every eighth step."""
    assert waits["decode_step"]["each"] <= 1 / 8, waits["decode_step"]["where"]
