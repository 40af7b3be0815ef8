"""Learners on several processes, one of which runs out of memory.

python tests/learners.py < CASES.json

CASES is a list. A case is `{"size": N, "strategy": NAME, "max_tokens": N, "fails": [[process, pass], ...],
"out": FILE}`: each process takes three optimiser steps on the same made-up trees and writes FILE.RANK.json with its
`max_tokens`, gradient norms, number of passes and error, FILE.RANK.pt with its weights, and FILE.RANK.log. The passes
named run out of memory, all of a process where the number is -1. With `"fused": true` AdamW is one kernel, as on a GPU.
"""

import json
import logging
import os
import sys
import traceback
from typing import Any

import ranks as processes
import torch
from tiny_models import fresh
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.learn import learner as learner_module
from stepcredit.learn.learner import Learner
from stepcredit.learn.options import AdamWOptions
from stepcredit.learn.placement import Placement, full_state
from stepcredit.learn.replicas import sum_gradients
from stepcredit.processes.ranks import Ranks


def trees() -> Forest:
    """5 groups of 3 completions, with a weight for each token."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 97, (count,), generator=generator).tolist()

    groups = [[Segment(tokens(4 + 2 * n + number)) for n in range(3)] for number in range(5)]
    forest = Forest.from_trees([Tree(Problem(id=str(number)), tokens(6), group) for number, group in enumerate(groups)])
    return forest.with_token(weights=torch.randn(forest.num_tokens, generator=generator) / forest.num_tokens)


def learn(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    policy = fresh("qwen2")
    with torch.no_grad():
        next(policy.parameters()).mul_(1 + ranks.rank)  # as if it had been loaded otherwise: the first one's holds
    placement = Placement(ranks, case["strategy"])
    if placement.sharded:
        policy = fresh("qwen2")
    learner_module.FUSED = {"cpu"} if case.get("fused") else learner_module.FUSED
    learner = Learner(placement.place(policy), placement, AdamWOptions(learning_rate=1e-3), case["max_tokens"])
    fails = {number for rank, number in case["fails"] if rank == ranks.rank}
    step, passes = trees(), 0

    def loss(part: Forest, call: Any) -> tuple[Tensor, int]:
        nonlocal passes
        passes += 1
        value = -(call(part).logprobs * part.token["weights"] * part.token["owned"]).sum()
        if passes in fails or -1 in fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return value, passes

    norms, error = [], None
    try:
        for _ in range(3):
            learner.accumulate(step, loss)
            norms.append(learner.step()[0])
    except UserError as raised:
        error = str(raised)
    if error is None:
        filled = type(learner)(policy, Placement(), AdamWOptions(), 1).tensors(fill=True)
        kinds = {name: (value.shape, value.device, value.dtype) for name, value in learner.tensors().items()}
        assert {name: (value.shape, value.device, value.dtype) for name, value in filled.items()} == kinds
        torch.save(full_state(policy), f"{case['out']}.{ranks.rank}.pt")
    if placement.replicated and error is None:
        norms.append(sparse_sum(ranks))
    return {"max_tokens": learner.max_tokens, "norms": norms, "error": error, "passes": passes}


def sparse_sum(ranks: Ranks) -> list[list[float] | None]:
    """Gradients of three parameters that have one in all processes, in the last one, and in none."""
    values = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    values[0].grad = torch.full((2,), 1.0 + ranks.rank)
    if ranks.rank == ranks.size - 1:
        values[1].grad = torch.full((2,), 7.0)
    sum_gradients(values, ranks)
    return [None if value.grad is None else value.grad.tolist() for value in values]


def child(case: dict[str, Any], rank: int, port: int) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case["size"], "LOCAL_WORLD_SIZE": case["size"]}
    os.environ |= {name: str(value) for name, value in own.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logging.basicConfig(filename=f"{case['out']}.{rank}.log", level=logging.WARNING)
    ranks = Ranks.join(timeout_s=20, device="cpu")
    with open(f"{case['out']}.{rank}.json", "w", encoding="utf-8") as out:
        json.dump(learn(case, ranks), out)
    os._exit(0)


def run(case: dict[str, Any]) -> list[int]:
    """The exit code of each process."""
    port, pids = processes.free_port(), []
    for rank in range(case["size"]):
        pid = os.fork()
        if not pid:
            try:
                child(case, rank, port)
            finally:
                traceback.print_exc()
                os._exit(3)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    torch.set_num_threads(1)  # a process that forks may have no other threads
    print(json.dumps([run(case) for case in json.load(sys.stdin)]))
