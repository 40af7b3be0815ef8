"""Programs that nobody has read, run by bubblewrap without network, files, rights, or more than they are allowed.

A sandbox sees the system's programs and this Python, read-only, and one temp folder of its own; it has its own process
table, a foreign user's rights and a filter of system calls. Its processes keep limits, and a watch in the calling
process ends it when all of them together are over one. Nothing outlives the call, or the caller's death.

What remains: a hole in the kernel is a way out; memory that the kernel uses on a program's behalf is bounded by the
number of its processes and files alone. Systems other than x86-64 and AArch64 have no filter of system calls.
"""

import json
import logging
import os
import platform
import select
import shutil
import signal
import struct
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

from stepcredit.errors import UserError

log = logging.getLogger("stepcredit")

Status = Literal["ok", "error", "timeout", "memory", "processes", "files", "output"]

INSIDE = Path(__file__).with_name("sandbox_inside.py")
UIDS = 1_000_000_000  # users of sandboxes made by root: this and the number of the process, so that no two share one
MAX_SERIAL = 1 << 28
NOBODY = 65534
MAX_FILES = 4096  # in the temp folder
POLL_S = 0.02
STARVED = 3.0  # times the seconds that a program gets which is kept from running by others ...
HAD_ITS_SHARE = 0.7  # ... because it had less than this share of a processor
HELP = "; install bubblewrap, or run programs unprotected with --reward.options.code.allow_unsafe true"


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
    """What came of a program: "ok" is exit code 0, "error" any other, the rest names the limit that ended it."""

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
    with Box(["script"], limits, allow_unsafe) as box:
        for stdin in inputs:
            box.send({"program": program, "stdin": stdin})
            try:
                found = box.receive()
                yield Result(found["status"], found["code"], found["stdout"], found["stderr"])
            except Ended as end:
                yield Result(end.status)
            except (ValueError, TypeError, KeyError):  # the program wrote into the pipe of its keeper
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
            serving = Box(["serve"], limits, allow_unsafe, stdin=calls[0], stdout=answers[1])
            stack.enter_context(serving)
            role = ["test", str(answers[0]), str(calls[1])]
            testing = Box(role, limits, allow_unsafe, inherited=(answers[0], calls[1]))
            stack.enter_context(testing)
        finally:
            for end in (*calls, *answers):
                os.close(end)
        testing.beside = serving
        testing.send({"program": program, "setup": setup, "tests": list(tests)})
        for _ in tests:
            try:
                yield testing.receive() is True
            except Ended:
                yield False


