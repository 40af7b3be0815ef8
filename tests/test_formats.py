"""Rewards for form, and the penalty for length."""

import pytest

from stepcredit.errors import UserError
from stepcredit.verifiers.formats import boxed, overlong, think


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("so \\boxed{5}.", 1),
        ("\\boxed{\\frac{1}{2}}", 1),
        ("\\boxed{}", 0),
        ("5", 0),
        ("\\boxed{5} or \\boxed{6}", 0),
    ],
)
def test_boxed(text: str, reward: float) -> None:
    assert boxed([""], [text]) == [reward]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a\nb</think>\n5", 1),
        ("  <think></think>5", 1),
        ("<think>a</think>", 0),
        ("a <think>b</think> 5", 0),
        ("<think>a</think> <think>b</think> 5", 0),
        ("</think>a<think> 5", 0),
        ("<think>a 5", 0),
        ("5", 0),
    ],
)
def test_think(text: str, reward: float) -> None:
    assert think([""], [text]) == [reward]


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (120, -1.0)]
)
def test_overlong(length: int, penalty: float) -> None:
    """0 up to 80 of 100 tokens, then down to -1 (arXiv 2503.14476)."""
    assert overlong([""], [""], [[0] * length], max_tokens=100, buffer=20) == pytest.approx([penalty])


@pytest.mark.parametrize(("most", "buffer"), [(0, 0), (10, 0), (10, 11)])
def test_overlong_options(most: int, buffer: int) -> None:
    with pytest.raises(UserError, match=r"reward.options.overlong"):
        overlong([""], [""], [[0]], max_tokens=most, buffer=buffer)
