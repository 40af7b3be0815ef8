"""Runs a server as long as its standard input is open, and ends all its processes then: also when the run was killed.

python supervise.py COMMAND ...
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

GRACE_S = 10.0


def end(group: int) -> None:
    """Ask all processes of a group to end, then make them."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        before = time.monotonic()
        while time.monotonic() - before < GRACE_S:
            time.sleep(0.1)
            os.killpg(group, 0)
        os.killpg(group, signal.SIGKILL)


def main(command: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to everybody; the run says when it is over
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def until_closed() -> None:
        sys.stdin.buffer.read()
        end(server.pid)

    threading.Thread(target=until_closed, daemon=True).start()
    code = server.wait()
    end(server.pid)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
