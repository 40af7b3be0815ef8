"""Exact match of the last line that is not empty."""

from collections.abc import Sequence
from typing import Any

from stepcredit.forest.types import Problem


def verify(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the completion's last line, without blanks around it, is the answer."""
    return [float(final_answer(text) == right.strip()) for text, right in zip(completions, answer, strict=True)]


def final_answer(completion: str) -> str:
    """The last line that is not empty."""
    lines = [line.strip() for line in completion.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def gold(problem: Problem) -> str | None:
    """The answer itself."""
    return problem.answer
