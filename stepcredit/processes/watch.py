"""Who is missing when processes wait in vain."""

import threading
import time
from typing import Any

BEATS = 8  # of each process in the time after which one counts as lost
LONGEST_S = 5.0  # between two


class Watch:
    """Every process notes in the run's store how far it has come, and that it lives.

    Args:
        store: of torch.distributed, seen by all processes.
        timeout_s: after which a process counts as lost.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.every_s = min(LONGEST_S, timeout_s / BEATS)
        self.come = 0
        self._note("come", 0)
        self._note("beat", 0)
        threading.Thread(target=self._beat, daemon=True).start()

    def pass_by(self) -> None:
        """This process has come to the next place where all meet."""
        self.come += 1
        self._note("come", self.come)

    def missing(self) -> list[int]:
        """The processes that are behind the others, or, when all are at one place, those that live no more."""
        come = self._read("come")
        behind = [rank for rank in range(self.size) if come[rank] < max(come)]
        if behind:
            return behind
        before = self._read("beat")
        time.sleep(2.5 * self.every_s)
        return [rank for rank, beat in enumerate(self._read("beat")) if beat == before[rank] and rank != self.rank]

    def _beat(self) -> None:
        number = 0
        while True:
            time.sleep(self.every_s)
            number += 1
            try:
                self._note("beat", number)
            except RuntimeError:  # the run is over
                return

    def _note(self, what: str, value: int) -> None:
        self.store.set(f"{what}/{self.rank}", str(value))

    def _read(self, what: str) -> list[int]:
        return [int(self.store.get(f"{what}/{rank}")) for rank in range(self.size)]
