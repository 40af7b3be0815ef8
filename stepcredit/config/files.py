"""Config files."""

from pathlib import Path
from typing import Any

import yaml

from stepcredit.config.renamed import with_new_names
from stepcredit.config.schema import Config
from stepcredit.config.values import dump_options, parse_yaml
from stepcredit.errors import UserError


def read_yaml(path: str) -> dict[str, Any]:
    """A config file as a nested dictionary."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file")
    try:
        loaded = parse_yaml(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise UserError(f"{path}{where}: not YAML ({problem})") from error
    except UserError as error:
        raise UserError(f"{path}, {error}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise UserError(f"{path}: expected sections such as `train:`, found {type(loaded).__name__}")
    return with_new_names(loaded or {})


def dump_yaml(config: Config) -> str:
    """A config as a config file that reads as the same."""
    return dump_options(config.model_dump(mode="json"))
