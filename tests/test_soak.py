"""A few kills of every algorithm that `make soak` kills often."""

import subprocess
import sys
from pathlib import Path

import pytest
from soak import RUNS


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_as_if_nothing_had_happened(name: str) -> None:
    """SIGKILL and SIGTERM at random instants, resumed to the end: identical to the last bit."""
    script = Path(__file__).with_name("soak.py")
    done = subprocess.run([sys.executable, script, name, "--kills", "4"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all ends identical" in done.stdout
