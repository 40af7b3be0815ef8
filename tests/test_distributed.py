"""Several processes give what one gives; they stop, die and go on together."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks_of import launch
from safetensors.torch import load_file

from stepcredit.cli.main import main
from stepcredit.policy.batching import split_into_parts, tree_sizes, unowned_part
from stepcredit.policy.forward import random_forest
from stepcredit.processes.ranks import balanced_shares
from stepcredit.run.checkpoint import newest_checkpoint, verify

HERE = Path(__file__).parent
COMMON = "--eval.num-problems 10 --sampler.max-new-tokens 48 --optim.schedule constant --learning-rate 1e-4"
COMMON += " --train.problems-per-iteration 5 --eval-every 5 --save-every 1 --seed 1"
RUNS = {
    "grpo": "--algorithm grpo --group-size 4 --optim.num-epochs 2 --optim.num-minibatches 2 --optim.weight-decay 0.1",
    "spro": "--algorithm spro --group-size 4",
    "shaped": "--algorithm dapo --group-size 4 --objective.entropy-target 0.3 --objective.entropy-top 0.5"
    " --shapers running_scale,unlikeliness --estimators.old_logprobs forward",
    "treerpo": "--algorithm treerpo --growth.depth 3 --objective.kl.coef 0.01 --optim.num-minibatches 2",
    "prime": "--algorithm prime --group-size 4 --prm.num-minibatches 2 --optim.num-minibatches 2"
    " --filter.enabled true --prm.reference start --prm.learning-rate 3e-4",
    "prime with adapters": "--algorithm prime --group-size 4 --lora.rank 4 --prm.reference start"
    " --prm.learning-rate 1e-3",
    "ppo": "--algorithm ppo --group-size 4 --critic.num-minibatches 2 --optim.num-minibatches 2 --critic.warmup 1"
    " --credit.bootstrap value --critic.learning-rate 3e-4 --learning-rate 3e-5",  # ratios have the critic's rounding
    "ppo on the policy's states": "--algorithm ppo --group-size 4 --critic.backbone policy --critic.learning-rate 1e-3"
    " --credit.lam 0.9",
    "t_ppo": "--algorithm t_ppo --group-size 4 --sampler.window 16 --critic.num-minibatches 2 --optim.num-minibatches 2"
    " --critic.learning-rate 3e-4",
    "grpo in windows": "--algorithm grpo --group-size 4 --sampler.window 16 --optim.num-minibatches 2",
}
AGAIN = ("spro", "prime with adapters", "ppo")  # whose layers several processes compute again in the backward
APART = ("time/", "tokens/per_second")  # no two runs share them
CUT = ("tokens/computed", "tokens/sharing", "sampler/logprob_diff")  # depend on how a step is cut, or are rounding


def words(run: Path, algorithm: str, iterations: int = 5, *more: str) -> list[str]:
    named = ["--iterations", str(iterations), "--run-dir", str(run)]
    return ["train", *COMMON.split(), *RUNS[algorithm].split(), *named, *more]


def _with_seed(given: list[str], seed: str) -> list[str]:
    """With some seeds AdamW makes more than the bound of the rounding, in the ratio of the token that moved most."""
    place = given.index("--seed") + 1
    return [*given[:place], seed, *given[place + 1 :]]


def job(run: Path, size: int, given: list[str], **more: object) -> dict:
    return {"words": given, "size": size, "log": f"{run}.log", **more}


def logs(run: Path, rank: int = 0) -> str:
    return Path(f"{run}.log.{rank}").read_text()


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_metrics(one: Path, two: Path) -> None:
    """Within 1e-5, relative or absolute."""
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.keys() - {"time/gather"} == b.keys() - {"time/gather"}
        for name, value in a.items():
            if not name.startswith(APART) and name not in CUT:
                near = value if value is None else pytest.approx(value, rel=1e-5, abs=1e-5)
                assert b[name] == near, (a["iteration"], name)


def same_weights(one: Path, two: Path) -> None:
    """All models of the last checkpoints within 1e-5 of their norm."""
    first, second = (newest_checkpoint(run) for run in (one, two))
    assert first is not None and second is not None
    files = [path.relative_to(first) for path in first.rglob("*model.safetensors") if "optimizer" not in str(path)]
    assert files
    for file in files:
        a, b = load_file(first / file), load_file(second / file)
        assert a.keys() == b.keys()
        far = sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5
        size = sum(float(value.square().sum()) for value in a.values()) ** 0.5
        assert far < 1e-5 * size, (str(file), far / size)


# ------------------------------------------------------------------ distribution


def test_balanced_shares_are_fair_and_complete():
    sizes = [7, 1, 9, 3, 3, 8, 2, 2]
    shares = balanced_shares(sizes, 3)
    assert sorted(item for share in shares for item in share) == list(range(8))
    assert max(sum(sizes[item] for item in share) for share in shares) <= 12
    assert balanced_shares([5], 3) == [[0], [], []]


def test_parts_of_some_trees_own_all_of_them_and_nothing_else():
    forest = random_forest(50)
    assert tree_sizes(forest) == [32, 18]
    for trees in ([0], [1], [0, 1]):
        owned = torch.zeros(forest.num_tokens, dtype=torch.long)
        for part in split_into_parts(forest, 20, trees=trees):
            owned[part.token["source"][part.token["owned"]]] += 1
        wanted = sum((forest.token_tree == tree).long() for tree in trees)
        assert owned.equal(wanted)


def test_a_stand_in_owns_nothing():
    part = unowned_part(random_forest(50))
    assert part.num_segments == 1 and part.num_tokens == 1
    assert not part.token["owned"].any()


# ------------------------------------------------------------------ what one process gives


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", RUNS)
def test_several_processes_give_what_one_gives(algorithm, tmp_path):
    """Five iterations; trees of unequal depth, one process has fewer of them."""
    alone = tmp_path / "alone"
    runs = {(size, kind): tmp_path / f"{kind}{size}" for kind in ("ddp", "fsdp") for size in (2, 3)}
    if algorithm == "prime with adapters":
        runs = {key: run for key, run in runs.items() if key[0] == 2}
    jobs = [job(alone, 1, words(alone, algorithm))]
    again = str(algorithm in AGAIN).lower()
    for (size, kind), run in runs.items():
        more = ["--distributed.strategy", kind, "--train.gradient-checkpointing", again]
        jobs.append(job(run, size, words(run, algorithm, 5, *more)))
    for one, codes in zip(jobs, launch(jobs), strict=True):
        assert set(codes) <= {0, 1} and len(set(codes)) == 1, Path(one["log"] + ".0").read_text()
    for run in runs.values():
        same_metrics(alone, run)
        same_weights(alone, run)


@pytest.mark.slow
def test_a_process_without_trees_is_fine(tmp_path):
    alone, three = tmp_path / "alone", tmp_path / "three"
    few = ["--train.problems-per-iteration", "2", "--eval.num-problems", "2"]
    jobs = [job(alone, 1, words(alone, "grpo", 3, *few)), job(three, 3, words(three, "grpo", 3, *few))]
    assert all(set(codes) <= {0, 1} for codes in launch(jobs)), logs(three)
    same_metrics(alone, three)
    same_weights(alone, three)


# ------------------------------------------------------------------ stopping and going on


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_killed_and_resumed_on_other_numbers_of_processes(kind, tmp_path):
    """SIGKILL to two processes, SIGKILL to one, three to the end."""
    alone, run = tmp_path / "alone", tmp_path / "run"
    end = words(run, "prime", 5, "--distributed.strategy", kind, "--resume", "auto")
    end, whole = (_with_seed(given, "2") for given in (end, words(alone, "prime")))
    saved = [str(run / "checkpoints" / f"{number:06d}") for number in (1, 3)]
    codes = launch(
        [
            job(alone, 1, whole),
            job(run, 2, end, signal="SIGKILL", ranks=[0, 1], when=saved[0]),
            job(run, 1, end, signal="SIGKILL", ranks=[0], when=saved[1]),
            job(run, 3, end),
        ]
    )
    assert codes[1:3] == [[-9, -9], [-9]] and set(codes[3]) <= {0, 1}, logs(run)
    same_metrics(alone, run)
    same_weights(alone, run)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_place(tmp_path):
    """They save between two optimiser steps, and the run ends as if it had not been stopped."""
    alone, run = tmp_path / "alone", tmp_path / "run"
    first = str(run / "checkpoints" / "000002")
    codes = launch(
        [
            job(alone, 2, words(alone, "grpo")),
            job(run, 2, words(run, "grpo"), signal="SIGTERM", ranks=[1], when=first),
        ]
    )
    assert codes[1] == [130, 130], logs(run)
    stopped = newest_checkpoint(run)
    assert stopped is not None and verify(stopped) is None and stopped.name >= "000002"
    assert launch([job(run, 2, words(run, "grpo", 5, "--resume", "auto"))]) == codes[:1]
    same_metrics(alone, run)
    same_weights(alone, run)


# ------------------------------------------------------------------ processes that fail


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
def test_a_process_that_dies_or_hangs_ends_the_run_and_is_named(fault, tmp_path):
    """Within the time-out; the last checkpoint is whole."""
    run = tmp_path / "run"
    given = words(run, "grpo", 500, "--distributed.timeout-s", "4")
    when = str(run / "checkpoints" / "000002")
    started = time.monotonic()
    codes = launch([job(run, 2, given, signal=fault, ranks=[1], when=when)])[0]
    assert codes == [2, -9]
    assert time.monotonic() - started < 90
    assert re.search(r"error in process 0 of 2: process 1 has ended or has not answered for 4 s", logs(run)), logs(run)
    saved = newest_checkpoint(run)
    assert saved is not None and verify(saved) is None


@pytest.mark.slow
def test_a_process_that_raises_ends_the_run_with_its_error(tmp_path):
    run = tmp_path / "run"
    given = words(run, "grpo", 5, "--reward.functions", "user_rewards.fails_in_process_1", "--reward.gold-check", "0")
    assert launch([job(run, 2, given)])[0] == [2, 2]
    assert "error in process 1 of 2: reward function" in logs(run, 1) and "no gold here" in logs(run, 1)
    assert "process 1 has ended" in logs(run)


@pytest.mark.slow
def test_bad_input_is_said_once(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "something").write_text("")
    assert launch([job(run, 2, words(run, "grpo"))])[0] == [2, 2]
    assert "is not empty" in logs(run) and logs(run, 1) == ""


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The command of the documentation; a killed process ends the job."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "stepcredit"]
    command += words(run, "grpo", 500, "--distributed.strategy", "fsdp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        while not (run / "checkpoints" / "000001").exists():
            assert job.poll() is None, job.stdout and job.stdout.read()
            time.sleep(0.1)
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                given = entry.read_bytes().split(b"\0")
                mine = str(run).encode() in (entry.parent / "cmdline").read_bytes()
            except OSError:
                continue
            if mine and b"RANK=1" in given:
                os.kill(int(entry.parent.name), signal.SIGKILL)
                break
        output, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "on 2 processes (fsdp)" in output and "SIGKILL" in output


def test_other_commands_run_as_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(os, "_exit", lambda code: None)
    assert main(["eval"]) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_nothing_learnt_is_no_crash_under_torchrun(tmp_path):
    """torchrun calls every other exit code a failure; the log says what it was."""
    run = tmp_path / "nothing"
    given = ["--reward.functions", "format_boxed", "--reward.gold-check", "0", "--sampler.max-new-tokens", "8"]
    assert launch([job(run, 2, words(run, "grpo", 1, *given))]) == [[0, 0]]
    assert "nothing was learnt" in logs(run)
