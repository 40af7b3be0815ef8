"""Paths and names in options: a leading `~` is the home folder, `${NAME}` an environment variable.

Which options these are the schema says (`section.Place`).
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from stepcredit.config.renamed import new_name
from stepcredit.config.schema import Config
from stepcredit.errors import UserError
from stepcredit.section import Choice, Expanded

VARIABLE = re.compile(r"\$\{([^}]*)\}|\$([A-Z_][A-Z0-9_]*)")
HOME = re.compile(r"(^|,\s*|verl:)(~[^/,:]*)")  # of a path, of each of several, of a verl function


# ---------------------------------------------------------------------- what the schema says


@dataclass(frozen=True)
class Kind:
    """What an option takes: text, several values, null; a path or name that is expanded."""

    text: bool = False
    many: bool = False
    nullable: bool = False
    expanded: bool = False


FREE = Kind()  # no schema says


def kind_of(path: Sequence[str]) -> Kind:
    annotation: Any = Config
    marks: tuple[Any, ...] = ()
    for part in new_name(".".join(path)).split("."):
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if part not in annotation.model_fields:
                return FREE
            field = annotation.model_fields[part]
            annotation, marks = field.annotation, tuple(field.metadata)
        elif get_origin(annotation) is dict:
            annotation, marks = get_args(annotation)[1], ()
        elif get_origin(annotation) is list and part.isdigit():
            annotation, marks = get_args(annotation)[0], ()
        else:
            return FREE
        annotation, marks = _bare(annotation, marks)
        section, _, _ = _without_null(annotation, marks)
        annotation = section if _holds_sections(section) else annotation
    annotation, marks, nullable = _without_null(annotation, marks)
    if isinstance(annotation, type) and issubclass(annotation, Choice):
        return Kind(text=True, expanded=True)  # its name alone
    many = get_origin(annotation) is list
    one = get_args(annotation)[0] if many else annotation
    words = get_args(one) if get_origin(one) is Literal else ()
    text = one is str or (bool(words) and all(isinstance(word, str) for word in words))
    return Kind(text, many, nullable, any(isinstance(mark, Expanded) for mark in marks))


def _holds_sections(annotation: Any) -> bool:
    """Whether it is a list of sections, whose options have names of their own behind their number."""
    item = _bare(get_args(annotation)[0], ())[0] if get_origin(annotation) is list else None
    return isinstance(item, type) and issubclass(item, BaseModel)


def _bare(annotation: Any, marks: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        marks += tuple(more)
    return annotation, marks


def _without_null(annotation: Any, marks: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], bool]:
    if get_origin(annotation) not in (Union, UnionType):
        return annotation, marks, False
    others = [each for each in get_args(annotation) if each is not NoneType]
    return *_bare(others[0], marks), len(others) < len(get_args(annotation))


# ---------------------------------------------------------------------- home folder and environment


def expand_all(given: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """A nested config with `~` and `${NAME}` expanded in paths and names.

    Raises:
        UserError: there is no such variable or home folder, or a path is empty.
    """
    return {name: _expanded(value, (*path, *str(name).split("."))) for name, value in given.items()}


def _expanded(value: Any, path: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return expand_all(value, path)
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [_expanded(item, (*path, str(number))) for number, item in enumerate(value)]
    kind = kind_of(path)
    if not kind.expanded:
        return value
    option = ".".join(path)
    if value == "" and not kind.many:
        raise UserError(f"{option}: is empty; give it a value or leave it out")
    if isinstance(value, list):
        return [expand(option, item) if isinstance(item, str) else item for item in value]
    return expand(option, value) if isinstance(value, str) else value


def expand(option: str, text: str) -> str:
    """A path, or several with commas between, with `~` and `${NAME}` expanded.

    Raises:
        UserError: naming `option`, when there is no such variable or home folder.
    """

    def variable(match: re.Match[str]) -> str:
        name = match[1] or match[2] or ""
        if not name.isidentifier():
            raise UserError(f"{option}: '{match[0]}' in '{text}' is not an environment variable; write ${{NAME}}")
        if name not in os.environ:
            raise UserError(f"{option}: environment variable {name} is not set ('{text}')")
        return os.environ[name]

    def home(match: re.Match[str]) -> str:
        folder = os.path.expanduser(match[2])
        if folder == match[2]:
            raise UserError(
                f"{option}: '{match[2]}' is nobody's home folder; write ./{match[2]} for a file of that name"
            )
        return match[1] + folder

    return HOME.sub(home, VARIABLE.sub(variable, text))
