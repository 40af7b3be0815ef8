"""Command-line words to a nested dictionary: short flags, `--section.option value`, a YAML file."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from stepcredit.cli.others import answer, check_assignment
from stepcredit.config import Config, expand_all, merge
from stepcredit.config.places import expand
from stepcredit.config.renamed import new_name
from stepcredit.errors import UserError, did_you_mean
from stepcredit.imports import search_in
from stepcredit.section import split as listed

SHORT = {
    "algorithm": "algorithm",
    "model": "model",
    "data": "task.data",
    "iterations": "train.iterations",
    "group-size": "growth.group_size",
    "seed": "train.seed",
    "run-dir": "run_dir",
    "code-folders": "code_folders",
    "trust-remote-code": "trust_remote_code",
    "learning-rate": "optim.learning_rate",
    "device": "train.device",
    "eval-every": "eval.every",
    "save-every": "checkpoint.every",
    "num-problems": "eval.num_problems",
    "num-samples": "eval.num_samples",
    "temperature": "sampler.temperature",
    "max-new-tokens": "sampler.max_new_tokens",
}
PLACES = {"config", "in", "json", "out", "prm", "ref", "resume", "verifier"}  # commands' own: ~ and ${NAME} hold


def parse(words: Sequence[str], own: Mapping[str, str | None], command: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Split words into config overrides and the command's own options.

    Args:
        own: options of the command itself with their defaults (None: not given; "false": a flag that needs no value).

    Returns:
        The nested overrides (a YAML file first, flags over it), and the own options that have a value.

    Raises:
        UserError: an unknown option, a missing value, a second file.
    """
    from stepcredit.config import parse_value, read_yaml

    given: dict[str, Any] = {}
    options = {name: value for name, value in own.items() if value is not None}
    config_file: str | None = None
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            check_assignment(word, command)
            if config_file is not None or "config" not in own:
                raise UserError(
                    f"{command}: unexpected '{word}'; options start with --, see 'stepcredit {command} --help'"
                )
            config_file = word
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("_", "-") if "." not in name else name.replace("-", "_")
        if not equals:
            if own.get(name) == "false" and (not queue or queue[0].startswith("--")):
                value = "true"
            elif not queue or queue[0].startswith("--"):
                raise UserError(f"--{name} needs a value, for example '--{name} {_example(name)}'")
            else:
                value = queue.pop(0)
        if name in PLACES & own.keys():
            value = expand(f"--{name}", value)
        if name == "config" and name in own:
            config_file = value
            continue
        if name in own:
            options[name] = value
            continue
        path = new_name(SHORT.get(name, name))
        _check_known(path, name, own, command)
        given = merge(given, _nested(path, parse_value(value, path.split("."))))
    if config_file:
        written = expand_all(read_yaml(config_file))
        _check_places(written, config_file)
        given = merge(written, given)
        search_in(Path(config_file).parent)
    given = expand_all(given)
    search_in(*code_folders(given))
    return given, options


def _check_places(written: Mapping[str, Any], config_file: str) -> None:
    """Refuse files to read that are beside the config file and not where the command runs: which one counts is said."""
    for section, name in (
        ("task", "data"),
        ("task", "eval_data"),
        ("prm", "model"),
        ("critic", "model"),
        ("", "model"),
    ):
        options = written.get(section) if section else written
        place = options.get(name) if isinstance(options, Mapping) else None
        if not isinstance(place, str) or place == "embedded" or Path(place).exists():
            continue
        beside = Path(config_file).parent / place
        if beside.exists():
            raise UserError(
                f"{config_file}: {f'{section}.{name}'.strip('.')}: '{place}' is beside this file, but paths count from "
                f"the folder where the command runs; write {beside.resolve()}, or start there"
            )


def code_folders(given: Mapping[str, Any]) -> list[str]:
    """The folders for code of one's own that a config names; what is no folder is refused with the whole config."""
    named = listed(given.get("code_folders"))
    return [folder for folder in named if isinstance(folder, str)] if isinstance(named, list) else []


def _nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def _check_known(path: str, name: str, own: Mapping[str, Any], command: str) -> None:
    said = answer(name)
    if said and name not in SHORT:
        raise UserError(f"--{name}: unknown option; {said}")
    if path.split(".")[0] in Config.model_fields:
        options = dict(_sections()).get(path)
        if options:
            raise UserError(f"--{name} is a section of options; give one of them, for example --{path}.{options[0]}")
        return
    sections = [f"{section}.{option}" for section, options in _sections() for option in options]
    close = difflib.get_close_matches(name, [*SHORT, *own, *sections], n=1)
    hint = f"did you mean --{close[0]}?" if close else f"see 'stepcredit {command} --help'"
    raise UserError(f"--{name}: unknown option; {hint}")


def _sections() -> Iterator[tuple[str, list[str]]]:
    for section, field in Config.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield section, list(type(field.default).model_fields)


def _example(name: str) -> str:
    return {"data": "problems.jsonl", "model": "embedded", "algorithm": "grpo", "resume": "auto"}.get(name, "1")


def split(
    words: Sequence[str], options: Mapping[str, str], command: str, short: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """What a command that takes no config is given: its places, and its options with their values.

    Args:
        options: names, with an example each.
        short: other ways to write them, such as -o.

    Raises:
        UserError: an unknown option or a missing value.
    """
    places: list[str] = []
    given: dict[str, str] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("-"):
            places.append(word)
            continue
        written, equals, value = word.partition("=")
        name = (short or {}).get(written, written.removeprefix("--"))
        if name not in options:
            hint = did_you_mean(name.lstrip("-"), options)
            raise UserError(f"{command}: unknown option {written}; {hint}")
        if not equals and (not queue or queue[0].startswith("--")):
            raise UserError(f"{written} needs a value, for example '{written} {options[name]}'")
        value = value if equals else queue.pop(0)
        given[name] = expand(f"--{name}", value) if name in PLACES else value
    return places, given


def read_number(own: Mapping[str, str], name: str, above: float = -math.inf) -> float:
    """The value of an option, a finite number above a bound.

    Raises:
        UserError: it is no such number.
    """
    try:
        value = float(own[name])
    except ValueError as error:
        raise UserError(f"--{name}: '{own[name]}' is not a number") from error
    if not above < value < math.inf:
        bound = "" if above == -math.inf else f" above {above:g}"
        raise UserError(f"--{name}: expected a finite number{bound}, got {own[name]}")
    return value


def output_file(own: Mapping[str, str], name: str = "out") -> Path | None:
    """The file to write, when the option was given; its folder must exist."""
    if name not in own:
        return None
    path = Path(own[name])
    if path.is_dir():
        raise UserError(f"--{name}: '{path}' is a folder; name a file")
    if not path.parent.is_dir():
        raise UserError(f"--{name}: folder '{path.parent}' does not exist")
    return path
