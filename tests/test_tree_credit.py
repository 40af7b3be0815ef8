"""Credit on trees: vectors of the paper, what is pruned, and an independent reference on random trees."""

import json
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest
import reference_credit
import torch
from builders import is_near, objective_of, random_forest, random_trees, run, squeezed
from torch import Tensor

from stepcredit.cli.main import main
from stepcredit.credit import CREDIT, assign
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.ops import TokenScores
from stepcredit.forest.records import write_trees
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.losses.weights import AGGREGATORS

SCALES = ("variance", "sqrt", "std", "none")
TREE_VARIANTS = [
    ("spo_tree", {}),
    *(("treerpo", {"scale": scale, **rest}) for scale in SCALES for rest in ({}, {"tau": 0.0}, {"tau": 0.3})),
    ("treerpo", {"scale": "none", "tau": 0.5, "at_tau": "keep"}),
    ("treerpo", {"scale": "none", "tau": 0.5, "at_tau": "drop"}),
]
both = pytest.mark.parametrize("name, options", [("treerpo", {"scale": s}) for s in SCALES] + [("spo_tree", {})])


def segments_of(nested: list, parent: int = -1, first: int = 0) -> list[Segment]:
    """Segments of one token, parents first: a list is an inner segment with its children, else a leaf's reward."""
    found: list[Segment] = []
    for child in nested:
        index = first + len(found)
        inner = isinstance(child, list)
        found.append(Segment([index], parent, "cut" if inner else "stop", reward=None if inner else child))
        found += segments_of(child, index, index + 1) if inner else []
    return found


def forest_of(*trees: list) -> Forest:
    """Trees "t0", "t1" ... of nested lists."""
    return Forest.from_trees([Tree(Problem(id=f"t{i}"), [1], segments_of(t)) for i, t in enumerate(trees)])


def credited(forest: Forest, name: str = "treerpo", **options) -> Forest:
    return assign(forest, name, CREDIT[name], options)


def by_segment(forest: Forest) -> Tensor:
    """[num_segments] the advantage of each segment's first token; all of its tokens have it."""
    first = forest.token["advantages"][forest.segment["start"]]
    assert forest.token["advantages"].equal(first[forest.token["segment"]])
    return first


# ---------------------------------------------------------------------- vectors of the paper


@pytest.mark.parametrize(
    "rewards, scale, expected",
    [
        ([0, 0, 1, 1], "variance", [-2, -2, 2, 2]),
        ([0, 0, 1, 1], "sqrt", [-1, -1, 1, 1]),
        ([0, 0, 1, 1], "std", [-(3**0.5) / 2] * 2 + [3**0.5 / 2] * 2),
        ([0, 0, 1, 1], "none", [-0.5, -0.5, 0.5, 0.5]),
        ([1] + [0] * 7, "variance", [8] + [-8 / 7] * 7),
        ([1] + [0] * 7, "sqrt", [7**0.5] + [-(7**-0.5)] * 7),
        ([0.25, 0.5], "variance", [-0.125 / (0.375 * 0.625), 0.125 / (0.375 * 0.625)]),
    ],
)
def test_one_group_by_hand(rewards, scale, expected):
    """Eq. 4 and the other divisors; all groups are kept."""
    forest = credited(forest_of(rewards), scale=scale)
    torch.testing.assert_close(by_segment(forest), torch.tensor(expected, dtype=torch.float32), atol=5e-5, rtol=1e-5)
    assert forest.segment["kept"].all() and forest.active.all()


@pytest.mark.parametrize("aggregate", AGGREGATORS)
def test_a_narrow_group_is_pruned(aggregate):
    """.49 .49 .51 .51 get +-0.04, and no weight; the other group has the weights that it has alone."""
    forest = credited(forest_of([0.49, 0.49, 0.51, 0.51], [0, 0, 1]))
    is_near(by_segment(forest)[:4], [-0.04, -0.04, 0.04, 0.04], 1e-6)
    assert forest.segment["kept"].tolist() == forest.active.tolist() == [False] * 4 + [True] * 3
    objective = objective_of(aggregate=aggregate, constant=7.0)
    weights, alone = objective.weights(forest), objective.weights(credited(forest_of([0, 0, 1])))
    assert weights[:4].abs().max() == 0 and weights[4:].equal(alone) and alone.min() > 0


