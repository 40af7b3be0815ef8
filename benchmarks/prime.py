"""What PRIME adds to an RLOO iteration, against one forward and backward of its process reward model, in one run.

Both iterations have the same rollouts and the same reference pass; sampling, which is the same, is left out. `share` is
(PRIME - RLOO) over a forward and backward of the model on the same rollouts. With the default order of updates the
rewards are by-products of the pass that trains the model, so it should be little above 1: the optimiser step and the
credit are the rest.

python benchmarks/prime.py [--repeats 9] [--threads N] [--json FILE]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from forest import Case, make_forest, make_policy

from stepcredit.credit import CREDIT, assign
from stepcredit.estimators.frozen import Reference
from stepcredit.estimators.options import PRMOptions
from stepcredit.estimators.prm import ImplicitPRM
from stepcredit.forest import Forest
from stepcredit.losses.objective import Objective
from stepcredit.policy.forward import Policy

BUDGET = 1 << 14
CASE = Case(prompt=128, branches=8, depth=1, tokens=64, trees=8, ragged=True)
UPDATES = {
    "after": PRMOptions(),
    "after, 2 minibatches": PRMOptions(num_minibatches=2),
    "before": PRMOptions(update="before"),
}


def rollouts() -> Forest:
    """A judged forest; every other completion is right."""
    forest = make_forest(CASE)
    reward = torch.arange(forest.num_segments) % 2
    return forest.with_segment(reward=reward.float(), has_reward=torch.ones(forest.num_segments, dtype=torch.bool))


def learn(policy: Policy, optimizer: torch.optim.Optimizer, forest: Forest) -> None:
    objective = Objective()
    forest = forest.with_token(weights=objective.weights(forest))
    for part in policy.parts(forest, BUDGET):
        objective.loss(policy(part), part)[0].backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the numbers here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    policy, forest = make_policy(), rollouts()
    reference = Reference(policy, 1.0, BUDGET)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)

    def rloo() -> None:
        learn(policy, optimizer, assign(reference.observe(forest), "rloo", CREDIT["rloo"], {}))

    def once() -> None:
        for part in policy.parts(forest, BUDGET):
            policy(part).logprobs.sum().backward()
        policy.zero_grad()

    results = {}
    print(f"seconds, medians of {given.repeats}; {given.threads} threads")
    print(f"{'order of updates':22}{'RLOO':>9}{'PRIME':>9}{'once':>9}{'share':>8}")
    for name, options in UPDATES.items():
        prm = ImplicitPRM(policy, options, max_tokens=BUDGET)

        def prime(prm: ImplicitPRM = prm) -> None:
            found = prm.observe(reference.observe(forest))
            learn(policy, optimizer, assign(found, "prime", CREDIT["prime"], {}))

        runs = {"rloo": rloo, "prime": prime, "once": once}
        taken = [{key: timed(run) for key, run in runs.items()} for _ in range(given.repeats + 1)][1:]
        found = {key: statistics.median(row[key] for row in taken) for key in runs}
        found["share"] = statistics.median((row["prime"] - row["rloo"]) / row["once"] for row in taken)
        results[name] = found
        print(
            f"{name:22}{found['rloo']:9.3f}{found['prime']:9.3f}{found['once']:9.3f}{found['share']:8.2f}", flush=True
        )
    if given.json:
        with open(given.json, "w", encoding="utf-8") as out_file:
            json.dump({"threads": given.threads, "orders": results}, out_file, indent=1)


if __name__ == "__main__":
    main()
