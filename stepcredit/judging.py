"""Rewards for the leaves of a forest, from reward functions."""

import asyncio
import inspect
import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.verifiers import RewardFunction


class Judge:
    """Calls reward functions on completions and adds their weighted values.

    Args:
        functions: by name, in the order of the config.
        weights: one for each function.
        tokenizer: turns completions into text, special tokens left out.
    """

    def __init__(
        self, functions: dict[str, RewardFunction], weights: Sequence[float], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.functions, self.weights, self.tokenizer = functions, list(weights), tokenizer

    def __call__(self, forest: Forest) -> Forest:
        """The forest with `reward` and `has_reward` on its leaves, and each function's value in `details`.

        A function's None is left out of the sum; a completion that all functions leave out stays unjudged.

        Raises:
            UserError: a function returned the wrong number of values, NaN or something that is no number.
        """
        leaves = forest.segment["is_leaf"].nonzero().squeeze(1).tolist()
        values = self._call(forest, leaves)
        reward, has_reward = torch.zeros(forest.num_segments), torch.zeros(forest.num_segments, dtype=torch.bool)
        details = list(forest.details)
        for row, leaf in enumerate(leaves):
            parts = {name: column[row] for name, column in values.items()}
            judged = [
                weight * part for weight, part in zip(self.weights, parts.values(), strict=True) if part is not None
            ]
            reward[leaf], has_reward[leaf] = sum(judged), bool(judged)
            details[leaf] = {**details[leaf], "rewards": parts}
        return replace(forest.with_segment(reward=reward, has_reward=has_reward), details=tuple(details))

    def _call(self, forest: Forest, leaves: Sequence[int]) -> dict[str, list[float | None]]:
        problems = [forest.problems[int(forest.segment["tree"][leaf])] for leaf in leaves]
        ids = [completion_ids(forest, leaf) for leaf in leaves]
        names = {name for problem in problems for name in problem.columns}
        columns: dict[str, list[Any]] = {name: [problem.columns.get(name) for problem in problems] for name in names}
        columns |= {
            "prompts": [problem.question for problem in problems],
            "completions": self.tokenizer.batch_decode(ids, skip_special_tokens=True),
            "completion_ids": ids,
            "answer": [problem.answer for problem in problems],
            "id": [problem.id for problem in problems],
        }
        results = {}
        for name, function in self.functions.items():
            result = function(**_accepted(name, function, columns))
            if inspect.isawaitable(result):
                result = asyncio.run(_wait(result))
            if not isinstance(result, Iterable):
                raise UserError(f"reward function '{name}' returned {result!r:.40}; expected a list of numbers")
            values = [value.item() if hasattr(value, "item") else value for value in result]  # numpy, torch
            results[name] = _checked(name, values, [problem.id for problem in problems])
        return results


def completion_ids(forest: Forest, leaf: int) -> list[int]:
    """Token ids of the completion that ends in this leaf."""
    ids: list[int] = []
    for segment in forest.completion_segments(leaf):
        start = int(forest.segment["start"][segment])
        ids += forest.token["token_ids"][start : start + int(forest.segment["length"][segment])].tolist()
    return ids


def _accepted(name: str, function: RewardFunction, columns: dict[str, Any]) -> dict[str, Any]:
    """The columns that the function takes: all of them when it has `**columns`."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return columns
    for parameter in parameters:
        if parameter.name not in columns and parameter.default is parameter.empty:
            raise UserError(
                f"reward function '{name}' asks for '{parameter.name}'; there are only {', '.join(sorted(columns))}"
            )
    return {parameter.name: columns[parameter.name] for parameter in parameters if parameter.name in columns}


MAX_REWARD = 1e30  # within fp32, sums of a batch included


async def _wait(result: Any) -> Any:
    return await result


def _checked(name: str, values: list[Any], ids: Sequence[str]) -> list[float | None]:
    if len(values) != len(ids):
        raise UserError(f"reward function '{name}' returned {len(values)} values for {len(ids)} completions")
    for value, problem in zip(values, ids, strict=True):
        if value is not None and not isinstance(value, numbers.Real):
            raise UserError(
                f"reward function '{name}' returned {value!r:.40} for problem '{problem}': expected a number or None"
            )
        if value is not None and not abs(float(value)) <= MAX_REWARD:
            shown = "NaN" if math.isnan(value) else value
            raise UserError(
                f"reward function '{name}' returned {shown} for problem '{problem}'; return a finite number, or "
                "None for unjudged"
            )
    return [None if value is None else float(value) for value in values]
