"""What a value means that somebody writes in a YAML file or on the command line, by the schema of its option.

Text stays text where the schema says so; elsewhere numbers, booleans and null are what they look like, `1e-6` included.
In paths and names a leading `~` is the home folder, `${NAME}` an environment variable. `docs/config.md` is the manual.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from stepcredit.config.renamed import new_name
from stepcredit.config.schema import Config
from stepcredit.errors import UserError
from stepcredit.section import Choice, Expanded

log = logging.getLogger("stepcredit")
_told: set[str] = set()  # options of which the log has said that a word is null

NULL_WORDS = {"None", "none", "null", "Null", "NULL"}
INT, FLOAT, BOOL, NULL, TEXT, MERGE, TIMESTAMP = (
    f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null", "str", "merge", "timestamp")
)
VARIABLE = re.compile(r"\$\{([^}]*)\}|\$([A-Z_][A-Z0-9_]*)")
HOME = re.compile(r"(^|,\s*|verl:)(~[^/,:]*)")  # of a path, of each of several, of a verl function


# ---------------------------------------------------------------------- YAML


class Loader(yaml.SafeLoader):
    """YAML whose numbers are those of the command line: `1e-6` is one; `12:30`, `2026-01-02` are text, `007` is 7."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rows if tag not in (INT, FLOAT, TIMESTAMP)]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


NUMBER_STARTS = list("+-.0123456789")
DIGITS = r"(\.[0-9]+|[0-9][0-9_]*\.[0-9_]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
FLOATS = re.compile(rf"([-+]?({DIGITS}|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$")
INTS = re.compile(r"[-+]?[0-9][0-9_]*$")
NONE = re.compile(r"None$")
Loader.add_implicit_resolver(FLOAT, FLOATS, NUMBER_STARTS)
Loader.add_implicit_resolver(INT, INTS, NUMBER_STARTS)
Loader.add_implicit_resolver(NULL, NONE, ["N"])
Loader.add_constructor(INT, lambda loader, node: int(node.value))


class Dumper(yaml.SafeDumper):
    """Puts quotes around text that `Loader`, or YAML 1.1, would take for something else."""


Dumper.add_implicit_resolver(FLOAT, FLOATS, NUMBER_STARTS)
Dumper.add_implicit_resolver(NULL, re.compile(r"None$|none$"), ["N", "n"])


def parse_yaml(text: str, path: Sequence[str] = ()) -> Any:
    """The value of an option that is written in YAML; of the whole config without a path.

    Raises:
        yaml.YAMLError: it is no YAML.
        UserError: an option stands there twice; without the name of the file.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _built(loader, node, tuple(path), {})
    except RecursionError as error:
        raise UserError("an anchor holds itself") from error
    finally:
        loader.dispose()


def _built(loader: Loader, node: yaml.Node, path: tuple[str, ...], seen: dict[tuple[str, ...], int]) -> Any:
    """Args: seen: options so far, with their lines."""
    if isinstance(node, yaml.MappingNode):
        return _section(loader, node, path, seen)
    if isinstance(node, yaml.SequenceNode):
        return [_built(loader, item, path, seen) for item in node.value]
    kind, text = kind_of(path), str(node.value)
    quoted = not isinstance(node, yaml.ScalarNode) or node.style is not None
    if quoted or node.tag not in (INT, FLOAT, BOOL, NULL, TEXT):
        return loader.construct_object(node)
    if kind.nullable and text in NULL_WORDS:
        return _null(path, text)
    if kind.text and (node.tag != NULL or text == "None"):
        return text
    if text == "None":
        return _null(path, text)
    return loader.construct_object(node)


def _section(
    loader: Loader, node: yaml.MappingNode, path: tuple[str, ...], seen: dict[tuple[str, ...], int]
) -> dict[str, Any]:
    for key, _ in node.value:
        if key.tag == MERGE:
            continue
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"line {line}: the name of an option is a word, not a list or a section")
        option = (*path, *key.value.split("."))
        if option in seen:
            raise UserError(
                f"line {line}: {'.'.join(option)} stands there already, in line {seen[option]}; make it one"
            )
        seen[option] = line
    loader.flatten_mapping(node)  # `<<`; what stands in the section itself comes last
    values = {key.value: value for key, value in node.value}
    return {name: _built(loader, value, (*path, *name.split(".")), seen) for name, value in values.items()}


def _null(path: Sequence[str], word: str) -> None:
    """Null, with a word about it where YAML would not take it for that."""
    option = ".".join(path)
    if word != "null" and option not in _told:
        _told.add(option)
        log.warning("%s: '%s' is taken for null, no value", option, word)


# ---------------------------------------------------------------------- the command line


def parse_value(text: str, path: Sequence[str] = ()) -> Any:
    """What a command-line value means: text where the schema says so; else number, boolean, null, list, section, text.

    Without a path, of an option that no schema knows.
    """
    kind = kind_of(path)
    if kind.nullable and text in NULL_WORDS:
        return _null(path, text)
    if kind.text and not (kind.many and text.lstrip().startswith("[")):
        return text
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    try:
        parsed = parse_yaml(text, path)
    except yaml.YAMLError:
        return text
    except UserError as error:
        raise UserError(f"--{'.'.join(path)}: {error}") from error
    return parsed if parsed is None or isinstance(parsed, (bool, list, dict)) else text


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
        else:
            return FREE
        annotation, marks = _bare(annotation, marks)
    annotation, marks, nullable = _without_null(annotation, marks)
    if isinstance(annotation, type) and issubclass(annotation, Choice):
        return Kind(text=True, expanded=True)  # its name alone
    many = get_origin(annotation) is list
    one = get_args(annotation)[0] if many else annotation
    words = get_args(one) if get_origin(one) is Literal else ()
    text = one is str or (bool(words) and all(isinstance(word, str) for word in words))
    return Kind(text, many, nullable, any(isinstance(mark, Expanded) for mark in marks))


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