FIG_2 = [
    [[0, 0, [0, 0, 1]], 0, 0],
    [0, [0, 1, 0], 1],
    [1, 1, [[0, 1, 1], 0, 1]],
]
FIG_2_TOP = [index for index, segment in enumerate(segments_of(FIG_2)) if segment.parent == -1]
# By segment, parents first: the lines are the left, middle and right branch.
FIG_2_VALUES = [
    Fraction(*pair)
    for pair in [(1, 27), (1, 9), (0, 1), (0, 1), (1, 3), (0, 1), (0, 1), (1, 1), (0, 1), (0, 1),
                 (4, 9), (0, 1), (1, 3), (0, 1), (1, 1), (0, 1), (1, 1),
                 (23, 27), (1, 1), (1, 1), (5, 9), (2, 3), (0, 1), (1, 1), (1, 1), (0, 1), (1, 1)]
]  # fmt: skip


def fig_2_advantages(scale: str) -> list[float]:
    """By segment, from the values above."""
    segments, found = segments_of(FIG_2), []
    for own, segment in zip(FIG_2_VALUES, segments, strict=True):
        group = [v for v, other in zip(FIG_2_VALUES, segments, strict=True) if other.parent == segment.parent]
        mean = sum(group) / len(group)
        found.append(float((own - mean) / (mean * (1 - mean) if scale == "variance" else 1)))
    return found


def test_figure_2_of_the_paper():
    """Three-ary with early ends: values 1/27, 4/9, 23/27 below a prompt worth 4/9; first advantages -1.65, 0, 1.65."""
    forest = credited(forest_of(FIG_2))
    value, top = forest.segment["value"], torch.tensor(FIG_2_TOP)
    is_near(value, [float(v) for v in FIG_2_VALUES], 1e-6)
    assert float(value[top].mean()) == pytest.approx(4 / 9, abs=1e-7)
    is_near(by_segment(forest)[top], [-1.65, 0, 1.65])  # (-11/27) / (20/81) is just that
    is_near(by_segment(forest), fig_2_advantages("variance"), 1e-4)
    assert forest.segment["kept"].all()
    spo = credited(forest_of(FIG_2), "spo_tree")
    is_near(by_segment(spo), fig_2_advantages("none"), 1e-6)
    is_near(by_segment(spo)[top], [-11 / 27, 0, 11 / 27], 1e-6)


def test_a_mean_of_means_is_not_the_mean_over_leaves():
    """The left branch of Fig. 2 has 1 right leaf of 7 and is worth 1/27; [[0, 1], 1] is worth 3/4, not 2/3."""
    assert float(credited(forest_of(FIG_2)).segment["value"][0]) == pytest.approx(1 / 27)
    forest = credited(forest_of([[[0, 1], 1], 0]), "spo_tree")
    is_near(forest.segment["value"], [0.75, 0.5, 0, 1, 1, 0])
    is_near(by_segment(forest), [0.375, -0.25, -0.5, 0.5, 0.25, -0.375])


def test_the_example_of_spo_tree():
    """Leaves 0, 1 and 1, 1: the segments -.25, .25, the leaves -.5, .5, 0, 0, the last two pruned."""
    forest = credited(forest_of([[0, 1], [1, 1]]), "spo_tree")
    is_near(by_segment(forest), [-0.25, -0.5, 0.5, 0.25, 0, 0], 0)
    assert forest.segment["kept"].tolist() == [True] * 4 + [False] * 2


# ---------------------------------------------------------------------- through files


def scored(source: str, *words: str) -> list[dict]:
    out = f"scored-{source}"
    assert main(["credit", "--in", source, "--out", out, "--credit.name", "treerpo", *words]) == 0
    return [json.loads(line) for line in Path(out).read_text().splitlines()]


