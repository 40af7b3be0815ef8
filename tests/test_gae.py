"""Generalised advantages: vectors by hand, an independent reference over paths, limits, invariances, whitening."""

import math
from dataclasses import dataclass
from random import Random

import pytest
import torch
from builders import flat_forest, is_near, random_forest, random_trees, run
from reference_credit import paths
from torch import Tensor

from stepcredit.credit import CREDIT, assign
from stepcredit.credit.gae import Returns, step_rewards
from stepcredit.credit.returns import rewards_by_token
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree

close = torch.testing.assert_close
COLUMNS = ("values", "value_after", "token_rewards")


def one(values: list[float], reward: float | None, finish: str = "stop", **columns) -> Forest:
    """A forest of one completion."""
    segment = Segment([5] * len(values), reward=reward, finish=finish, columns={"values": values, **columns})
    return Forest.from_trees([Tree(Problem(), [1], [segment])])


# ---------------------------------------------------------------------- by hand


BY_HAND = [
    ({"lam": 1.0}, [0.5, 0.75, 0.25]),  # 1 - V
    ({"lam": 0.0}, [-0.25, 0.5, 0.25]),  # the differences of V, and 1 - .75
    ({"lam": 0.5}, [-0.25 + 0.5 * 0.625, 0.5 + 0.5 * 0.25, 0.25]),
    ({"lam": 1.0, "gamma": 0.5}, [0.25 - 0.5, 0.5 - 0.25, 0.25]),
    ({"lam": 0.5, "gamma": 0.5}, [0.125 - 0.5 + 0.25 * 0.1875, 0.375 - 0.25 + 0.25 * 0.25, 0.25]),
    ({"lam": 1.0, "lam_policy": 0.0}, [-0.25, 0.5, 0.25]),
    ({"lam": 0.0, "length_alpha": 0.5}, [-0.25 + (0.5 + 0.25 / 3) / 3, 0.5 + 0.25 / 3, 0.25]),  # 1 - 1 / (.5 * 3)
    ({"lam": 1.0, "clip": 0.5}, [0.5, 0.5, 0.25]),
]


@pytest.mark.parametrize("options, expected", BY_HAND, ids=str)
def test_one_completion_by_hand(options, expected):
    """Values 1/2, 1/4, 3/4 and the outcome 1."""
    is_near(run(one([0.5, 0.25, 0.75], 1.0), "gae", **options), expected, 1e-6)


@pytest.mark.parametrize(
    "bootstrap, last, first",
    [("zero", -0.75, -0.5), ("hold_last", 0.0, 0.25), ("value", 0.25, 0.5)],
)
def test_a_completion_that_was_cut_off(bootstrap, last, first):
    """Reward 0, gamma 1: the end is worth nothing, what its last state was worth, or 1 by the critic; lam 0 and 1."""
    forest = one([0.5, 0.25, 0.75], 0.0, "length", value_after=[9.0, 9.0, 1.0])
    is_near(run(forest, "gae", lam=0.0, bootstrap=bootstrap), [-0.25, 0.5, last], 1e-6)
    found = run(forest, "gae", lam=1.0, bootstrap=bootstrap)
    is_near(found, [first, first + 0.25, last], 1e-6)
    ended = one([0.5, 0.25, 0.75], 0.0, value_after=[9.0, 9.0, 1.0])
    is_near(run(ended, "gae", lam=0.0, bootstrap=bootstrap), [-0.25, 0.5, -0.75], 1e-6)


@pytest.mark.parametrize("kind", ["flat", "chain", "deep"])
def test_egae_ends_in_exactly_zero(kind):
    """At gamma 1 the last sampled token of a cut-off completion without reward has advantage 0, whatever lambda is."""
    trees = random_trees(3, kind, columns=("values",), unjudged=0.0)
    for segment in (segment for tree in trees for segment in tree.segments):
        segment.finish = "cut" if segment.reward is None else "length"
        segment.reward = None if segment.reward is None else 0.0
    forest = Forest.from_trees(trees)
    last = (forest.segment["start"] + forest.segment["length"] - 1)[forest.segment["is_leaf"]]
    for lam in (0.0, 0.3, 1.0):
        found = run(forest, "gae", lam=lam, bootstrap="hold_last")
        assert found[last].abs().max() == 0 and found.abs().max() > 0.1 and len(last) > 4


