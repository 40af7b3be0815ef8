"""Tasks of reasoning-gym (Apache-2.0): each scores answers by itself.

A problem of such a task has the column `gym`: {"task", "options", "seed", "form", "entry"}, of which `entry` is what
the task's own `score_answer` asks for. A completion's answer is what stands in its last `<answer>` tags, as
reasoning-gym has it ("tags"), its last line ("line"), or all of it ("plain"); scores between 0 and 1 are kept.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from types import ModuleType
from typing import Any, get_type_hints

from stepcredit.errors import UserError
from stepcredit.forest.types import Problem
from stepcredit.verifiers import exact

try:  # here, so that the worker processes of reward functions share what is imported
    import reasoning_gym
    import reasoning_gym.factory
    import reasoning_gym.utils
except ImportError:  # `library` says so to those who ask for a task
    reasoning_gym = None

TUPLE, FRACTION, PAIRS = "!tuple", "!fraction", "!pairs"  # the one key of an object that stands for such a value


def verify(prompts: Sequence[Any], completions: Sequence[str], gym: Sequence[Any], **columns: Any) -> list[float]:
    """The task's own score of each completion's answer; 0 without an answer, which no scorer is asked about.

    Raises:
        RuntimeError: a scorer raised something.
        UserError: reasoning-gym is not installed.
    """
    return [_score(text, each) for text, each in zip(completions, gym, strict=True)]


def final_answer(completion: str) -> str | None:
    """What stands in the last `<answer>` tags, or else the last line."""
    tagged = answer_in(completion, "tags")
    return answer_in(completion, "line") if tagged is None else tagged


def gold(problem: Problem) -> str | None:
    """The task's answer, as it is asked for; None where the task gives none."""
    if problem.answer is None:
        return None
    return stated(problem.answer, problem.columns["gym"]["form"])


def unfit(problem: Problem) -> str | None:
    """Why a problem is none of a task of reasoning-gym; None where it is."""
    given = problem.columns.get("gym")
    is_task = isinstance(given, Mapping) and {"task", "options", "form", "entry"} <= given.keys()
    return None if is_task else "it is of no gym task"


def stated(answer: str, form: str) -> str:
    """A completion that gives an answer in this form."""
    return f"<answer>{answer}</answer>" if form == "tags" else answer


def answer_in(completion: str, form: str) -> str | None:
    """The answer of a completion; None where it has none in this form."""
    if form == "plain":
        return completion.strip() or None
    if form == "line":
        return exact.final_answer(completion) or None
    return library().utils.extract_answer(completion) or None


def _score(completion: str, gym: Mapping[str, Any]) -> float:
    answer = answer_in(completion, gym["form"])
    if answer is None:
        return 0.0
    name = gym["task"]
    scorer = _scorer(name, json.dumps(gym["options"], sort_keys=True))
    try:
        return float(scorer.score_answer(answer, decoded(gym["entry"])))
    except Exception as error:
        raise RuntimeError(
            f"gym:{name}: its scorer raises {type(error).__name__} ({error}) on the answer {answer!r:.40}; count it as "
            "wrong with --reward.on-failure zero"
        ) from error


@cache
def _scorer(name: str, options: str) -> Any:
    """A dataset of the task, for its scorer alone."""
    return dataset(name, json.loads(options), seed=0)


# ---------------------------------------------------------------------- the library


def library() -> ModuleType:
    """reasoning-gym.

    Raises:
        UserError: it is not installed.
    """
    if reasoning_gym is None:
        raise UserError("gym tasks need reasoning-gym: pip install 'stepcredit[gym]'")
    return reasoning_gym


def config_class(name: str) -> Any:
    """The dataclass of a task's options."""
    return library().factory.DATASETS[name][1]


def typed(name: str, option: str, value: Any) -> Any:
    """The value of an option as the task's config has it: a list becomes a tuple, the word of a choice that choice.

    Raises:
        ValidationError: of pydantic, when it is of another type.
    """
    from pydantic import TypeAdapter  # not for workers that score the defaults

    annotation = get_type_hints(config_class(name))[option]
    is_number = annotation in (int, float, int | None, float | None)
    strict = isinstance(value, bool | str) and is_number  # true is no 1, "3" no 3
    return TypeAdapter(annotation).validate_python(value, strict=strict or None)


def config_of(name: str, options: Mapping[str, Any], **more: Any) -> Any:
    """The task's own config: the curriculum's at `level` where that is given, and the other options over it.

    Args:
        options: `level` is a number for all attributes of the curriculum, or a level for each by its name.

    Raises:
        AssertionError, ValueError: the task does not take the options.
    """
    own = {option: typed(name, option, value) for option, value in options.items() if option != "level"} | more
    config = _at_level(name, options["level"]) if options.get("level") is not None else config_class(name)()
    config = replace(config, **own)
    if hasattr(config, "validate"):
        config.validate()
    return config


def _at_level(name: str, level: int | Mapping[str, int]) -> Any:
    curriculum = library().factory.create_curriculum(name)
    if isinstance(level, int):
        curriculum.set_global_level(level)
    else:
        for attribute, each in level.items():
            curriculum.set_attr_level(attribute, each)
    return curriculum.generate_configuration()


def dataset(name: str, options: Mapping[str, Any], seed: int) -> Any:
    """A data set of one problem, number 0."""
    return library().factory.DATASETS[name][0](config_of(name, options, seed=seed, size=1))


# ---------------------------------------------------------------------- entries as text


def encoded(value: Any) -> str:
    """An entry as JSON from which `decoded` makes the same: tuples, fractions and keys that are no text are marked.

    Raises:
        TypeError: it has something else.
    """
    return json.dumps(_marked(value), separators=(",", ":"), ensure_ascii=False)


def decoded(text: str) -> Any:
    return json.loads(text, object_hook=_unmarked)


def _marked(value: Any) -> Any:
    value = value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") else value
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list):
        return [_marked(each) for each in value]
    if isinstance(value, tuple):
        return {TUPLE: [_marked(each) for each in value]}
    if isinstance(value, Fraction):
        return {FRACTION: str(value)}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("!") for key in value):
            return {key: _marked(each) for key, each in value.items()}
        return {PAIRS: [[_marked(key), _marked(each)] for key, each in value.items()]}
    raise TypeError(f"a {type(value).__name__} in its entry")


def _unmarked(value: dict[str, Any]) -> Any:
    if value.keys() == {TUPLE}:
        return tuple(value[TUPLE])
    if value.keys() == {FRACTION}:
        return Fraction(value[FRACTION])
    return dict(map(tuple, value[PAIRS])) if value.keys() == {PAIRS} else value
