"""The tasks of reasoning-gym: which there are, which are refused and why, their options and levels.

What is said of an option is read from the task's own config class: its fields, and the conditions in its `validate`.
"""

import ast
import difflib
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import EnumType
from typing import Any

from pydantic import ValidationError

from stepcredit.errors import UserError, did_you_mean
from stepcredit.verifiers.gym import config_class, config_of, library, typed

NO_GOLD = "its problems have no answer to check the scorer with"
REFUSED = {  # docs/gym.md has what every task was seen to do
    "boxnet": NO_GOLD,
    "game_of_life_halting": "its scorer gives 1 to any text on half of its problems",
    "graph_color": NO_GOLD,
    "prime_factorization": "its scorer fails on an answer that has no numbers",
    "propositional_logic": NO_GOLD,
    "rubiks_cube": NO_GOLD,
    "rush_hour": NO_GOLD,
}
LICENCES = {  # parts of reasoning-gym with terms of their own, as their files state them
    "acre": "GPL-3.0, as its file says",
    "bf": "Apache-2.0, with the compiler bfit (MIT)",
    "zebra_puzzles": "Apache-2.0, with logic_puzzle (MIT)",
}
MIXTURE = "composite"  # a task of tasks
OURS = {"seed", "size"}  # options that are not the user's


@dataclass(frozen=True)
class Option:
    """An option of a task: its default, its type, and the conditions on it as the task's `validate` has them."""

    name: str
    default: Any
    kind: str
    conditions: tuple[str, ...]


@dataclass(frozen=True)
class Attribute:
    """What a curriculum makes harder: the values of its levels, level 0 first, and the options that it sets."""

    name: str
    levels: tuple[Any, ...]
    options: tuple[str, ...]
    description: str


def names() -> list[str]:
    """All tasks that can be named, those that are refused included."""
    return sorted(name for name in library().factory.DATASETS if name != MIXTURE)


def check_task(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a task, without `allow`, as plain values.

    Raises:
        UserError: there is no such task or option, the task is refused, or a value is not allowed.
    """
    if name == MIXTURE:
        raise UserError(f"gym:{name}: is a mixture of tasks; name them with commas instead, gym:chain_sum,gcd")
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"gym:{name}: no such task of reasoning-gym; {hint}'stepcredit tasks' lists them")
    allowed = options.get("allow", False)
    if not isinstance(allowed, bool):
        raise UserError(f"task.gym.{name}.allow: true or false, not {allowed!r}")
    if name in REFUSED and not allowed:
        raise UserError(f"gym:{name}: {REFUSED[name]}; take it all the same with --task.gym.{name}.allow true")
    own = {option: value for option, value in options.items() if option != "allow"}
    _check_options(name, own)
    return own


def options_of(name: str) -> list[Option]:
    conditions = list(_conditions(name))
    return [
        Option(
            field.name,
            _default(field),
            _kind(field.type),
            tuple(text for words, text, _ in conditions if field.name in words),
        )
        for field in fields(config_class(name))
        if field.name not in OURS
    ]


def attributes_of(name: str) -> list[Attribute]:
    """The attributes of the task's curriculum; none where it has no curriculum."""
    factory = library().factory
    if not factory.has_curriculum(name):
        return []
    attributes = []
    for attribute in factory.create_curriculum(name).attributes.values():
        own = [getattr(attribute, key, None) for key in ("field_name", "lower_field_name", "upper_field_name")]
        options = tuple(dict.fromkeys(option for option in own if option))
        attributes.append(Attribute(attribute.name, tuple(attribute.levels), options, attribute.description or ""))
    return attributes


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    known = [option.name for option in options_of(name)]
    for option, value in options.items():
        where = f"task.gym.{name}.{option}"
        if option in OURS:
            raise UserError(f"{where}: is set by the run; --seed changes the problems")
        if option == "level":
            _check_level(name, value)
        elif option not in known:
            raise UserError(f"{where}: unknown option; {did_you_mean(option, [*known, 'level', 'allow'])}")
        else:
            try:
                typed(name, option, value)
            except ValidationError as error:
                raise UserError(f"{where}: {error.errors()[0]['msg'].lower()}, got {value!r:.60}") from error
    try:
        config_of(name, options)
    except Exception as error:  # whatever the task's own check raises
        raise UserError(_refusal(name, options, str(error))) from error


def _check_level(name: str, level: Any) -> None:
    where, attributes = f"task.gym.{name}.level", attributes_of(name)
    if not attributes:
        raise UserError(f"{where}: this task has no curriculum; set its options, see 'stepcredit tasks {name}'")
    sizes = {attribute.name: len(attribute.levels) - 1 for attribute in attributes}
    levels = level if isinstance(level, Mapping) else {"": level}
    for attribute, value in levels.items():
        if attribute and attribute not in sizes:
            raise UserError(f"{where}.{attribute}: no such attribute; {did_you_mean(attribute, sizes)}")
        most = sizes.get(attribute, max(sizes.values()))
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            each = f"{where}.{attribute}".rstrip(".")
            raise UserError(f"{each}: a level is a whole number from 0 to {most}, got {value!r:.60}")


def _refusal(name: str, options: Mapping[str, Any], message: str) -> str:
    """What the task's own check says, with the options that it is about."""
    words = next((words for words, _, said in _conditions(name) if said and said == message), set(options))
    given = {option: options[option] for option in options if option in words} or options
    shown = ", ".join(f"{option} {value}" for option, value in given.items())
    conditions = dict.fromkeys(text for about, text, _ in _conditions(name) if about & set(given))
    allowed = f"; allowed: {', '.join(conditions)}" if conditions else ""
    which = f".{next(iter(given))}" if len(given) == 1 else ""
    return f"task.gym.{name}{which}: {message or 'not allowed'} ({shown}){allowed}"


def _conditions(name: str) -> Iterator[tuple[set[str], str, str]]:
    """What the task's `validate` asserts: the options that it is about, the condition, the message."""
    validate = getattr(config_class(name), "validate", None)
    known = {field.name for field in fields(config_class(name))} - OURS
    if validate is None:
        return
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(validate)))):
        if not isinstance(node, ast.Assert):
            continue
        inside = [each for each in ast.walk(node.test) if isinstance(each, ast.Attribute)]
        words = {each.attr for each in inside if isinstance(each.value, ast.Name) and each.value.id == "self"} & known
        if words and "isinstance" not in (text := ast.unparse(node.test)):
            said = node.msg.value if isinstance(node.msg, ast.Constant) else ""
            yield words, text.replace("self.", ""), str(said)


def _kind(annotation: Any) -> str:
    if isinstance(annotation, EnumType):
        members: list[Any] = list(annotation)
        return "|".join(str(member.value) for member in members)
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _default(field: Any) -> Any:
    return (
        field.default_factory() if field.default is MISSING and field.default_factory is not MISSING else field.default
    )