class Ended(Exception):
    """A sandbox has ended, by itself ("error") or because it was over a limit."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.status = status


class Box:
    """A sandbox and the watch over it; it is dead, with all that ran in it, when its `with` block ends."""

    def __init__(
        self,
        role: Sequence[str],
        limits: Limits,
        allow_unsafe: bool = False,
        stdin: int = subprocess.PIPE,
        stdout: int = subprocess.PIPE,
        inherited: Sequence[int] = (),
    ) -> None:
        self.limits, self.beside = limits, self
        self.deadline = time.monotonic() + limits.seconds
        self.unsafe = allow_unsafe and refusal() is not None
        self.inner: int | None = None  # first process inside, and a handle that tells when all are gone
        self.handle: int | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._unsent, self._read = b"", b""
        self._over: Status | None = None
        self._open(list(role), stdin, stdout, tuple(inherited))

    def _open(self, role: list[str], stdin: int, stdout: int, inherited: tuple[int, ...]) -> None:
        limits = asdict(self.limits) | {"cpu_seconds": int(self.limits.seconds) + 1, "alone": not self.unsafe}
        limits["uid"] = 0 if self.unsafe or not _as_root() else UIDS + _serial()
        inside = [sys.executable, "-I", "-B", str(INSIDE), json.dumps(limits), *role]
        if self.unsafe:
            _warn()
            self._folder = tempfile.TemporaryDirectory(prefix="stepcredit-program-", ignore_cleanup_errors=True)
            self.process = subprocess.Popen(
                inside,
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                pass_fds=inherited,
                env=_environment(self._folder.name),
                cwd=self._folder.name,
                start_new_session=True,
            )
        else:
            _check()
            self._start(inside, stdin, stdout, inherited)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)

    def _start(self, inside: list[str], stdin: int, stdout: int, inherited: tuple[int, ...]) -> None:
        info, info_end = os.pipe()
        rules, rules_end = os.pipe()
        try:
            os.write(rules_end, _system_calls())
            os.close(rules_end)
            command = [*_bubblewrap(self.limits.file_mb), "--info-fd", str(info_end)]
            command += ["--seccomp", str(rules)] if _system_calls() else []
            self.process = subprocess.Popen(
                [*command, "--", *inside],
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                pass_fds=(info_end, rules, *inherited),
            )
            os.close(info_end)
            told = b""
            while b"}" not in told and (chunk := os.read(info, 4096)):
                told += chunk
        finally:
            os.close(info)
            os.close(rules)
        if b"}" not in told:
            self.process.wait()
            raise RuntimeError(f"bubblewrap could not make a sandbox (exit code {self.process.returncode})")
        self.inner = json.loads(told)["child-pid"]
        with suppress(ProcessLookupError):  # it has ended already
            self.handle = os.pidfd_open(self.inner)

    def __enter__(self) -> "Box":
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
            Ended: nothing came, or a limit was passed.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        given, said = self.process.stdin.fileno(), self.process.stdout.fileno()
        most = 16 * (self.limits.output_kb << 10)  # JSON may write a byte as six
        while b"\n" not in self._read:
            self._over = self._over or self._passed()
            if self._over or len(self._read) > most:
                raise Ended(self._over or "output")
            readable, writable, _ = select.select([said], [given] if self._unsent else [], [], POLL_S)
            if writable:
                try:
                    self._unsent = self._unsent[os.write(given, self._unsent[: 1 << 16]) :]
                except BrokenPipeError:
                    self._unsent = b""
            if readable:
                chunk = os.read(said, 1 << 16)
                if not chunk:
                    raise Ended("error")
                self._read += chunk
        line, self._read = self._read.split(b"\n", 1)
        return json.loads(line)

    def _passed(self) -> Status | None:
        """The limit that is passed now, by this sandbox or the one beside it."""
        boxes = dict.fromkeys((self, self.beside))
        found = [box._use() for box in boxes]
        for use in found:
            if use.over:
                return use.over
        seconds, late = self.limits.seconds, time.monotonic() - self.deadline
        if late <= 0:
            return None
        running, used_s = any(use.running for use in found), sum(use.seconds for use in found)
        starved = running and used_s < min(seconds, HAD_ITS_SHARE * (seconds + late))
        return None if starved and late < (STARVED - 1) * seconds else "timeout"

    def _use(self) -> "Use":
        """What all processes of this sandbox use together."""
        if self.inner is None:
            return Use()
        memory = count = running = 0
        used_s = 0.0
        root = f"/proc/{self.inner}/root"
        try:
            if os.path.samefile(root, "/"):  # it is still being made
                return Use(running=True)
            numbers = [name for name in os.listdir(f"{root}/proc") if name.isdigit()]
            temp = os.statvfs(f"{root}/tmp")
        except OSError:  # it has ended
            return Use()
        for number in numbers:
            with suppress(OSError, IndexError):  # this one has ended
                memory += int(Path(f"{root}/proc/{number}/statm").read_text().split()[1]) * _PAGE
                stat = Path(f"{root}/proc/{number}/stat").read_text().rpartition(")")[2].split()
                running += stat[0] == "R"
                used_s += (int(stat[11]) + int(stat[12])) / _TICKS
                count += 1
        over: Status | None = None
        if memory > self.limits.memory_mb << 20:
            over = "memory"
        elif count > self.limits.processes + 3:  # bubblewrap's, the keeper's, the program's
            over = "processes"
        elif temp.f_files - temp.f_ffree > MAX_FILES:
            over = "files"
        return Use(over, running > 0, used_s)


@dataclass(frozen=True)
class Use:
    """What a sandbox uses now: the limit that it is over, whether a process runs, and processor time."""

    over: Status | None = None
    running: bool = False
    seconds: float = 0.0


_PAGE, _TICKS = (os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")) if hasattr(os, "sysconf") else (4096, 100)


# ---------------------------------------------------------------------- bubblewrap


def refusal() -> str | None:
    """Why this machine has no sandbox; None when it has one."""
    if sys.platform != "linux":
        return f"programs can be sandboxed on Linux only, not on {sys.platform}"
    if shutil.which("bwrap") is None:
        return "there is no bubblewrap (bwrap) on this machine"
    done = _probe()
    if done.returncode == 0:
        return None
    return f"bubblewrap cannot make a sandbox here: {done.stderr.strip()[-200:] or f'exit code {done.returncode}'}"


@cache
def _probe() -> "subprocess.CompletedProcess[str]":
    command = [*_bubblewrap(1), "--", sys.executable, "-I", "-c", "import json"]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def _check() -> None:
    if (reason := refusal()) is not None:
        raise UserError(reason + HELP)


def _bubblewrap(file_mb: int) -> list[str]:
    """The command up to what it runs."""
    command = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if not _as_root():
        command += ["--unshare-user", "--disable-userns", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    command += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--clearenv"]
    for name, value in _environment("/tmp").items():
        command += ["--setenv", name, value]
    command += ["--proc", "/proc", "--dev", "/dev", "--size", str(1 << 20), "--perms", "1777", "--tmpfs", "/dev/shm"]
    command += ["--size", str(file_mb << 20), "--perms", "1777", "--tmpfs", "/tmp"]
    command += ["--ro-bind", "/usr", "/usr"]
    for path in map(Path, ("/bin", "/lib", "/lib64", "/sbin")):
        if path.is_symlink():
            command += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            command += ["--ro-bind", str(path), str(path)]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    command += ["--ro-bind-try", "/etc/alternatives", "/etc/alternatives"]
    for path in dict.fromkeys((Path(sys.base_prefix), Path(sys.prefix), INSIDE)):
        if not path.is_relative_to("/usr"):
            for parent in reversed(path.parents[:-1]):  # others must be able to pass
                command += ["--perms", "0755", "--dir", str(parent)] if str(parent) != "/tmp" else []
            command += ["--ro-bind", str(path), str(path)]
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]


def _environment(folder: str) -> dict[str, str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
    return {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", **threads}


@cache
def _as_root() -> bool:
    """Whether root's own rights make the sandbox; a foreign user takes over inside. Otherwise a user namespace does."""
    if os.geteuid() != 0:
        return False
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    spans = [(int(first), int(count)) for first, _, count in map(str.split, lines)]
    return any(first <= UIDS and first + count > UIDS + MAX_SERIAL for first, count in spans)


