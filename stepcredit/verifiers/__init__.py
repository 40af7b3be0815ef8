"""Reward functions: `f(prompts, completions, **columns) -> list[float | None]`, sync or async.

`columns` holds `answer`, `id`, `completion_ids` and every column of the data, one entry for each completion. None
means unjudged. Name your own by dotted path: `--reward.functions my_package.my_reward`.
"""

from collections.abc import Callable
from typing import Any

from stepcredit.imports import by_name

RewardFunction = Callable[..., Any]

VERIFIERS = {
    "chain": "stepcredit.tasks.chain.verify",
    "exact": "stepcredit.verifiers.exact.verify",
    "math": "stepcredit.verifiers.math.verify",
}


def reward_function(name: str) -> RewardFunction:
    """The reward function of this name or dotted path."""
    return by_name("reward.functions", name, VERIFIERS)
