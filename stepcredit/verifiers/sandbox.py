"""Runs programs that nobody has read, without network, files or rights and within limits.

A sandbox (`bubblewrap.py`) sees the system's programs and this Python, read-only, and one temp folder of its own; it
has its own process table, the rights of an unprivileged user and a filter of system calls (`seccomp.py`). Its processes
have limits of their own (`sandbox_inside.py`), and the calling process ends it when all of them together exceed one.
Nothing outlives the call, or the caller's death.

What remains: a hole in the kernel is a way out; memory that the kernel uses on a program's behalf is bounded by the
number of its processes and files alone. Systems other than x86-64 and AArch64 have no filter of system calls.
"""

import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from stepcredit.verifiers import bubblewrap
from stepcredit.verifiers.bubblewrap import refusal
from stepcredit.verifiers.seccomp import system_call_filter

log = logging.getLogger("stepcredit")

Status = Literal["ok", "error", "timeout", "memory", "processes", "files", "output"]

MAX_FILES = 4096  # in the temp folder
OWN_PROCESSES = 3  # of a sandbox besides those that are counted: bubblewrap's, the one that runs programs, the program
POLL_S = 0.02
STARVED = 3.0  # times the seconds that a program gets which other programs keep from running ...
FAIR_SHARE = 0.7  # ... because it had less than this share of a processor
if hasattr(os, "sysconf"):
    PAGE_SIZE, TICKS_PER_S = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
else:
    PAGE_SIZE, TICKS_PER_S = 4096, 100  # Windows, where there is no sandbox


@dataclass(frozen=True)
class Limits:
    """What a sandbox may use.

    Attributes:
        seconds: wall time of everything, and processor time of a process. A program that would run and does not get
            the processor, on a busy machine, has up to three times the wall time.
        memory_mb: address space of a process, and resident memory of all of them.
        processes: processes and threads.
        file_mb: the largest file, and all files.
        output_kb: of standard output and standard error, each.
    """

    seconds: float = 6.0
    memory_mb: int = 512
    processes: int = 16
    file_mb: int = 16
    output_kb: int = 64


@dataclass(frozen=True)
class Result:
    """How a program ended: "ok" is exit code 0, "error" any other; the other statuses name the limit that ended it."""

    status: Status
    code: int | None = None
    stdout: str = ""
    stderr: str = ""


def run(program: str, stdin: str = "", limits: Limits = Limits(), allow_unsafe: bool = False) -> Result:
    """Run a Python program.

    Raises:
        UserError: there is no sandbox on this machine.
    """
    with closing(run_each(program, [stdin], limits, allow_unsafe)) as results:
        return next(results)


def run_each(
    program: str, inputs: Sequence[str], limits: Limits, allow_unsafe: bool = False
) -> Generator[Result, None, None]:
    """Run a Python program on each input, in one sandbox; limits hold for all runs together.

    A program never sees a later input. Close the iterator to end early.

    Raises:
        UserError: there is no sandbox on this machine.
    """
    with Sandbox(["script"], limits, allow_unsafe) as sandbox:
        for stdin in inputs:
            sandbox.send({"program": program, "stdin": stdin})
            try:
                answer = sandbox.receive()
                yield Result(answer["status"], answer["code"], answer["stdout"], answer["stderr"])
            except SandboxEnded as end:
                yield Result(end.status)
            except (ValueError, TypeError, KeyError):  # the program wrote into the pipe that answers come from
                yield Result("error")


