"""`stepcredit config`: a config of TRL or verl as one of ours."""

import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from stepcredit.cli.arguments import output_file, parse, read_number
from stepcredit.cli.conversion import Conversion, Remark
from stepcredit.config import Config, merge, resolve
from stepcredit.errors import UserError, did_you_mean

HELP = """\
usage: stepcredit config --from trl|verl FILE [NAME=VALUE ...] [--option value ...] [--out FILE]

Prints our config, for 'stepcredit train', that means what a config of TRL 1.16 or verl 0.9.1 means. Their defaults are
written out where ours are others. Comments at the end name every option whose meaning differs, every one that has no
counterpart and is left out, and what the file does not say and a run needs; standard error has their numbers.

  --from trl            FILE is what 'trl grpo --config' takes: YAML or JSON, flat
  --from verl           FILE is verl's YAML, or text with Hydra's overrides, such as the script that starts a run;
                        overrides may also stand on the command line, over those of the file
  --processes N         of a run with TRL, whose batch grows with them   [1]
  --out FILE            write there

Any option of 'stepcredit train' is taken over what is converted: --model, --data, --iterations ...

Examples
  stepcredit config --from trl grpo.yaml --out run.yaml
  stepcredit config --from trl grpo.yaml --processes 8 --data problems.jsonl --iterations 500
  stepcredit config --from verl run_grpo.sh --out run.yaml
  stepcredit config --from verl algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=8 data.train_batch_size=128
  stepcredit train run.yaml

Exit codes: 0 done, 2 the input is wrong."""
THEIRS = "options"  # in front of their names, which are none of our schema
LIBRARIES = {"trl": "TRL 1.16", "verl": "verl 0.9.1"}
NAMES = ("credit.name", "loss.name")
OVERRIDE = re.compile(r"([+]{0,2}|~)([A-Za-z_]\w*(?:[./@][\w-]+)*)=(.*)", re.DOTALL)
INTERPOLATION = re.compile(r"\$\{(?:oc\.select:)?([\w.]+)(?:,(.*))?\}")


def main(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words or not words:
        print(HELP)
        return 0
    places, rest = _split(words)
    given, own = parse(rest, {"from": None, "out": None, "processes": "1"}, "config")
    library = own.get("from", "")
    if library not in LIBRARIES:
        hint = did_you_mean(library, LIBRARIES) if library else "give --from trl or --from verl"
        raise UserError(f"config: --from: whose config it is, trl or verl; {hint}")
    out = output_file(own)
    conversion = _converted(library, places, int(read_number(own, "processes", above=0)))
    text = _text(conversion, library, given)
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
    counts = (len(conversion.ours), len(conversion.differing), len(conversion.left_out), len(conversion.to_give))
    print(
        "config: {} options written; {} differ in meaning, {} have no counterpart, {} are for you to give: see the "
        "comments".format(*counts),
        file=sys.stderr,
    )
    return 0


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The file and overrides, and the options with their values."""
    places: list[str] = []
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            places.append(word)
            continue
        rest.append(word)
        if "=" not in word and queue and not queue[0].startswith("--"):
            rest.append(queue.pop(0))
    return places, rest


def _converted(library: str, places: Sequence[str], processes: int) -> Conversion:
    from stepcredit.cli import from_trl, from_verl

    overrides = [place for place in places if OVERRIDE.fullmatch(place)]
    files = [place for place in places if place not in overrides]
    if len(files) > 1:
        raise UserError(f"config: one file is converted, and there are {', '.join(files)}")
    if overrides and library == "trl":
        raise UserError(
            f"config: '{overrides[0]}': overrides NAME=VALUE are verl's; give options of ours as --name value"
        )
    if not files and not overrides:
        raise UserError("config: name the file to convert; see 'stepcredit config --help'")
    theirs, unclear = _options(files[0], library) if files else ({}, [])
    more, more_unclear = _assigned(overrides)
    module = from_trl if library == "trl" else from_verl
    conversion = Conversion("TRL" if library == "trl" else "verl", theirs | more, module.DEFAULTS)
    if library == "trl":
        from_trl.from_trl(conversion, processes)
    else:
        from_verl.from_verl(conversion)
    conversion.left_out[:0] = [*unclear, *more_unclear]
    return conversion


# ---------------------------------------------------------------------- what is read


def _options(file: str, library: str) -> tuple[dict[str, Any], list[Remark]]:
    """The options of a file by their full names, and what of it has no value that can be read."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"config: there is no file '{file}'")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if library == "verl" and path.suffix.lower() not in (".yaml", ".yml", ".json"):
        try:
            words = [word for word in shlex.split(text, comments=True) if OVERRIDE.fullmatch(word)]
        except ValueError as error:
            raise UserError(f"{file}: not the text of a shell ({error})") from error
        words = [word for word in words if "." in word.partition("=")[0]]  # variables of the shell have no sections
        if not words:
            raise UserError(f"{file}: there is no override such as data.train_batch_size=256")
        return _assigned(words)
    loaded = _loaded(file, text)
    if library == "trl":
        return loaded, []
    return _interpolated(dict(_flat(loaded)))


def _loaded(file: str, text: str) -> dict[str, Any]:
    from stepcredit.config.values import parse_yaml

    try:
        loaded = json.loads(text) if Path(file).suffix.lower() == ".json" else parse_yaml(text, (THEIRS,))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: not JSON ({error.msg})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{file}{f', line {mark.line + 1}' if mark else ''}: not YAML") from error
    except UserError as error:
        raise UserError(f"{file}, {error}") from error
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f"{file}: expected options such as 'learning_rate: 1e-6'")
    return loaded


