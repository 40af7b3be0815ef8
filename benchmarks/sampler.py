"""Tokens a second of the sampler against `model.generate`, same weights, prompts and settings, in one run.

long     a random Qwen2 of 3 million parameters, 8 prompts of 1024 tokens x 8 completions of exactly 128
short    the embedded model on 16 problems of its task x 8 completions that stop by themselves

The floor of `long` is the arithmetic of every position once at the measured matrix rate, plus the bytes of keys and
values (a prompt's once a step for its group, each row's own) at the measured reading rate.

python benchmarks/sampler.py [--cases long short] [--repeats 3] [--threads N] [--json FILE]
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from forest import make_policy, matrix_rate

from stepcredit.demo.chain import problems
from stepcredit.policy.forward import Policy
from stepcredit.policy.loading import load_policy
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.transformers import TransformersSampler


@dataclass(frozen=True)
class Case:
    policy: Policy
    prompts: list[list[int]]
    group_size: int
    params: SamplingParams


def long_case() -> Case:
    policy, generator = make_policy(), torch.Generator().manual_seed(0)
    prompts = torch.randint(0, policy.model.config.vocab_size, (8, 1024), generator=generator).tolist()
    return Case(policy, prompts, 8, SamplingParams(max_new_tokens=128, stop_token_ids=()))


def short_case() -> Case:
    policy = load_policy("embedded")
    questions = [str(problem.question) for problem in problems("held_out", 0, 16)]
    return Case(policy, [list(policy.tokenizer(text)["input_ids"]) for text in questions], 8, SamplingParams())


CASES = {"long": long_case, "short": short_case}


def best(run: Callable[[], int], repeats: int) -> tuple[float, float]:
    """Tokens a second of the fastest call, after one that warms up, and its seconds."""
    run()
    speed, seconds = 0.0, 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        made = run()
        taken = time.perf_counter() - started
        if made / taken > speed:
            speed, seconds = made / taken, taken
    return speed, seconds


def by_sampler(case: Case) -> Callable[[], int]:
    sampler = TransformersSampler(case.policy)

    def run() -> int:
        groups = sampler.sample(case.prompts, case.group_size, case.params, list(range(len(case.prompts))))
        return sum(len(segment.token_ids) for group in groups for segment in group)

    return run


def by_generate(case: Case) -> Callable[[], int]:
    """`generate` of the same weights with transformers' own attention."""
    policy = copy.deepcopy(case.policy)
    policy.scoring_form = "plain"
    longest = max(map(len, case.prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in case.prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in case.prompts])
    exact = case.params.stop_token_ids is not None and not case.params.stop_token_ids
    stop = policy.model.config.vocab_size - 1 if exact else policy.stop_token_ids
    pad = 0 if exact else policy.model.generation_config.pad_token_id

    @torch.inference_mode()
    def run() -> int:
        out = policy.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=case.group_size,
            max_new_tokens=case.params.max_new_tokens,
            min_new_tokens=case.params.max_new_tokens if exact else None,
            eos_token_id=stop,
            pad_token_id=pad,
        )
        return out[:, longest:].numel() if exact else int((out[:, longest:] != pad).sum())

    return run


def reading_rate() -> float:
    """Bytes a second that one pass over memory reads."""
    numbers = torch.ones(1 << 26)
    least = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        numbers.sum()
        least = min(least, time.perf_counter() - started)
    return numbers.numel() * numbers.element_size() / least


def floor_seconds(case: Case) -> float:
    """Of `long`: every position encoded once, every key and value read once a step by all that share it."""
    config = case.policy.model.config
    rows, prompt, new = len(case.prompts) * case.group_size, len(case.prompts[0]), case.params.max_new_tokens
    layers = sum(weight.numel() for weight in case.policy.model.base_model.layers.parameters() if weight.dim() == 2)
    head = config.hidden_size * config.vocab_size
    size = config.hidden_size // config.num_attention_heads
    pairs = len(case.prompts) * prompt * prompt / 2 + rows * (new * prompt + new * new / 2)
    work = 2 * layers * (len(case.prompts) * prompt + rows * new) + 2 * head * rows * new
    work += 4 * pairs * config.num_attention_heads * size * config.num_hidden_layers
    kept = 2 * config.num_key_value_heads * size * config.num_hidden_layers * 4  # bytes of a position
    read = kept * new * (len(case.prompts) * prompt + rows * new / 2)
    return work / matrix_rate() + read / reading_rate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the numbers here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results = {}
    print(f"sampling, tokens a second, {given.threads} threads")
    print(f"{'case':8}{'generate':>10}{'stepcredit':>12}{'ratio':>8}{'share of floor':>16}")
    for name in given.cases:
        case = CASES[name]()
        (ours, seconds), (theirs, _) = best(by_sampler(case), given.repeats), best(by_generate(case), given.repeats)
        found = results[name] = {"stepcredit": ours, "generate": theirs, "ratio": ours / theirs}
        if name == "long":
            found["share_of_floor"] = floor_seconds(case) / seconds
        share = f"{found['share_of_floor']:16.0%}" if "share_of_floor" in found else f"{'-':>16}"
        print(f"{name:8}{theirs:10,.0f}{ours:12,.0f}{ours / theirs:8.2f}{share}", flush=True)
    if given.json:
        with open(given.json, "w", encoding="utf-8") as out_file:
            json.dump({"threads": given.threads, "cases": results}, out_file, indent=1)


if __name__ == "__main__":
    main()