def run_tests(
    program: str, setup: str, tests: Sequence[Any], limits: Limits, allow_unsafe: bool = False
) -> Generator[bool, None, None]:
    """Whether a program passes each test; programs and tests run in two sandboxes.

    Args:
        setup: run before the tests.
        tests: source text that calls what the program defines, or `{"function", "arguments", "expected"}` with JSON
            texts: of the arguments, and of each value that is right.

    Raises:
        UserError: there is no sandbox on this machine.
    """
    with ExitStack() as stack:
        calls, answers = os.pipe(), os.pipe()
        try:
            serving = Sandbox(["serve"], limits, allow_unsafe, stdin=calls[0], stdout=answers[1])
            stack.enter_context(serving)
            role = ["test", str(answers[0]), str(calls[1])]
            testing = Sandbox(role, limits, allow_unsafe, inherited=(answers[0], calls[1]))
            stack.enter_context(testing)
        finally:
            for descriptor in (*calls, *answers):
                os.close(descriptor)
        testing.partner = serving
        testing.send({"program": program, "setup": setup, "tests": list(tests)})
        for _ in tests:
            try:
                yield testing.receive() is True
            except SandboxEnded:
                yield False


class SandboxEnded(Exception):
    """A sandbox has ended, by itself ("error") or because it exceeded a limit."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.status = status


class Sandbox:
    """A sandbox whose limits are watched; all that ran in it is dead when its `with` block ends.

    Args:
        role: what `sandbox_inside.py` is to do, and its arguments.
        stdin, stdout: its own pipes, or file descriptors.
        inherited: file descriptors that it takes over.

    Attributes:
        partner: a sandbox whose limits are watched together with those of this one.
    """

    def __init__(
        self,
        role: Sequence[str],
        limits: Limits,
        allow_unsafe: bool = False,
        stdin: int = subprocess.PIPE,
        stdout: int = subprocess.PIPE,
        inherited: Sequence[int] = (),
    ) -> None:
        self.limits = limits
        self.partner: Sandbox | None = None
        self.deadline = time.monotonic() + limits.seconds
        self.unsafe = allow_unsafe and refusal() is not None
        self.first_pid: int | None = None  # of the processes inside, as this one sees it
        self.handle: int | None = None  # becomes readable when all processes inside are gone
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._unsent, self._received = b"", b""
        self._exceeded: Status | None = None
        self._open(list(role), stdin, stdout, tuple(inherited))

    def _open(self, role: list[str], stdin: int, stdout: int, inherited: tuple[int, ...]) -> None:
        limits = asdict(self.limits) | {"cpu_seconds": int(self.limits.seconds) + 1, "alone": not self.unsafe}
        limits["uid"] = bubblewrap.new_uid() if not self.unsafe and bubblewrap.made_by_root() else 0
        inside = [sys.executable, "-I", "-B", str(bubblewrap.INSIDE), json.dumps(limits), *role]
        if self.unsafe:
            _warn_unprotected()
            self._folder = tempfile.TemporaryDirectory(prefix="stepcredit-program-", ignore_cleanup_errors=True)
            self.process = subprocess.Popen(
                inside,
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                pass_fds=inherited,
                env=bubblewrap.environment(self._folder.name),
                cwd=self._folder.name,
                start_new_session=True,
            )
        else:
            bubblewrap.require()
            self._start_bubblewrap(inside, stdin, stdout, inherited)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)

    def _start_bubblewrap(self, inside: list[str], stdin: int, stdout: int, inherited: tuple[int, ...]) -> None:
        info, info_end = os.pipe()
        rules, rules_end = os.pipe()
        try:
            os.write(rules_end, system_call_filter())
            os.close(rules_end)
            command = [*bubblewrap.command(self.limits.file_mb), "--info-fd", str(info_end)]
            if system_call_filter():
                command += ["--seccomp", str(rules)]
            self.process = subprocess.Popen(
                [*command, "--", *inside],
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                pass_fds=(info_end, rules, *inherited),
            )
            os.close(info_end)
            described = b""
            while b"}" not in described and (chunk := os.read(info, 4096)):
                described += chunk
        finally:
            os.close(info)
            os.close(rules)
        if b"}" not in described:
            self.process.wait()
            raise RuntimeError(f"bubblewrap could not make a sandbox (exit code {self.process.returncode})")
        self.first_pid = json.loads(described)["child-pid"]
        with suppress(ProcessLookupError):  # it has ended already
            self.handle = os.pidfd_open(self.first_pid)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill everything inside, and wait until it is gone."""
        if self.unsafe:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        if self.handle is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
            select.select([self.handle], [], [])  # the first process of a namespace goes last
            os.close(self.handle)
            self.handle = None
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        if self._folder is not None:
            self._folder.cleanup()

    def send(self, value: Any) -> None:
        """Have a value sent as a line while `receive` waits."""
        self._unsent += json.dumps(value).encode() + b"\n"

    def receive(self) -> Any:
        """The next value.

        Raises:
            SandboxEnded: nothing came, or a limit was exceeded.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        stdin, stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        most = 16 * (self.limits.output_kb << 10)  # JSON may write a byte as six
        while b"\n" not in self._received:
            if exceeded := self._exceeded_limit():
                raise SandboxEnded(exceeded)
            if len(self._received) > most:
                raise SandboxEnded("output")
            readable, writable, _ = select.select([stdout], [stdin] if self._unsent else [], [], POLL_S)
            if writable:
                try:
                    self._unsent = self._unsent[os.write(stdin, self._unsent[: 1 << 16]) :]
                except BrokenPipeError:
                    self._unsent = b""
            if readable:
                chunk = os.read(stdout, 1 << 16)
                if not chunk:
                    raise SandboxEnded("error")
                self._received += chunk
        line, self._received = self._received.split(b"\n", 1)
        return json.loads(line)

    def _exceeded_limit(self) -> Status | None:
        """The limit that this sandbox or its partner exceeds now, or has exceeded before."""
        self._exceeded = self._exceeded or self._check_limits()
        return self._exceeded

    def _check_limits(self) -> Status | None:
        usages = [self._usage()]
        if self.partner is not None:
            usages.append(self.partner._usage())
        for usage in usages:
            if usage.exceeded:
                return usage.exceeded
        seconds, late = self.limits.seconds, time.monotonic() - self.deadline
        if late <= 0:
            return None
        running, used_s = any(usage.running for usage in usages), sum(usage.seconds for usage in usages)
        starved = running and used_s < min(seconds, FAIR_SHARE * (seconds + late))
        return None if starved and late < (STARVED - 1) * seconds else "timeout"

    def _usage(self) -> "Usage":
        """What all processes of this sandbox use together."""
        if self.first_pid is None:
            return Usage()
        memory = count = running = 0
        used_s = 0.0
        root = f"/proc/{self.first_pid}/root"
        try:
            if os.path.samefile(root, "/"):  # it is still being made
                return Usage(running=True)
            numbers = [name for name in os.listdir(f"{root}/proc") if name.isdigit()]
            temp = os.statvfs(f"{root}/tmp")
        except OSError:  # it has ended
            return Usage()
        for number in numbers:
            with suppress(OSError, IndexError):  # this one has ended
                memory += int(Path(f"{root}/proc/{number}/statm").read_text().split()[1]) * PAGE_SIZE
                stat = Path(f"{root}/proc/{number}/stat").read_text().rpartition(")")[2].split()
                running += stat[0] == "R"
                used_s += (int(stat[11]) + int(stat[12])) / TICKS_PER_S
                count += 1
        exceeded: Status | None = None
        if memory > self.limits.memory_mb << 20:
            exceeded = "memory"
        elif count > self.limits.processes + OWN_PROCESSES:
            exceeded = "processes"
        elif temp.f_files - temp.f_ffree > MAX_FILES:
            exceeded = "files"
        return Usage(exceeded, running > 0, used_s)


@dataclass(frozen=True)
class Usage:
    """What a sandbox uses now: the limit that it exceeds, whether a process runs, and seconds of processor time."""

    exceeded: Status | None = None
    running: bool = False
    seconds: float = 0.0


@cache
def _warn_unprotected() -> None:
    log.warning("programs run unprotected (allow_unsafe): %s", refusal())
