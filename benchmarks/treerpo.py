"""A whole TreeRPO iteration (sampling and update) against sampling every path flat and training one row per node.

All forms have the same weights, sampler and attention kernels, and micro-batches of about as many token positions; no
completion stops early. `ratio` is rows over the form in seconds. Memory is what an iteration adds to the peak of a
process of its own, beyond what a first small one needs.

python benchmarks/treerpo.py [--cases 4x3x32 ...] [--repeats 3] [--threads N] [--json FILE]
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from forest import ROW_BUDGET, VOCABULARY, make_policy, one_row_per_node, parts_of
from memory import peak_mib

from stepcredit.forest import Forest
from stepcredit.forest.types import Problem
from stepcredit.growth.flat import flat
from stepcredit.growth.options import TreeOptions
from stepcredit.growth.steps import StepRule
from stepcredit.growth.tree import tree
from stepcredit.policy.batching import unshared_positions
from stepcredit.policy.forward import Policy
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.transformers import TransformersSampler


@dataclass(frozen=True)
class Case:
    """Full trees: `branches` children of every node, `depth` levels of `tokens` tokens each."""

    prompt: int
    branches: int
    depth: int
    tokens: int
    trees: int

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(max_new_tokens=self.depth * self.tokens, stop_token_ids=())

    def encode(self, problem: Problem) -> list[int]:
        generator = torch.Generator().manual_seed(int(problem.id))
        return torch.randint(0, VOCABULARY, (self.prompt,), generator=generator).tolist()


CASES = {
    "4x3x32": Case(prompt=64, branches=4, depth=3, tokens=32, trees=4),
    "4x3x32-long": Case(prompt=512, branches=4, depth=3, tokens=32, trees=1),
    "8x3x16": Case(prompt=64, branches=8, depth=3, tokens=16, trees=1),
}
FORMS = ("rows", "stepwise", "tree")


def sample(policy: Policy, case: Case, form: str) -> Forest:
    """The forest that an iteration trains on; "rows" samples a completion for every leaf."""
    problems = [Problem(id=str(number)) for number in range(case.trees)]
    sampler, seeds = TransformersSampler(policy), list(range(case.trees))
    if form == "rows":
        return flat(sampler, problems, case.encode, case.params, seeds, case.branches**case.depth)
    mode = "complete" if form == "tree" else "stepwise"
    shape = TreeOptions(num_branches=case.branches, depth=case.depth, mode=mode)
    return tree(sampler, problems, case.encode, case.params, seeds, shape, StepRule(case.tokens))


def update(policy: Policy, forest: Forest) -> None:
    policy.zero_grad()
    for part in parts_of(forest, policy.scoring_form):
        policy(part).logprobs.sum().backward()


def seconds(policy: Policy, case: Case, form: str, trained: Forest, repeats: int) -> tuple[float, float]:
    """Least seconds of sampling and of the update, after one iteration that warms up."""
    least = [float("inf"), float("inf")]
    for number in range(repeats + 1):
        policy.scoring_form = "forest"
        started = time.perf_counter()
        sample(policy, case, form)
        between = time.perf_counter()
        policy.scoring_form = "plain" if form == "rows" else "forest"
        update(policy, trained)
        ended = time.perf_counter()
        if number:
            least = [min(least[0], between - started), min(least[1], ended - between)]
    return least[0], least[1]


def added_mib(case: Case, form: str) -> float:
    """MiB that an iteration adds to the peak of this process."""
    policy = make_policy()
    small = Case(case.prompt, 2, 2, 4, 1)
    update(policy, sample(policy, small, "tree"))
    trained = sample(policy, case, "tree") if form == "rows" else None  # the same nodes; their memory is freed again
    before = peak_mib()
    grown = sample(policy, case, form)
    if trained is not None:
        policy.scoring_form, grown = "plain", one_row_per_node(trained)
    update(policy, grown)
    return peak_mib() - before


def in_own_process(name: str, form: str) -> float:
    command = [sys.executable, __file__, "--memory", name, form, "--threads", str(torch.get_num_threads())]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(name: str, repeats: int) -> dict[str, dict[str, float]]:
    case, policy = CASES[name], make_policy()
    grown = sample(policy, case, "tree")
    rows = one_row_per_node(grown)
    found: dict[str, dict[str, float]] = {}
    for form in FORMS:
        trained = rows if form == "rows" else grown
        sampling, learning = seconds(policy, case, form, trained, repeats)
        sampled = sample(policy, case, form) if form == "rows" else grown
        found[form] = {
            "sampling": sampling,
            "update": learning,
            "iteration": sampling + learning,
            "tokens_sampled": float(sampled.num_tokens),
            "tokens_computed": float(
                unshared_positions(rows) if form == "rows" else grown.num_tokens + len(grown.prompt_ids)
            ),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the numbers here")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory:
        print(added_mib(CASES[given.memory[0]], given.memory[1]))
        return
    print(f"seconds of an iteration; {given.threads} threads, micro-batches of {ROW_BUDGET} positions")
    print(
        f"{'case':13}{'form':10}{'sampling':>10}{'update':>9}{'both':>9}{'ratio':>8}"
        f"{'sampled':>10}{'computed':>10}{'MiB':>8}"
    )
    memory = {name: {form: in_own_process(name, form) for form in FORMS} for name in given.cases}  # while this is small
    results = {}
    for name in given.cases:
        results[name] = measure(name, given.repeats)
        whole = results[name]["rows"]["iteration"]
        for form, row in results[name].items():
            print(
                f"{name:13}{form:10}{row['sampling']:10.3f}{row['update']:9.3f}{row['iteration']:9.3f}"
                f"{whole / row['iteration']:8.2f}{row['tokens_sampled']:10,.0f}{row['tokens_computed']:10,.0f}"
                f"{memory[name][form]:8,.0f}",
                flush=True,
            )
    if given.json:
        with open(given.json, "w", encoding="utf-8") as out_file:
            json.dump({"threads": given.threads, "cases": results, "mib": memory}, out_file, indent=1)


if __name__ == "__main__":
    main()