def test_figure_2_through_the_command_line(tmp_path, monkeypatch):
    """Values, advantages and pruned groups stand in the file, which can be scored again to the same bytes."""
    monkeypatch.chdir(tmp_path)
    write_trees(Path("in.jsonl"), forest_of(FIG_2, [0.49, 0.51], [[0, 1], None, [1, 1], [None]]))
    figure, narrow, last = [tree["segments"] for tree in scored("in.jsonl")]
    assert [segment["value"] for segment in figure] == pytest.approx([float(v) for v in FIG_2_VALUES], abs=1e-6)
    assert [a for s in figure for a in s["advantages"]] == pytest.approx(fig_2_advantages("variance"), abs=1e-4)
    assert not any("pruned" in segment for segment in figure)
    assert [figure[index]["advantages"][0] for index in FIG_2_TOP] == pytest.approx([-1.65, 0, 1.65], abs=1e-5)
    assert [segment["value"] for segment in narrow] == [0.49, 0.51]
    for segment in [*narrow, last[3], *last[5:]]:
        assert segment["pruned"] is True and not {"advantages", "weights", "process"} & segment.keys()
    assert [segment.get("value") for segment in last] == [0.5, 0, 1, None, 1, 1, 1, None, None]
    assert ["pruned" in segment for segment in last] == [False, False, False, True, False, True, True, True, True]
    kept = [segment for segment in (*figure, *last) if "pruned" not in segment]
    assert [segment["weights"] for segment in kept] == [[pytest.approx(1 / len(kept))]] * len(kept)
    scored("scored-in.jsonl")
    assert Path("scored-scored-in.jsonl").read_bytes() == Path("scored-in.jsonl").read_bytes()


def test_options_through_the_command_line(tmp_path, monkeypatch):
    """scale, tau and at_tau are read; what an earlier credit wrote is gone from the records."""
    monkeypatch.chdir(tmp_path)
    write_trees(Path("in.jsonl"), forest_of([0, 0.5], [0, 1]))
    words = ["--credit.scale", "none", "--credit.tau", "0.5"]
    narrow, wide = [tree["segments"] for tree in scored("in.jsonl", *words)]
    assert ["advantages" in segment for segment in (*narrow, *wide)] == [False, False, True, True]
    narrow, wide = [tree["segments"] for tree in scored("scored-in.jsonl", *words, "--credit.at-tau", "keep")]
    assert [s["advantages"] for s in (*narrow, *wide)] == [[-0.25], [0.25], [-0.5], [0.5]]
    assert not any("pruned" in segment for segment in (*narrow, *wide))
    assert main(["credit", "--in", "scored-in.jsonl", "--out", "flat.jsonl", "--credit.name", "dr_grpo"]) == 0
    segments = [s for line in Path("flat.jsonl").read_text().splitlines() for s in json.loads(line)["segments"]]
    assert [s["advantages"] for s in segments] == [[-0.25], [0.25], [-0.5], [0.5]]
    assert not any({"value", "pruned"} & segment.keys() for segment in segments)


