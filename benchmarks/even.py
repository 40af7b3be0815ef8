"""The rewards of the comparisons: the same function for every trainer that is compared."""

from collections.abc import Sequence
from typing import Any


def share_even(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list[float]:
    """The share of even token ids: hardly ever the same for a whole group, so that no completion is left out."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def right(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    answer: Sequence[Any],
    **columns: Any,
) -> list[float]:
    """1 for a right answer, by stepcredit's check of mathematics, else 0: groups that agree carry no gradient."""
    from stepcredit.verifiers.math import verify

    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]  # TRL gives messages
    return verify(prompts, texts, answer)
