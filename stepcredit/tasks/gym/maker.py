"""Makes problems of reasoning-gym in a process of its own.

Some of its tasks depend on the order of Python's sets, which another process has differently, and one on Python's
global random numbers. So problems are made where the hashes of texts are fixed (PYTHONHASHSEED=0) and the global
generators are seeded for each problem: a seed gives the same problem in every process, today and after a resume. A
problem that takes too long or too much memory is a refusal there and no more.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import numpy

from stepcredit.errors import UserError
from stepcredit.verifiers.gym import dataset, decoded, encoded, library

LONGEST_S = 60  # for one problem
MEMORY = 4 << 30  # bytes of address space
# Slow to build, and a problem depends on nothing but the seed: built once. tests/test_gym.py compares.
BUILT_ONCE = {"arc_agi", "codeio", "figlet_font", "group_anagrams", "spell_backward", "word_ladder"}


class Maker:
    """The process; it starts with the first problem and ends with this one. Usable from any thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def make(self, task: str, options: dict[str, Any], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """For each seed {"question", "answer", "entry"}, or {"error"} where the task makes no problem of it.

        Raises:
            UserError: reasoning-gym is not installed, or the process ended.
        """
        library()
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            made = []
            for seed in seeds:
                try:
                    process.stdin.write(json.dumps({"task": task, "options": options, "seed": seed}) + "\n")
                    process.stdin.flush()
                    line = process.stdout.readline()
                except OSError:
                    line = ""
                if not line:
                    self._process = None
                    raise UserError(f"gym:{task}: the process that makes problems ended with code {process.wait()}")
                made.append(json.loads(line))
            return made

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for the run, which ends this when it goes
            )
            weakref.finalize(self, _end, self._process)
        return self._process


@cache
def maker() -> Maker:
    """The one of this process."""
    return Maker()


def _end(process: "subprocess.Popen[str]") -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):  # it has gone already
                stream.close()
    process.wait()


# ---------------------------------------------------------------------- inside the process


def make_problem(task: str, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """A problem of a task; called where the hashes of texts are fixed.

    Raises:
        Exception: whatever the task raises.
    """
    random.seed(seed)
    numpy.random.seed(seed)
    if task in BUILT_ONCE:
        made = _built(task, json.dumps(options, sort_keys=True))
        made.seed = seed
    else:
        made = dataset(task, options, seed)
    entry = made[0]
    text = encoded(entry)
    if encoded(decoded(text)) != text:
        raise TypeError("its entry cannot be written as text")
    answer = entry["answer"]
    return {"question": entry["question"], "answer": None if answer is None else str(answer), "entry": text}


@cache
def _built(task: str, options: str) -> Any:
    return dataset(task, json.loads(options), seed=0)


def _too_long(*signal_and_frame: Any) -> None:
    raise TimeoutError(f"it took longer than {LONGEST_S} s")


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some tasks print
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.signal(signal.SIGALRM, _too_long)
    for line in sys.stdin:
        request = json.loads(line)
        signal.alarm(LONGEST_S)
        try:
            reply = make_problem(**request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}".replace("\n", " ")[:200]}
        finally:
            signal.alarm(0)
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
