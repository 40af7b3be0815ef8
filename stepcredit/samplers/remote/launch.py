"""A server of the run's own, on this machine."""

import logging
import os
import re
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx

from stepcredit.errors import UserError
from stepcredit.samplers.remote.dialect import Dialect, Start

log = logging.getLogger("stepcredit")

SERVER = Path(__file__).parent / "server"
READY_S = 1800.0  # reading a large model takes its time
HEALTH_S = 2.0
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LocalServer:
    """Starts a server and waits until it answers; it ends with `close` or with this process, however that ends.

    Args:
        start: what is wanted.
        log_file: takes what it prints.

    Raises:
        UserError: the port is in use, the engine is missing, or the server ends.
    """

    def __init__(self, dialect: Dialect, start: Start, log_file: Path) -> None:
        start = replace(start, port=usable_port(start.port))
        self.dialect, self.port, self.log_file = dialect, start.port, log_file
        self.url = f"http://127.0.0.1:{self.port}"
        command = dialect.command(start)
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(SERVER / "supervise.py"), *command],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env=server_environment(dialect, os.environ, start.gpus),
            )
        self._end = weakref.finalize(self, _close, self.process)
        log.info("%s: starting %s at %s; its log is %s", dialect.name, start.model, self.url, log_file)
        self._wait()

    def close(self) -> None:
        self._end()

    def check(self) -> None:
        """Raise `UserError` when the server has ended."""
        if self.process.poll() is not None:
            raise UserError(f"sampler.server.launch: the server has ended; its log is {self.log_file}{self._why()}")

    def _wait(self) -> None:
        started = time.monotonic()
        while time.monotonic() - started < READY_S:
            self.check()
            with suppress(httpx.TransportError):
                answer = httpx.get(f"{self.url}{self.dialect.health_path}", timeout=HEALTH_S, trust_env=False)
                if answer.status_code == 200:
                    log.info("%s: ready after %.0f s", self.dialect.name, time.monotonic() - started)
                    return
            time.sleep(0.5)
        self.close()
        raise UserError(
            f"sampler.server.launch: the server is not ready after {READY_S:g} s; its log is {self.log_file}"
        )

    def _why(self) -> str:
        """The first error in the log."""
        text = self.log_file.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"\b\w*Error: .{0,300}", "\n".join(x for x in text.splitlines() if "WARNING" not in x))
        return f" ({found[0]})" if found else ""


def server_environment(dialect: Dialect, own: Mapping[str, str], gpus: Sequence[str] | None = None) -> dict[str, str]:
    """The environment variables of a server: it finds what it runs for us, and is no process of torchrun's."""
    found = dialect.environment(own)
    if gpus is not None:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    paths = [str(SERVER)]
    if found.get("PYTHONPATH"):
        paths.append(found["PYTHONPATH"])
    found["PYTHONPATH"] = os.pathsep.join(paths)
    if found.get("PYTORCH_ALLOC_CONF") == "expandable_segments:True":  # this process's (run/allocator.py)
        del found["PYTORCH_ALLOC_CONF"]  # vLLM's memory that it gives back while it sleeps does not go with it
    return {name: value for name, value in found.items() if name not in OF_TORCHRUN}


def usable_port(port: int) -> int:
    """This port, or a free one for 0.

    Raises:
        UserError: it is in use.
    """
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(
                f"sampler.server.port: {port} is in use; take another, or 0 for a free one, or name a server that runs "
                "there with --sampler.server.urls"
            ) from error
        return int(one.getsockname()[1])


def _close(process: "subprocess.Popen[bytes]") -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
