"""Length buckets and micro-batch parts: nothing lost, nothing twice, budgets kept."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_forest

from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.policy.batching import gather_owned, length_buckets, split_into_parts

lengths_of_rows = st.lists(st.integers(1, 40), min_size=1, max_size=8)
budgets = st.integers(1, 200)
overheads = st.integers(0, 60)
shapes = pytest.mark.parametrize("deep", [False, True], ids=["flat", "deep"])
seeds = pytest.mark.parametrize("seed", range(4))
token_budgets = pytest.mark.parametrize("budget", [1, 17, 35, 80, 10**6])


def allowed(batch: list[int], budget: int) -> bool:
    return len(batch) == 1 or len(batch) * max(batch) <= budget


def total_cost(batches: list[list[int]], overhead: int) -> int:
    return sum(len(batch) * max(batch) + overhead for batch in batches)


def every_cut(rows: list[int]):
    """All ways to cut a list into runs."""
    for count in range(len(rows)):
        for cuts in combinations(range(1, len(rows)), count):
            bounds = [0, *cuts, len(rows)]
            yield [rows[start:end] for start, end in pairwise(bounds)]


@given(lengths_of_rows, budgets, overheads)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_buckets_are_the_cheapest_runs_within_the_budget(lengths, budget, overhead):
    """A partition in which every batch of several rows fits, no dearer than any cut of the sorted rows."""
    buckets = length_buckets(lengths, budget, overhead)
    assert sorted(row for bucket in buckets for row in bucket) == list(range(len(lengths)))
    batches = [[lengths[row] for row in bucket] for bucket in buckets]
    assert all(allowed(batch, budget) for batch in batches)
    best = min(
        total_cost(batches, overhead)
        for batches in every_cut(sorted(lengths))
        if all(allowed(batch, budget) for batch in batches)
    )
    assert total_cost(batches, overhead) == best


def test_no_rows_make_no_buckets():
    assert length_buckets([], 100) == []


def test_buckets_of_many_rows_keep_the_budget():
    """Ten thousand tokens' worth of rows under a budget of 64: all there, short rows first."""
    lengths = torch.randint(1, 30, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    buckets = length_buckets(lengths, 64)
    assert sorted(row for bucket in buckets for row in bucket) == list(range(700))
    assert all(len(bucket) * max(lengths[row] for row in bucket) <= 64 for bucket in buckets)
    longest = [max(lengths[row] for row in bucket) for bucket in buckets]
    assert longest == sorted(longest)


def size(forest: Forest) -> int:
    return forest.num_tokens + len(forest.prompt_ids)


def longest_path(forest: Forest) -> int:
    whole = forest.path_offset + forest.segment["length"] + forest.tree["prompt_length"][forest.segment["tree"]]
    return int(whole.max())


@shapes
@seeds
@token_budgets
def test_owned_rows_partition_the_tokens(deep, seed, budget):
    """Every token is owned in exactly one part; with room for all there is one part."""
    forest = random_forest(seed, deep, num_trees=4)
    pieces = split_into_parts(forest, budget)
    owned = torch.cat([piece.token["source"][piece.token["owned"]] for piece in pieces])
    assert sorted(owned.tolist()) == list(range(forest.num_tokens))
    assert (len(pieces) == 1) == (budget >= size(forest))


@shapes
@seeds
@token_budgets
def test_parts_keep_the_budget_when_they_can(deep, seed, budget):
    """Tokens and prompts of a part fit the budget, unless the part is one path that is longer alone."""
    forest = random_forest(seed, deep, num_trees=4)
    for piece in split_into_parts(forest, budget):
        assert size(piece) <= budget or piece.segment["is_leaf"].sum() == 1
        assert size(piece) <= max(budget, longest_path(forest))


@shapes
@seeds
@token_budgets
def test_parts_are_whole_paths_of_the_forest(deep, seed, budget):
    """Every row of a part is its source row, after the same prompt and the same tokens; every leaf is in one part."""
    forest = random_forest(seed, deep, num_trees=4)
    marked = forest.with_token(mark=torch.arange(forest.num_tokens))
    paths = completions(marked)
    found = []
    for piece in split_into_parts(marked, budget):
        assert piece.token["source"].equal(piece.token["mark"])
        assert piece.token["token_ids"].equal(forest.token["token_ids"][piece.token["source"]])
        found += completions(piece)
    assert sorted(found) == sorted(paths)


def completions(forest: Forest) -> list[tuple]:
    """Each path from the prompt to a leaf: problem, prompt, and the rows of its tokens in the first forest."""
    prompts = forest.prompt_ids.split(forest.tree["prompt_length"].tolist())
    marks = forest.token["mark"].split(forest.segment["length"].tolist())
    found = []
    for leaf in forest.segment["is_leaf"].nonzero().squeeze(1).tolist():
        tree = int(forest.segment["tree"][leaf])
        rows = torch.cat([marks[segment] for segment in forest.completion_segments(leaf)])
        found.append((forest.problems[tree].id, tuple(prompts[tree].tolist()), tuple(rows.tolist())))
    return found


@shapes
@token_budgets
def test_gather_owned_undoes_the_cut(deep, budget):
    """Values of the parts come back to their rows; what a part does not own is not read."""
    forest = random_forest(7, deep)
    values = torch.arange(forest.num_tokens) + 0.5
    pieces = split_into_parts(forest, budget)
    parts = [
        torch.where(piece.token["owned"], values[piece.token["source"]], torch.nan).requires_grad_() for piece in pieces
    ]
    gathered = gather_owned(forest, pieces, parts)
    assert gathered.equal(values) and not gathered.requires_grad


def test_a_tree_is_split_between_its_leaves():
    """Example: a prompt of 2, a shared segment of 3 and two leaves of 4 under a budget of 10."""
    segments = [Segment([1, 2, 3], finish="cut"), Segment([4] * 4, parent=0), Segment([5] * 4, parent=0)]
    pieces = split_into_parts(Forest.from_trees([Tree(Problem(), [8, 9], segments)]), 10)
    assert [piece.token["source"].tolist() for piece in pieces] == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 7, 8, 9, 10]]
    assert [piece.token["owned"].int().tolist() for piece in pieces] == [[1] * 7, [0] * 3 + [1] * 4]


