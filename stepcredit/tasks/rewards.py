"""From the config to the reward functions, their judge, and the rows they are for: what needs no model."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from stepcredit.config import Config
from stepcredit.errors import UserError, did_you_mean
from stepcredit.forest.types import Problem, look
from stepcredit.shaping.options import overlong_options
from stepcredit.tasks.base import Task
from stepcredit.tasks.dataset import load_problems
from stepcredit.tasks.recorded import load_recorded
from stepcredit.verifiers import gym
from stepcredit.verifiers.answers import listed
from stepcredit.verifiers.judging import Judge
from stepcredit.verifiers.reward import Kinds, Reward, reward_function
from stepcredit.verifiers.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("stepcredit")

COMPARING = ("math", "exact", "code")  # beside `gym` they judge the other rows


def build_rewards(config: Config, task: Task) -> tuple[dict[str, Reward], list[float]]:
    """The reward functions, those of the task where none are named, and their weights.

    Raises:
        UserError: a function, weight or option does not fit, or no row of the data fits any function.
    """
    names = function_names(config) or list(task.reward_functions)
    if len(set(names)) < len(names):
        raise UserError(f"reward.functions: one of {', '.join(names)} is named twice")
    rewards = named_rewards(config, names)
    weights = config.reward.weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise UserError(f"reward.weights: {len(weights)} weights for {len(names)} functions ({', '.join(names)})")
    if names == ["math", "code"] and not function_names(config):
        log.warning("%s: rows with tests are judged by 'code', the others by 'math'", task.name)
    if rows := task.rows():
        check_rows(rewards, rows, task.name)
    return rewards, weights


def function_names(config: Config) -> list[str]:
    """Those of `reward.functions`, then those of `reward.kinds`, each once."""
    given = config.reward
    of_kinds = [name for names in given.kinds.values() for name in names if name not in given.functions]
    return [*given.functions, *dict.fromkeys(of_kinds)]


def named_rewards(config: Config, names: Sequence[str]) -> dict[str, Reward]:
    """The reward functions of these names with their options and kinds of rows.

    Raises:
        UserError: there is no such function, or an option for another one.
    """
    given = config.reward
    options = options_by_function(given.options, names)
    if "overlong" in options:
        options["overlong"] = overlong_options(options["overlong"], config.sampler.max_new_tokens)
    kinds = Kinds(given.kind_column, given.kinds) if given.kinds else None
    rewards = {}
    for name in names:
        reward = reward_function(name, options[name])
        of_kinds = any(name in functions for functions in given.kinds.values())
        rewards[name] = replace(reward, kinds=kinds) if of_kinds else reward
    if "gym" in rewards:
        for name in (name for name in COMPARING if name in rewards):
            rewards[name] = replace(rewards[name], lacks=partial(_lacks_or_gym, rewards[name].lacks))
    return rewards


def _lacks_or_gym(lacks: Callable[[Problem], str | None] | None, problem: Problem) -> str | None:
    """Why a function that compares answers does not judge a problem: those of gym tasks have scorers of their own."""
    if gym.unfit(problem) is None:
        return "its gym task scores it"
    return lacks(problem) if lacks is not None else None


def options_by_function(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The options of each function. Those of `a.b` may stand under "a.b", or as the command line has them under a, b.

    Raises:
        UserError: they are for no function, or no section of options.
    """
    found: dict[str, dict[str, Any]] = {}
    left = dict(options)
    for name in names:
        mine = left.pop(name, {})
        nested, left = _taken(left, name.split("."))
        for part in (mine, nested):
            if not isinstance(part, Mapping):
                raise UserError(f"reward.options.{name}: expected a section with options, found {part!r:.60}")
        found[name] = {**mine, **nested}
    if unknown := next((key for key in left), None):
        raise UserError(f"reward.options.{unknown}: no such reward function; {did_you_mean(unknown, names)}")
    return found


def _taken(tree: dict[str, Any], path: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """What stands at a path of sections, and the rest without it."""
    first, rest = path[0], path[1:]
    if first not in tree:
        return {}, tree
    if not rest:
        return tree[first], {name: value for name, value in tree.items() if name != first}
    if not isinstance(tree[first], dict):
        return {}, tree
    found, left = _taken(tree[first], rest)
    return found, {name: left if name == first else value for name, value in tree.items() if name != first or left}


def check_rows(rewards: Mapping[str, Reward], problems: Sequence[Problem], source: str) -> None:
    """Say which rows no function judges, and what lists of answers mean.

    Raises:
        UserError: there is no row that one of them judges.
    """
    kinds = next((reward.kinds for reward in rewards.values() if reward.kinds), None)
    if kinds is not None:
        _check_kinds(kinds, problems, source)
    unfit = [problem for problem in problems if all(reward.unfit(problem) for reward in rewards.values())]
    if unfit:
        why = "; ".join(f"{name}: {reward.unfit(unfit[0])}" for name, reward in rewards.items())
        text = (
            f"{source}: {len(unfit)} of {len(problems)} rows are for no reward function; first '{unfit[0].id}' ({why})"
        )
        if len(unfit) == len(problems):
            raise UserError(f"{text}; name a function that fits with --reward.functions, or another column of answers")
        log.warning("%s; they stay unjudged and are counted as reward/unfit", text)
    several = [problem for problem in problems if len(listed(problem.answer) or ()) > 1]
    ours = [name for name, reward in rewards.items() if name in ("math", "exact")]
    if several and ours:
        text = "%s: %d rows have a list of answers (first: '%s'); for '%s' any of them is right, or all together"
        log.warning(text, source, len(several), several[0].id, ours[0])


def _check_kinds(kinds: Kinds, problems: Sequence[Problem], source: str) -> None:
    values = {str(look(problem.columns, kinds.column)) for problem in problems}
    if values == {"None"}:
        columns = {name for problem in problems for name in problem.columns}
        raise UserError(
            f"reward.kind_column: {source} has no column '{kinds.column}'; {did_you_mean(kinds.column, columns)}"
        )
    found = {kinds.kind(problem) for problem in problems}
    if unused := [kind for kind in kinds.functions if kind not in found]:
        shown = ", ".join(sorted(values)[:8])
        log.warning("reward.kinds: no row is of kind '%s'; '%s' has %s", unused[0], kinds.column, shown)


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
    return Judge(rewards, weights, tokenizer, workers, given.on_failure, given.call_with, given.skip_special_tokens)


def load_rows(config: Config, source: str | None = None, split: str | None = None) -> list[Problem]:
    """The problems of a data set, `task.data` where none is named."""
    given = config.task
    if config.growth.recorded:
        where, part = source or given.data, split or given.split
        return load_recorded(config.growth.name, where, part, given.columns, given.prompt_template)
    return load_problems(source or given.data, split or given.split, given.columns, needs_answer(config))


def needs_answer(config: Config) -> bool | None:
    """Whether every row needs an answer for the functions that are named; None: those without tests for programs."""
    named = [reward_function(name) for name in function_names(config)]
    if config.reward.kinds:  # a row may be of a kind whose functions need none
        return all(reward.needs_answer for reward in named)
    if not named or any(reward.name == "code" for reward in named):
        return None if not named or any(reward.needs_answer for reward in named) else False
    return any(reward.needs_answer for reward in named)