def test_a_tree_by_hand():
    """Two tokens of 1/2, then a leaf of value 1/4 with 1 and one of 3/4 with 0, gamma 1 and lam 1/2.

    The leaves' advantages are 3/4 and -3/4, whose mean is 0, and their mean value is 1/2.
    """
    segments = [Segment([5, 6], finish="cut", columns={"values": [0.5, 0.5]})]
    segments += [Segment([7], 0, reward=1.0, columns={"values": [0.25]})]
    segments += [Segment([8], 0, reward=0.0, columns={"values": [0.75]})]
    segments += [Segment([9], 0, columns={"values": [99.0]})]  # unjudged
    forest = Forest.from_trees([Tree(Problem(), [1], segments)])
    is_near(run(forest, "gae", lam=0.5), [0.0, 0.0, 0.75, -0.75, 0.0], 1e-6)
    unequal = forest.with_segment(reward=torch.tensor([0.0, 2.0, 0.0, 0.0]))
    is_near(run(unequal, "gae", lam=0.5), [0.125, 0.25, 1.75, -0.75, 0.0], 1e-6)


def test_tokens_of_tools_are_no_steps():
    """Values 1/2 and 1 around a tool's answer: one step from one to the other, with one discount."""
    segments = [
        Segment([1], columns={"values": [0.5]}),
        Segment([2] * 9, 0, sampled=False, columns={"values": [7.0] * 9}),
    ]
    segments += [Segment([3], 1, reward=1.0, columns={"values": [1.0]})]
    forest = Forest.from_trees([Tree(Problem(), [1], segments)])
    is_near(run(forest, "gae", gamma=0.5, lam=0.0), [0.5 - 0.5] + [0.0] * 9 + [0.0], 1e-6)
    is_near(run(forest, "gae", gamma=0.5, lam=1.0), [0.5 - 0.5] + [0.0] * 9 + [0.0], 1e-6)


# ---------------------------------------------------------------------- against the reference


@dataclass
class Path:
    """A judged completion: rows of its sampled tokens, and its share among the completions below each segment."""

    rows: list[int]
    segments: list[int]
    reward: float
    cut: bool
    last: int  # row of the last token, sampled or not


def judged_paths(trees: list[Tree]) -> list[tuple[Path, dict[int, float]]]:
    """All judged completions; with each the chance to end there from each segment, children equally likely."""
    found, first_row, first_segment = [], 0, 0
    for tree in trees:
        own = [path for path in paths(tree) if tree.segments[path[-1]].reward is not None]
        starts = [first_row + sum(len(s.token_ids) for s in tree.segments[:k]) for k in range(len(tree.segments))]
        for path in own:
            rows = [
                starts[k] + n for k in path if tree.segments[k].sampled for n in range(len(tree.segments[k].token_ids))
            ]
            chance, share = 1.0, {}
            for depth in range(len(path) - 1, -1, -1):
                share[first_segment + path[depth]] = chance
                siblings = {other[depth] for other in own if other[:depth] == path[:depth] and len(other) > depth}
                chance /= len(siblings)
            leaf = tree.segments[path[-1]]
            last = starts[path[-1]] + len(leaf.token_ids) - 1
            found.append((Path(rows, path, leaf.reward, leaf.finish == "length", last), share))
        first_row += sum(len(s.token_ids) for s in tree.segments)
        first_segment += len(tree.segments)
    return found


def reference(
    trees: list[Tree], gamma: float = 1.0, lam: float = 0.95, bootstrap: str = "zero", length_alpha: float = 0.0
) -> list[float]:
    """GAE of every completion by itself, term by term; a shared token gets the mean, weighed by the chances."""
    every = [segment for tree in trees for segment in tree.segments]
    segment_of = [k for k, segment in enumerate(every) for _ in segment.token_ids]
    column = {name: [x for s in every for x in s.columns.get(name, [0.0] * len(s.token_ids))] for name in COLUMNS}
    values, total = column["values"], [0.0] * len(segment_of)
    completions = judged_paths(trees)
    length = [0.0] * len(segment_of)
    for path, share in completions:
        for row in path.rows:
            length[row] += share[segment_of[row]] * len(path.rows)

    def lam_of(row: int) -> float:
        return max(0.0, 1 - 1 / (length_alpha * length[row])) if length_alpha else lam

    for path, share in completions:
        size = len(path.rows)
        if not size:
            continue
        behind = 0.0
        if path.cut and bootstrap != "zero":
            behind = values[path.rows[-1]] if bootstrap == "hold_last" else column["value_after"][path.last]
        following = [*(values[row] for row in path.rows[1:]), behind]
        rewards = [column["token_rewards"][row] for row in path.rows]
        rewards[-1] += path.reward
        delta = [r + gamma * v - values[row] for r, v, row in zip(rewards, following, path.rows, strict=True)]
        for t, row in enumerate(path.rows):
            terms = [math.prod(gamma * lam_of(path.rows[j]) for j in range(t, k)) * delta[k] for k in range(t, size)]
            total[row] += share[segment_of[row]] * math.fsum(terms)
    return total


