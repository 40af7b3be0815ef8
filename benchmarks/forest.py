"""Forward and backward of one update, each token once, against one row per completion and per node, in one run.

Micro-batches have about the same number of token positions in all forms. `ratio` is rows over forest in seconds,
`arithmetic` the same in operations: what the ratio would be if every operation took as long in both. The floor is the
arithmetic of every token position computed once (matrix products of the layers, the scores inside each path, the output
layer for sampled tokens; three times the forward) at the matrix rate measured in the same run.

python benchmarks/forest.py [--cases group-128 tree-8x3x8 ...] [--repeats 3] [--threads N] [--json FILE]
"""

import argparse
import json
import time
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.policy.batching import split_into_parts
from stepcredit.policy.forward import Policy, ScoringForm
from stepcredit.policy.packing import Packing
from stepcredit.run.allocator import keep_freed_memory

VOCABULARY = 512
ROW_BUDGET = 1 << 14  # token positions of one micro-batch, for all forms


@dataclass(frozen=True)
class Case:
    """Trees of equal shape: every node has `branches` children of `tokens` tokens, `depth` levels deep.

    `ragged` ones have between half and all of `tokens`; one row per completion pads them.
    """

    prompt: int
    branches: int
    depth: int
    tokens: int
    trees: int
    ragged: bool = False


CASES = {
    "group-128": Case(prompt=128, branches=8, depth=1, tokens=64, trees=4),
    "group-128r": Case(prompt=128, branches=8, depth=1, tokens=64, trees=4, ragged=True),
    "group-1024": Case(prompt=1024, branches=8, depth=1, tokens=128, trees=2),
    "tree-4x3x32": Case(prompt=64, branches=4, depth=3, tokens=32, trees=2),
    "tree-8x3x8": Case(prompt=64, branches=8, depth=3, tokens=8, trees=1),
    "tree-8x3x128": Case(prompt=128, branches=8, depth=3, tokens=128, trees=1),
}


def make_policy(vocabulary: int = VOCABULARY, layers: int = 4) -> Policy:
    """A Qwen2 of about 3 million parameters, if the vocabulary is small and the layers are 4, with random weights."""
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
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

    def length() -> int:
        return (
            int(torch.randint(case.tokens // 2, case.tokens + 1, (), generator=generator))
            if case.ragged
            else case.tokens
        )

    trees = []
    for number in range(case.trees):
        segments: list[Segment] = []
        level = [-1]
        for depth in range(case.depth):
            finish = "stop" if depth == case.depth - 1 else "cut"
            first = len(segments)
            segments += [Segment(tokens(length()), up, finish) for up in level for _ in range(case.branches)]
            level = list(range(first, len(segments)))
        trees.append(Tree(Problem(id=str(number)), tokens(case.prompt), segments))
    return Forest.from_trees(trees)


def one_row_per_node(forest: Forest) -> Forest:
    """Every node a tree of its own, behind all the tokens before it: of a group, one row per completion."""
    trees = []
    for tree in forest.to_trees():
        before: list[list[int]] = []
        for segment in tree.segments:
            above = tree.prompt_ids if segment.parent < 0 else before[segment.parent]
            before.append([*above, *segment.token_ids])
            trees.append(Tree(tree.problem, list(above), [Segment(segment.token_ids)]))
    return Forest.from_trees(trees)


def parts_of(forest: Forest, form: ScoringForm) -> list[Forest]:
    """Micro-batches of about as many token positions for every form."""
    if form != "plain":
        return split_into_parts(forest, ROW_BUDGET)
    parts = []
    for rows in forest.ends.nonzero().squeeze(1).split(max(1, ROW_BUDGET // int(forest.path_length.max()))):
        keep = torch.zeros(forest.num_segments, dtype=torch.bool)
        keep[rows] = True
        parts.append(forest.select(keep))
    return parts


def seconds(policy: Policy, forest: Forest, form: ScoringForm, repeats: int) -> float:
    """Least seconds of a forward and backward, after one that warms up."""
    policy.scoring_form = form
    parts = parts_of(forest, form)
    least = float("inf")
    for _ in range(repeats + 1):
        policy.zero_grad()
        started = time.perf_counter()
        for part in parts:
            policy(part).logprobs.sum().backward()
        least = min(least, time.perf_counter() - started)
    return least


def matrix_rate() -> float:
    """Floating-point operations a second of a large matrix product."""
    left, right = torch.randn(2, 1536, 1536)
    least = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        left @ right
        least = min(least, time.perf_counter() - started)
    return 2 * 1536**3 / least


def operations(policy: Policy, forest: Forest) -> float:
    """Of a forward and backward that computes every position and every pair of positions on a path once."""
    config = policy.model.config
    packing, _ = Packing.of_forest(forest)
    layers = sum(weight.numel() for weight in policy.model.base_model.layers.parameters() if weight.dim() == 2)
    pairs = sum((end - start) * (end - start + 1) / 2 for start, end in packing.squares)
    pairs += sum((last - end) * (end - start) for level in packing.rectangles for start, end, last in level)
    size = config.hidden_size // config.num_attention_heads
    forward = 2 * layers * len(packing.token_ids)
    forward += 4 * pairs * config.num_attention_heads * size * config.num_hidden_layers
    forward += 2 * config.hidden_size * config.vocab_size * forest.num_tokens
    return 3 * forward


def measure(policy: Policy, case: Case, repeats: int) -> dict[str, float]:
    forest = make_forest(case)
    found = {"forest": seconds(policy, forest, "forest", repeats)}
    rows = one_row_per_node(forest)
    found["rows"] = seconds(policy, rows, "plain", repeats)
    if forest.num_tokens <= ROW_BUDGET:  # the cached form copies a parent's keys and values for every child
        found["cached"] = seconds(policy, forest, "cached", repeats)
    found["ratio"] = found["rows"] / found["forest"]
    found["arithmetic"] = operations(policy, rows) / operations(policy, forest)
    found["share_of_floor"] = operations(policy, forest) / matrix_rate() / found["forest"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the numbers here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()  # as in training
    policy, results = make_policy(), {}
    print(f"update, seconds; rows: one per completion (groups) or node (trees); {given.threads} threads")
    print(f"{'case':14}{'rows':>9}{'cached':>9}{'forest':>9}{'ratio':>8}{'arithmetic':>12}{'share of floor':>16}")
    for name in given.cases:
        found = results[name] = measure(policy, CASES[name], given.repeats)
        cached = f"{found['cached']:9.3f}" if "cached" in found else f"{'-':>9}"
        print(
            f"{name:14}{found['rows']:9.3f}{cached}{found['forest']:9.3f}{found['ratio']:8.2f}"
            f"{found['arithmetic']:12.2f}{found['share_of_floor']:16.0%}",
            flush=True,
        )
    if given.json:
        with open(given.json, "w", encoding="utf-8") as out_file:
            json.dump({"threads": given.threads, "cases": results}, out_file, indent=1)


if __name__ == "__main__":
    main()