def test_errors_through_the_command_line(tmp_path, monkeypatch, capsys):
    """A reward out of range and a wrong option end the command with one line."""
    monkeypatch.chdir(tmp_path)
    write_trees(Path("in.jsonl"), forest_of([0, 1], [0, [2, 0]]))
    words = ["credit", "--in", "in.jsonl", "--out", "out.jsonl", "--credit.name", "treerpo"]
    refused = [
        ([], ["tree 't1', segment 2 is worth 2", "[0, 1]"]),
        (["--credit.scale", "mean"], ["credit.scale", "variance, sqrt, std, none"]),
        (["--credit.scale", "none", "--credit.tau", "-0.1"], ["credit.tau must not be negative, got -0.1"]),
    ]
    for extra, parts in refused:
        assert main([*words, *extra]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and [part for part in parts if part not in error] == []
        assert not Path("out.jsonl").exists()


# ---------------------------------------------------------------------- what is pruned


def test_what_is_unjudged_is_in_no_mean():
    """Two of four leaves are unjudged, and a whole branch: the values are those of the judged ones, the rest get 0."""
    forest = credited(forest_of([[None, 0, 1, 1], [None, None], 0, None], [[None], None]))
    alone = credited(forest_of([[0, 1, 1], 0]))
    judged = [0, 2, 3, 4, 8]
    assert forest.judged.nonzero().squeeze(1).tolist() == judged
    for column in ("value", "kept"):
        assert forest.segment[column][judged].equal(alone.segment[column])
    assert by_segment(forest)[judged].equal(by_segment(alone)) and by_segment(alone).abs().min() > 0.1
    others = ~forest.judged
    assert by_segment(forest)[others].abs().max() == 0
    assert not forest.segment["kept"][others].any() and not forest.active[others].any()


def test_advantages_of_rounding_are_pruned():
    """Leaves worth 0.1, 0.2 and 0.3: the middle one is worth their mean, but for rounding."""
    leaves = [Segment([number], reward=number / 10) for number in (1, 2, 3)]
    forest = assign(Forest.from_trees([Tree(Problem(), [1], leaves)]), "spo_tree", CREDIT["spo_tree"], {})
    assert forest.segment["kept"].tolist() == [True, False, True]
    assert forest.token["advantages"][1] == 0


@both
def test_singletons_and_uniform_groups_are_pruned_with_exactly_zero(name, options):
    """No sibling, no judged sibling, or equal values; 0.1 and 0.7, whose means round, too. The others keep theirs."""
    for reward in (0.0, 0.1, 0.7, 1 / 3, 1.0):
        uniform = [[reward] * 7, [[reward, None]], [reward] * 3, [reward], [[reward] * 6, [reward] * 6]]
        forest = credited(forest_of(*uniform, [[[0, 1]]]), name, **options)
        wanted = [False] * (forest.num_segments - 2) + [True] * 2
        assert forest.segment["kept"].tolist() == wanted, reward
        assert by_segment(forest)[:-2].abs().max() == 0 and by_segment(forest)[-2:].abs().min() > 0.1


@pytest.mark.parametrize("name, options", [("treerpo", {"scale": "std", "tau": 0.0}), ("spo_tree", {})])
@pytest.mark.parametrize("nested", [[0.7, [0.7] * 7], [[1] + [0] * 9, [[1] + [0] * 9] * 10]], ids=["leaves", "0/1"])
def test_equal_values_of_unlike_branches_are_uniform(name, options, nested):
    """A leaf of 0.7 beside a branch of leaves of 0.7; the mean of 1/10s beside one 1/10."""
    forest = credited(forest_of(nested), name, **options)
    assert not forest.segment["kept"][forest.segment["parent"] == -1].any()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "tau, at_tau, kept", [(0.5, "drop", False), (0.5, "keep", True), (0.49, "drop", True), (0.51, "keep", False)]
)
def test_a_range_of_just_tau(scale, tau, at_tau, kept):
    """The range of leaves 0.25, 0.75 and of branches worth 0, 0.5 is 0.5; the advantages are the same either way."""
    forest = credited(forest_of([0.25, 0.5, 0.75], [[0, 0], [0, 1]]), scale=scale, tau=tau, at_tau=at_tau)
    assert forest.segment["kept"].tolist() == [kept] * 4 + [False] * 2 + [kept] + [True] * 2
    assert by_segment(forest).equal(by_segment(credited(forest_of([0.25, 0.5, 0.75], [[0, 0], [0, 1]]), scale=scale)))


def test_a_negative_tau_is_refused():
    with pytest.raises(UserError, match=r"credit\.tau must not be negative, got -0\.1"):
        run(forest_of([0, 1]), "treerpo", tau=-0.1)


@pytest.mark.parametrize("reward", [-1.0, 1.5])
@pytest.mark.parametrize("scale", SCALES)
def test_rewards_out_of_range(reward, scale):
    """Refused by name where the divisor is that of a chance, taken where it is not."""
    forest = forest_of([0, 1], [1, [1 if reward < 0 else 0, reward]])  # the mean is in the range
    if scale in ("none", "std"):
        assert by_segment(credited(forest, scale=scale)).abs().min() > 0
        return
    match = rf"credit 'treerpo': tree 't1', segment 3 is worth {reward:g}; scale '{scale}' needs rewards in \[0, 1\]"
    with pytest.raises(UserError, match=match):
        credited(forest, scale=scale)


# ---------------------------------------------------------------------- rules


@pytest.mark.parametrize("scale, flat", [("std", "grpo"), ("none", "dr_grpo")])
def test_trees_of_depth_one_are_groups(scale, flat):
    """With tau 0: GRPO and Dr. GRPO, where kept; what is pruned has 0 there too."""
    forest = random_forest(0, "flat", num_trees=50)
    found = credited(forest, scale=scale, tau=0.0)
    torch.testing.assert_close(found.token["advantages"], run(forest, flat), atol=1e-6, rtol=1e-6)
    kept = found.active
    assert 0.2 < kept.float().mean() < 0.9 and found.token["advantages"][~kept].abs().max() == 0


def test_undivided_treerpo_is_spo_tree():
    """The advantages on deep forests, token rewards included."""
    for seed in range(6):
        forest = random_forest(seed, "deep", unsampled=0.2, columns=("token_rewards",))
        assert run(forest, "treerpo", scale="none", tau=0.0).equal(run(forest, "spo_tree"))


