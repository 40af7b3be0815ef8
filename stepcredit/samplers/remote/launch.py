"""A vLLM server of the run's own, on this machine."""

import logging
import os
import re
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import torch

from stepcredit.errors import UserError

log = logging.getLogger("stepcredit")

SERVER = Path(__file__).parent / "server"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
READY_S = 1800.0  # reading a large model takes its time
ON_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB; other devices ignore them
ALWAYS = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}


class LocalServer:
    """Starts a server and waits until it answers; it ends with `close` or with this process, however that ends.

    Args:
        model: folder or hub id.
        python: the interpreter of the environment that has vLLM; None: this one.
        port: 0 takes a free one.
        dtype: of the computation, as `train.dtype` has it.
        processed: give log-probabilities at the sampling temperature instead of temperature 1.
        args: further arguments of the server.
        log_file: takes what it prints.

    Raises:
        UserError: the port is in use, there is no vLLM, or the server ends.
    """

    def __init__(
        self,
        model: str,
        python: str | None,
        port: int,
        dtype: str,
        processed: bool,
        args: Sequence[str],
        log_file: Path,
    ) -> None:
        python = python or sys.executable
        self.port, self.log_file = _port(port), log_file
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            model,
            "--served-model-name",
            "policy",
        ]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--enable-prefix-caching"]
        command += ["--generation-config", "vllm", "--worker-extension-cls", "stepcredit_worker.Extension"]
        command += ["--dtype", dtype] if dtype != "auto" else []
        command += ["--logprobs-mode", "processed_logprobs"] if processed else []
        if not torch.cuda.is_available():  # on CPUs vLLM 0.32 dies when it cuts the prompt of a request with a seed
            command += ["--no-enable-chunked-prefill"]
        command += args
        paths = [str(SERVER), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = ON_CPU | os.environ | ALWAYS | {"PYTHONPATH": os.pathsep.join(paths)}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)  # it is no process of torchrun's
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(SERVER / "supervise.py"), *command],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env=environment,
            )
        self._end = weakref.finalize(self, _close, self.process)
        log.info("vLLM: starting %s at %s; its log is %s", model, self.url, log_file)
        self._wait()

    def close(self) -> None:
        self._end()

    def check(self) -> None:
        """Raise `UserError` when the server has ended."""
        if self.process.poll() is not None:
            raise UserError(f"sampler.vllm.launch: the server has ended; its log is {self.log_file}{self._why()}")

    def _wait(self) -> None:
        started = time.monotonic()
        while time.monotonic() - started < READY_S:
            self.check()
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=2.0, trust_env=False).status_code == 200:
                    log.info("vLLM: ready after %.0f s", time.monotonic() - started)
                    return
            time.sleep(0.5)
        self.close()
        raise UserError(f"sampler.vllm.launch: the server is not ready after {READY_S:g} s; its log is {self.log_file}")

    def _why(self) -> str:
        """The first error in the log."""
        text = self.log_file.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"\b\w*Error: .{0,300}", "\n".join(x for x in text.splitlines() if "WARNING" not in x))
        return f" ({found[0]})" if found else ""


def lora_args(rank: int) -> list[str]:
    """What lets a server take adapters of this rank."""
    fitting = [one for one in LORA_RANKS if one >= rank]
    if rank and not fitting:
        raise UserError(f"lora.rank: vLLM takes adapters up to rank {LORA_RANKS[-1]}, got {rank}")
    return ["--enable-lora", "--max-lora-rank", str(fitting[0])] if rank else []


def _port(port: int) -> int:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(
                f"sampler.vllm.port: {port} is in use; take another, or 0 for a free one, or name a server that runs "
                "there with --sampler.vllm.servers"
            ) from error
        return int(one.getsockname()[1])


def _close(process: "subprocess.Popen[bytes]") -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
