"""Options that had another name, so that configs of before still load."""

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger("stepcredit")

RENAMED = {
    "objective.surrogate": "loss.name",
    "objective.clip_low": "loss.clip_low",
    "objective.clip_high": "loss.clip_high",
    "objective.dual_clip": "loss.dual_clip",
    "sampler.vllm.servers": "sampler.server.urls",
    "sampler.vllm": "sampler.server",
}


def new_name(path: str) -> str:
    """The name that an option has now."""
    for old, new in RENAMED.items():
        if path == old or path.startswith(f"{old}."):
            return new + path.removeprefix(old)
    return path


def with_new_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """A nested config with old names replaced; where both are given the new one holds. Replaced ones are logged."""
    config: dict[str, Any] = {}
    replaced: dict[str, str] = {}
    old_options: list[tuple[str, Any]] = []
    for path, value in _leaves(given):
        if new_name(path) == path:
            _put(config, path.split("."), value)
        else:
            old_options.append((path, value))
    for path, value in old_options:
        new = new_name(path)
        replaced[path] = new
        loss = config.get("loss", {}).get("name", "clip") if isinstance(config.get("loss", {}), Mapping) else "clip"
        if new.startswith("loss.") and new != "loss.name" and loss != "clip":
            continue  # saved with its default beside a loss that has no such option
        _put(config, new.split("."), value)
    if replaced:
        log.warning("config: %s", ", ".join(f"{old} is {new} now" for old, new in replaced.items()))
    return config


def _leaves(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Options with their values, those of the top first; dictionaries that are values come apart and together again."""
    found: list[tuple[str, Any]] = []
    for key, value in section.items():
        path = f"{prefix}{key}"
        found += _leaves(value, f"{path}.") if isinstance(value, Mapping) and value else [(path, value)]
    return found


def _put(config: dict[str, Any], path: list[str], value: Any) -> None:
    *sections, name = path
    for section in sections:
        inner = config.get(section)
        config[section] = inner if isinstance(inner, dict) else {}
        config = config[section]
    config.setdefault(name, value)