OPTIONS = [
    {},
    {"lam": 1.0},
    {"lam": 0.0, "gamma": 0.7},
    {"lam": 0.6, "gamma": 0.9, "bootstrap": "hold_last"},
    {"lam": 0.6, "gamma": 0.9, "bootstrap": "value"},
    {"lam": 1.0, "gamma": 1.0, "bootstrap": "hold_last"},
    {"length_alpha": 0.3, "gamma": 0.9},
]


@pytest.mark.parametrize(
    "kind, unsampled", [("flat", 0.0), ("flat", 0.3), ("chain", 0.3), ("deep", 0.0), ("deep", 0.3)]
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equal_to_the_reference(options, kind, unsampled):
    """Ragged trees with tools, unjudged and cut-off completions and dense rewards."""
    cut = 0
    for seed in range(8):
        trees = random_trees(seed, kind, unsampled=unsampled, columns=COLUMNS)
        forest = Forest.from_trees(trees)
        is_near(run(forest, "gae", **options), reference(trees, **options), 2e-5)
        cut += sum(path.cut for path, _ in judged_paths(trees))
    assert cut > 5


def test_on_completions_the_rewards_are_those_of_the_other_credits():
    for seed in range(4):
        trees = random_trees(seed, "chain", unsampled=0.3, columns=("token_rewards",))
        forest = Forest.from_trees(trees)
        close(step_rewards(forest), rewards_by_token(forest), atol=1e-12, rtol=0)


# ---------------------------------------------------------------------- limits and invariances


@pytest.mark.parametrize("kind", ["flat", "chain", "deep"])
@pytest.mark.parametrize("bootstrap", ["zero", "hold_last", "value"])
def test_a_critic_that_knows_the_returns_leaves_nothing(kind, bootstrap):
    """gamma 1, lam 1: A = G - V, exactly; with V = G it is 0, and so it is for lam 0 where nothing is cut off."""
    forest = random_forest(5, kind, columns=COLUMNS, unsampled=0.2)
    returns = Returns(1.0, 1.0, bootstrap).of(forest, forest.token["values"]).float()
    found = run(forest, "gae", lam=1.0, bootstrap=bootstrap)
    counted = forest.judged[forest.token["segment"]] & forest.token_sampled
    close(found[counted], (returns - forest.token["values"])[counted], atol=1e-6, rtol=0)
    ended = forest.with_segment(finish=torch.zeros_like(forest.segment["finish"]))
    perfect = Returns(1.0, 1.0).of(ended, ended.token["values"])
    assert perfect.abs().max() > 0.5
    for lam in (0.0, 0.7, 1.0):
        assert run(ended.with_token(values=perfect), "gae", lam=lam, bootstrap=bootstrap).abs().max() < 1e-6


def test_targets_are_advantages_plus_values():
    """TRL and verl make them so; here they are lambda-returns, with lam whatever lam_policy is."""
    forest = random_forest(2, "deep", columns=COLUMNS)
    for lam in (0.0, 0.5, 1.0):
        target = Returns(0.9, lam, "hold_last").of(forest, forest.token["values"])
        found = run(forest, "gae", gamma=0.9, lam=lam, bootstrap="hold_last")
        counted = forest.judged[forest.token["segment"]]
        close((found + forest.token["values"])[counted], target.float()[counted], atol=1e-6, rtol=0)
        assert target[~counted].abs().max() == 0


def test_permuting_completions_permutes_advantages():
    random = Random(1)
    trees = random_trees(5, "flat", columns=COLUMNS)
    orders = [random.sample(range(len(tree.segments)), len(tree.segments)) for tree in trees]
    mixed = [
        Tree(tree.problem, tree.prompt_ids, [tree.segments[k] for k in order])
        for tree, order in zip(trees, orders, strict=True)
    ]
    before, after = Forest.from_trees(trees), Forest.from_trees(mixed[::-1])

    def rows(forest: Forest, options: dict) -> list[list[float]]:
        found = run(forest, "gae", **options).split(forest.segment["length"].tolist())
        return sorted([round(x, 5) + 0.0 for x in row.tolist()] for row in found)

    for options in ({}, {"whiten": True, "whiten_rewards": True}, {"bootstrap": "hold_last"}):
        assert torch.tensor([x for row in rows(before, options) for x in row]).allclose(
            torch.tensor([x for row in rows(after, options) for x in row]), atol=3e-5
        )


def test_how_a_completion_is_cut_into_segments_changes_nothing():
    """Three tokens as one segment, and as three."""
    values, dense = [0.5, -0.25, 0.75], [0.0, 0.125, -0.5]
    whole = one(values, 1.0, "length", token_rewards=dense)
    pieces = [
        Segment([5], k - 1, "length", reward=1.0 if k == 2 else None, columns={"values": [v], "token_rewards": [d]})
        for k, (v, d) in enumerate(zip(values, dense, strict=True))
    ]
    cut = Forest.from_trees([Tree(Problem(), [1], pieces)])
    for options in ({"gamma": 0.9}, {"bootstrap": "hold_last"}, {"length_alpha": 0.5}):
        close(run(whole, "gae", **options), run(cut, "gae", **options), atol=1e-7, rtol=0)


def test_sharing_a_prefix_changes_nothing():
    """A tree, and its completions apart: a shared token has the mean, one behind the fork what it had."""
    shared, ends = {"values": [0.5, 0.25]}, [([0.75], 1.0), ([0.0, -1.0], 0.0)]
    tree = [Segment([5, 6], finish="cut", columns=shared)]
    tree += [Segment([7] * len(v), 0, reward=r, columns={"values": v}) for v, r in ends]
    apart = [Segment([5, 6] + [7] * len(v), reward=r, columns={"values": shared["values"] + v}) for v, r in ends]
    together, flat = (Forest.from_trees([Tree(Problem(), [1], segments)]) for segments in (tree, apart))
    for options in ({"gamma": 0.9, "lam": 0.7}, {"lam": 1.0}):
        a, b = run(together, "gae", **options), run(flat, "gae", **options)
        close(a, torch.cat([(b[:2] + b[3:5]) / 2, b[2:3], b[5:]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{}, {"bootstrap": "value"}, {"whiten": True, "whiten_rewards": True}], ids=str)
def test_unjudged_completions_and_tools_change_nothing(options):
    """Whatever stands in their columns, undefined numbers too; they get 0."""
    trees = random_trees(7, "deep", unsampled=0.3, columns=COLUMNS)
    forest = Forest.from_trees(trees)
    silent = ~(forest.judged[forest.token["segment"]] & forest.token_sampled)
    assert silent.any() and not forest.judged.all()
    names = ("values", "token_rewards")
    spoiled = forest.with_token(**{name: torch.where(silent, torch.nan, forest.token[name]) for name in names})
    found = run(spoiled, "gae", **options)
    assert found.equal(run(forest, "gae", **options)) and found[silent].abs().max() == 0


# ---------------------------------------------------------------------- whitening


def masked_whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """As verl and TRL write it, without a mask."""
    mean = values.mean()
    centred = values - mean
    variance = centred.square().mean() * len(values) / (len(values) - 1)
    found = centred * torch.rsqrt(variance + 1e-8)
    return found if shift_mean else found + mean


def test_whitening_of_advantages_and_rewards():
    forest = random_forest(4, "flat", columns=COLUMNS, unsampled=0.2)
    counted = forest.judged[forest.token["segment"]] & forest.token_sampled
    plain = run(forest, "gae", gamma=0.9)
    found = run(forest, "gae", gamma=0.9, whiten=True)
    close(found[counted], masked_whiten(plain[counted]), atol=1e-5, rtol=0)
    assert found[~counted].abs().max() == 0
    rewards = torch.zeros(forest.num_tokens, dtype=torch.float64)
    rewards[counted] = masked_whiten(step_rewards(forest)[counted], shift_mean=False)
    dense = forest.with_token(token_rewards=rewards.float())
    dense = dense.with_segment(reward=torch.zeros(forest.num_segments))
    close(run(forest, "gae", whiten_rewards=True), run(dense, "gae"), atol=1e-5, rtol=0)


def test_equal_advantages_are_whitened_to_zero():
    forest = flat_forest([[3, 1]], [[0.7, 0.7]], values=[[[0.1] * 3, [0.1]]])
    assert run(forest, "gae", lam=1.0, whiten=True).abs().max() == 0
    assert run(one([0.25], 1.0), "gae", whiten=True).abs().max() == 0


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "options, words",
    [
        ({"gamma": 1.5}, "credit.gamma must lie in [0, 1], got 1.5"),
        ({"lam": -0.1}, "credit.lam must lie in [0, 1], got -0.1"),
        ({"lam_policy": 1.1}, "credit.lam_policy must be at most 1"),
        ({"lam_policy": 0.5, "length_alpha": 0.1}, "credit.length_alpha makes lam_policy"),
        ({"clip": -1.0}, "credit.clip must not be negative, got -1.0"),
        ({"length_alpha": -1.0}, "credit.length_alpha must not be negative"),
        ({"bootstrap": "value"}, "reads the column 'value_after'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(options, words):
    with pytest.raises(UserError) as error:
        run(one([0.5], 1.0, "length"), "gae", **options)
    assert words in str(error.value)


def test_values_are_asked_for():
    with pytest.raises(UserError, match="credit 'gae' needs the column 'values'"):
        assign(random_forest(0), "gae", CREDIT["gae"], {})
