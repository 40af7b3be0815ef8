"""Peak memory, each form in a process of its own: the output layer, a prompt's keys, layers that are computed again.

head     8 x 512 tokens at a vocabulary of 152,000, forward and backward: what log-softmax of all logits adds to the
         memory of the process, and what the chunked head adds
cache    a prompt of 1024 tokens x 8 completions of 64: bytes of keys and values that are held
layers   24 layers of hidden size 256, 4 prompts of 512 tokens x 4 completions of 128, forward and backward: what is
         added to the memory with all activations kept, and with train.gradient_checkpointing; and the seconds

python benchmarks/memory.py [--json FILE]
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from forest import Case, make_forest, make_policy

from stepcredit.policy.decoding import ForestRows
from stepcredit.policy.head import score_logits, score_states

TOKENS, HIDDEN, VOCABULARY = 8 * 512, 64, 152_000


def peak_mib() -> float:
    """Of this program; what `getrusage` tells begins with the size of the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="utf-8"))[1]) / 1024  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def head_mib(chunked: bool) -> float:
    """MiB that a forward and backward of the output layer adds to the peak."""
    states = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
    head.weight.grad = torch.zeros_like(head.weight)
    before = peak_mib()
    if chunked:
        scores = score_states(states, targets, head, 1.0)
    else:
        scores = score_logits(head(states), targets, 1.0, entropy_grad=False)
    scores.logprobs.sum().backward()
    return peak_mib() - before


@torch.no_grad()
def cache_mib() -> tuple[float, float]:
    """MiB of keys and values: copied for every row, and as they are held."""
    policy = make_policy()
    rows = ForestRows(policy, 8, 64)
    rows.begin(rows.encode([[index % 500 for index in range(1024)]]) * 8)
    rows.step(torch.zeros(8, dtype=torch.long))
    shared = [tensor for group in rows.prefix_batches for tensor in (*group.keys, *group.values)]
    own = [tensor for pair in rows.own for tensor in pair]
    size = sum(tensor.nbytes for tensor in own)
    prompt = sum(tensor.nbytes for tensor in shared)
    return (8 * prompt + size) / 2**20, (prompt + size) / 2**20


def layers_mib(again: bool) -> tuple[float, float]:
    """MiB that a forward and backward adds to the peak, and the seconds of the second one."""
    policy = make_policy(layers=24)
    if again:
        policy.checkpoint_layers()
    forest = make_forest(Case(prompt=512, branches=4, depth=1, tokens=128, trees=4))
    for value in policy.parameters():
        value.grad = torch.zeros_like(value)
    before = peak_mib()
    for _ in range(2):
        started = time.perf_counter()
        policy(forest).logprobs.sum().backward()
    return peak_mib() - before, time.perf_counter() - started


FORMS = {
    "all-logits": lambda: head_mib(False),
    "chunked": lambda: head_mib(True),
    "kept": lambda: layers_mib(False),
    "again": lambda: layers_mib(True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the numbers here")
    parser.add_argument("--only", choices=FORMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(FORMS[given.only]()))
        return
    run = [sys.executable, __file__, "--only"]
    whole, chunked, (kept, kept_s), (again, again_s) = (
        json.loads(subprocess.run([*run, form], check=True, capture_output=True, text=True).stdout) for form in FORMS
    )
    repeated, held = cache_mib()
    results = {
        "head": {"repeated": whole, "ours": chunked},
        "cache": {"repeated": repeated, "ours": held},
        "layers": {"repeated": kept, "ours": again},
    }
    print(f"{'MiB':8}{'usual':>10}{'stepcredit':>12}{'share':>8}")
    for name, found in results.items():
        print(f"{name:8}{found['repeated']:10,.0f}{found['ours']:12,.0f}{found['ours'] / found['repeated']:8.0%}")
    print(f"layers computed again take {again_s / kept_s:.2f} times as long ({kept_s:.2f} s and {again_s:.2f} s)")
    if given.json:
        with open(given.json, "w", encoding="utf-8") as out_file:
            json.dump(results, out_file, indent=1)


if __name__ == "__main__":
    main()
