"""Hostile programs: stopped in time, nothing reached, nothing left; and what a right program needs works."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hostile import BOMBS, ESCAPES, FAKES, LEFTOVERS

from stepcredit.errors import UserError
from stepcredit.verifiers import bubblewrap, sandbox
from stepcredit.verifiers.sandbox import Limits, run, run_each, run_tests

REASON = bubblewrap.refusal()
needs_sandbox = pytest.mark.skipif(REASON is not None, reason=f"{REASON} (bubblewrap)")
MARK = os.getpid() * 1e-9  # makes the limits, which stand in the command line, those of this process
SHORT = Limits(seconds=1.5 + MARK, memory_mb=256)
LONG = Limits(seconds=6 + MARK)
SLACK_S = 10  # against what never ends; how fast a busy machine ends it is no matter
TESTS = ["assert f(2) == 4", "assert f(3) == 6"]


def living() -> set[int]:
    """Processes of this process's sandboxes, as the host sees them."""
    marks = [repr(limits.seconds).encode() for limits in (SHORT, LONG)]
    names = [name for name in os.listdir("/proc") if name.isdigit()]
    return {int(name) for name in names if any(mark in _command(name) for mark in marks)}


def _command(number: str) -> bytes:
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture(autouse=True)
def nothing_left():
    """Whatever a test ran is gone after it; all processes of a sandbox but a shell's carry its limits."""
    before = living()
    yield
    assert living() <= before


@pytest.fixture
def world(tmp_path, monkeypatch):
    """What a program must not reach, and must leave as it is."""
    (tmp_path / "secret").write_text("secret")
    monkeypatch.setenv("STEPCREDIT_SECRET", "swordfish")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as named:
        marker = f"stepcredit-{os.getpid()}"
        named.bind("\0" + marker)
        named.listen()
        server.setblocking(False)
        yield {
            "port": server.getsockname()[1],
            "secret": "swordfish",
            "folder": tmp_path,
            "home": Path.home(),
            "marker": marker,
        }
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


@needs_sandbox
@pytest.mark.parametrize("kind", ESCAPES)
def test_no_escape(kind, world):
    result = run(ESCAPES[kind].format(**world), limits=SHORT)
    assert "ESCAPED" not in result.stdout


@needs_sandbox
@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_stopped(kind):
    start = time.monotonic()
    result = run(BOMBS[kind].format(), limits=SHORT)
    assert result.status != "ok"
    assert time.monotonic() - start < SHORT.seconds + SLACK_S
    assert len(result.stdout) + len(result.stderr) <= 2 * (SHORT.output_kb << 10) + 2


@needs_sandbox
@pytest.mark.parametrize("kind", LEFTOVERS)
def test_nothing_is_left(kind):
    """Also between the runs on two inputs."""
    count = "import os, time\ntime.sleep(0.2)\nprint(sum(n.isdigit() for n in os.listdir('/proc')), flush=True)\n"
    program = count + LEFTOVERS[kind]  # the sleep is for the dead to be buried
    first, second = run_each(program, ["", ""], LONG)
    assert first.status == second.status == "ok"
    assert first.stdout == second.stdout
    assert not [name for name in os.listdir("/proc") if name.isdigit() and b"sleep\x001000" in _command(name)]


@needs_sandbox
@pytest.mark.parametrize("kind", FAKES)
def test_fakes_pass_no_test(kind):
    assert list(run_tests(FAKES[kind].format(), "", TESTS, SHORT)) == [False, False]


@needs_sandbox
def test_a_right_program_passes():
    assert list(run_tests("def f(x): return 2 * x", "", TESTS, LONG)) == [True, True]


@needs_sandbox
@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("loop", "timeout"),
        ("memory of many", "memory"),
        ("output", "output"),
        ("many files", "files"),
        ("core", "error"),
    ],
)
def test_the_status_names_the_limit(kind, status):
    assert run(BOMBS[kind].format(), limits=SHORT).status == status


@needs_sandbox
def test_input_output_and_libraries():
    program = "import sympy, os, tempfile\nopen('a', 'w').write('x')\nprint(int(input()) + 1, os.getuid() > 0)"
    assert [result.stdout for result in run_each(program, ["1\n", "2\n"], LONG)] == ["2 True\n", "3 True\n"]
    assert run("import sys; print(1); print(2, file=sys.stderr); sys.exit(3)", limits=LONG) == sandbox.Result(
        "error", 3, "1\n", "2\n"
    )


@needs_sandbox
def test_the_limit_of_processes_is_the_kernels():
    """They could not be started, rather than being counted too late."""
    program = (
        "import os, time\nn = 0\ntry:\n    while n < 100:\n        if os.fork() == 0: time.sleep(9)\n        n += 1\n"
        "except OSError: print(n)"
    )
    assert int(run(program, limits=replace(LONG, processes=8)).stdout) <= 8


@needs_sandbox
def test_objects_and_changed_arguments_of_tests():
    program = (
        "class Stack:\n    def __init__(self): self.all = []\n    def push(self, x): self.all.append(x); return self\n"
        "    def __len__(self): return len(self.all)\n"
        "def add(values): values.append(1)\n"
        "def count(): yield from range(3)\n"
        "def apply(g, x): return g(x)\n"
        "def wrong(): raise KeyError('x')\n"
        "def big(): return 10 ** 5000\n"
    )
    tests = [
        "s = Stack(); s.push(1).push(2); assert len(s) == 2 and s.all == [1, 2] and isinstance(s, Stack)",
        "x = []; add(x); assert x == [1]",
        "assert list(count()) == [0, 1, 2]",
        "assert apply(lambda x: x + 1, 2) == 3",
        "try:\n    wrong()\nexcept KeyError:\n    pass\nelse:\n    assert False",
        "assert big() == 10 ** 5000",
        "assert s.missing == 1",
    ]
    assert list(run_tests(program, "", tests, LONG)) == [True] * 6 + [False]


@needs_sandbox
def test_a_program_that_ends_itself_is_loaded_again():
    program = "import os\ndef f(x): return os._exit(0) if x else 7"
    assert list(run_tests(program, "", ["assert f(1) == 7", "assert f(0) == 7"], LONG)) == [False, True]


@needs_sandbox
def test_closing_early_kills():
    with closing(run_each("import time; time.sleep(float(input()))", ["0", "1000"], LONG)) as results:
        assert next(results).status == "ok"


@needs_sandbox
def test_a_killed_caller_takes_its_sandbox_along():
    code = f"from stepcredit.verifiers.sandbox import Limits, run\nrun('while True: pass', limits={LONG})"
    before = living()
    caller = subprocess.Popen([sys.executable, "-c", code])
    _until(lambda: len(living() - before) >= 2)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    _until(lambda: living() <= before)


def _until(true) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_without_bubblewrap_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="allow_unsafe true"):
        run("print(1)")


def test_unprotected(monkeypatch, caplog):
    """Limits and the end of what was left hold there, too."""
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: None)
    sandbox._warn_unprotected.cache_clear()
    assert run("print(int(input()) + 1)", "1", LONG, allow_unsafe=True).stdout == "2\n"
    assert run("while True: pass", "", SHORT, allow_unsafe=True).status == "timeout"
    assert run("x = bytearray(10 ** 9)", "", SHORT, allow_unsafe=True).status == "error"
    assert list(run_tests("def f(x): return 4", "", TESTS, LONG, allow_unsafe=True)) == [True, False]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
