"""Exact match of the last line that is not empty."""

from collections.abc import Sequence
from typing import Any


def verify(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the completion's last line, without blanks around it, is the answer."""
    return [float(_last_line(text) == right.strip()) for text, right in zip(completions, answer, strict=True)]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
