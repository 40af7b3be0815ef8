"""Reward functions of users: what they may take and return, and what is said when they go wrong."""

import numpy
import pytest
import torch

from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.judging import Judge
from stepcredit.policy.loading import load_policy
from stepcredit.types import Problem, Segment, Tree


@pytest.fixture(scope="module")
def tokenizer():
    return load_policy("embedded", "cpu").tokenizer


def judged(tokenizer, *functions, weights=None) -> Forest:
    """Two completions of one problem, judged."""
    problem = Problem("Ivy ?", "14", "p", {"level": 2})
    forest = Forest.from_trees([Tree(problem, [1], [Segment([5, 2]), Segment([6, 7, 2])])])
    named = {f"f{number}": function for number, function in enumerate(functions)}
    return Judge(named, weights or [1.0] * len(functions), tokenizer)(forest)


async def later(completions, **columns):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    "function",
    [
        lambda completions, **columns: [1, 1.0],
        lambda completions, answer: [float(text != "") for text in answer],
        lambda prompts, completions, level: [float(value == 2) for value in level],
        lambda completions, **columns: numpy.ones(2, dtype=numpy.float32),
        lambda completions, **columns: torch.ones(2),
        lambda completions, **columns: (True for _ in completions),
        later,
    ],
)
def test_what_a_reward_function_may_look_like(tokenizer, function) -> None:
    """Any subset of the columns, any iterable of numbers, async or not."""
    assert judged(tokenizer, function).segment["reward"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda completions, **columns: None, "expected a list"),
        (lambda completions, **columns: 1.0, "expected a list"),
        (lambda completions, **columns: [1.0], "1 values for 2 completions"),
        (lambda completions, **columns: ["yes", "no"], "'yes'"),
        (lambda completions, **columns: [float("nan"), 0.0], "NaN"),
        (lambda completions, **columns: [1e300, 0.0], "1e\\+300"),
        (lambda completions, colour: [0.0, 0.0], "asks for 'colour'"),
    ],
)
def test_what_is_refused_by_name(tokenizer, function, word: str) -> None:
    with pytest.raises(UserError, match=f"reward function 'f0'.*{word}"):
        judged(tokenizer, function)


def test_none_is_left_out_of_the_weighted_sum(tokenizer) -> None:
    """A completion that no function judges has no reward."""
    forest = judged(
        tokenizer,
        lambda completions, **columns: [1.0, None],
        lambda completions, **columns: [None, None],
        weights=[0.5, 2.0],
    )
    assert forest.segment["reward"].tolist() == [0.5, 0.0]
    assert forest.segment["has_reward"].tolist() == [True, False]
