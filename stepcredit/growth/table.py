"""The growths by name, bound to a task and a tokenizer; a user's own by dotted path.

A growth of your own is a function `grow(sampler, problems, encode, params, seeds, **options) -> Forest`.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from stepcredit.config import Config
from stepcredit.growth.base import Growth
from stepcredit.growth.flat import flat
from stepcredit.growth.steps import step_rule
from stepcredit.growth.tree import check_limits, tree
from stepcredit.imports import by_name
from stepcredit.tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bind = Callable[[Config, Task, "PreTrainedTokenizerBase"], Growth]


def _flat(config: Config, task: Task, tokenizer: "PreTrainedTokenizerBase") -> Growth:
    return partial(flat, group_size=config.growth.group_size)


def _tree(config: Config, task: Task, tokenizer: "PreTrainedTokenizerBase") -> Growth:
    given = config.growth
    check_limits(given, config.sampler.max_new_tokens)
    rule = step_rule(given.step.tokens, given.step.delimiters, tokenizer, task.step_delimiters)
    return partial(tree, shape=given, rule=rule)


GROWTHS: dict[str, Bind] = {"flat": _flat, "tree": _tree}


def build_growth(config: Config, task: Task, tokenizer: "PreTrainedTokenizerBase") -> Growth:
    """How training forests are grown.

    Raises:
        UserError: there is no such growth, no token ends a step, or not even the first level fits the limits.
    """
    given = config.growth
    if given.name in GROWTHS:
        return GROWTHS[given.name](config, task, tokenizer)
    own: Callable[..., Any] = by_name("growth.name", given.name, GROWTHS)
    return partial(own, **given.options)
