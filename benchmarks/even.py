"""The reward of the comparisons: one function, called by every trainer that is compared, and cheap to import."""

from collections.abc import Sequence
from typing import Any


def share_even(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list[float]:
    """The share of even token ids: hardly ever the same for a whole group, so that no completion is left out."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]
