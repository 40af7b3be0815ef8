"""How the seconds of sampling and of an update grow, one quantity at a time, in one run.

A group of 8 completions of 32 tokens behind each of 4 prompts of 256 tokens, a vocabulary of 512; then other group
sizes, prompts, lengths and vocabularies, and trees of 2 branches and more and more levels of 16 tokens. `exponent` is
the slope of a line through the logarithms: 1 is proportional, 0 is no growth; that of `positions`, the tokens computed
once each, is what to compare it with.

group    seconds = a + b * group size, fitted at prompts of 256 and of 1024 tokens. The prompts are in `a` alone if
         they are computed once for their group: then `a` grows with them, and `b` by no more than what each completion
         has to read of them.

python benchmarks/growth.py [--axes group prompt length vocabulary depth] [--repeats 3] [--threads N] [--json FILE]
"""

import argparse
import json
import math
import time
from dataclasses import replace
from typing import Any

import torch
from forest import VOCABULARY, make_policy
from treerpo import Case, sample, update

from stepcredit.policy.forward import Policy

BASE = Case(prompt=256, branches=8, depth=1, tokens=32, trees=4)
LONG = 1024
AXES: dict[str, dict[int, Case]] = {
    "group": {size: replace(BASE, branches=size) for size in (2, 4, 8, 16, 32)},
    "prompt": {size: replace(BASE, prompt=size) for size in (64, 128, 256, 512, 1024)},
    "length": {size: replace(BASE, tokens=size) for size in (16, 32, 64, 128, 256)},
    "vocabulary": {size: BASE for size in (512, 2048, 8192, 32768)},
    "depth": {size: Case(prompt=64, branches=2, depth=size, tokens=16, trees=4) for size in (1, 2, 3, 4, 5, 6)},
}
PARTS = ("sampling", "update")


def measure(policy: Policy, case: Case, repeats: int) -> dict[str, float]:
    """Least seconds of sampling and of the update, after one of each that warms up, and what they compute."""
    form = "rows" if case.depth == 1 else "tree"  # at one level both sample a completion for every branch
    least = dict.fromkeys(PARTS, float("inf"))
    for number in range(repeats + 1):
        started = time.perf_counter()
        forest = sample(policy, case, form)
        between = time.perf_counter()
        update(policy, forest)
        ended = time.perf_counter()
        if number:
            least = {
                "sampling": min(least["sampling"], between - started),
                "update": min(least["update"], ended - between),
            }
    return least | {"positions": float(forest.num_tokens + len(forest.prompt_ids))}


def line(x: list[float], y: list[float]) -> tuple[float, float]:
    """Least squares: y at x = 0, and the slope."""
    middle, height = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)
    return height - slope * middle, slope


def exponent(x: list[float], y: list[float]) -> float:
    return line([math.log(value) for value in x], [math.log(value) for value in y])[1]


def along(axis: str, cases: dict[int, Case], repeats: int) -> dict[str, Any]:
    policy = make_policy()
    rows: dict[int, dict[str, float]] = {}
    for size, case in cases.items():
        if axis == "vocabulary":
            policy = make_policy(size)
        row = rows[size] = measure(policy, case, repeats)
        print(f"{axis:12}{size:8}{row['positions']:11,.0f}{row['sampling']:10.3f}{row['update']:9.3f}", flush=True)
    x = [float(size) for size in rows]
    found = {part: exponent(x, [row[part] for row in rows.values()]) for part in (*PARTS, "positions")}
    print(
        f"{axis:12}{'exponent':>8}{found['positions']:11.2f}{found['sampling']:10.2f}{found['update']:9.2f}", flush=True
    )
    return {"points": rows, "exponent": found}


def lines(short: dict[int, dict[str, float]], repeats: int) -> dict[str, Any]:
    """Seconds as a line over the group size, at two lengths of the prompts."""
    policy = make_policy()
    long = {size: measure(policy, replace(case, prompt=LONG), repeats) for size, case in AXES["group"].items()}
    found: dict[str, Any] = {}
    for prompt, rows in ((BASE.prompt, short), (LONG, long)):
        for part in PARTS:
            start, slope = line([float(size) for size in rows], [row[part] for row in rows.values()])
            found[f"{part}-{prompt}"] = {"a": start, "b": slope}
            print(f"{part}, prompts of {prompt}: {start:.3f} s + {slope:.4f} s x group size", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the numbers here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"seconds, least of {given.repeats}; {given.threads} threads, a vocabulary of {VOCABULARY} unless it varies")
    print(f"{'axis':12}{'size':>8}{'positions':>11}{'sampling':>10}{'update':>9}")
    results = {axis: along(axis, AXES[axis], given.repeats) for axis in given.axes}
    if "group" in results:
        results["group"]["lines"] = lines(results["group"]["points"], given.repeats)
    if given.json:
        with open(given.json, "w", encoding="utf-8") as out_file:
            json.dump({"threads": given.threads, "axes": results}, out_file, indent=1)


if __name__ == "__main__":
    main()
