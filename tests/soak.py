"""Kills runs at random instants, resumes them to the end, and compares them with a run that was left alone.

python tests/soak.py [--kills 30] [--seed 0] [ALGORITHM ...]

A new algorithm joins by a row in `RUNS`. Each kill is a SIGKILL in a process of its own, at a random instant of a run
that saves after every iteration; some runs are stopped by SIGTERM in between, which saves between optimiser steps.
Weights, optimiser state, metrics (times aside), rollouts and the order of the data must be the same to the last bit.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NoReturn

import torch
import zstandard
from safetensors.torch import load_file

from stepcredit.cli.main import main as stepcredit
from stepcredit.policy.loading import load_policy
from stepcredit.run.checkpoint import checkpoints

COMMON = "--train.problems-per-iteration 4 --eval.num-problems 4 --sampler.max-new-tokens 40"
COMMON += " --iterations 5 --save-every 1 --eval-every 2 --rollouts.every 1"
RUNS = {
    "grpo": "--algorithm grpo --group-size 4 --optim.num-epochs 2 --optim.num-minibatches 2",
    "spro": "--algorithm spro --group-size 4",
    "ppo": "--algorithm ppo --group-size 4 --critic.num-minibatches 2 --optim.num-minibatches 2 --critic.warmup 2"
    " --credit.bootstrap value",
    "t_ppo": "--algorithm t_ppo --group-size 4 --sampler.window 12 --critic.num-minibatches 2"
    " --optim.num-minibatches 2",
    "grpo in windows": "--algorithm grpo --group-size 4 --sampler.window 12 --optim.num-minibatches 2",
    "prime": "--algorithm prime --group-size 4 --prm.num-minibatches 2 --optim.num-minibatches 2"
    " --filter.enabled true --filter.oversample 2",
    "shaped": "--algorithm unlikeliness --group-size 4 --objective.entropy-target 0.3 --objective.entropy-top 0.5"
    " --shapers running_scale,unlikeliness",
    "astar_po": "--algorithm astar_po --sampler.max-rows 8 --optim.num-epochs 2",
    "treerpo": "--algorithm treerpo --growth.num-branches 3 --growth.depth 2 --optim.num-minibatches 2",
    "vine": "--algorithm vine --group-size 3 --prefix-values.num-rollouts 2 --optim.num-minibatches 2",
}
UNEQUAL = ("time/", "tokens/per_second")  # metrics that no two runs share


def start(words: list[str]) -> multiprocessing.Process:
    """Run the command line in a process of its own, without the seconds that imports take; it writes to `RUN.log`."""
    log = Path(words[words.index("--run-dir") + 1]).with_suffix(".log")

    def child() -> None:
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
        code = 3
        try:
            code = stepcredit(words)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def finish(words: list[str]) -> None:
    process = start(words)
    process.join()
    if process.exitcode not in (0, 1):
        failed(words, process.exitcode)


def failed(words: list[str], code: int | None) -> NoReturn:
    log = Path(words[words.index("--run-dir") + 1]).with_suffix(".log")
    raise SystemExit(f"exit code {code} of stepcredit {' '.join(words)}\n{log.read_text()}")


def result(run: Path) -> dict[str, object]:
    """Everything of a run that must not depend on how often it was killed."""
    last = checkpoints(run)[-1]
    state = json.loads((last / "trainer_state" / "state.json").read_text())
    rollouts = {
        path.name: zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()
        for path in sorted((run / "rollouts").iterdir())
    }
    return {
        "checkpoint": last.name,
        "weights": (last / "model.safetensors").read_bytes(),
        "tensors": {k: v.tolist() for k, v in load_file(last / "trainer_state" / "state.safetensors").items()},
        "state": {name: value for name, value in state.items() if name != "random"},
        "metrics": [
            {name: value for name, value in json.loads(line).items() if not name.startswith(UNEQUAL)}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ],
        "order": [[json.loads(line)["id"] for line in text.splitlines()] for text in rollouts.values()],
        "rollouts": rollouts,
    }


def soak(name: str, kills: int, seed: int, folder: Path, terms: int | None = None) -> str:
    """Kill runs of an algorithm this often.

    Raises:
        SystemExit: a run that was killed ended differently from the one that was not.
    """
    words = ["train", *COMMON.split(), *RUNS[name].split()]
    alone = folder / f"{name}-alone"
    started = time.monotonic()
    finish([*words, "--run-dir", str(alone)])
    whole, expected = time.monotonic() - started, result(alone)
    chance = random.Random(seed)
    left = [signal.SIGKILL] * kills + [signal.SIGTERM] * (kills // 3 if terms is None else terms)
    chance.shuffle(left)
    done, runs, saved = 0, 0, 0
    while left:
        run = folder / f"{name}-{runs}"
        runs += 1
        for _ in range(6):  # kills of one run
            if not left:
                break
            process = start([*words, "--run-dir", str(run), "--resume", "auto"])
            process.join(chance.uniform(0.02, 1.0) * whole)
            if not process.is_alive():
                if process.exitcode not in (0, 1):
                    failed([*words, "--run-dir", str(run)], process.exitcode)
                break
            os.kill(process.pid or 0, left.pop())
            process.join()
            done += 1
            saved += bool(list((run / "checkpoints").glob("[0-9]*.*"))) if run.exists() else 0
        finish([*words, "--run-dir", str(run), "--resume", "auto"])
        found = result(run)
        for what, value in expected.items():
            if found[what] != value:
                raise SystemExit(f"{name}, run {runs}: {what} differ after {done} kills; compare {run} with {alone}")
        shutil.rmtree(run)
    return f"{name}: {done} kills in {runs} runs, {saved} saved between optimiser steps; all ends identical"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithms", nargs="*", metavar="ALGORITHM", help=", ".join(RUNS))
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # a process that forks may have no other threads
    load_policy("embedded", "cpu")  # import everything once, before the processes
    unknown = set(given.algorithms) - RUNS.keys()
    if unknown:
        sys.exit(f"no run for {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    for name in given.algorithms or RUNS:
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            print(soak(name, given.kills, given.seed, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
