"""Sampled tokens to a target accuracy with and without a filter that knows how difficult each problem was before.

    python benchmarks/difficulty.py [--seeds 3] [--jobs 2] [--target 0.45] [--out runs/difficulty]

The embedded model on a file of 160 problems of 1 to 8 needed steps, of which it gets the first nearly always right and
the last nearly never; a problem comes back every 10 iterations.

all          16 groups of 8 an iteration, as they come
again        groups that agree are left out and other problems sampled in their place (dynamic sampling)
skip         problems whose last two groups agreed are not sampled, but for one in ten; groups as they come
again-skip   both

Finished runs are not repeated.
"""

import argparse
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from learning import train

from stepcredit.demo.chain import generate

LEVELS, ROWS = range(1, 9), 160
COMMON = (
    "--data {train} --task.eval-data {test} --reward.functions stepcredit.demo.chain:verify --model embedded "
    "--optim.learning-rate 4e-4 --optim.schedule constant --train.iterations 100 --train.problems-per-iteration 16 "
    "--growth.group-size 8 --sampler.max-new-tokens 160 --eval.every 10 --eval.num-problems 300 --eval.num-samples 2"
)
FILTERS = {
    "all": "",
    "again": "--filter.enabled true --filter.low 0.01 --filter.high 0.99",
    "again-skip": "--filter.enabled true --filter.low 0.01 --filter.high 0.99 --filter.history 2",
    "skip": "--filter.enabled true --filter.low 0 --filter.high 1 --filter.history 2",
}


def write_rows(path: Path, seed: int, count: int) -> Path:
    """A file of problems, as many of each level."""
    rng = random.Random(seed)
    rows = [generate(rng, LEVELS[number % len(LEVELS)], 0).problem(str(number)) for number in range(count)]
    text = "".join(json.dumps({"id": row.id, "question": row.question, "answer": row.answer}) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--target", type=float, default=0.45)
    parser.add_argument("--out", type=Path, default=Path("runs/difficulty"))
    parser.add_argument("--more", default="", help="options of stepcredit train for every run")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    files = {
        "train": write_rows(given.out / "train.jsonl", 1, ROWS),
        "test": write_rows(given.out / "test.jsonl", 2, 304),
    }
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = {
            given.out / f"{name}-{seed}": (f"{COMMON.format(**files)} {options} {given.more}", seed)
            for name, options in FILTERS.items()
            for seed in range(given.seeds)
        }
        for run in [pool.submit(train, folder, *words) for folder, words in runs.items()]:
            run.result()  # ends here if it failed
    command = [sys.executable, "-m", "stepcredit", "compare", *map(str, runs), "--target", str(given.target)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
