"""Seeds of all that is random in a run, and the generator that reads them.

torch's generator on a CPU reads the lower 32 bits of its seed alone, so what is drawn many times in a run is drawn by
numpy's, which reads all bits. A seed is a hash of the numbers that name what it is for: two of a run, of its streams or
of two runs are the same only by chance, which is 1 in 2^62.
"""

from hashlib import blake2b

import numpy as np

# Streams: what is sampled, shuffled, or drawn by chance.
TRAINING, EVALUATION, MINIBATCHES, REWARD_MODEL, ROWS, EXPLORING, PREFIX_VALUES, PREPARATION, CRITIC, TEXT = range(10)
BITS = 62  # servers take signed 64 bits, and add the number of the completion


def mixed(*numbers: int) -> int:
    """A seed of 62 bits from whole numbers; another number anywhere, or another order, gives another seed."""
    digest = blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - BITS)


def sampling_seed(run_seed: int, stream: int, number: int) -> int:
    """A seed for problem `number` of a stream."""
    return mixed(run_seed, stream, number)


def generator(seed: int) -> np.random.Generator:
    """Random numbers that depend on all bits of a seed, which must not be negative."""
    return np.random.Generator(np.random.PCG64(seed))
