"""What a run is: one schema, the algorithms that set its defaults, YAML and command-line values."""

from stepcredit.config.files import dump_yaml, read_yaml
from stepcredit.config.resolve import merge, resolve
from stepcredit.config.schema import Config, CreditConfig
from stepcredit.config.values import expand_all, parse_value

__all__ = ["Config", "CreditConfig", "dump_yaml", "expand_all", "merge", "parse_value", "read_yaml", "resolve"]
