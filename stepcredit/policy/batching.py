"""Batches of rows: length-sorted buckets inside a level, and parts of a forest by token budget."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stepcredit.forest import Forest

CALL_OVERHEAD = 256  # what one more forward call costs, in token positions (measured on CPU with the embedded model)
PREFERRED_TOKENS_ON_CPU = (
    2048  # token positions beyond which a pass is hardly faster per position, but takes more memory
)
MAX_REPEATED_SHARE = 1 / 16  # of the preferred size: ancestors that may be computed again to end a part there
BLOCK_OVERHEAD = 1 << 13  # what one more attention call costs, in scores (measured on CPU with 4 heads of 64)


def length_buckets(lengths: Sequence[int], max_positions: int, overhead: int = CALL_OVERHEAD) -> list[list[int]]:
    """Group rows into padded batches of the least total cost, sum over batches of rows * longest + overhead.

    Exact, by dynamic programming over the rows sorted by length (the best batches are contiguous in that order).

    Args:
        lengths: tokens in each row.
        max_positions: largest rows * longest of one batch; a single longer row still makes a batch of its own.

    Returns:
        Row numbers of each batch, short rows first.

    >>> length_buckets([9, 1, 1, 9], max_positions=100, overhead=4)
    [[1, 2], [0, 3]]
    """
    order = np.argsort(np.asarray(lengths), kind="stable")
    ordered = np.asarray(lengths)[order]
    best = np.zeros(len(order) + 1)
    start = np.zeros(len(order) + 1, dtype=np.int64)
    for end in range(1, len(order) + 1):
        rows = end - np.arange(end)
        positions = rows * ordered[end - 1]
        cost = np.where((positions <= max_positions) | (rows == 1), best[:end] + positions + overhead, np.inf)
        start[end] = int(cost.argmin())
        best[end] = cost[start[end]]
    buckets = []
    end = len(order)
    while end > 0:
        buckets.append(order[start[end] : end].tolist())
        end = int(start[end])
    return buckets[::-1]


def cheapest_batches(sizes: Sequence[tuple[int, int]], overhead: int = BLOCK_OVERHEAD) -> list[list[int]]:
    """Group blocks into padded batches of least total cost, sum over batches of blocks * tallest * widest + overhead.

    By dynamic programming over the blocks sorted by width, then height; blocks of one size stay together.

    Args:
        sizes: (height, width) of each block.

    Returns:
        Block numbers of each batch.

    >>> cheapest_batches([(2, 9), (1, 1), (3, 9)], overhead=10)
    [[1], [0, 2]]
    """
    blocks: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, size in enumerate(sizes):
        blocks[size].append(index)
    ordered = sorted(blocks, key=lambda size: size[::-1])
    height, width = np.array(ordered, dtype=np.int64).reshape(-1, 2).T
    count = np.array([0, *(len(blocks[size]) for size in ordered)]).cumsum()
    best = np.zeros(len(ordered) + 1)
    start = np.zeros(len(ordered) + 1, dtype=np.int64)
    for end in range(1, len(ordered) + 1):
        tallest = np.maximum.accumulate(height[:end][::-1])[::-1]
        cost = best[:end] + (count[end] - count[:end]) * tallest * width[end - 1] + overhead
        start[end] = int(cost.argmin())
        best[end] = cost[start[end]]
    batches = []
    end = len(ordered)
    while end > 0:
        batches.append([index for size in ordered[start[end] : end] for index in blocks[size]])
        end = int(start[end])
    return batches[::-1]


def split_into_parts(
    forest: Forest,
    max_tokens: int,
    shared: bool = True,
    trees: Sequence[int] | None = None,
    preferred_tokens: int | None = None,
    whole_trees: bool = False,
) -> list[Forest]:
    """Split a forest into parts of at most `max_tokens` token positions.

    Trees with prompts of similar length come together. A tree over the budget is split between subtrees: the ancestors
    of a leaf are in every part that needs them, but `token["owned"]` is True in one part only. A single path over the
    budget still makes a part of its own. Completions of a flat forest are never split.

    Args:
        preferred_tokens: token positions after which a part ends where that costs nothing, between trees, or next to
            nothing, between subtrees whose ancestors are short; None: parts are as large as they may be.
        shared: prompts and shared segments count once per part; otherwise once for every completion.
        trees: numbers of the trees to take; None takes all.
        whole_trees: no tree is split, even if it is over the budget.

    Returns:
        Forests with `token["source"]` (row in `forest`) and `token["owned"]`; the owned rows partition the trees taken.
    """
    parent, length = forest.segment["parent"].tolist(), forest.segment["length"].tolist()
    tree, prompt = forest.segment["tree"].tolist(), forest.tree["prompt_length"].tolist()
    groups: list[list[int]] = []
    used: set[int] = set()
    budget = 0
    taken = range(forest.num_trees) if trees is None else set(trees)
    sizes = tree_sizes(forest) if shared else _unshared_tree_sizes(forest)
    before = -1
    for leaf in _leaves_by_subtree(forest):
        if tree[leaf] not in taken:
            continue
        cost, path = _cost(leaf, used, parent, length, tree, prompt)
        alone, whole_path = _cost(leaf, set(), parent, length, tree, prompt)
        full = budget + cost > max_tokens
        if preferred_tokens is not None and budget + cost > preferred_tokens:
            full = full or alone - cost <= MAX_REPEATED_SHARE * preferred_tokens
        if whole_trees:
            most = max_tokens if preferred_tokens is None else min(max_tokens, preferred_tokens)
            full = tree[leaf] != before and budget + sizes[tree[leaf]] > most
        if not groups or full:
            groups.append([])
            used, budget = set(), 0
            cost, path = alone, whole_path
        groups[-1].append(leaf)
        before = tree[leaf]
        budget += cost
        if shared:
            used |= path
    owned = torch.zeros(forest.num_segments, dtype=torch.bool)
    whole, result = with_source(forest), []
    for group in groups:
        keep = torch.zeros(forest.num_segments, dtype=torch.bool)
        keep[group] = True
        part = whole.select(keep)
        source = part.segment["part_source"]
        first = ~owned[source]
        owned[source] = True
        result.append(part.with_token(owned=first[part.token["segment"]]))
    return result


def unowned_part(forest: Forest) -> Forest:
    """A part that owns nothing, for a process with fewer parts than the others: the shortest path of the forest."""
    ends = forest.ends.nonzero().squeeze(1)
    keep = torch.zeros(forest.num_segments, dtype=torch.bool)
    keep[ends[forest.path_length[ends].argmin()]] = True
    part = with_source(forest).select(keep)
    return part.with_token(owned=torch.zeros(part.num_tokens, dtype=torch.bool))


def tree_sizes(forest: Forest) -> list[int]:
    """[num_trees] token positions of each tree, its prompt included."""
    sampled = torch.zeros(forest.num_trees, dtype=torch.long)
    sampled.index_add_(0, forest.segment["tree"], forest.segment["length"])
    return (sampled + forest.tree["prompt_length"]).tolist()


def _unshared_tree_sizes(forest: Forest) -> list[int]:
    """[num_trees] token positions of a tree with one row for each completion."""
    ends = forest.ends
    rows = torch.zeros(forest.num_trees, dtype=torch.long)
    return rows.index_add_(0, forest.segment["tree"][ends], forest.path_length[ends]).tolist()


def unshared_positions(forest: Forest, segments: Tensor | None = None) -> int:
    """Token positions with one row for each of these segments (bool), by default for each completion."""
    if segments is None:
        segments = forest.ends
    return int(forest.path_length[segments].sum())


def children_of(forest: Forest) -> dict[int, list[int]]:
    """The children of each segment, by its row, and of each prompt, by -1 - tree; empty lists for leaves."""
    children: dict[int, list[int]] = defaultdict(list)
    for segment, parent in enumerate(forest.siblings.tolist()):
        children[parent].append(segment)
    return children


def _leaves_by_subtree(forest: Forest) -> list[int]:
    """The leaves of the forest, those of a subtree together, trees with short prompts first."""
    children = children_of(forest)
    leaves = []
    waiting = [-1 - tree for tree in forest.tree["prompt_length"].argsort(stable=True).tolist()][::-1]
    while waiting:
        node = waiting.pop()
        if node >= 0 and not children[node]:
            leaves.append(node)
        waiting.extend(reversed(children[node]))
    return leaves


def with_source(forest: Forest) -> Forest:
    """The forest with its own row numbers as `source`, whatever it was selected from."""
    return forest.with_segment(
        part_source=torch.arange(forest.num_segments), source=torch.arange(forest.num_segments)
    ).with_token(source=torch.arange(forest.num_tokens))


def _cost(
    leaf: int, used: set[int], parent: list[int], length: list[int], tree: list[int], prompt: list[int]
) -> tuple[int, set[int]]:
    """Token positions that adding the path of `leaf` costs, and its rows; the prompt is row -1 - tree."""
    path: set[int] = set()
    cost, row = 0, leaf
    while row >= 0 and row not in used:
        path.add(row)
        cost += length[row]
        row = parent[row]
    root = -1 - tree[leaf]
    if root not in used:
        path.add(root)
        cost += prompt[tree[leaf]]
    return cost, path


def gather_owned(forest: Forest, parts: Sequence[Forest], values: Sequence[Tensor]) -> Tensor:
    """Put per-token values of the parts back into the rows of the whole forest."""
    out = torch.zeros(forest.num_tokens, dtype=torch.float32)
    for part, value in zip(parts, values, strict=True):
        owned = part.token["owned"]
        out[part.token["source"][owned]] = value.detach().float().cpu()[owned]
    return out
