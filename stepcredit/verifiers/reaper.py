"""A process that outlives the run for a moment: when the run ends, however it ends, it kills all reward workers.

A worker that hangs cannot notice that its run was killed. This script waits for the end of its standard input, whose
other end the run holds, and then kills the process groups that are listed in a folder, a file for each.
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

ROUNDS, PAUSE_S = 10, 0.05  # a worker may be starting right now


def sweep(groups: Path, everything: bool = False) -> None:
    """Kill what workers that have ended left running: their process groups outlive them."""
    for path in groups.iterdir():
        group = int(path.name)
        if everything or not _alive(group):
            with suppress(ProcessLookupError):  # nothing was left
                os.killpg(group, signal.SIGKILL)
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main(groups: Path) -> None:
    sys.stdin.buffer.read()
    for _ in range(ROUNDS):
        sweep(groups, everything=True)
        time.sleep(PAUSE_S)
    shutil.rmtree(groups, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
