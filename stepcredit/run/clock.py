"""Seconds of each phase of an iteration."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = dict(seconds or {})

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the block's time under this name."""
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def metrics(self, tokens: float) -> dict[str, float]:
        total = sum(self.seconds.values())
        return self.seconds | {"time/iteration": total, "tokens/per_second": tokens / total}


class Pace:
    """How long a run goes on: iterations are counted by themselves, evaluations too.

    Args:
        last: the number of the last iteration.
        eval_every: iterations between evaluations; there is one after the last iteration in any case.
    """

    def __init__(self, last: int, eval_every: int) -> None:
        self.last, self.eval_every = last, eval_every
        self.iterations: list[float] = []  # seconds of each
        self.evaluations: list[float] = []
        self.elapsed_s = 0.0

    def add(self, iteration: int, elapsed_s: float, eval_s: float | None) -> None:
        """Count what has passed since the last call; iteration 0 is what comes before the first.

        Args:
            elapsed_s: seconds since the program started.
            eval_s: seconds of that which were an evaluation.
        """
        if eval_s is not None:
            self.evaluations.append(eval_s)
        if iteration:
            self.iterations.append(elapsed_s - self.elapsed_s - (eval_s or 0.0))
        self.elapsed_s = elapsed_s

    def left(self, iteration: int) -> float:
        """Seconds that the iterations after this one and their evaluations take, by the mean of those before."""
        every = self.eval_every or self.last
        evaluations = self.last // every - iteration // every + (self.last % every > 0) if iteration < self.last else 0
        return (self.last - iteration) * _mean(self.iterations) + evaluations * _mean(self.evaluations)


def _mean(seconds: list[float]) -> float:
    return sum(seconds) / len(seconds) if seconds else 0.0
