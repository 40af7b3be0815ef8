"""Freed memory stays with the process, and segments on CUDA grow, unless a user has chosen otherwise."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from stepcredit.run.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
def work():
    held = [torch.empty(1 << 20).fill_(1.0) for _ in range(64)]  # 4 MiB each, as a pass holds them for its backward
work()
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    work()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words: str, **environment: str) -> tuple[bool, int]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FAULTS, *words]
    found = subprocess.run(command, env=plain | environment, capture_output=True, text=True, check=True).stdout.split()
    return found[0] == "True", int(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_freed_memory_is_used_again():
    """Of 4 x 65,536 pages next to none; without it, most of them come again."""
    kept, few = faults("keep")
    if not kept:
        pytest.skip("another C library than glibc")
    assert few < 10_000


def test_what_a_user_chose_holds():
    kept, _ = faults("keep", MALLOC_ARENA_MAX="2")
    assert not kept


SETTINGS = """
import sys
from stepcredit.cli import main as command_line
def show(words):
    import torch
    print(torch._C._accelerator_getAllocatorSettings(), file=sys.stderr)
    return 0
assert "torch" not in sys.modules
command_line.COMMANDS["show"] = show
command_line.main(["show"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "garbage_collection_threshold:0.5"}, "garbage_collection_threshold:0.5"),
    ],
)
def test_torch_reads_that_segments_grow(given, read):
    """What torch itself says of its settings, after a command has imported it."""
    plain = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run(
        [sys.executable, "-c", SETTINGS], env=plain | given, capture_output=True, text=True, check=True
    )
    assert done.stderr.split() == [read]
