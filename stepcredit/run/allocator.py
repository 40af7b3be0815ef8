"""Memory that is freed stays with the process: the next micro-batch needs as much again.

By default glibc gives large blocks back to the kernel at once and gets fresh, zeroed pages for the next ones; with
tensors of some MiB that can take a fifth of a training step on a CPU (benchmarks/choices.py).
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
NEVER = (1 << 31) - 1  # the largest number that it takes
GIVEN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # beginnings of variables by which a user chooses an allocator


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, unless the environment says what it should do; whether that was possible."""
    if sys.platform != "linux" or any(name.startswith(GIVEN) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, NEVER)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
