"""Forward and backward of one update, each token once, against one row per completion and per node, in one run.

The floor is the arithmetic of every token position computed once (matrix products of the layers, the scores inside each
path, the output layer for sampled tokens; three times the forward) at the matrix rate measured in the same run.

python benchmarks/forest.py [--cases group-128 tree-8x3x8 ...] [--repeats 3] [--threads N] [--json FILE]
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from stepcredit.forest import Forest
from stepcredit.policy.batching import cut
from stepcredit.policy.forward import Path, Policy
from stepcredit.policy.packing import Packing
from stepcredit.types import Problem, Segment, Tree

VOCABULARY = 512
ROW_BUDGET = 1 << 14  # token positions of one micro-batch, for all forms


@dataclass(frozen=True)
class Case:
    """Trees of equal shape: every node has `branches` children of `tokens` tokens, `depth` levels deep."""

    prompt: int
    branches: int
    depth: int
    tokens: int
    trees: int


CASES = {
    "group-128": Case(prompt=128, branches=8, depth=1, tokens=64, trees=4),
    "group-1024": Case(prompt=1024, branches=8, depth=1, tokens=128, trees=2),
    "tree-4x3x32": Case(prompt=64, branches=4, depth=3, tokens=32, trees=2),
    "tree-8x3x8": Case(prompt=64, branches=8, depth=3, tokens=8, trees=1),
    "tree-8x3x128": Case(prompt=128, branches=8, depth=3, tokens=128, trees=1),
}


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


def make_forest(case: Case) -> Forest:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()

    trees = []
    for number in range(case.trees):
        segments: list[Segment] = []
        level = [-1]
        for depth in range(case.depth):
            finish = "stop" if depth == case.depth - 1 else "cut"
            first = len(segments)
            segments += [Segment(tokens(case.tokens), up, finish) for up in level for _ in range(case.branches)]
            level = list(range(first, len(segments)))
        trees.append(Tree(Problem(id=str(number)), tokens(case.prompt), segments))
    return Forest.from_trees(trees)


def one_row_per_node(forest: Forest) -> Forest:
    """Every node a tree of its own, behind all the tokens before it."""
    trees = []
    for tree in forest.to_trees():
        before: list[list[int]] = []
        for segment in tree.segments:
            above = tree.prompt_ids if segment.parent < 0 else before[segment.parent]
            before.append([*above, *segment.token_ids])
            trees.append(Tree(tree.problem, list(above), [Segment(segment.token_ids)]))
    return Forest.from_trees(trees)


def update(policy: Policy, forest: Forest, path: Path) -> Callable[[], None]:
    policy.path = path
    rows = forest.ends.sum() if path == "plain" else 1
    parts = cut(forest, ROW_BUDGET)
    if path == "plain":  # rows hold their prompts each
        longest = int(
            (forest.tree["prompt_length"][forest.segment["tree"]] + forest.path_offset + forest.segment["length"]).max()
        )
        ends = forest.ends.nonzero().squeeze(1)
        parts = []
        for rows in ends.split(max(1, ROW_BUDGET // longest)):
            keep = torch.zeros(forest.num_segments, dtype=torch.bool)
            keep[rows] = True
            parts.append(forest.select(keep))

    def run() -> None:
        policy.zero_grad()
        for part in parts:
            policy(part).logprobs.sum().backward()

    return run
