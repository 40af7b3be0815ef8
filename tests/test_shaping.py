"""Shapers: what they mask leaves every denominator, what they leave alone stays bit for bit."""

import pytest
from builders import flat_forest, objective_of, random_forest, run

from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.shaping.base import Shaper
from stepcredit.shaping.choose import with_raw_rewards
from stepcredit.shaping.shapers import SHAPERS, drop_uniform, mask_truncated, shuffle_rewards

OPTIONS = {"overlong": {"max_tokens": 6, "buffer": 3}, "outcome_gate": {"outcome": "exact", "think": "other"}}


def test_truncated_completions_are_masked_over_all_their_segments():
    """Truncation at the end masks the whole path, and nothing of the completions beside it."""
    segments = [
        Segment([1, 2], finish="cut"),
        Segment([3], finish="length", reward=0.0),
        Segment([4, 5], parent=0, finish="length", reward=0.0),
        Segment([6], reward=1.0),
    ]
    forest = mask_truncated(Forest.from_trees([Tree(Problem(), [1], segments)]))
    assert forest.segment["mask"].tolist() == [False, False, False, True]
    assert objective_of().weights(forest).tolist() == [0, 0, 0, 0, 0, 1]


def test_rewards_of_truncated_completions_stay_in_the_baseline():
    """Masking changes no advantage."""
    forest = random_forest(0, "chain")
    masked = mask_truncated(forest)
    assert not masked.segment["mask"].all() and masked.segment["mask"].any()
    assert run(masked, "rloo").equal(run(forest, "rloo"))


def test_rewards_that_differ_by_rounding_are_uniform():
    """0.1 + 0.2 and 0.3 are one reward, as fp32 has them and a hundredth more is another."""
    forest = drop_uniform(flat_forest([[1, 1], [1, 1]], [[0.3, 0.3000001], [0.3, 0.31]]))
    assert forest.segment["mask"].tolist() == [False, False, True, True]


def test_truncated_leaves_of_a_branching_tree():
    """A truncated leaf is masked, its siblings are not; an inner segment is where all its leaves are truncated."""
    leaf = {"reward": 0.0, "finish": "length"}
    segments = [
        Segment([1], finish="cut"),
        Segment([2], 0, **leaf),
        Segment([3], 0, finish="cut"),
        Segment([4], 2, reward=1.0),
        Segment([5], 2, **leaf),
        Segment([6], finish="cut"),
        Segment([7], 5, finish="cut"),
        Segment([8], 6, **leaf),
        Segment([9], 5, **leaf),
        Segment([10], reward=1.0),
    ]
    forest = mask_truncated(Forest.from_trees([Tree(Problem(), [1], segments)]))
    kept = [0, 2, 3, 9]
    assert forest.segment["mask"].nonzero().squeeze(1).tolist() == kept
    weights = [1 / len(kept) if index in kept else 0 for index in range(len(segments))]
    assert objective_of().weights(forest).tolist() == weights


def test_masked_truncated_leaves_stay_in_the_values():
    """Masking changes no credit of trees either."""
    forest = random_forest(0, "deep")
    masked = mask_truncated(forest)
    assert not masked.segment["mask"].all() and masked.segment["mask"].any()
    assert run(masked, "spo_tree").equal(run(forest, "spo_tree"))


@pytest.mark.parametrize(
    "rewards, kept",
    [
        ([1.0, 0.0], True),
        ([0.3, 0.3001], True),
        ([1.0, 1.0], False),
        ([0.1] * 7, False),
        ([1.0], False),
        ([1.0, None], False),
        ([1.0, None, 0.0], True),
        ([None, None], False),
    ],
)
def test_groups_of_equal_rewards_are_dropped(rewards, kept):
    """Only judged completions are compared; singletons are uniform; the other group keeps its whole step."""
    lengths = [2] * len(rewards)
    forest = drop_uniform(flat_forest([lengths, [1, 3]], [rewards, [1.0, 0.0]]))
    assert forest.segment["mask"].tolist() == [kept] * len(rewards) + [True, True]
    active = 2 * sum(reward is not None for reward in rewards) * kept
    assert objective_of().weights(forest)[-4:].tolist() == pytest.approx([1 / (4 + active)] * 4)


def test_shapers_respect_each_others_masks():
    """The second shaper of a list adds to the mask of the first."""
    forest = random_forest(0, "chain", num_trees=8)
    first, second = mask_truncated(forest).segment["mask"], drop_uniform(forest).segment["mask"]
    assert (first & ~second).any() and (second & ~first).any()
    assert drop_uniform(mask_truncated(forest)).segment["mask"].equal(first & second)
    assert mask_truncated(drop_uniform(forest)).segment["mask"].equal(first & second)


def test_shuffled_rewards_are_the_same_rewards_elsewhere():
    """The judged leaves keep their number and multiset of rewards, unjudged stay unjudged; the same every time."""
    forest = random_forest(0, "chain", num_trees=8)
    shuffled = shuffle_rewards(forest)
    before, after = forest.segment["reward"], shuffled.segment["reward"]
    judged = forest.segment["has_reward"]
    assert not after.equal(before) and after.sort().values.equal(before.sort().values)
    assert shuffled.segment["has_reward"].equal(judged) and after[~judged].abs().max() == 0
    assert shuffle_rewards(forest).segment["reward"].equal(after)


@pytest.mark.parametrize("name", SHAPERS)
def test_shapers_leave_their_argument_alone(name):
    """A shaper makes a new forest."""
    forest = random_forest(0, "chain")
    reward, mask = forest.segment["reward"].clone(), forest.segment["mask"].clone()
    Shaper(name, SHAPERS[name], OPTIONS.get(name, {}))(with_raw_rewards(forest))
    assert forest.segment["reward"].equal(reward) and forest.segment["mask"].equal(mask)
