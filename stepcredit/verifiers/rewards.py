"""From the config to the reward functions, their judge, and the rows they are for: what needs no model."""

from typing import TYPE_CHECKING

from stepcredit.config import Config
from stepcredit.errors import UserError, did_you_mean
from stepcredit.forest.types import Problem
from stepcredit.tasks.base import Task
from stepcredit.tasks.dataset import load_problems
from stepcredit.verifiers import Reward, reward_function
from stepcredit.verifiers.judging import Judge
from stepcredit.verifiers.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_rewards(config: Config, task: Task) -> tuple[dict[str, Reward], list[float]]:
    """The reward functions, those of the task where none are named, and their weights."""
    given = config.reward
    names = given.functions or list(task.reward_functions)
    if len(set(names)) < len(names):
        raise UserError(f"reward.functions: one of {', '.join(names)} is named twice")
    weights = given.weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise UserError(f"reward.weights: {len(weights)} weights for {len(names)} functions ({', '.join(names)})")
    if unknown := given.options.keys() - set(names):
        raise UserError(f"reward.options.{min(unknown)}: no such reward function; {did_you_mean(min(unknown), names)}")
    longest = config.sampler.max_new_tokens
    defaults = {"overlong": {"max_tokens": longest, "buffer": max(1, longest // 5)}}
    return {
        name: reward_function(name, defaults.get(name, {}) | given.options.get(name, {})) for name in names
    }, weights


def build_judge(
    config: Config,
    rewards: dict[str, Reward],
    weights: list[float],
    tokenizer: "PreTrainedTokenizerBase | None",
    sharing: int = 1,
) -> Judge:
    """Args: sharing: processes on this machine that judge at the same time and share its cores."""
    given = config.reward
    workers = Workers(given.timeout_s, given.workers, given.memory_mb, sharing)
    return Judge(rewards, weights, tokenizer, workers, given.on_failure, given.call_with)


def load_rows(config: Config) -> list[Problem]:
    """The problems of `task.data`, a data set."""
    given = config.task
    return load_problems(given.data, given.split, given.columns, needs_answer(config))


def needs_answer(config: Config) -> bool | None:
    """Whether a reward function that is named needs answers; None when none is named."""
    named = [reward_function(name) for name in config.reward.functions]
    return any(reward.needs_answer for reward in named) if named else None
