"""A whole training step against TRL, one after the other on the same GPU, and what the embedded task learns there."""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from steps import take_step

from gpu_stages.bench import Bench, Numbers
from gpu_stages.check import SMALL_RUN
from gpu_stages.shapes import load, make_folder
from gpu_stages.trl import RATE, Given, Seconds, have_trl, steps_of_trl
from stepcredit.config import resolve
from stepcredit.policy.forward import Policy, choose_scoring_form
from stepcredit.run.build import build_parts
from stepcredit.run.trainer import Trainer

SEEDS = (0, 1, 2)
CASES = {  # prompts, tokens of a prompt, completions of each, their tokens
    "32 x 8 of 256 behind 256": (32, 256, 8, 256),
    "8 x 8 of 512 behind 1024": (8, 1024, 8, 512),
}
SMALL = {"2 x 4 of 8 behind 16": (2, 16, 4, 8)}


def run(bench: Bench) -> None:
    for shape in bench.shapes:
        for name, numbers in (SMALL if bench.small else CASES).items():
            given = Given(shape, *numbers)
            bench.case(f"{shape}, {name}, stepcredit", lambda g=given: ours(bench, g))
            if have_trl():
                bench.case(f"{shape}, {name}, TRL", lambda g=given: theirs(bench, g))
            else:
                print("trl is not installed: nothing to compare with")
    bench.case("three seeds of the embedded task", lambda: seeds(bench))


def least(taken: list[Seconds]) -> Seconds:
    names = ("step", "sampling", "update", "length")
    return {f"{name}_s" if name != "length" else name: min(one[name] for one in taken) for name in names}


def ours(bench: Bench, given: Given) -> Numbers:
    """With stepcredit's defaults, on the device."""
    with tempfile.TemporaryDirectory() as place:
        folder = make_folder(given.shape, Path(place), given.prompts * (bench.repeats + 2), given.prompt, bench.device)
        config = resolve(
            {
                "model": str(folder),
                "task": {"data": str(folder / "prompts.jsonl"), "eval_data": str(folder / "prompts.jsonl")},
                "sampler": {"max_new_tokens": given.tokens, "stop_token_ids": [], "max_rows": given.rows},
                "growth": {"group_size": given.group},
                "reward": {"functions": ["even.share_even"], "gold_check": 0, "workers": 0},
                "train": {
                    "problems_per_iteration": given.prompts,
                    "device": str(bench.device),
                    "dtype": "bfloat16",
                    "iterations": 1000,
                },
                "optim": {"learning_rate": RATE, "max_tokens_per_micro_batch": bench.budget},
                "eval": {"num_problems": 0},
            }
        )
        model, words = load(folder)
        policy = Policy(model.to(bench.device), words, torch.bfloat16)
        choose_scoring_form(policy)
        trainer = Trainer(config, build_parts(config), policy, Console(quiet=True))
        taken: list[Seconds] = []

        def step() -> None:
            one = take_step(trainer)
            bench.wait()
            parts = {"sampling": one.seconds["sample"], "update": one.seconds["learn"]}
            taken.append({"step": one.seconds["step"], **parts, "length": one.metrics["completion/length"]})

        step()
        peak = bench.peak_gib(step)
        for _ in range(bench.repeats):
            step()
    return least(taken[1:]) | {"added_gib": peak, "budget": trainer.policy_update.learner.max_tokens}


def theirs(bench: Bench, given: Given) -> Numbers:
    """With the largest micro-batch that fits; `ratio` is over stepcredit's step of the same file."""

    def measured(completions: int) -> Numbers:
        with tempfile.TemporaryDirectory() as place:
            return least(steps_of_trl(bench, given, Path(place), completions))

    found: dict[str, Any] = bench.halving(measured, given.rows, "completions_of_a_micro_batch")
    case = next(name for name, numbers in (CASES | SMALL).items() if Given(given.shape, *numbers) == given)
    own = bench.cases.get(f"{given.shape}, {case}, stepcredit", {})
    if own.get("ok"):
        found |= {f"ratio of {part}": found[f"{part}_s"] / own[f"{part}_s"] for part in ("step", "sampling", "update")}
    return found


def seeds(bench: Bench) -> Numbers:
    """Held-out accuracy of the embedded model before and after its default run, at one time on the device."""
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(len(SEEDS)) as pool:
        rows = list(pool.map(lambda seed: train(bench, Path(place), seed), SEEDS))
    found: Numbers = {}
    for seed, (first, last) in zip(SEEDS, rows, strict=True):
        for name in ("eval/accuracy", "eval/accuracy_greedy"):
            if name in last:
                found[f"seed {seed}, {name.removeprefix('eval/')}"] = [first[name], last[name]]
        found[f"seed {seed}, seconds"] = last["time/elapsed"]
    return found


def train(bench: Bench, place: Path, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and the last row of its metrics."""
    run_dir = place / str(seed)
    command = [sys.executable, "-m", "stepcredit", "train", "--device", str(bench.device), "--seed", str(seed)]
    command += ["--run-dir", str(run_dir), *([*SMALL_RUN.split(), "--iterations", "2"] if bench.small else [])]
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=560, env=here)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"exit code {done.returncode}: {(done.stderr or done.stdout)[-1500:]}")
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(lines[0]), json.loads(lines[-1])
