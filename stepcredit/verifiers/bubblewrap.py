"""How bubblewrap makes a sandbox: its command line, the user inside, and whether this machine can do it at all."""

import os
import shutil
import subprocess
import sys
from functools import cache
from itertools import count
from pathlib import Path

from stepcredit.errors import UserError

INSIDE = Path(__file__).with_name("sandbox_inside.py")  # what a sandbox runs
FIRST_UID = 1_000_000_000  # of the users of sandboxes made by root: each sandbox has one of its own
MAX_SERIAL = 1 << 28
NOBODY = 65534  # the user of other sandboxes
REMEDY = "; install bubblewrap, or run programs unprotected with --reward.options.code.allow_unsafe true"

_serials = count()


def refusal() -> str | None:
    """Why this machine has no sandbox; None when it has one."""
    if sys.platform != "linux":
        return f"programs can be sandboxed on Linux only, not on {sys.platform}"
    if shutil.which("bwrap") is None:
        return "there is no bubblewrap (bwrap) on this machine"
    probe = _probe()
    if probe.returncode == 0:
        return None
    why = probe.stderr.strip()[-200:] or f"exit code {probe.returncode}"
    return f"bubblewrap cannot make a sandbox here: {why}"


@cache
def _probe() -> "subprocess.CompletedProcess[str]":
    program = [sys.executable, "-I", "-c", "import json"]
    return subprocess.run([*command(1), "--", *program], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def require() -> None:
    """Do nothing where this machine has a sandbox.

    Raises:
        UserError: it has none; the message says what to do.
    """
    if (reason := refusal()) is not None:
        raise UserError(reason + REMEDY)


def command(file_mb: int) -> list[str]:
    """The command line up to the program that runs inside.

    Args:
        file_mb: size of the temp folder.
    """
    words = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if not made_by_root():
        words += ["--unshare-user", "--disable-userns", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    words += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--clearenv"]
    for name, value in environment("/tmp").items():
        words += ["--setenv", name, value]
    words += ["--proc", "/proc", "--dev", "/dev", "--size", str(1 << 20), "--perms", "1777", "--tmpfs", "/dev/shm"]
    words += ["--size", str(file_mb << 20), "--perms", "1777", "--tmpfs", "/tmp"]
    words += _readable()
    return [*words, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]


def _readable() -> list[str]:
    """The options that let a program read the system's programs, this Python and what runs inside."""
    words = ["--ro-bind", "/usr", "/usr"]
    for path in map(Path, ("/bin", "/lib", "/lib64", "/sbin")):
        if path.is_symlink():
            words += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            words += ["--ro-bind", str(path), str(path)]
    words += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    words += ["--ro-bind-try", "/etc/alternatives", "/etc/alternatives"]
    for path in dict.fromkeys((Path(sys.base_prefix), Path(sys.prefix), INSIDE)):
        if not path.is_relative_to("/usr"):
            for parent in reversed(path.parents[:-1]):  # others must be able to pass
                if str(parent) != "/tmp":
                    words += ["--perms", "0755", "--dir", str(parent)]
            words += ["--ro-bind", str(path), str(path)]
    return words


def environment(folder: str) -> dict[str, str]:
    """The environment variables of a program, and no others."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
    return {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", **threads}


@cache
def made_by_root() -> bool:
    """Whether root makes sandboxes, with an unprivileged user of its own inside; otherwise a user namespace does."""
    if os.geteuid() != 0:
        return False
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    spans = [(int(first), int(count)) for first, _, count in map(str.split, lines)]
    return any(first <= FIRST_UID and first + count > FIRST_UID + MAX_SERIAL for first, count in spans)


def new_uid() -> int:
    """A user for a sandbox made by root that no other live sandbox of this machine is likely to have."""
    return FIRST_UID + (os.getpid() * 64 + next(_serials) % 64) % MAX_SERIAL
