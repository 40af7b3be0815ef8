"""What a value means that somebody writes in a YAML file or on the command line, by the schema of its option.

Text stays text where the schema says so; elsewhere numbers, booleans and null are what they look like, `1e-6` included.
`docs/config.md` is the manual.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from stepcredit.config.places import kind_of
from stepcredit.errors import UserError

log = logging.getLogger("stepcredit")
_told: set[str] = set()  # options of which the log has said that a word is null

NULL_WORDS = {"None", "none", "null", "Null", "NULL"}
INT, FLOAT, BOOL, NULL, TEXT, MERGE, TIMESTAMP = (
    f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null", "str", "merge", "timestamp")
)


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


def dump_options(options: Mapping[str, Any]) -> str:
    """Options as YAML that reads as the same."""
    return yaml.dump(dict(options), Dumper=Dumper, sort_keys=False)


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
        return [
            _built(loader, item, (*path, str(number)) if isinstance(item, yaml.MappingNode) else path, seen)
            for number, item in enumerate(node.value)
        ]
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
