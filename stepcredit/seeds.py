"""Seeds of what is sampled."""

TRAINING, EVALUATION = 0, 1  # streams


def sampling_seed(run_seed: int, stream: int, number: int) -> int:
    """A seed for problem `number` of a stream; streams and runs do not overlap."""
    return ((run_seed * 2 + stream) * 1_000_000_007 + number) % (2**62)
