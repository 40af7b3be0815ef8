"""SIGINT and SIGTERM: the optimiser step at hand is finished and saved, then the program ends."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The run was asked to stop; what it had is to be saved."""


class StopRequest:
    """Remembers that a signal came, from `with` to the end of its block; a second one interrupts at once.

    Outside the main thread, where Python takes no signals, it never asks.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def check(self, *_: object) -> None:
        """Raise `Interrupted` once a signal has come. Stands where nothing would be lost."""
        if self.asked:
            raise Interrupted
