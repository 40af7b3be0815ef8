"""The growths by name, bound to a task and to how prompts are encoded; a user's own by dotted path.

A growth of your own is a function `grow(sampler, problems, encode, params, seeds, **options) -> Forest`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from stepcredit.config import Config
from stepcredit.growth.base import Growth
from stepcredit.growth.flat import flat
from stepcredit.growth.recorded import Recorded
from stepcredit.growth.steps import step_rule
from stepcredit.growth.tree import check_limits, tree
from stepcredit.imports import by_name
from stepcredit.tasks.base import Task
from stepcredit.tasks.prompts import PromptFormat

Bind = Callable[[Config, Task, PromptFormat, Sequence[int]], Growth]


def _flat(config: Config, task: Task, encode: PromptFormat, stop: Sequence[int]) -> Growth:
    return partial(flat, group_size=config.growth.group_size)


def _tree(config: Config, task: Task, encode: PromptFormat, stop: Sequence[int]) -> Growth:
    given = config.growth
    check_limits(given, config.sampler.max_new_tokens)
    rule = step_rule(given.step.tokens, given.step.delimiters, encode.tokenizer, task.step_delimiters)
    return partial(tree, shape=given, rule=rule)


def _recorded(config: Config, task: Task, encode: PromptFormat, stop: Sequence[int]) -> Growth:
    return Recorded(encode, stop, config.sampler.max_new_tokens)


GROWTHS: dict[str, Bind] = {"flat": _flat, "tree": _tree, "pairs": _recorded, "demonstrations": _recorded}


def build_growth(config: Config, task: Task, encode: PromptFormat, stop: Sequence[int]) -> Growth:
    """How training forests are grown.

    Args:
        stop: token ids that end a completion.

    Raises:
        UserError: there is no such growth, no token ends a step, or not even the first level fits the limits.
    """
    given = config.growth
    if given.name in GROWTHS:
        return GROWTHS[given.name](config, task, encode, stop)
    own: Callable[..., Any] = by_name("growth.name", given.name, GROWTHS)
    return partial(own, **given.options)