_serials = iter(range(1 << 62))


def _serial() -> int:
    """A number that no other live sandbox of this machine is likely to have."""
    return (os.getpid() * 64 + next(_serials) % 64) % MAX_SERIAL


@cache
def _warn() -> None:
    log.warning("programs run unprotected (allow_unsafe): %s", refusal())


# ---------------------------------------------------------------------- system calls

FORBIDDEN = {  # number on x86-64, on AArch64; what a program never needs and the kernel's limits do not cover
    "ptrace": (101, 117),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "pidfd_getfd": (438, 438),
    "mount_setattr": (442, 442),
}
ARCHITECTURES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}  # column, the kernel's name, clone
CLONE3, NEW_USER = 435, 0x10000000
LOAD, EQUAL, ABOVE, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, REFUSE, ABSENT = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # EPERM, ENOSYS


@cache
def _system_calls() -> bytes:
    """The filter for this machine's processor, as the kernel takes it; empty where the numbers are not known."""
    if platform.machine() not in ARCHITECTURES:
        return b""
    column, name, clone = ARCHITECTURES[platform.machine()]
    rules = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, name), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    rules += [(ABOVE, 0, 1, 0x40000000), (RETURN, 0, 0, REFUSE)]  # x86-64's second set of numbers
    for numbers in FORBIDDEN.values():
        rules += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, REFUSE)]
    rules += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, ABSENT)]  # its flags are out of sight; the C library has clone
    rules += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, 16), (ANY_BIT, 0, 1, NEW_USER), (RETURN, 0, 0, REFUSE)]
    rules += [(RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *rule) for rule in rules)
