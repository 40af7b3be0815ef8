"""Tokens a second of the sampler against `model.generate`, same model, prompts and settings, in one run.

python benchmarks/sampler.py [--prompts 16] [--group-size 8] [--repeats 5] [--threads N] [--json FILE]
"""

import argparse
import json
import time
from collections.abc import Callable

import torch

from stepcredit.policy.loading import load_policy
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.transformers import TransformersSampler
from stepcredit.tasks.chain import problems


def best(run: Callable[[], int], repeats: int) -> tuple[float, int]:
    """Least seconds of a call over the repeats, and the tokens it made."""
    run()
    seconds, tokens = float("inf"), 0
    for _ in range(repeats):
        started = time.perf_counter()
        made = run()
        taken = time.perf_counter() - started
        if taken < seconds:
            seconds, tokens = taken, made
    return seconds, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    policy = load_policy("embedded")
    prompts = [
        list(policy.tokenizer(str(problem.question))["input_ids"]) for problem in problems("held_out", 0, given.prompts)
    ]
    params = SamplingParams(max_new_tokens=given.max_new_tokens)
    sampler = TransformersSampler(policy)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    pad = policy.model.generation_config.pad_token_id

    def ours() -> int:
        groups = sampler.sample(prompts, given.group_size, params, list(range(len(prompts))))
        return sum(len(segment.token_ids) for group in groups for segment in group)

    @torch.inference_mode()
    def generate() -> int:
        out = policy.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=given.group_size,
            max_new_tokens=given.max_new_tokens,
        )
        return int((out[:, longest:] != pad).sum())

    speeds = {}
    for name, run in (("stepcredit", ours), ("model.generate", generate)):
        seconds, tokens = best(run, given.repeats)
        speeds[name] = tokens / seconds
    ratio = speeds["stepcredit"] / speeds["model.generate"]
    rows = given.prompts * given.group_size
    print(f"sampling, {rows} completions of up to {given.max_new_tokens} tokens, {given.threads} threads")
    for name, speed in speeds.items():
        print(f"  {name:16}{speed:10,.0f} tokens/s")
    print(f"  ratio           {ratio:10.2f}")
    if given.json:
        with open(given.json, "w", encoding="utf-8") as out_file:
            json.dump({"tokens_per_second": speeds, "ratio": ratio, "rows": rows, "threads": given.threads}, out_file)


if __name__ == "__main__":
    main()
