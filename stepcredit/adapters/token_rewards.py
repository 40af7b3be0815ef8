"""Reward functions for TRL that give a number for each token."""

import inspect
import math
from collections.abc import Callable
from typing import Any

from stepcredit.errors import UserError


class TokenRewards:
    """A reward function that returns, for each completion, a number for each of its tokens, or None.

        @token_rewards
        def steps(completion_ids, **kwargs):
            return [[0.1 if token == STEP else 0.0 for token in ids] for ids in completion_ids]

    TRL gets the sums, for its metrics. The numbers reach the credit function as `token_rewards`, times the weight that
    TRL has for the function in `reward_weights`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            raise UserError(f"token_rewards: '{self.__name__}' is async; give a plain function")
        self.function = function
        self.last: list[list[float] | None] = []

    def __call__(self, **given: Any) -> list[float | None]:
        ids = given["completion_ids"]
        values = list(self.function(**given))
        if len(values) != len(ids):
            raise UserError(f"{self.__name__} returned {len(values)} lists; expected {len(ids)}, one a completion")
        self.last = [
            None if row is None else self._row(number, row, len(tokens))
            for number, (row, tokens) in enumerate(zip(values, ids, strict=True))
        ]
        return [None if row is None else math.fsum(row) for row in self.last]

    def _row(self, number: int, row: Any, length: int) -> list[float]:
        if not hasattr(row, "__len__"):
            raise UserError(f"{self.__name__} returned {row!r:.40} for completion {number}; expected a list of numbers")
        row = [float(value) for value in row]
        if len(row) != length:
            raise UserError(f"{self.__name__} returned {len(row)} numbers for completion {number} of {length} tokens")
        if not all(map(math.isfinite, row)):
            raise UserError(f"{self.__name__}: a number for completion {number} is not finite")
        return row


token_rewards = TokenRewards
