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
    config = _copy(given)
    replaced: list[str] = []
    for old, new in RENAMED.items():
        value = _take(config, old.split("."))
        if value is None:
            continue
        replaced.append(f"{old} is {new} now")
        if new.startswith("loss.") and new != "loss.name" and _loss(config) != "clip":
            continue  # saved with its default beside a loss that has no such option
        _put(config, new.split("."), value)
    if replaced:
        log.warning("config: %s", ", ".join(replaced))
    return config


def _loss(config: Mapping[str, Any]) -> Any:
    loss = config.get("loss")
    return loss.get("name", "clip") if isinstance(loss, Mapping) else "clip"


def _copy(value: Any) -> Any:
    return {key: _copy(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


def _take(config: dict[str, Any], path: list[str]) -> Any:
    """Remove an option or a section and give its value; None where it is not there."""
    *sections, name = path
    inside: Any = config
    for section in sections:
        inside = inside.get(section)
        if not isinstance(inside, dict):
            return None
    return inside.pop(name, None)


def _put(config: dict[str, Any], path: list[str], value: Any) -> None:
    """Set an option, or the options of a section, that are not there yet."""
    *sections, name = path
    for section in sections:
        inner = config.get(section)
        config[section] = inner if isinstance(inner, dict) else {}
        config = config[section]
    if isinstance(value, dict) and isinstance(config.get(name), dict):
        config[name] = value | config[name]
    else:
        config.setdefault(name, value)
