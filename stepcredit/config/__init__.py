"""What a run is: one schema, the algorithms that set its defaults, YAML and command-line values.

YAML is loaded when something is read: help needs none.
"""

from typing import TYPE_CHECKING, Any

from stepcredit.config.places import expand_all
from stepcredit.config.resolve import merge, resolve
from stepcredit.config.schema import Config, CreditConfig

if TYPE_CHECKING:
    from stepcredit.config.files import dump_yaml, read_yaml
    from stepcredit.config.values import parse_value

__all__ = ["Config", "CreditConfig", "dump_yaml", "expand_all", "merge", "parse_value", "read_yaml", "resolve"]


def __getattr__(name: str) -> Any:
    if name in ("dump_yaml", "read_yaml"):
        from stepcredit.config import files

        return getattr(files, name)
    if name == "parse_value":
        from stepcredit.config import values

        return values.parse_value
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
