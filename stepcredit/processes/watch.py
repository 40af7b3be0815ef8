"""Which processes are missing when the others wait for them."""

import threading
import time
from typing import Any

HEARTBEATS = 8  # of each process in the time after which one counts as lost
LONGEST_S = 5.0  # between two heartbeats


class Watch:
    """Every process counts in the run's store how many barriers it has reached, and sends heartbeats.

    Args:
        store: of torch.distributed, seen by all processes.
        timeout_s: after which a process counts as lost.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.every_s = min(LONGEST_S, timeout_s / HEARTBEATS)
        self.barriers = 0
        self._write("barriers", 0)
        self._write("heartbeats", 0)
        threading.Thread(target=self._send_heartbeats, daemon=True).start()

    def arrive(self) -> None:
        """Count that this process has reached a barrier."""
        self.barriers += 1
        self._write("barriers", self.barriers)

    def missing(self) -> list[int]:
        """The processes that have reached fewer barriers than others, else those without heartbeats."""
        barriers = self._read("barriers")
        behind = [rank for rank in range(self.size) if barriers[rank] < max(barriers)]
        if behind:
            return behind
        before = self._read("heartbeats")
        time.sleep(2.5 * self.every_s)
        after = self._read("heartbeats")
        return [rank for rank in range(self.size) if after[rank] == before[rank] and rank != self.rank]

    def _send_heartbeats(self) -> None:
        number = 0
        while True:
            time.sleep(self.every_s)
            number += 1
            try:
                self._write("heartbeats", number)
            except RuntimeError:  # the run is over
                return

    def _write(self, counter: str, value: int) -> None:
        self.store.set(f"{counter}/{self.rank}", str(value))

    def _read(self, counter: str) -> list[int]:
        return [int(self.store.get(f"{counter}/{rank}")) for rank in range(self.size)]
