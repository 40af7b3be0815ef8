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
