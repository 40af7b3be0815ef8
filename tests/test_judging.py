"""Reward functions of users: what they may take and return, and what is said when they go wrong."""

import numpy
import pytest
import torch

from stepcredit.credit.returns import reward_to_go
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.policy.loading import load_policy
from stepcredit.run.metrics import forest_metrics
from stepcredit.verifiers.judging import Judge
from stepcredit.verifiers.reward import Reward, reward_function
from stepcredit.verifiers.workers import Workers


@pytest.fixture(scope="module")
def tokenizer():
    return load_policy("embedded", "cpu").tokenizer


def judged(tokenizer, *functions, weights=None, on_failure="drop", apart=False) -> Forest:
    """Two completions, of one problem or of two, judged."""
    ends = [Segment([5, 2]), Segment([6, 7, 2])]
    groups = [ends[:1], ends[1:]] if apart else [ends]
    problems = [Problem("Ivy ?", "14", name, {"level": 2}) for name in ("p", "q")]
    forest = Forest.from_trees([Tree(problem, [1], group) for problem, group in zip(problems, groups, strict=False)])
    named = {f"f{number}": function for number, function in enumerate(functions)}
    return Judge(named, weights or [1.0] * len(functions), tokenizer, on_failure=on_failure)(forest)


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
        (lambda completions, **columns: [float("nan")] * 2, "NaN"),
        (lambda completions, **columns: [1e300, -1e300], "1e\\+300"),
        (lambda completions, **columns: 1 / 0, "ZeroDivisionError.*all 2 completions"),
        (lambda completions, colour: [0.0, 0.0], "asks for 'colour'"),
    ],
)
def test_what_is_refused_by_name(tokenizer, function, word: str) -> None:
    with pytest.raises(UserError, match=f"reward function 'f0'.*{word}"):
        judged(tokenizer, function, apart=True)


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


@pytest.mark.parametrize(
    ("on_failure", "rewards", "has_reward"), [("drop", [1.5, 0.0], [True, False]), ("zero", [1.5, 0.5], [True, True])]
)
def test_a_failure_is_counted_and_treated_as_the_config_says(
    tokenizer, caplog, on_failure: str, rewards: list[float], has_reward: list[bool]
) -> None:
    """Dropped: unjudged, though another function gave it a reward. The first of a kind is said once."""
    forest = judged(
        tokenizer,
        lambda completions, **columns: [1.0, float("nan")],
        lambda completions, **columns: [0.5, 0.5],
        on_failure=on_failure,
    )
    assert forest.segment["reward"].tolist() == rewards
    assert forest.segment["has_reward"].tolist() == has_reward
    metrics = forest_metrics(forest.with_token(advantages=torch.zeros(forest.num_tokens)))
    assert metrics["reward/error"] == 0.5 and metrics["reward/timeout"] == 0.0
    assert forest.to_trees()[0].segments[1].extra["failures"] == {"f0": "error"}
    assert caplog.text.count("returned NaN") == 1


def test_a_failure_ends_the_run_where_it_is_to(tokenizer) -> None:
    with pytest.raises(UserError, match=r"f0.*'p'.*NaN.*reward.on_failure is raise"):
        judged(tokenizer, lambda completions, **columns: [1.0, float("nan")], on_failure="raise")


def groups(*answers: str) -> Forest:
    """Two completions of a problem for each answer."""
    trees = [Tree(Problem("q", answer, str(row)), [1], [Segment([5, 2])] * 2) for row, answer in enumerate(answers)]
    return Forest.from_trees(trees)


def breaks_on_bad_rows(completions, answer):
    return [1.0 / (text != "bad") for text in answer]


def test_one_broken_row_does_not_end_the_run(tokenizer) -> None:
    """A round of the prompt filter may hold that one alone."""
    judge = Judge({"f": breaks_on_bad_rows}, [1.0], tokenizer)
    assert judge(groups("bad")).segment["has_reward"].tolist() == [False] * 2
    with pytest.raises(UserError, match=r"ZeroDivisionError.*all 4 completions"):
        judge(groups("bad", "bad"))


def test_a_function_that_has_worked_does_not_end_the_run(tokenizer) -> None:
    judge = Judge({"f": breaks_on_bad_rows, "g": lambda completions: [0.0] * len(completions)}, [1.0, 1.0], tokenizer)
    assert judge(groups("fine", "fine")).segment["has_reward"].all()
    assert not judge(groups("bad", "bad", "bad")).segment["has_reward"].any()
    with pytest.raises(UserError, match="'h'"):
        Judge(judge.rewards | {"h": lambda completions: 0}, [1.0] * 3, tokenizer)(groups("fine", "fine"))


