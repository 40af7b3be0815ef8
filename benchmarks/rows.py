"""Seconds that credit of padded rows takes: groups of 8, every row full, least of two calls.

python benchmarks/rows.py [--rows 4096] [--tokens 4096] [--threads 1] [--device cpu]
"""

import argparse
import time

import torch

from stepcredit.adapters.rows import credit_rows

NAMES = ("grpo", "opo", "rloo", "spro", "reward_to_go")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    generator = torch.Generator().manual_seed(0)
    shape, device = (given.rows, given.tokens), given.device
    groups, mask = torch.arange(given.rows) // 8, torch.ones(shape, dtype=torch.bool, device=device)
    rewards = torch.randint(2, (given.rows,), generator=generator).float()
    logprobs = {name: torch.rand(shape, generator=generator).to(device) for name in ("old_logprobs", "ref_logprobs")}
    for name in NAMES:
        taken = []
        for _ in range(2):
            started = time.perf_counter()
            credit_rows(name, groups, mask, rewards, logprobs if name == "spro" else {}).sum().item()
            taken.append(time.perf_counter() - started)
        print(f"{name:14}{min(taken):8.2f} s")


if __name__ == "__main__":
    main()
