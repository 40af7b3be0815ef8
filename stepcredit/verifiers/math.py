"""Mathematical answers by math-verify: boxed or last expression, LaTeX or plain."""

from collections.abc import Sequence
from typing import Any

from math_verify import parse
from math_verify import verify as equivalent


def verify(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the completion's final expression equals the answer, else 0.

    The answer may be a bare expression (`\\frac{1}{2}`) or a whole solution that ends in `\\boxed{...}`. The gold side
    goes first: math-verify is not symmetric. Its time limits use signals, so call this from the main thread.
    """
    return [_score(text, right) for text, right in zip(completions, answer, strict=True)]


def _score(completion: str, answer: str) -> float:
    gold = parse(answer if "\\boxed" in answer else f"\\boxed{{{answer}}}")
    return float(bool(gold) and equivalent(gold, parse(completion)))
