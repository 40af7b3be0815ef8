"""SIGINT and SIGTERM: the current optimiser step is finished and saved, then the program ends."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from stepcredit.processes.ranks import SINGLE_PROCESS, Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The run was asked to stop; its state is to be saved."""


class StopRequest:
    """Records signals inside its `with` block; a second signal interrupts at once.

    Outside the main thread, where Python handles no signals, none is recorded. Several processes stop at the same place
    once one of them was asked; there a second signal is ignored, because torchrun repeats the one of the terminal.
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
        """Raise `Interrupted` after a signal. All processes call this, at places where no work would be lost."""
        if self.ranks.any(self.asked):
            raise Interrupted

    def check_if_alone(self, *_: object) -> None:
        """`check` inside the work of one process; does nothing when there are others."""
        if self.ranks.size == 1:
            self.check()