# ---------------------------------------------------------------------- rewards inside completions


def test_token_rewards_reach_credit(tokenizer) -> None:
    """Functions add up by weight; completions of 2 and 3 tokens; reward_to_go returns what is still to come."""
    forest = judged(
        tokenizer,
        lambda completion_ids, **columns: [{"token": [1.0] * len(ids), "reward": 1.0} for ids in completion_ids],
        lambda completion_ids, **columns: [{"step": [4.0], "ends": [1]} for ids in completion_ids],
        weights=[1.0, 0.5],
    )
    assert forest.token["token_rewards"].tolist() == [1.0, 3.0, 1.0, 3.0, 1.0]
    assert forest.segment["reward"].tolist() == [1.0, 1.0]
    assert reward_to_go(forest, baseline="none").tolist() == [5.0, 4.0, 6.0, 5.0, 2.0]


def test_shared_tokens_get_the_mean_of_their_completions(tokenizer) -> None:
    segments = [Segment([5, 6], finish="cut"), Segment([7], parent=0), Segment([8, 2], parent=0)]
    forest = Forest.from_trees([Tree(Problem("q", "1", "p"), [1], segments)])
    rewards = {3: [1.0, 2.0, 3.0], 4: [3.0, 4.0, 5.0, 6.0]}
    judge = Judge(
        {"f": lambda completion_ids, **c: [{"token": rewards[len(i)]} for i in completion_ids]}, [1], tokenizer
    )
    assert judge(forest).token["token_rewards"].tolist() == [2.0, 3.0, 3.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({"token": [1.0]}, "1 token rewards for 2 tokens"),
        ({"step": [1.0, 2.0], "ends": [1]}, "2 step rewards with 1 ends"),
        ({"step": [1.0, 2.0], "ends": [1, 0]}, "must rise"),
        ({"step": [1.0], "ends": [2]}, "within 0 and 1"),
        ({"step": [1.0]}, "expected"),
        ({"token": [1.0, 2.0], "step": [1.0], "ends": [1]}, "expected"),
        ({"tokens": [1.0, 2.0]}, "tokens"),
        ({"token": [float("nan"), 1.0]}, "NaN"),
        ({}, "nothing"),
    ],
)
def test_rewards_that_do_not_fit_are_refused_by_name(tokenizer, value, word: str) -> None:
    with pytest.raises(UserError, match=f"reward function 'f0'.*'p'.*{word}"):
        judged(tokenizer, lambda completions, **columns: [value] * 2, apart=True)


# ---------------------------------------------------------------------- calls and gold answers


@pytest.mark.parametrize(("call_with", "sizes"), [("row", [1, 1, 1]), ("group", [2, 2, 1]), ("batch", [3, 3, 3])])
def test_what_a_call_gets(tokenizer, call_with, sizes: list[int]) -> None:
    trees = [
        Tree(Problem("q", "1", "a"), [1], [Segment([5, 2]), Segment([6, 2])]),
        Tree(Problem("q", "1", "b"), [1], [Segment([5, 2])]),
    ]
    workers = Workers(count=2)
    judge = Judge({"f": reward_function("tests.user_rewards.counts")}, [1.0], tokenizer, workers, call_with=call_with)
    try:
        assert judge(Forest.from_trees(trees)).segment["reward"].tolist() == sizes
    finally:
        judge.close()


def test_gold_answers_are_checked_where_the_function_knows_them() -> None:
    def fussy(prompts, completions, **columns):
        return [float(text != "2") for text in completions]

    fussy.gold = lambda problem: problem.answer
    problems = [Problem("q", answer, f"p{number}") for number, answer in enumerate(["1", "2", None])]
    rewards = {"fussy": Reward("fussy", fussy, gold=fussy.gold), "other": lambda completions: [0.0]}
    (name, check), *rest = Judge(rewards, [1, 1], None).check_gold(problems).items()
    assert name == "fussy" and not rest and check.total == 2
    assert [(problem.id, why) for problem, why in check.failed] == [("p1", "the gold answer gets 0.0: '2'")]
    assert [problem.id for problem in check.missing] == ["p2"]
