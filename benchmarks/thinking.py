"""A reward for the thinking before the answer of the embedded task (posterior.yaml)."""

from collections.abc import Sequence
from typing import Any

from stepcredit.demo.chain import check_lines


def right_lines(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The share of right lines before the answer, each checked against the question; 0 where there is no line."""
    shares = []
    for prompt, completion in zip(prompts, completions, strict=True):
        lines = check_lines(prompt, completion)[:-1]
        shares.append(sum(line.ok for line in lines) / max(1, len(lines)))
    return shares
