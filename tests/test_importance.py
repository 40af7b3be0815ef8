"""Importance weights."""

import math

import torch
from builders import is_near, objective_of

from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.losses.weights import importance_weights


def ratios(*values: float) -> dict[str, list[float]]:
    """Columns whose quotients are these."""
    return {"old_logprobs": [math.log(value) - 1 for value in values], "rollout_logprobs": [-1.0] * len(values)}


FLAT = [  # a completion that calls a tool, and one without
    Segment([1, 1], columns=ratios(2.0, 1.5), finish="cut"),
    Segment([1, 1], 0, sampled=False, columns=ratios(9.0, 0.1), finish="cut"),
    Segment([1], 1, columns=ratios(0.5), reward=1.0),
    Segment([1] * 3, columns=ratios(0.5, 0.5, 1.0), reward=0.0),
]
BRANCHING = [
    Segment([1, 1], columns=ratios(2.0, 0.75), finish="cut"),
    Segment([1], 0, columns=ratios(0.5), reward=1.0),
    Segment([1, 1], 0, columns=ratios(1.2, 1.0), reward=0.0),
]


def forest_of(segments: list[Segment]) -> Forest:
    return Forest.from_trees([Tree(Problem(), [1], segments)])


def test_importance_of_tokens():
    """Each by itself, at most the cap; 1 for tokens that nobody sampled."""
    is_near(importance_weights(forest_of(FLAT), False, 1.8), [1.8, 1.5, 1, 1, 0.5, 0.5, 0.5, 1])
    is_near(importance_weights(forest_of(FLAT), False, 9.0), [2, 1.5, 1, 1, 0.5, 0.5, 0.5, 1])
    is_near(importance_weights(forest_of(BRANCHING), False, 1.1), [1.1, 0.75, 0.5, 1.1, 1])


def test_importance_of_sequences():
    """Flat: the product over the completion, on all its tokens; in trees over the path to the segment's end."""
    forest = forest_of(FLAT)
    is_near(importance_weights(forest, True, 9.0)[forest.token_sampled], [1.5, 1.5, 1.5, 0.25, 0.25, 0.25])
    is_near(importance_weights(forest, True, 1.4)[forest.token_sampled], [1.4, 1.4, 1.4, 0.25, 0.25, 0.25])
    is_near(importance_weights(forest_of(BRANCHING), True, 1.6), [1.5, 1.5, 0.75, 1.6, 1.6])


def test_importance_in_the_objective():
    forest = forest_of(BRANCHING)
    forest = forest.with_token(advantages=torch.ones(5))
    plain = objective_of(aggregate="token_mean").weights(forest)
    is_near(plain, [0.2] * 5)
    is_near(objective_of(importance="token", importance_cap=1.1).weights(forest), [0.22, 0.15, 0.1, 0.22, 0.2])
    is_near(objective_of(importance="sequence", importance_cap=1.6).weights(forest), [0.3, 0.3, 0.15, 0.32, 0.32])
    without = forest.without_token("rollout_logprobs")
    is_near(objective_of(importance="token").weights(without), [0.2] * 5)
