"""Reward functions written for verl: `compute_score(data_source, solution_str, ground_truth, extra_info)`."""

from collections.abc import Mapping, Sequence
from typing import Any

from stepcredit.imports import by_name


class ComputeScore:
    """verl's function under this project's signature.

    `data_source` and `extra_info` are the data's columns of these names (empty where there are none), `ground_truth` is
    the answer. Where the function returns a dictionary its "score" is the reward.
    """

    def __init__(self, path: str) -> None:
        self.compute_score = by_name("reward.functions", path, {})

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **columns: Any
    ) -> list[Any]:
        sources = columns.get("data_source") or [""] * len(completions)
        extras = columns.get("extra_info") or [None] * len(completions)
        scores = []
        for source, text, right, extra in zip(sources, completions, answer, extras, strict=True):
            found = self.compute_score(
                data_source=source, solution_str=text, ground_truth=right, extra_info=extra or {}
            )
            scores.append(found["score"] if isinstance(found, Mapping) else found)
        return scores
