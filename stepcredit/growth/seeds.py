"""Seeds of what is sampled."""


def sampling_seed(run_seed: int, stream: int, number: int) -> int:
    """A seed for problem `number` of a stream (0 training, 1 evaluation); streams and runs do not overlap."""
    return ((run_seed * 2 + stream) * 1_000_000_007 + number) % (2**62)
