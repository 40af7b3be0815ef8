"""Tokens a second of the decode loop with and without a window, where few completions are much longer than the others.

A random model samples completions of lengths that are drawn beforehand: `1 - tail` of them are geometric with mean
`mean`, the rest reaches the token limit. Its stop tokens are what a completion draws with probability 1 / mean, so the
limit of each completion is its length. A batch of the same rows is sampled in each iteration: without a window until
the last row has ended, with one for at most so many tokens, what has not ended going on next time and being encoded
again. `idle` is the share of rows times steps in which a row had ended and waited for the longest of its batch.

python benchmarks/window.py [--rows 32] [--limit 512] [--window 64 128] [--iterations 6] [--threads N] [--json FILE]
"""

import argparse
import json
import time
from dataclasses import dataclass

import numpy as np
import torch
from forest import make_policy

from stepcredit.samplers.params import SamplingParams, Stream
from stepcredit.samplers.transformers import TransformersSampler

PROMPT = 32  # tokens


@dataclass
class Row:
    """A completion: its prompt and number, how long it will be, and its tokens so far."""

    prompt: list[int]
    number: int
    length: int
    tokens: list[int]


class Rows:
    """Completions of drawn lengths, the same for every window."""

    def __init__(self, vocabulary: int, mean: int, tail: float, limit: int) -> None:
        self.chance = np.random.default_rng(0)
        self.vocabulary, self.mean, self.tail, self.limit, self.begun = vocabulary, mean, tail, limit, 0

    def next(self) -> Row:
        self.begun += 1
        long = self.chance.random() < self.tail
        length = self.limit if long else min(self.limit, int(self.chance.geometric(1 / self.mean)))
        prompt = self.chance.integers(0, self.vocabulary, PROMPT).tolist()
        return Row(prompt, self.begun, length, [])


def iterate(sampler: TransformersSampler, rows: Rows, count: int, window: int, iterations: int) -> dict[str, float]:
    """Tokens a second and idle rows of some iterations, after one that warms up."""
    params = SamplingParams(max_new_tokens=rows.limit, stop_token_ids=())
    going: list[Row] = []
    tokens = idle = steps = 0
    seconds = 0.0
    for iteration in range(iterations + 1):
        going += [rows.next() for _ in range(count - len(going))]
        limits = [min(window or rows.limit, row.length - len(row.tokens)) for row in going]
        started = time.perf_counter()
        drawn = sampler.sample(
            [row.prompt + row.tokens for row in going],
            1,
            params,
            [row.number for row in going],
            limits,
            streams=[Stream(0, 1, len(row.tokens)) for row in going],
        )
        taken = time.perf_counter() - started
        sampler.sync(sampler.policy)
        for row, (more,) in zip(going, drawn, strict=True):
            row.tokens += more.token_ids
        going = [row for row in going if len(row.tokens) < row.length]
        if iteration:
            seconds, tokens = seconds + taken, tokens + sum(limits)
            steps, idle = steps + max(limits) * count, idle + max(limits) * count - sum(limits)
    return {"tokens_per_second": tokens / seconds, "idle": idle / steps, "seconds": seconds / iterations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--limit", type=int, default=512, help="most tokens of a completion")
    parser.add_argument("--mean", type=int, default=64, help="mean length of those that are not in the tail")
    parser.add_argument("--tail", type=float, nargs="+", default=[0.0, 0.1], help="share that reaches the limit")
    parser.add_argument("--window", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the numbers here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    policy = make_policy()
    vocabulary = policy.model.config.vocab_size
    results = []
    print(f"{given.rows} rows, limit {given.limit}, mean {given.mean}, {given.threads} threads")
    print(f"{'tail':>6}{'window':>8}{'tokens/s':>10}{'ratio':>7}{'idle':>7}{'s/iteration':>13}")
    for tail in given.tail:
        alone = 0.0
        for window in (0, *given.window):
            rows = Rows(vocabulary, given.mean, tail, given.limit)
            speed = iterate(TransformersSampler(policy), rows, given.rows, window, given.iterations)
            alone = alone or speed["tokens_per_second"]
            ratio = speed["tokens_per_second"] / alone
            results.append({"tail": tail, "window": window, "ratio": ratio, **speed})
            shown = f"{speed['tokens_per_second']:10.0f}{ratio:7.2f}{speed['idle']:7.0%}{speed['seconds']:13.2f}"
            print(f"{tail:6.0%}{window or 'none':>8}{shown}", flush=True)
    if given.json:
        with open(given.json, "w", encoding="utf-8") as out_file:
            json.dump(
                {"rows": given.rows, "limit": given.limit, "mean": given.mean, "results": results}, out_file, indent=1
            )


if __name__ == "__main__":
    main()
