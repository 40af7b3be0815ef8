"""What a run is: one schema, the algorithms that set its defaults, YAML and command-line values."""

from stepcredit.config.files import dump_yaml, parse_value, read_yaml
from stepcredit.config.resolve import merge, resolve
from stepcredit.config.schema import Config, CreditConfig

__all__ = ["Config", "CreditConfig", "dump_yaml", "merge", "parse_value", "read_yaml", "resolve"]
