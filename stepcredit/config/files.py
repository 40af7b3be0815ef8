"""Config files and the values that people write in them and on the command line."""

from pathlib import Path
from typing import Any

import yaml

from stepcredit.config.renamed import with_new_names
from stepcredit.config.schema import Config
from stepcredit.errors import UserError


def read_yaml(path: str) -> dict[str, Any]:
    """A config file as a nested dictionary."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file")
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not YAML ({getattr(error, 'problem', error)})") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise UserError(f"{path}: expected sections such as `train:`, found {type(loaded).__name__}")
    loaded = with_new_names(loaded or {})
    return loaded | {part: _numbers(loaded[part]) for part in ("credit", "loss") if part in loaded}


def dump_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads `1e-6` as text; where no schema says that it is a number, take it for one."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, str):
        return parse_value(value) if value[:1] in "+-.0123456789" and "e" in value.lower() else value
    return value


def parse_value(text: str) -> Any:
    """What a command-line value means: number, boolean, null, list, or text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return parsed if parsed is None or isinstance(parsed, (bool, list, dict)) else text
