"""Help texts that are made from the schema and the source, so that they cannot go out of date."""

import ast
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from stepcredit.config import Config
from stepcredit.config.algorithms import ALGORITHMS

WIDTH = 119
PACKAGE = Path(__file__).parents[1]


def algorithms() -> str:
    return "\n".join(f"  {name:22}{row.summary} ({_source(row.paper)})" for name, row in ALGORITHMS.items())


def algorithm_names() -> str:
    return "\n".join(_wrapped("  ", [f"{name} ({row.paper})" for name, row in ALGORITHMS.items()]))


def options() -> str:
    """Every `--section.option` with its default, a line or two a section; short ones share a line."""
    lines = []
    for name, field in Config.model_fields.items():
        default = field.default
        if isinstance(default, BaseModel):
            lines += _wrapped(f"  --{name}.".ljust(16), _options(default))
            short = len(lines) > 1 and all(line.startswith("  --") for line in lines[-2:])
            if short and len("".join(lines[-2:])) <= WIDTH:  # two sections of a line each
                lines[-2:] = ["".join(lines[-2:])]
    return "\n".join(lines)


def functions(folder: str, decorator: str) -> str:
    """The functions of a folder that have a decorator, each with its options and defaults in brackets.

    They are read, not imported: losses and credit functions need torch, which takes longer than anybody waits for help.
    """
    words = []
    for path in sorted((PACKAGE / folder).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body if f"@{decorator}(" in text else ():
            if isinstance(node, ast.FunctionDef) and decorator in map(_name_called, node.decorator_list):
                defaults = [ast.literal_eval(value) for value in node.args.defaults]
                given = node.args.args[len(node.args.args) - len(defaults) :]
                pairs = [f"{one.arg} {_shown(value)}" for one, value in zip(given, defaults, strict=True)]
                words += f"{node.name} ({', '.join(pairs)})".split(", ") if pairs else [node.name]
    return "\n".join(_wrapped(f"  {decorator}".ljust(10), words))


def _name_called(decorator: ast.expr) -> str | None:
    is_call = isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name)
    return decorator.func.id if is_call else None  # type: ignore[attr-defined]


def _options(section: BaseModel, prefix: str = "") -> list[str]:
    words = []
    for name, value in sorted(section, key=lambda pair: pair[0] != "name"):
        if isinstance(value, BaseModel):
            words += _options(value, f"{prefix}{name}.")
        else:
            words.append(f"{prefix}{name} {_shown(value)}")
    return words


def _wrapped(head: str, words: list[str]) -> list[str]:
    lines, line = [], head
    for number, word in enumerate(words):
        piece = word + ("," if number < len(words) - 1 else "")
        if len(line) + len(piece) > WIDTH:
            lines.append(line.rstrip())
            line = " " * len(head)
        line += piece + " "
    return [*lines, line.rstrip()]


def _shown(value: Any) -> str:
    if value is None or value == "" or value == [] or value == {}:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


def _source(paper: str) -> str:
    return f"arXiv {paper}" if paper[0].isdigit() else paper
