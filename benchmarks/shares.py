"""Where the seconds of a whole training step go, in one run: credit, verifier, Python, and the distance to the floor.

The steps are those of versus.py. `python` is the share of a step that is spent outside of torch's operators, as its
profiler sees it; the profiler's own work is in it, so it is an upper bound. The floor is the arithmetic of every token
position computed once (matrix products of the layers, scores on the paths, output layer for sampled tokens; three times
that for the update) at the rate of a large matrix product, measured in the same run.

credit   seconds of every credit function on the forest of the first case's step, over the seconds of that step
spro     a SPRO step over a GRPO step with the same reference pass and the same rollouts, median of pairs

What PRIME adds to RLOO is in prime.py, TreeRPO against flat sampling in treerpo.py.

python benchmarks/shares.py [--cases a b c] [--repeats 5] [--threads N] [--json FILE]
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from forest import matrix_rate, operations
from steps import CASES, Case, Step, make_folder, make_trainer, take_step
from torch.profiler import ProfilerActivity, profile

from stepcredit.config import resolve
from stepcredit.credit import CREDIT, assign, needs_of
from stepcredit.credit.choose import build_credit
from stepcredit.forest import Forest
from stepcredit.run.trainer import Trainer

PHASES = ("sample", "judge", "observe", "learn")


def outside_torch(trainer: Trainer) -> float:
    """The share of a step during which no operator runs."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        whole = take_step(trainer).seconds["step"]
    spans = sorted((one.time_range.start, one.time_range.end) for one in profiler.events() if one.cpu_parent is None)
    inside, reached = 0.0, float("-inf")
    for start, end in spans:
        inside += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - inside / 1e6 / whole


def shares(trainer: Trainer, repeats: int) -> tuple[dict[str, float], Step]:
    """Of the shortest step: its seconds, what parts of it they are, and the floor over sampling and update."""
    take_step(trainer)
    step = min((take_step(trainer) for _ in range(repeats)), key=lambda taken: taken.seconds["step"])
    seconds, floor = step.seconds, operations(trainer.policy, step.forest) / matrix_rate()
    found = {"seconds": seconds["step"]} | {name: seconds[name] / seconds["step"] for name in PHASES}
    found["rest"] = 1 - sum(found[name] for name in PHASES)
    found["python"] = outside_torch(trainer)
    return found | {"floor_sampling": floor / 3 / seconds["sample"], "floor_update": floor / seconds["learn"]}, step


def credit_seconds(forest: Forest, repeats: int = 5) -> dict[str, float]:
    """Least seconds of each credit function, with made-up columns where it reads any."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, function in CREDIT.items():
        columns = {column: -torch.rand(forest.num_tokens, generator=generator) for column in needs_of(function).columns}
        given, least = forest.with_token(**columns), float("inf")
        for _ in range(repeats):
            started = time.perf_counter()
            assign(given, name, function, {})
            least = min(least, time.perf_counter() - started)
        found[name] = least
    return found


def spro_ratio(case: Case, folder: Path, repeats: int) -> dict[str, float]:
    """Of whole steps; one trainer takes both, so that everything but the credit is the same."""
    trainer = make_trainer(case, folder, algorithm="spro")
    credits = {name: build_credit(resolve({"algorithm": name}).credit)[1] for name in ("grpo", "spro")}
    pairs: list[dict[str, float]] = []
    for number in range(repeats + 1):
        pair = {}
        for name in ("grpo", "spro")[:: 1 if number % 2 else -1]:
            trainer.parts = replace(trainer.parts, assign=credits[name])
            pair[name] = take_step(trainer, again=True).seconds["step"]
        pairs.append(pair)
    return {
        name: statistics.median(pair[name] for pair in pairs[1:]) for name in credits
    } | {"ratio": statistics.median(pair["spro"] / pair["grpo"] for pair in pairs[1:])}  # fmt: skip


def show(name: str, found: dict[str, float]) -> None:
    parts = "".join(f"{found[part]:9.2%}" for part in (*PHASES, "rest", "python"))
    print(
        f"{name:6}{found['seconds']:9.3f}{parts}{found['floor_sampling']:12.0%}{found['floor_update']:9.0%}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the numbers here")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    results: dict[str, Any] = {"threads": given.threads, "cases": {}}
    print(f"shares of a step, and of the floor; {given.threads} threads, least of {given.repeats}")
    titles = "".join(f"{part:>9}" for part in (*PHASES, "rest", "python"))
    print(f"{'case':6}{'seconds':>9}{titles}{'sampling':>12}{'update':>9}")
    first: Step | None = None
    with tempfile.TemporaryDirectory() as place:
        for name in given.cases:
            folder = make_folder(CASES[name], Path(place) / name, (3 + given.repeats) * CASES[name].prompts)
            found, step = shares(make_trainer(CASES[name], folder), given.repeats)
            results["cases"][name], first = found, first or step
            show(name, found)
        assert first is not None
        whole = results["cases"][given.cases[0]]["seconds"]
        results["credit"] = {name: taken / whole for name, taken in credit_seconds(first.forest).items()}
        print("credit: " + ", ".join(f"{name} {share:.2%}" for name, share in results["credit"].items()), flush=True)
        results["spro"] = spro_ratio(CASES[given.cases[0]], Path(place) / given.cases[0], given.repeats)
    print(f"spro: {results['spro']['spro']:.3f} s over {results['spro']['grpo']:.3f} s, {results['spro']['ratio']:.3f}")
    if given.json:
        with open(given.json, "w", encoding="utf-8") as out_file:
            json.dump(results, out_file, indent=1)


if __name__ == "__main__":
    main()
