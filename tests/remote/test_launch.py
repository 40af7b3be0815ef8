"""A server of the run's own."""

import itertools
import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from fake_server import COMPLETIONS, PARAMS, PROMPTS, SEEDS, drop, sampling

from stepcredit.errors import UserError
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.remote import launch
from stepcredit.samplers.remote.dialect import Start
from stepcredit.samplers.remote.launch import LocalServer
from stepcredit.samplers.remote.vllm import VLLM

SERVER = """
import json, os, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

child = subprocess.Popen(["sleep", "300"])

def end(*_):
    child.kill()
    child.wait()
    os._exit(1)

signal.signal(signal.SIGTERM, signal.SIG_IGN if "--stubborn" in sys.argv else end)
told = {"pids": [os.getpid(), os.getppid(), child.pid], "words": sys.argv[1:], "environment": dict(os.environ)}
Path(sys.argv[0]).with_name("told.json").write_text(json.dumps(told))
starting = [503, 503]

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if not starting:
            Path(sys.argv[0]).with_name("ready").touch()
        self.send_response(starting.pop() if starting else 200)
        self.end_headers()

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")


@pytest.fixture
def python(tmp_path) -> Path:
    """An interpreter that is a script, and stands for one with vLLM."""
    script, python = tmp_path / "server.py", tmp_path / "python"
    script.write_text(SERVER)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n')
    python.chmod(0o755)
    return python


def local(
    python: Path | str | None, folder: Path, processed: bool = False, port: int = 0, more: str = "--more"
) -> LocalServer:
    params = SamplingParams(temperature=0.7 if processed else 1.0)
    start = Start("a-model", "float32", params, str(python), port, args=[more, "1"])
    return LocalServer(VLLM(), start, folder / "log" / "server.log")


def told(folder: Path) -> dict:
    return json.loads((folder / "told.json").read_text())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def all_gone(pids: list[int], within: float = 30.0) -> bool:
    until = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


@linux
def test_close_ends_all_processes(python, tmp_path, monkeypatch, caplog):
    """And how the server is called: with what the worker extension needs, and not as one of torchrun's."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    caplog.set_level(logging.INFO)
    with closing(local(python, tmp_path, processed=True)) as server:
        found = told(tmp_path)
        assert (tmp_path / "ready").exists()
        assert all(map(alive, found["pids"])) and str(server.log_file) in caplog.text
        server.check()
    assert all_gone(found["pids"])
    words, environment = found["words"], found["environment"]
    assert words[:2] == ["-m", "vllm.entrypoints.openai.api_server"] and words[-2:] == ["--more", "1"]
    given = dict(itertools.pairwise(words))
    expected = {"--model": "a-model", "--dtype": "float32", "--host": "127.0.0.1", "--port": str(server.port)}
    expected |= {"--worker-extension-cls": "stepcredit_worker.Extension", "--logprobs-mode": "processed_logprobs"}
    assert given | expected == given
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(launch.SERVER), "elsewhere"]
    assert (launch.SERVER / "stepcredit_worker.py").is_file()
    assert environment["VLLM_SERVER_DEV_MODE"] == "1" and "RANK" not in environment
    assert "PYTORCH_ALLOC_CONF" not in environment  # the run's own, with which a server could not sleep


@linux
def test_nothing_stays_when_the_run_is_killed(python, tmp_path):
    code = "import sys, time; from pathlib import Path; from stepcredit.samplers.params import SamplingParams\n"
    code += "from stepcredit.samplers.remote.dialect import Start; from stepcredit.samplers.remote.vllm import VLLM\n"
    code += "from stepcredit.samplers.remote.launch import LocalServer\n"
    code += "start = Start('m', 'auto', SamplingParams(), sys.argv[1])\n"
    code += "one = LocalServer(VLLM(), start, Path(sys.argv[2]))\nprint('ready', flush=True)\n"
    code += "time.sleep(300)"
    words = [sys.executable, "-c", code, str(python), str(tmp_path / "log")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "ready\n"
        pids = told(tmp_path)["pids"]
        assert all(map(alive, pids))
        run.send_signal(signal.SIGKILL)
    assert all_gone(pids)


@linux
def test_a_server_of_its_own_that_ends_ends_the_run(policy, fake, python, tmp_path):
    """Without waiting for the patience to be over."""
    server = local(python, tmp_path)
    with sampling(policy, fake, patience_s=30.0, local=server) as sampler:
        pids = told(tmp_path)["pids"]
        os.kill(pids[0], signal.SIGTERM)
        assert server.process.wait(5) != 0
        assert all_gone(pids)
        fake.fail(COMPLETIONS, itertools.repeat(drop))
        with pytest.raises(UserError, match=f"the server has ended; its log is {re.escape(str(server.log_file))}"):
            sampler.sample(PROMPTS, 2, PARAMS, SEEDS)


@linux
@pytest.mark.parametrize("which", ["server", "child"])
def test_what_does_not_end_is_made_to(python, tmp_path, monkeypatch, which):
    """A server that takes no signals, and what one that died has left running."""
    folder = tmp_path / "server"
    folder.mkdir()
    text = (launch.SERVER / "supervise.py").read_text()
    assert "GRACE_S = 10.0" in text
    (folder / "supervise.py").write_text(text.replace("GRACE_S = 10.0", "GRACE_S = 0.5"))
    monkeypatch.setattr(launch, "SERVER", folder)
    with closing(local(python, tmp_path, more="--stubborn")) as server:
        pids, started = told(tmp_path)["pids"], time.monotonic()
        if which == "server":
            server.close()
            assert time.monotonic() - started > 0.5
        else:
            os.kill(pids[0], signal.SIGKILL)
        assert all_gone(pids)


@linux
def test_the_sampler_closes_its_server(policy, fake, python, tmp_path):
    with sampling(policy, fake, local=local(python, tmp_path)):
        pids = told(tmp_path)["pids"]
    assert all_gone(pids)


def test_a_port_in_use(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"sampler.server.port: {port} is in use"):
            local(None, tmp_path, port=port)


@pytest.mark.parametrize("python, why", [(None, "No module named"), ("no-such-python", "no-such-python")])
def test_no_vllm(python, why, tmp_path):
    """The error names the log and the reason."""
    with pytest.raises(UserError, match="the server has ended") as error:
        local(python or bare(tmp_path), tmp_path)
    assert str(tmp_path / "log" / "server.log") in str(error.value) and why in str(error.value)


def bare(folder: Path) -> Path:
    """This interpreter, without whatever is installed."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S "$@"\n')
    python.chmod(0o755)
    return python
