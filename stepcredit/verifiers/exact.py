"""Exact match of the last line that is not empty."""

from collections.abc import Sequence
from typing import Any

from stepcredit.forest.types import Problem
from stepcredit.verifiers.answers import texts_of, unfit

__all__ = ["final_answer", "gold", "unfit", "verify"]


def verify(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any], **columns: Any) -> list[float]:
    """1 where the completion's last line, without blanks around it, is the answer, or one of a list of answers."""
    return [
        float(final_answer(text) in [each.strip() for each in texts_of(right)])
        for text, right in zip(completions, answer, strict=True)
    ]


def final_answer(completion: str) -> str:
    """The last line that is not empty."""
    lines = [line.strip() for line in completion.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def gold(problem: Problem) -> str | None:
    """The answer, or the first of several, on a line of its own."""
    return None if problem.answer is None else f"The answer is\n{texts_of(problem.answer)[0]}"