@both
def test_permuting_siblings_permutes_advantages(name, options):
    """Segments in any order, parents first."""
    random = Random(3)
    for seed in range(4):
        (tree,) = random_trees(seed, "deep", num_trees=1, unjudged=0.1)
        order: list[int] = []
        while len(order) < len(tree.segments):
            ready = [i for i, s in enumerate(tree.segments) if i not in order and s.parent in (-1, *order)]
            order.append(random.choice(ready))
        place = {-1: -1, **{origin: row for row, origin in enumerate(order)}}
        mixed = [Segment(s.token_ids, place[s.parent], reward=s.reward) for s in (tree.segments[i] for i in order)]
        before = credited(Forest.from_trees([tree]), name, **options)
        after = credited(Forest.from_trees([Tree(tree.problem, tree.prompt_ids, mixed)]), name, **options)
        torch.testing.assert_close(by_segment(after), by_segment(before)[order], atol=1e-5, rtol=0)
        torch.testing.assert_close(after.segment["value"], before.segment["value"][order])


def test_no_advantage_is_larger_than_the_number_of_siblings():
    """Any rewards in [0, 1], tiny and nearly equal ones too; a lone right one of N has just N."""
    random = Random(0)
    for size in range(1, 13):
        groups = [[random.random() ** random.choice([1, 8, 40]) for _ in range(size)] for _ in range(50)]
        groups += [[1 - reward for reward in group] for group in groups]
        groups += [[float(random.random() < chance) for _ in range(size)] for chance in (0.1, 0.5, 0.9)]
        found = run(forest_of(*groups), "treerpo", tau=0.0)
        assert found.abs().max() <= size * 1.0001
        if size > 1:
            largest = float(run(forest_of([1] + [0] * (size - 1)), "treerpo")[0])
            assert largest == pytest.approx(size, rel=1e-3)


def test_token_rewards_count_from_the_segment_on():
    """What stands above a group is the same for all of it; below the parent it is part of the children's values."""
    rewards = {"a": [0.25, -0.5], "b": [1.0], "c": [0.5, 0.0, 0.25], "d": [0.0], "e": [2.0]}
    column = {name: {"token_rewards": values} for name, values in rewards.items()}
    segments = [
        Segment([1, 2], finish="cut", columns=column["a"]),
        Segment([3], 0, finish="cut", columns=column["b"]),
        Segment([4, 5, 6], 1, reward=0.0, columns=column["c"]),
        Segment([7], 1, reward=1.0, columns=column["d"]),
        Segment([8], 0, reward=0.5),  # a segment without the column
        Segment([9], reward=0.0, columns=column["e"]),
    ]

    def forest() -> Forest:
        return credited(Forest.from_trees([Tree(Problem(), [1], segments)]), scale="none", tau=0.0)

    c, d, e = 0.75, 1.0, 2.0
    b = 1.0 + (c + d) / 2  # 1.875
    a = -0.25 + (b + 0.5) / 2  # 0.9375
    found = forest()
    is_near(found.segment["value"], [a, b, c, d, 0.5, e], 0)
    is_near(by_segment(found), [(a - e) / 2, (b - 0.5) / 2, (c - d) / 2, (d - c) / 2, (0.5 - b) / 2, (e - a) / 2], 0)
    segments[0].columns = {"token_rewards": [10.0, -20.0]}  # moves its own group and nothing below
    moved = forest()
    assert by_segment(moved)[1:5].equal(by_segment(found)[1:5]) and by_segment(moved)[0] != by_segment(found)[0]
    segments[1].sampled = False  # the reward of a tool's token does not count
    is_near(forest().segment["value"][1:5], [(c + d) / 2, c, d, 0.5], 0)


def test_tool_turns_get_no_advantage():
    """Values pass through a segment that was not sampled; the segments below it are siblings all the same."""
    segments = [
        Segment([1, 2], finish="cut"),
        Segment([3, 4, 5], 0, finish="cut", sampled=False),
        Segment([6], 1, reward=1.0),
        Segment([7], 1, reward=0.0),
        Segment([8], finish="cut"),
        Segment([9], 4, finish="cut", sampled=False),
        Segment([10], 5, reward=0.0),
    ]
    for name in ("treerpo", "spo_tree"):
        forest = credited(Forest.from_trees([Tree(Problem(), [1], segments)]), name)
        quarter, half = (4 / 3, 2.0) if name == "treerpo" else (0.25, 0.5)
        is_near(forest.segment["value"], [0.5, 0.5, 1, 0, 0, 0, 0])
        is_near(forest.token["advantages"], [quarter] * 2 + [0] * 3 + [half, -half, -quarter, 0, 0])
        assert forest.active.tolist() == [True] * 2 + [False] * 3 + [True] * 3 + [False] * 2
    siblings = [Segment([1], reward=1.0), Segment([2], reward=0.0, sampled=False), Segment([3], reward=0.0)]
    forest = credited(Forest.from_trees([Tree(Problem(), [1], siblings)]))
    is_near(forest.token["advantages"], [3, 0, -1.5], 5e-5)
    assert forest.active.tolist() == [True, False, True]


