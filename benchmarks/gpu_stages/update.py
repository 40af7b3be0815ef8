"""Forward and backward of groups and trees, beside their floor, one row per completion or node, and TRL.

Model FLOPs utilisation is the arithmetic of every position once (three times the forward: matrix products of the
layers, the scores inside each path, the output layer for sampled tokens) over the seconds and the measured rate of a
large product in bf16. Recomputation and padding are no part of it.
"""

import tempfile
import time
from pathlib import Path

import torch
from forest import Case, make_forest, one_row_per_node, operations

from gpu_stages.bench import Bench, Numbers
from gpu_stages.shapes import CASES, SMALL, make_policy
from gpu_stages.trl import Given, have_trl, steps_of_trl
from stepcredit.config import resolve
from stepcredit.forest import Forest
from stepcredit.learn.learner import Learner
from stepcredit.learn.placement import UNSHARDED
from stepcredit.policy.forward import Policy, ScoringForm, score


def run(bench: Bench) -> None:
    bench.case("rates", bench.rates)
    for shape in bench.shapes:
        policies: list[Policy] = []  # made by the first case that needs it

        def policy(shape: str = shape, policies: list[Policy] = policies) -> Policy:
            if not policies:
                policies.append(make_policy(shape, bench.device))
            return policies[0]

        bench.case(f"{shape}, exactness", lambda p=policy: exactness(p(), bench.budget))
        for name, case in (SMALL if bench.small else CASES).items():
            bench.case(f"{shape}, {name}", lambda p=policy, c=case: update(bench, p(), c))
            bench.case(f"{shape}, {name}, rows", lambda p=policy, c=case: rows(bench, p(), c))
        first = next(iter((SMALL if bench.small else CASES).values()))
        bench.case(f"{shape}, kernels", lambda p=policy, c=first: kernels(bench, p(), c))
        bench.case(f"{shape}, optimiser", lambda p=policy: optimiser(bench, p()))
        policies.clear()
        bench.free()
        if have_trl():
            for name, case in (SMALL if bench.small else CASES).items():
                if case.depth == 1:
                    bench.case(f"{shape}, {name}, TRL", lambda s=shape, c=case: trl(bench, s, c))


def passes(policy: Policy, forest: Forest, form: ScoringForm, budget: int) -> None:
    """What adds up the gradient of a step."""
    policy.scoring_form = form
    for part in policy.parts(forest, budget):
        policy(part).logprobs.sum().backward()
    policy.zero_grad()


def timed(bench: Bench, policy: Policy, forest: Forest, form: ScoringForm, budget: int) -> Numbers:
    return {
        "seconds": bench.seconds(lambda: passes(policy, forest, form, budget)),
        "added_gib": bench.peak_gib(lambda: passes(policy, forest, form, budget)),
    }


def update(bench: Bench, policy: Policy, case: Case) -> Numbers:
    forest = make_forest(case)
    work, positions = operations(policy, forest), policy.num_positions(forest)
    found = bench.halving(lambda size: timed(bench, policy, forest, "forest", size), bench.budget, "budget", 256)
    rate = bench.matrix_rate()
    return found | {
        "positions": positions,
        "positions_per_second": positions / found["seconds"],
        "operations": work,
        "utilisation": work / found["seconds"] / rate,
    }


def rows(bench: Bench, policy: Policy, case: Case) -> Numbers:
    """One row per completion of a group, per node of a tree; `ratio` is over the forest's seconds of the same run."""
    forest = make_forest(case)
    apart = one_row_per_node(forest)
    found = bench.halving(lambda size: timed(bench, policy, apart, "plain", size), bench.budget, "budget", 256)
    ours = bench.halving(lambda size: timed(bench, policy, forest, "forest", size), bench.budget, "budget", 256)
    return found | {
        "forest_seconds": ours["seconds"],
        "ratio": found["seconds"] / ours["seconds"],
        "arithmetic": operations(policy, apart) / operations(policy, forest),
    }


def kernels(bench: Bench, policy: Policy, case: Case) -> Numbers:
    forest = make_forest(case)

    def profiled(size: int) -> Numbers:
        return bench.kernels(lambda: passes(policy, forest, "forest", size))

    return bench.halving(profiled, bench.budget, "budget", 256)


def exactness(policy: Policy, budget: int) -> Numbers:
    """Largest difference of log-probabilities between the packed form and one row per completion."""
    forest, found = make_forest(SMALL["tree 4^3 x 4"]), {}
    kept = policy.autocast
    try:
        for name, autocast in (("bf16", torch.bfloat16), ("fp32", None)):
            policy.autocast, scores = autocast, {}
            for form in ("forest", "plain"):
                policy.scoring_form = form
                scores[form] = score(policy, forest, 1.0, budget).logprobs
            found[name] = float((scores["forest"] - scores["plain"]).abs().max())
    finally:
        policy.autocast = kept
    if not found["fp32"] < 1e-2:
        raise ArithmeticError(f"the packed form differs from one row per completion: {found}")
    return found


def optimiser(bench: Bench, policy: Policy) -> Numbers:
    """Clipping and AdamW of all weights."""
    learner = Learner(policy, UNSHARDED, resolve({}).optim, bench.budget)
    gradients = [torch.full_like(value, 1e-3) for value in policy.parameters()]

    def step() -> None:
        for value, gradient in zip(policy.parameters(), gradients, strict=True):
            value.grad = gradient
        learner.step()

    return {"seconds": bench.seconds(step), "parameters": sum(value.numel() for value in policy.parameters())}


def trl(bench: Bench, shape: str, case: Case) -> Numbers:
    """TRL's update of the same number of completions, whose tokens are given: nothing is sampled."""

    def measured(completions: int) -> Numbers:
        with tempfile.TemporaryDirectory() as place:
            given = Given(shape, case.trees, case.prompt, case.branches, case.tokens, sampled=False)
            taken = steps_of_trl(bench, given, Path(place), completions)
        return {"seconds": min(step["update"] for step in taken)}

    started = time.perf_counter()
    found = bench.halving(measured, case.trees * case.branches, "completions_of_a_micro_batch")
    return found | {"all_s": time.perf_counter() - started}
