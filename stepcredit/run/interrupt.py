"""SIGINT and SIGTERM: the optimiser step at hand is finished and saved, then the program ends."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from stepcredit.processes.ranks import SINGLE_PROCESS, Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The run was asked to stop; what it had is to be saved."""


class StopRequest:
    """Remembers that a signal came, from `with` to the end of its block; a second one interrupts at once.

    Outside the main thread, where Python takes no signals, it never asks. Several processes stop at the same place once
    one was asked; there a second signal changes nothing, because torchrun passes on what the terminal has sent already.
    """

    def __init__(self, ranks: Ranks = SINGLE_PROCESS) -> None:
        self.asked = False
        self.ranks = ranks
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and self.ranks.size == 1:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raise `Interrupted` once a signal has come. Stands where nothing would be lost, and all processes come by."""
        if self.ranks.any(self.asked):
            raise Interrupted

    def check_here(self, *_: object) -> None:
        """The same inside the work of one process, when there are no others."""
        if self.ranks.size == 1:
            self.check()