def test_siblings_stay_together():
    """Example: leaves of different depth, parents first. Under a budget of two leaves with their parent, no parent of
    leaves is computed twice."""
    segments = [
        Segment([1], finish="cut"),
        Segment([2], finish="cut"),
        *(Segment([3, number], parent=number % 2) for number in range(4)),
    ]
    pieces = split_into_parts(Forest.from_trees([Tree(Problem(), [9], segments)]), 6)
    assert [piece.num_tokens for piece in pieces] == [5, 5]
    assert all(bool(piece.token["owned"].all()) for piece in pieces)


@shapes
@seeds
@token_budgets
def test_without_sharing_every_completion_counts_whole(deep, seed, budget):
    """The rows of a part, each with its prompt, fit the budget unless it is one row."""
    forest = random_forest(seed, deep, num_trees=4)
    for piece in split_into_parts(forest, budget, shared=False):
        whole = piece.path_offset + piece.segment["length"] + piece.tree["prompt_length"][piece.segment["tree"]]
        ends = piece.ends
        assert int(whole[ends].sum()) <= budget or int(ends.sum()) == 1


@shapes
def test_a_part_can_be_cut_again(deep):
    """Sources of a selection's parts count from the selection."""
    forest = random_forest(9, deep, num_trees=4)
    half = forest.select(forest.segment["tree"] % 2 == 1)
    pieces = split_into_parts(half, 20)
    owned = torch.cat([piece.token["source"][piece.token["owned"]] for piece in pieces])
    assert sorted(owned.tolist()) == list(range(half.num_tokens))
    assert all(piece.token["token_ids"].equal(half.token["token_ids"][piece.token["source"]]) for piece in pieces)


def trees_of(sizes: list[tuple[int, int, int]]) -> Forest:
    """Flat trees of (prompt tokens, completions, tokens of each)."""
    return Forest.from_trees(
        [
            Tree(Problem(id=str(number)), [1] * prompt, [Segment([5] * tokens) for _ in range(count)])
            for number, (prompt, count, tokens) in enumerate(sizes)
        ]
    )


def test_a_part_that_is_enough_ends_with_its_tree():
    """Four trees of 160 tokens: with 300 being enough two and two; long prompts are never computed twice for it."""
    forest = trees_of([(100, 3, 20)] * 4)
    assert [size(piece) for piece in split_into_parts(forest, 10_000, preferred_tokens=300)] == [320, 320]
    assert [size(piece) for piece in split_into_parts(forest, 10_000, preferred_tokens=100)] == [160] * 4
    assert [size(piece) for piece in split_into_parts(forest, 10_000, preferred_tokens=10_000)] == [640]


def test_a_part_that_is_enough_ends_inside_a_tree_whose_prompt_is_short():
    """A prompt of 4 tokens is less than a sixteenth of 100; one of 8 is not."""
    assert [size(piece) for piece in split_into_parts(trees_of([(4, 10, 32)]), 10_000, preferred_tokens=100)] == [
        100,
        100,
        100,
        36,
    ]
    assert [size(piece) for piece in split_into_parts(trees_of([(8, 10, 32)]), 10_000, preferred_tokens=100)] == [328]


@shapes
@seeds
@token_budgets
def test_what_is_enough_changes_nothing_else(deep, seed, budget):
    """Owned rows still partition the tokens, and the budget still holds."""
    forest = random_forest(seed, deep, num_trees=4)
    pieces = split_into_parts(forest, budget, preferred_tokens=16)
    owned = torch.cat([piece.token["source"][piece.token["owned"]] for piece in pieces])
    assert sorted(owned.tolist()) == list(range(forest.num_tokens))
    assert all(size(piece) <= max(budget, longest_path(forest)) for piece in pieces)
    assert len(pieces) >= len(split_into_parts(forest, budget))