def _flat(section: Mapping[str, Any], front: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, Mapping) and value and f"{front}{name}" not in WHOLE:
            yield from _flat(value, f"{front}{name}.")
        else:
            yield f"{front}{name}", value


WHOLE = ("data.apply_chat_template_kwargs", "actor_rollout_ref.model.override_config")  # values that are sections


def _assigned(words: Sequence[str]) -> tuple[dict[str, Any], list[Remark]]:
    """The values of Hydra's overrides."""
    from stepcredit.config import parse_value

    options: dict[str, Any] = {}
    unclear: list[Remark] = []
    for word in words:
        match = OVERRIDE.fullmatch(word)
        assert match is not None
        sign, name, value = match.groups()
        if sign == "~" or "@" in name or "/" in name:
            unclear.append(Remark(word, "only Hydra knows what it does"))
        elif "$" in value:
            unclear.append(Remark(name, f"{value}; a variable of the shell: give its value"))
        else:
            options[name] = parse_value(value, (THEIRS,))
    return options, unclear


def _interpolated(options: dict[str, Any]) -> tuple[dict[str, Any], list[Remark]]:
    """Values that name other options, such as ${data.max_response_length}, are those of these."""
    clear: dict[str, Any] = {}
    unclear: list[Remark] = []
    for name, value in options.items():
        if not (isinstance(value, str) and "${" in value):
            clear[name] = value
            continue
        match = INTERPOLATION.fullmatch(value)
        other = options.get(match.group(1)) if match else None
        if other is not None and not (isinstance(other, str) and "${" in other):
            clear[name] = other
        else:
            unclear.append(Remark(name, f"{value}; its value is not in this file"))
    return clear, unclear


# ---------------------------------------------------------------------- what is written


def _text(conversion: Conversion, library: str, given: Mapping[str, Any]) -> str:
    """The config with its comments."""
    from stepcredit.config.values import dump_options

    written = _nested(_needed(conversion, given))
    whole = merge(written, given)
    resolve(whole)
    conversion.to_give = [each for each in conversion.to_give if not _given(each.about, given)]
    if "model" not in whole:
        conversion.to_give.insert(0, Remark("--model", f"the file names no model; that of {library} is not taken"))
    if "data" not in whole.get("task", {}):
        conversion.to_give.insert(0, Remark("--data", "the file names no data"))
    known = list(Config.model_fields)
    ordered = {name: whole[name] for name in sorted(whole, key=known.index)}
    lines = [f"# Made by 'stepcredit config --from {library}' of a config of {LIBRARIES[library]}.", ""]
    lines += [dump_options(ordered).rstrip()]
    for title, remarks in (
        ("for you to give", conversion.to_give),
        ("whose meaning differs", conversion.differing),
        ("without a counterpart, left out", conversion.left_out),
    ):
        lines += ["", f"# Options {title}: {len(remarks)}"] + [f"#   {remark}" for remark in remarks]
    return "\n".join(lines) + "\n"


def _needed(conversion: Conversion, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says, and those of the library's defaults that are not ours.

    Without a model all of them: with the embedded one, our defaults would be those of its recipe.
    """
    ours = conversion.ours
    model = given.get("model", ours.get("model"))
    if model is None:
        return ours
    start = {"algorithm": ours["algorithm"], "model": model}
    named = {path: ours[path] for path in NAMES if path in ours}  # a part of another name has other defaults
    defaults = (resolve(_nested(start)), resolve(_nested(start | named)))
    standing = {path for path in conversion.implied if _value(defaults[path not in NAMES], path) == ours[path]}
    conversion.ours = {path: value for path, value in ours.items() if path not in standing or path == "algorithm"}
    return conversion.ours


def _value(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name, None)
    return list(config) if isinstance(config, tuple) else config


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in options.items():
        part: Any = value
        for name in reversed(path.split(".")):
            part = {name: part}
        nested = merge(nested, part)
    return nested


def _given(about: str, given: Mapping[str, Any]) -> bool:
    """Whether an option of ours was given on the command line."""
    from stepcredit.cli.conversion import path_of

    value: Any = given
    for name in path_of(about).split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value is not None
