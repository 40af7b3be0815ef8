"""Reward functions written for verl: `compute_score(data_source, solution_str, ground_truth, extra_info)`."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from stepcredit.imports import by_name

GIVEN = ("data_source", "solution_str", "ground_truth", "extra_info")


class ComputeScore:
    """verl's function under this project's signature.

    `data_source` and `extra_info` are the data's columns of these names (empty where there are none), `ground_truth` is
    the answer as the data have it; further arguments are options. Where the function returns a dictionary its "score"
    is the reward.

    Attributes:
        columns: the only columns of the data that it is given.
    """

    columns = ("prompts", "completions", "answer", "data_source", "extra_info")

    def __init__(self, path: str) -> None:
        self.compute_score = by_name("reward.functions", path, {})
        own = inspect.signature(self.__call__).parameters.values()
        given = [each for each in own if each.kind is not each.VAR_KEYWORD]
        parameters = inspect.signature(self.compute_score).parameters.values()
        options = [
            each if each.kind is each.VAR_KEYWORD else each.replace(kind=each.KEYWORD_ONLY)
            for each in parameters
            if each.name not in GIVEN and each.kind is not each.VAR_POSITIONAL
        ]
        self.__signature__ = inspect.Signature([*given, *options])
        self.takes_any = any(each.kind is each.VAR_KEYWORD for each in options)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        answer: Sequence[Any],
        data_source: Sequence[Any] | None = None,
        extra_info: Sequence[Any] | None = None,
        **options: Any,
    ) -> list[Any]:
        sources = data_source or [""] * len(completions)
        extras = extra_info or [None] * len(completions)
        scores = []
        for source, text, right, extra in zip(sources, completions, answer, extras, strict=True):
            found = self.compute_score(
                data_source=source, solution_str=text, ground_truth=right, extra_info=extra or {}, **options
            )
            scores.append(found["score"] if isinstance(found, Mapping) else found)
        return scores
