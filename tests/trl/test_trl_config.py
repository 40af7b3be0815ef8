"""The defaults of TRL that `stepcredit config` takes are those of the TRL that is installed."""

import sys

import pytest

if "trl.trainer.grpo_trainer" not in sys.modules:  # conftest.py tried
    pytest.skip("make test-trl sets up TRL", allow_module_level=True)

from trl import GRPOConfig, ModelConfig, ScriptArguments

from stepcredit.cli.from_trl import DEFAULTS


def test_the_defaults_are_those_of_trl():
    fields = {
        name: field.default
        for kind in (ScriptArguments, ModelConfig, GRPOConfig)
        for name, field in kind.__dataclass_fields__.items()
    }
    for name, value in DEFAULTS.items():
        assert getattr(fields[name], "value", fields[name]) == value, name
