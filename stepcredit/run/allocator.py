"""How torch allocates memory, unless the environment says how it should.

On a CPU what is freed stays with the process: the next micro-batch needs as much again. By default glibc gives large
blocks back to the kernel at once and gets fresh, zeroed pages for the next ones; with tensors of some MiB that can
take a fifth of a training step (benchmarks/choices.py).

On CUDA segments grow. Micro-batches and decoding ask for blocks of ever other sizes, which otherwise leave segments
with gaps that nothing fits into, so that a run ends out of memory while much is free.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
NEVER = (1 << 31) - 1  # the largest number that it takes
GIVEN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # beginnings of variables by which a user chooses an allocator

# Read when CUDA begins. The second is the name before torch 2.9, the third that of ROCm; torch still reads both.
SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
GROWING = "expandable_segments:True"


def grow_segments() -> bool:
    """Let segments on CUDA grow, unless the environment says how to allocate; before torch is imported."""
    if sys.platform != "linux" or any(name in os.environ for name in SETTINGS):
        return False
    os.environ[SETTINGS[0]] = GROWING
    return True


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, unless the environment says what it should do; whether that was possible."""
    if sys.platform != "linux" or any(name.startswith(GIVEN) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, NEVER)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