@pytest.mark.parametrize("name, options", TREE_VARIANTS, ids=str)
@pytest.mark.parametrize("dense", [False, True])
def test_equal_to_the_reference_on_deep_trees(name, options, dense):
    """Random branching trees with unjudged leaves and tool turns: advantages, values, and what is kept."""
    kept = []
    for seed in range(12):
        trees = random_trees(seed, "deep", unsampled=0.2, columns=("token_rewards",) if dense else ())
        trees = squeezed(trees) if dense else trees
        forest = credited(Forest.from_trees(trees), name, **options)
        is_near(forest.token["advantages"], reference_credit.advantages(name, trees, **options), 1e-4)
        steps = [step for tree in trees for step in reference_credit.steps(name, tree, **options)]
        assert forest.judged.tolist() == [step.value is not None for step in steps]
        is_near(forest.segment["value"], [float(step.value or 0) for step in steps], 1e-6)
        assert forest.segment["kept"].tolist() == [step.kept for step in steps]
        kept += [step.kept for step in steps]
    assert 0.03 < sum(kept) / len(kept) < 0.9


# ---------------------------------------------------------------------- gradient


@pytest.mark.parametrize("surrogate", ["reinforce", "clip"])
@pytest.mark.parametrize("name, top, below", [("spo_tree", 1, 1), ("treerpo", 16 / 3, 4)])
def test_gradient_of_a_tiny_tree(name, top, below, surrogate):
    """A uniform policy over 3 tokens at 4 prefixes; each segment is trained once, with its own advantage.

    Segments 0 1 (worth .5), then 0 (right) or 2 1 (wrong); and 2 (wrong). Sizes 2, 1, 2, 1, so weights 1/4 over size.
    A second tree of equal rewards changes nothing.
    """
    a, b = Segment([0, 1], finish="cut"), Segment([2], reward=0.0)
    segments = [a, Segment([0], 0, reward=1.0), Segment([2, 1], 0, reward=0.0), b]
    same = [Segment([1], reward=1.0), Segment([1, 1, 0], reward=1.0)]
    forest = credited(Forest.from_trees([Tree(Problem(), [1], segments), Tree(Problem(), [1], same)]), name)
    state = torch.tensor([0, 1, 2, 2, 3, 0, 0, 0, 0, 0])  # prefixes "", 0, 01, 012; of the second tree any
    theta = torch.zeros(4, 3, requires_grad=True)
    logprobs = theta.log_softmax(1)[state, forest.token["token_ids"]]
    objective = objective_of(loss=surrogate, aggregate="seq_mean_token_mean")
    forest = forest.with_token(weights=objective.weights(forest))
    loss, _ = objective.loss(TokenScores(logprobs, torch.zeros(10)), forest)
    (found,) = torch.autograd.grad(-loss, theta)
    # sum of weight * advantage * (one-hot - 1/3): e.g. at "" 1/8 * .25 * (e0 - 1/3) - 1/4 * .25 * (e2 - 1/3)
    expected = torch.tensor([[4.0, 1, -5], [-1, 2, -1], [10, -2, -8], [2, -4, 2]]) / 96
    torch.testing.assert_close(found, expected * torch.tensor([[top], [top], [below], [below]]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("at_tau", ["drop", "keep"])
@pytest.mark.parametrize("step", range(10))
def test_ranges_of_a_tenth_are_not_left_to_rounding(at_tau, step):
    """Rewards k/10 and (k+1)/10 are just tau = 0.1 apart, whatever fp32 makes of them."""
    forest = credited(forest_of([step / 10, (step + 1) / 10]), tau=0.1, at_tau=at_tau)
    assert forest.segment["kept"].tolist() == [at_tau == "keep"] * 2


def test_groups_without_difference_are_pruned_even_at_tau_zero():
    """`at_tau` "keep" with tau 0: a singleton and equal siblings still say nothing."""
    forest = credited(forest_of([0.5], [1, 1]), tau=0.0, at_tau="keep")
    assert not forest.segment["kept"].any()
