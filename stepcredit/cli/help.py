"""Help texts that are made from the schema, so that they cannot go out of date."""

from typing import Any

from pydantic import BaseModel

from stepcredit.config import Config
from stepcredit.config.algorithms import ALGORITHMS

WIDTH = 110


def algorithms() -> str:
    return "\n".join(f"  {name:22}{row.summary} ({_source(row.paper)})" for name, row in ALGORITHMS.items())


def options() -> str:
    """Every `--section.option` with its default, a line or two a section."""
    lines = []
    for name, field in Config.model_fields.items():
        default = field.default
        if isinstance(default, BaseModel):
            lines += _wrapped(name, _options(default))
    return "\n".join(lines)


def _options(section: BaseModel, prefix: str = "") -> list[str]:
    words = []
    for name, value in section:
        if isinstance(value, BaseModel):
            words += _options(value, f"{prefix}{name}.")
        else:
            words.append(f"{prefix}{name} {_shown(value)}")
    return words


def _wrapped(name: str, words: list[str]) -> list[str]:
    lines, line = [], f"  --{name}.".ljust(16)
    for number, word in enumerate(words):
        piece = word + ("," if number < len(words) - 1 else "")
        if len(line) + len(piece) > WIDTH:
            lines.append(line.rstrip())
            line = " " * 16
        line += piece + " "
    return [*lines, line.rstrip()]


def _shown(value: Any) -> str:
    if value is None or value == "" or value == [] or value == {}:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


def _source(paper: str) -> str:
    return f"arXiv {paper}" if paper[0].isdigit() else paper
