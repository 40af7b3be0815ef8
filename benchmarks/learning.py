"""Train with several settings and seeds; print held-out accuracy before and after as mean and spread over the seeds.

    python benchmarks/learning.py [--seeds 3] [--jobs 2] [--out FOLDER] ["OPTIONS OF stepcredit train" ...]

    python benchmarks/learning.py "--algorithm grpo" "--algorithm spro --credit.beta 0.01"

Each run gets one thread, so `--jobs` runs at a time are as fast as the machine has cores. Finished runs in the output
folder are not repeated.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DEFAULT = ("--algorithm grpo", "--algorithm opo", "--algorithm spro", "--algorithm grpo --shapers shuffle_rewards")
SHOWN = {  # name of the metric: what its numbers are multiplied by, digits
    "eval/accuracy": (100, 1),
    "eval/accuracy_greedy": (100, 1),
    "eval/length": (1, 1),
    "policy/entropy": (1, 3),
}


def run_dir(out: Path, setting: str, seed: int) -> Path:
    name = "-".join(word.strip("-").replace("/", "_") for word in shlex.split(setting))
    return out / f"{name}-seed{seed}"


def train(folder: Path, setting: str, seed: int) -> list[dict]:
    """The rows of metrics.jsonl of one run; one that has ended is not repeated."""
    if not (folder / "latest").is_file():
        command = [sys.executable, "-m", "stepcredit", "train", *shlex.split(setting), "--seed", str(seed)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(f"{folder}.log", "w", encoding="utf-8") as log:
            done = subprocess.run([*command, "--run-dir", str(folder)], env=environment, stdout=log, stderr=log)
        if done.returncode > 1:
            sys.exit(f"{shlex.join(command)} failed; see {folder}.log")
        print(f"done: {folder.name}", file=sys.stderr)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def spread(name: str, values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    scale, digits = SHOWN[name]
    mean = f"{statistics.mean(values) * scale:.{digits}f}"
    return f"{mean} ± {statistics.stdev(values) * scale:.{digits}f}" if len(values) > 1 else mean


def change(name: str, histories: list[list[dict]]) -> str:
    """The first value, which is the same for all seeds or nearly so, and the last ones."""
    first = statistics.mean(next(row[name] for row in rows if name in row) for rows in histories)
    return f"{spread(name, [first])} -> {spread(name, [rows[-1][name] for rows in histories])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=DEFAULT)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = {
            setting: [
                pool.submit(train, run_dir(given.out, setting, seed), setting, seed) for seed in range(given.seeds)
            ]
            for setting in given.settings
        }
        print("| setting | sampled accuracy, % | greedy accuracy, % | length | entropy, nats | tokens sampled |")
        print("|---|---|---|---|---|--:|")
        for setting, futures in runs.items():
            histories = [future.result() for future in futures]
            cells = [change(name, histories) for name in SHOWN]
            tokens = statistics.mean(rows[-1]["tokens/total"] for rows in histories)
            print(f"| `{setting}` | {' | '.join(cells)} | {tokens:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
