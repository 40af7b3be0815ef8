"""Forward and backward of one update: each token once (forest form) against one row per completion, in one run.

python benchmarks/forward.py [--prompt 128] [--groups 4] [--group-size 8] [--completion 64] [--threads N] [--json FILE]
"""

import argparse
import json
import time

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from stepcredit.forest import Forest
from stepcredit.policy.forward import Path, Policy
from stepcredit.types import Problem, Segment, Tree

VOCABULARY = 512


def make_policy() -> Policy:
    """A Qwen2 of about 3 million parameters with random weights."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Policy(Qwen2ForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel())))


def make_forest(groups: int, prompt: int, group_size: int, completion: int) -> Forest:
    """Groups of completions between half and all of `completion` tokens long."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()

    def length() -> int:
        return int(torch.randint(completion // 2, completion + 1, (1,), generator=generator))

    return Forest.from_trees(
        [
            Tree(Problem(id=str(group)), tokens(prompt), [Segment(tokens(length())) for _ in range(group_size)])
            for group in range(groups)
        ]
    )


def seconds(policy: Policy, forest: Forest, path: Path, repeats: int) -> float:
    """Least seconds of a forward and backward."""
    policy.path = path
    least = float("inf")
    for _ in range(repeats + 1):
        policy.zero_grad()
        started = time.perf_counter()
        policy(forest).logprobs.sum().backward()
        least = min(least, time.perf_counter() - started)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    policy, forest = make_policy(), make_forest(given.groups, given.prompt, given.group_size, given.completion)
    plain, shared = (seconds(policy, forest, path, given.repeats) for path in ("plain", "forest"))
    print(
        f"update, {given.groups} prompts of {given.prompt} x {given.group_size} completions of up to "
        f"{given.completion}, {given.threads} threads"
    )
    for name, value, unit in (
        ("one row per completion", plain, " s"),
        ("each token once", shared, " s"),
        ("ratio", plain / shared, ""),
    ):
        print(f"  {name:24}{value:8.3f}{unit}")
    if given.json:
        with open(given.json, "w", encoding="utf-8") as out_file:
            json.dump({"plain": plain, "forest": shared, "ratio": plain / shared}, out_file)


if __name__ == "__main__":
    main()
