"""The tables: nothing is lost on the way in and out, and every link is the one drawn by hand."""

import pytest
import torch
from builders import random_forest, random_trees
from reference_credit import paths

from stepcredit.errors import UserError
from stepcredit.forest import Forest, Table
from stepcredit.forest.types import Problem, Segment, Tree

KINDS = ("flat", "chain", "deep")


def deep_forest() -> Forest:
    """Two trees; segment 1 of the first is a tool's answer, its completions 3 and 5 are unjudged."""
    first = [
        Segment([10, 11], finish="cut"),
        Segment([20, 21, 22], parent=0, finish="cut", sampled=False),
        Segment([30], parent=1, reward=1.0),
        Segment([31, 32], parent=1),
        Segment([40], parent=0, finish="length", reward=0.5),
        Segment([50, 51]),
    ]
    second = [Segment([60], finish="cut"), Segment([61], parent=0, reward=0.0)]
    return Forest.from_trees([Tree(Problem(id="t"), [1, 2, 3], first), Tree(Problem(id="u"), [9], second)])


def chains() -> Forest:
    """One tree, two completions of two segments each, interleaved."""
    segments = [Segment([1, 2]), Segment([3]), Segment([5], parent=0, reward=1.0), Segment([6, 7], parent=1)]
    return Forest.from_trees([Tree(Problem(id="c"), [8], segments)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_trees_come_back_as_they_went_in(kind, seed):
    """to_trees inverts from_trees: ids, links, finishes, rewards (None too), named rewards, columns, extras."""
    trees = random_trees(seed, kind, unsampled=0.2)
    assert Forest.from_trees(trees).to_trees() == trees


def test_columns_added_later_come_out_and_own_columns_do_not():
    """to_trees hands out added columns by segment; ids, segment numbers, positions and sources are no columns."""
    forest = deep_forest().with_token(advantages=torch.arange(13.0))
    out = forest.select(torch.ones(8, dtype=torch.bool)).to_trees()
    assert out[0].segments[1].columns == {"advantages": [2.0, 3.0, 4.0]}
    assert out[1].segments[1].columns == {"advantages": [12.0]}
    assert deep_forest().to_trees()[0].segments[0].columns == {}


@pytest.mark.parametrize(
    "column, expected",
    [
        ("tree", [0, 0, 0, 0, 0, 0, 1, 1]),
        ("parent", [-1, 0, 1, 1, 0, -1, -1, 6]),
        ("depth", [0, 1, 2, 2, 1, 0, 0, 1]),
        ("start", [0, 2, 5, 6, 8, 9, 11, 12]),
        ("length", [2, 3, 1, 2, 1, 2, 1, 1]),
        ("is_leaf", [False, False, True, True, True, True, False, True]),
        ("sampled", [True, False, True, True, True, True, True, True]),
        ("finish", [2, 2, 0, 0, 1, 0, 2, 0]),
        ("reward", [0, 0, 1, 0, 0.5, 0, 0, 0]),
        ("has_reward", [False, False, True, False, True, False, False, True]),
        ("mask", [True] * 8),
    ],
)
def test_segment_table_by_hand(column, expected):
    """Every segment column of the small deep forest."""
    assert deep_forest().segment[column].tolist() == expected


def test_tree_and_token_tables_by_hand():
    """Prompts one after the other; token ids and segment numbers in table order."""
    forest = deep_forest()
    assert (forest.num_trees, forest.num_segments, forest.num_tokens) == (2, 8, 13)
    assert forest.prompt_ids.tolist() == [1, 2, 3, 9]
    assert forest.tree["prompt_start"].tolist() == [0, 3]
    assert forest.tree["prompt_length"].tolist() == [3, 1]
    assert forest.token["token_ids"].tolist() == [10, 11, 20, 21, 22, 30, 31, 32, 40, 50, 51, 60, 61]
    assert forest.token["segment"].tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7]
    assert forest.token_tree.tolist() == [0] * 11 + [1] * 2


def test_positions_count_sampled_tokens_only():
    """A tool's tokens all stand at the position of the sampled token after them; path_offset counts them."""
    forest = deep_forest()
    assert forest.token["position"].tolist() == [0, 1, 2, 2, 2, 2, 2, 3, 2, 0, 1, 0, 1]
    assert forest.path_offset.tolist() == [0, 2, 5, 5, 2, 0, 0, 1]


def test_links_of_a_branching_forest_by_hand():
    """previous_token crosses segments; judged goes up from judged leaves; active leaves out tools and unjudged."""
    forest = deep_forest()
    assert forest.previous_token.tolist() == [-1, 0, 1, 2, 3, 4, 4, 6, 1, -1, 9, -1, 11]
    assert forest.judged.tolist() == [True, True, True, False, True, False, True, True]
    assert forest.token_sampled.nonzero().squeeze(1).tolist() == [0, 1, 5, 6, 7, 8, 9, 10, 11, 12]
    assert forest.active.nonzero().squeeze(1).tolist() == [0, 1, 5, 8, 11, 12]
    assert forest.completion_segments(3) == [0, 1, 3]
    assert forest.describe_segment(7) == "tree 'u', segment 1"


def test_links_of_interleaved_completions_by_hand():
    """next_token and leaf follow a completion over segments that do not stand together."""
    forest = chains()
    assert forest.previous_token.tolist() == [-1, 0, -1, 1, 2, 4]
    assert forest.next_token.tolist() == [1, 3, 4, -1, 5, -1]
    assert forest.leaf.tolist() == [2, 3, 2, 3]
    assert forest.judged.tolist() == [True, False, True, False]


def test_masked_segments_are_not_active():
    """A shaper's mask takes its segment's tokens out of active, nothing else."""
    forest = deep_forest()
    mask = torch.ones(8, dtype=torch.bool)
    mask[2] = False
    masked = forest.with_segment(mask=mask)
    assert masked.active.nonzero().squeeze(1).tolist() == [0, 1, 8, 11, 12]
    assert masked.judged.equal(forest.judged)


def test_is_flat_means_no_segment_has_two_children():
    """Many completions at the prompt are flat, chains too; a fork below the prompt is not."""
    assert chains().is_flat and random_forest(0).is_flat and not deep_forest().is_flat
    for what in ("next_token", "leaf"):
        with pytest.raises(UserError, match=f"{what} takes flat forests.*tree 't' branches"):
            getattr(deep_forest(), what)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_links_against_plain_loops(kind, seed):
    """Positions, offsets, predecessors and judged of random forests, path by path."""
    trees = random_trees(seed, kind, unsampled=0.3)
    forest = Forest.from_trees(trees)
    judged = set()
    first = 0
    for tree in trees:
        for path in paths(tree):
            rows = [first + index for index in path]
            if tree.segments[path[-1]].reward is not None:
                judged |= set(rows)
            previous, position, offset = -1, 0, 0
            for row, index in zip(rows, path, strict=True):
                assert int(forest.path_offset[row]) == offset
                for token in range(
                    int(forest.segment["start"][row]),
                    int(forest.segment["start"][row]) + len(tree.segments[index].token_ids),
                ):
                    assert int(forest.previous_token[token]) == previous
                    assert int(forest.token["position"][token]) == position
                    previous, position, offset = token, position + tree.segments[index].sampled, offset + 1
        first += len(tree.segments)
    assert set(forest.judged.nonzero().squeeze(1).tolist()) == judged


def test_select_keeps_ancestors_and_drops_empty_trees():
    """Keeping one leaf keeps its path only; the other tree and its prompt are gone; source names the old rows."""
    keep = torch.zeros(8, dtype=torch.bool)
    keep[3] = True
    part = deep_forest().select(keep)
    assert [problem.id for problem in part.problems] == ["t"]
    assert part.prompt_ids.tolist() == [1, 2, 3]
    assert part.segment["parent"].tolist() == [-1, 0, 1]
    assert part.segment["start"].tolist() == [0, 2, 5]
    assert part.segment["source"].tolist() == [0, 1, 3]
    assert part.token["source"].tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert part.token["token_ids"].tolist() == [10, 11, 20, 21, 22, 31, 32]


def test_select_of_a_selection_names_rows_of_the_first_forest():
    """Sources survive a second selection, prompts and links are those of the second."""
    whole = deep_forest().select(torch.tensor([False, False, False, False, True, True, False, True]))
    again = whole.select_trees(torch.tensor([1]))
    assert again.segment["source"].tolist() == [6, 7]
    assert again.token["source"].tolist() == [11, 12]
    assert again.segment["parent"].tolist() == [-1, 0]
    assert again.prompt_ids.tolist() == [9] and again.tree["prompt_start"].tolist() == [0]


def test_select_trees_keeps_the_order_of_the_forest():
    """Asking for trees 3 and 1 gives 1, then 3."""
    forest = random_forest(1, "deep")
    part = forest.select_trees(torch.tensor([3, 1]))
    assert [problem.id for problem in part.problems] == ["deep-1", "deep-3"]
    whole = forest.to_trees()
    bare = part.to_trees()
    assert bare == [whole[1], whole[3]]


@pytest.mark.parametrize("seed", range(5))
def test_selected_rows_are_rows_of_the_forest(seed):
    """In a random selection every column and every predecessor is that of the source row."""
    forest = random_forest(seed, "deep", unsampled=0.2)
    keep = torch.rand(forest.num_segments, generator=torch.Generator().manual_seed(seed)) < 0.3
    keep[0] = True
    part = forest.select(keep)
    source = part.token["source"]
    for name in ("token_ids", "position", "old_logprobs"):
        assert part.token[name].equal(forest.token[name][source])
    previous = part.previous_token
    assert torch.where(previous < 0, previous, source[previous.clamp(min=0)]).equal(forest.previous_token[source])
    assert keep[part.segment["source"]].sum() == keep.sum()
    for index, extra in zip(part.segment["source"].tolist(), part.details, strict=True):
        assert extra == forest.details[index]


BAD = {
    "no segments": ([], "tree 'bad' has no segments"),
    "missing parent": ([Segment([1]), Segment([1], parent=7)], "tree 'bad', segment 1: parent 7 does not exist"),
    "parent below -1": ([Segment([1], parent=-2)], "tree 'bad', segment 0: parent -2 does not exist"),
    "parent after child": ([Segment([1], parent=1), Segment([1])], "segment 0: parent 1 must come before"),
    "own parent": ([Segment([1]), Segment([1], parent=1)], "segment 1: parent 1 must come before"),
    "empty token_ids": ([Segment([1]), Segment([])], "tree 'bad', segment 1: token_ids is empty"),
    "negative id": ([Segment([4, -1])], "tree 'bad', segment 0: token_ids has a negative id"),
    "unknown finish": ([Segment([1], finish="done")], "segment 0: finish 'done' is not one of stop, length, cut"),
    "reward above a leaf": ([Segment([1], reward=1.0), Segment([2], parent=0)], "segment 0: has children and a reward"),
    "NaN reward": ([Segment([1]), Segment([1], reward=float("nan"))], "tree 'bad', segment 1: reward is NaN"),
    "column length": (
        [Segment([1, 2], columns={"old_logprobs": [0.0]})],
        "tree 'bad', segment 0: old_logprobs has 1 values for 2 tokens",
    ),
    "missing column": (
        [Segment([1], columns={"old_logprobs": [0.0]}), Segment([1])],
        "tree 'bad', segment 1: old_logprobs is missing",
    ),
}


@pytest.mark.parametrize("segments, message", BAD.values(), ids=BAD)
def test_errors_name_tree_and_segment(segments, message):
    """A wrong tree among good ones is named with its segment."""
    good = Tree(Problem(id="good"), [1], [Segment([1], columns={"old_logprobs": [0.0]})])
    with pytest.raises(UserError) as error:
        Forest.from_trees([good, Tree(Problem(id="bad"), [1], segments)])
    assert message in str(error.value)


def test_absent_columns_are_zero_only_where_that_is_right():
    """token_rewards may be missing anywhere, other columns only from unsampled segments; missing means 0."""
    segments = [
        Segment([1, 2], columns={"old_logprobs": [-1.0, -2.0], "token_rewards": [0.5, 0.25]}),
        Segment([3, 4], parent=0, sampled=False),
        Segment([5], parent=1, columns={"old_logprobs": [-3.0]}),
    ]
    forest = Forest.from_trees([Tree(Problem(), [1], segments)])
    assert forest.token["old_logprobs"].tolist() == [-1, -2, 0, 0, -3]
    assert forest.token["token_rewards"].tolist() == [0.5, 0.25, 0, 0, 0]


def test_changes_make_new_forests():
    """with_token and without_token leave the forest as it was; a column of the wrong length is refused."""
    forest = chains()
    more = forest.with_token(advantages=torch.ones(6))
    assert "advantages" not in forest.token and more.token["advantages"].sum() == 6
    assert "advantages" not in more.without_token("advantages").token
    with pytest.raises(ValueError, match="'advantages' has shape"):
        forest.with_token(advantages=torch.ones(5))
    with pytest.raises(ValueError, match="'x' has shape"):
        Table(2, {"x": torch.zeros(3)})


# ---------------------------------------------------------------------- other orders


def extended(seed: int, kind: str, number: int) -> Forest:
    """A forest with columns of all three tables that trees do not know."""
    forest = random_forest(seed, kind, num_trees=3)
    generator = torch.Generator().manual_seed(seed)
    return (
        forest.with_tree(version=torch.full((forest.num_trees,), number))
        .with_segment(worth=torch.rand(forest.num_segments, generator=generator), kept=forest.segment["mask"])
        .with_token(surprise=torch.rand(forest.num_tokens, 2, generator=generator))
    )


@pytest.mark.parametrize("kind", ["flat", "chain", "deep"])
def test_joined_forests_are_their_trees_one_after_the_other(kind):
    """With every column of every table; what trees know is what joining by way of them gave."""
    parts = [extended(seed, kind, seed) for seed in range(3)]
    joined = Forest.join(parts)
    by_trees = Forest.from_trees([tree for part in parts for tree in part.to_trees()])
    for table in ("tree", "segment", "token"):
        for name, column in getattr(by_trees, table).items():
            assert getattr(joined, table)[name].equal(column), name
    assert joined.prompt_ids.equal(by_trees.prompt_ids) and joined.problems == by_trees.problems
    assert joined.tree["version"].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    for table, name in (("segment", "worth"), ("segment", "kept"), ("token", "surprise")):
        assert getattr(joined, table)[name].equal(torch.cat([getattr(part, table)[name] for part in parts]))


@pytest.mark.parametrize("kind", ["flat", "chain", "deep"])
def test_trees_in_another_order(kind):
    forest = extended(5, kind, 1)
    order = torch.tensor([2, 0, 1])
    found = forest.in_order(order)
    trees = forest.to_trees()
    assert found.to_trees() == [trees[index] for index in order]
    again = found.in_order(order.argsort())
    for table in ("tree", "segment", "token"):
        assert all(getattr(again, table)[name].equal(column) for name, column in getattr(forest, table).items())
    assert again.prompt_ids.equal(forest.prompt_ids)


def test_interleaved_forests_take_turns():
    parts = [extended(seed, "deep", seed) for seed in range(2)]
    parts[1] = parts[1].select_trees(torch.tensor([0, 1]))
    found = Forest.interleave(parts)
    assert found.tree["version"].tolist() == [0, 1, 0, 1, 0]
    assert [problem.id for problem in found.problems] == ["deep-0", "deep-0", "deep-1", "deep-1", "deep-2"]
    assert "source" not in found.token and found.token["surprise"].shape[1] == 2


def test_a_column_that_one_forest_lacks_is_named():
    one, other = random_forest(1), random_forest(2)
    with pytest.raises(UserError, match=r"lack the token column 'mine'"):
        Forest.join([one.with_token(mine=one.token["position"]), other])
    joined = Forest.join([one.with_token(token_rewards=torch.ones(one.num_tokens)), other])
    assert joined.token["token_rewards"].tolist() == [1.0] * one.num_tokens + [0.0] * other.num_tokens
