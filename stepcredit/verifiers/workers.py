"""Reward functions called in worker processes that can be killed, each call with a deadline."""

import asyncio
import inspect
import logging
import math
import multiprocessing
import numbers
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from itertools import accumulate
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import RLock
from pathlib import Path
from typing import Any, Literal

from pebble import ProcessExpired, ProcessPool

from stepcredit.errors import UserError
from stepcredit.imports import module_of
from stepcredit.verifiers.reaper import sweep
from stepcredit.verifiers.reward import VERL, Reward, reward_function

log = logging.getLogger("stepcredit")

Failure = Literal["timeout", "error", "unfit"]  # unfit: the row lacks what the function needs
Value = float | None | dict[str, Any]

MAX_REWARD = 1e30  # within fp32, sums of a batch included
SPARE_WORKERS = 14  # calls that hang wait for their deadlines side by side, not one after the other
MAX_WORKERS = 32
MAX_SHORT_CALLS = (os.cpu_count() or 1) + 1  # at once; calls that take long are not counted
LONG_S, LONG_WITH_LIMITS_S = 0.1, 1.0  # from when on a call takes long; the second for calls that limit themselves
KILL_AFTER = 0.9  # of the deadline: the rest is for noticing, killing and starting another
GRACE_S = 2.0  # a call that keeps the deadline of each of its completions itself gets this much more
DENSE_KEYS = {"reward", "token", "step", "ends"}  # of a dictionary of rewards inside a completion


@dataclass(frozen=True)
class Outcome:
    """What a function returned for one completion: a value, or why there is none."""

    value: Value = None
    failure: Failure | None = None
    message: str = ""


@dataclass(frozen=True)
class RewardCall:
    """One call of a reward function.

    Attributes:
        arguments: lists with an entry for each of `size` completions.
        together: the function is async and is called for each completion alone, all of them at the same time.
        separable: after a failure each completion is tried again alone, so that the others keep their values.
    """

    reward: Reward
    arguments: Mapping[str, list[Any]]
    size: int
    together: bool = False
    separable: bool = False

    def split(self, sizes: Sequence[int]) -> "list[RewardCall]":
        """Calls of so many completions each."""
        calls = []
        for size, end in zip(sizes, accumulate(sizes), strict=True):
            arguments = {name: column[end - size : end] for name, column in self.arguments.items()}
            calls.append(replace(self, arguments=arguments, size=size))
        return calls

    def rows(self) -> "list[RewardCall]":
        """A call for each completion."""
        return self.split([1] * self.size)


class Workers:
    """Runs calls: in worker processes where the reward function has a path, in this process otherwise.

    Args:
        timeout_s: deadline of a call. Its worker is killed after nine tenths of it and replaced, so that a call that
            hangs costs no more than the whole.
        count: worker processes; None: some more than there are cores, because those that hang only wait.
            0 calls everything in this process, without a deadline.
        memory_mb: address space of a worker; 0 sets no limit.

    Usable from any thread, and inside asyncio. Processes start with the first call (or `start`) and end with `close` or
    with this process, however that ends. What a function prints in a worker is dropped.
    """

    def __init__(
        self, timeout_s: float = 10.0, count: int | None = None, memory_mb: int = 4096, sharing: int = 1
    ) -> None:
        self.timeout_s, self.memory_mb = timeout_s, memory_mb
        cores = max(1, (os.cpu_count() or 1) // sharing)
        self.count = min(MAX_WORKERS, cores + SPARE_WORKERS) if count is None else count
        self._lock = threading.Lock()
        self._pool: ProcessPool | None = None
        self._groups = Path()  # has a file for each worker, named by its process group
        self._finalizer: weakref.finalize | None = None  # ends the pool and what it started

    def run(self, calls: Sequence[RewardCall]) -> list[list[Outcome]]:
        """The outcomes of each call, in order.

        A function that raises, returns what is no reward, outlives its deadline or ends its process makes outcomes with
        a `failure`.

        Raises:
            UserError: a function raised it, or workers cannot be kept running on this machine.
        """
        for_workers = [call for call in calls if self._needs_worker(call)]
        from_workers = iter(self._run_in_workers(for_workers) if for_workers else [])
        return [next(from_workers) if self._needs_worker(call) else run_here(call) for call in calls]

    def _needs_worker(self, call: RewardCall) -> bool:
        return call.reward.path is not None and self.count > 0

    def start(self, rewards: Iterable[Reward]) -> None:
        """Start the processes now if one of the functions needs them: they import while other things go on."""
        paths = sorted({reward.path for reward in rewards if reward.path is not None})
        if self.count and paths:
            self._ensure_pool(paths)

    def close(self) -> None:
        """End all workers and whatever they started."""
        with self._lock:
            finalizer, self._pool, self._finalizer = self._finalizer, None, None
        if finalizer is not None:
            finalizer()

    def _ensure_pool(self, paths: Sequence[str]) -> ProcessPool:
        with self._lock:
            if self._pool is None or not self._pool.active:
                if self._finalizer is not None:
                    self._finalizer()
                context: Any = LastingLocks() if sys.platform != "win32" else multiprocessing.get_context("spawn")
                if sys.platform != "win32":  # imported once, shared by all workers
                    context.set_forkserver_preload(["__main__", __name__, *_modules(paths)])
                self._groups = Path(tempfile.mkdtemp(prefix="stepcredit-workers-"))
                setup = (list(paths), str(self._groups), self.memory_mb)
                self._pool = ProcessPool(self.count, initializer=_set_up_worker, initargs=setup, context=context)
                reaper = subprocess.Popen(
                    [sys.executable, "-I", str(Path(__file__).with_name("reaper.py")), str(self._groups)],
                    stdin=subprocess.PIPE,
                    start_new_session=True,
                )
                self._finalizer = weakref.finalize(self, _end_workers, self._pool, reaper)
                try:
                    _ = self._pool.active  # starts the processes
                except RuntimeError as error:
                    raise UserError(
                        "the worker processes of reward functions cannot start (what Python says is above); a file of "
                        f"a name such as random.py in {os.getcwd()} hides Python's own, so rename it; or set "
                        "--reward.workers 0 to do without"
                    ) from error
            return self._pool

    def _run_in_workers(self, calls: Sequence[RewardCall]) -> list[list[Outcome]]:
        done: dict[int, list[Outcome]] = {}
        paths = sorted({call.reward.path for call in calls if call.reward.path is not None})
        for _ in range(2):  # once more with new workers, should the pool itself break
            pool = self._ensure_pool(paths)
            try:
                self._run_in_pool(pool, calls, done)
                return [done[number] for number in range(len(calls))]
            except (RuntimeError, OSError) as error:  # of the pool; those of the functions are outcomes
                log.warning("reward workers are started again (%s)", describe(error))
                pool.stop()
            finally:
                if any(outcome.failure for outcomes in done.values() for outcome in outcomes):
                    sweep(self._groups)
        raise UserError(
            "the worker processes of reward functions keep breaking; set --reward.workers 0 to do without (a script of "
            "your own needs `if __name__ == '__main__':` around what it runs)"
        )

    def _run_in_pool(self, pool: ProcessPool, calls: Sequence[RewardCall], done: dict[int, list[Outcome]]) -> None:
        """Run the calls that are not done in the pool.

        About as many run at once as there are cores, so that none loses its deadline to the others; calls that take
        long do not count, so that those that hang wait for their deadlines side by side.
        """
        waiting = deque(number for number in range(len(calls)) if number not in done)
        running: dict[Future[list[Outcome]], tuple[int, float]] = {}  # number, and from when on it takes long
        while waiting or running:
            now = time.monotonic()
            short = sum(now < long_from for _, long_from in running.values())
            while waiting and short < MAX_SHORT_CALLS and len(running) < self.count:
                number = waiting.popleft()
                call = calls[number]
                deadline = max(KILL_AFTER * self.timeout_s, call.reward.keeps_s) + (GRACE_S if call.together else 0)
                future = pool.schedule(_run_packed, _packed(call, self.timeout_s), timeout=deadline)
                running[future] = number, now + (LONG_WITH_LIMITS_S if call.reward.keeps_s else LONG_S)
                short += 1
            for finished in wait(running, LONG_S, return_when=FIRST_COMPLETED).done:
                number, _ = running.pop(finished)
                done[number] = self._outcomes(calls[number], finished)

    def _outcomes(self, call: RewardCall, future: "Future[list[Outcome]]") -> list[Outcome]:
        """The outcomes of a call that has finished.

        Raises:
            RuntimeError, OSError: the pool is broken.
        """
        try:
            return future.result()
        except TimeoutError:
            if call.separable and call.size > 1:
                return self._one_by_one(call)
            return [Outcome(None, "timeout", f"no result within {self.timeout_s:g} s")] * call.size
        except ProcessExpired as error:
            if call.separable and call.size > 1:
                return self._one_by_one(call)
            return [Outcome(None, "error", f"its process ended with {_describe_exit(error.exitcode)}")] * call.size

    def _one_by_one(self, call: RewardCall) -> list[Outcome]:
        return [outcome for outcomes in self._run_in_workers(call.rows()) for outcome in outcomes]


class LastingLocks(ForkServerContext):
    """Locks that keep their names until the pool has gone.

    A pool that stops lets go of its locks first and of its workers then; a worker that is still starting would not find
    the locks any more, and say so with a traceback.
    """

    def __init__(self) -> None:
        super().__init__()
        self.locks: list[RLock] = []

    def RLock(self) -> RLock:
        lock = super().RLock()
        self.locks.append(lock)
        return lock


# ---------------------------------------------------------------------- inside a worker


def _set_up_worker(paths: list[str], groups: str, memory_mb: int) -> None:
    """Set a new worker up: it leads a process group, prints nothing, and has imported what it needs."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler waits for the interpreter, which may be stuck
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    if sys.platform != "win32":
        os.setpgid(0, 0)
        (Path(groups) / str(os.getpid())).touch()
    for path in paths:
        try:
            _reward(path)
        except Exception:  # the call will fail with it and say so; here it would start workers without end
            continue
    if memory_mb and sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))


def _packed(call: RewardCall, timeout_s: float) -> tuple[Any, ...]:
    """A call as it goes to a worker, which finds the function by its path."""
    rest = call.size, call.together, call.separable
    return call.reward.path, dict(call.reward.options), dict(call.arguments), rest, timeout_s


def _run_packed(
    path: str, options: dict[str, Any], arguments: dict[str, Any], rest: tuple[int, bool, bool], timeout_s: float
) -> list[Outcome]:
    pid = os.getpid()
    try:
        return run_here(RewardCall(replace(_reward(path), options=options), arguments, *rest), timeout_s)
    finally:
        if os.getpid() != pid:  # a child that the function forked and that found its way back here
            os._exit(0)


_reward = cache(reward_function)


def _modules(paths: Iterable[str]) -> list[str]:
    """The modules of functions that have dotted paths; each worker loads files itself."""
    found = [module_of(path.removeprefix(VERL)) for path in paths]
    return [module for module in found if module is not None]


# ---------------------------------------------------------------------- a call, in whichever process


def run_here(call: RewardCall, timeout_s: float | None = None) -> list[Outcome]:
    """Run a call in this process, and check what the function returns.

    Raises:
        UserError: the function itself raised it.
    """
    function = call.reward.function
    try:
        if call.together:
            return _in_loop(_side_by_side(call, timeout_s))
        result = function(**call.arguments, **call.reward.options)
        if inspect.isawaitable(result):
            result = _in_loop(_finished(result))
        return checked(result, call.size)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit, too: whatever a function raises is an outcome
        if call.separable and call.size > 1:
            return [outcome for row in call.rows() for outcome in run_here(row)]
        return [Outcome(None, "error", describe(error))] * call.size


async def _side_by_side(call: RewardCall, timeout_s: float | None) -> list[Outcome]:
    async def one(row: RewardCall) -> Outcome:
        try:
            result = await asyncio.wait_for(row.reward.function(**row.arguments, **row.reward.options), timeout_s)
            return checked(result, 1)[0]
        except TimeoutError:
            return Outcome(None, "timeout", f"no result within {timeout_s:g} s")
        except UserError:
            raise
        except Exception as error:
            return Outcome(None, "error", describe(error))

    return list(await asyncio.gather(*map(one, call.rows())))


async def _finished(result: Awaitable[Any]) -> Any:
    return await result


def _in_loop(work: Any) -> Any:
    """Run a coroutine to its end, in another thread where this one has a loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def checked(result: Any, size: int) -> list[Outcome]:
    """Outcomes of a list that a reward function returned.

    Raises:
        TypeError, ValueError: it is no list, or has another length.
    """
    if not isinstance(result, Iterable) or isinstance(result, str | bytes | Mapping):
        raise TypeError(f"returned {result!r:.40}; expected a list of numbers")
    values = list(result)
    if len(values) != size:
        raise ValueError(f"returned {len(values)} values for {size} completions")
    return [_outcome(value) for value in values]


def _outcome(value: Any) -> Outcome:
    if value is None:
        return Outcome()
    try:
        if isinstance(value, Mapping):
            return Outcome(_dense(value))
        return Outcome(_number(value))
    except (TypeError, ValueError) as error:
        return Outcome(None, "error", str(error))


def _number(value: Any) -> float:
    value = value.item() if hasattr(value, "item") else value  # numpy, torch
    if not isinstance(value, numbers.Real | Decimal):
        raise TypeError(f"returned {value!r:.40}; expected a number or None")
    number = float(value)
    if not abs(number) <= MAX_REWARD:
        raise ValueError(f"returned {'NaN' if math.isnan(number) else value}; expected a finite number, or None")
    return number


def _dense(value: Mapping[str, Any]) -> dict[str, Any]:
    """`{"token": [...]}` or `{"step": [...], "ends": [...]}`, each with an optional "reward" for the outcome."""
    unknown = set(value) - DENSE_KEYS
    if unknown or ("token" in value) == ("step" in value) or ("step" in value) != ("ends" in value):
        raise ValueError(
            f'returned a dictionary with {", ".join(map(str, value)) or "nothing"}; expected "token", or "step" and '
            '"ends", and perhaps "reward"'
        )
    rewards: dict[str, Any] = {"reward": None if value.get("reward") is None else _number(value["reward"])}
    for name in ("token", "step", "ends"):
        if name in value:
            rewards[name] = [_number(number) for number in value[name]]
    return rewards


def describe(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "MemoryError: raise --reward.memory-mb if that is the function's fault and not the completion's"
    return f"{type(error).__name__}: {error}".rstrip(": ").replace("\n", " ")[:300]


# ---------------------------------------------------------------------- the ends of workers


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"signal {signal.Signals(-code).name}{hint}"


def _end_workers(pool: ProcessPool, reaper: "subprocess.Popen[bytes]") -> None:
    pool.stop()
    pool.join()
    if reaper.stdin is not None:
        reaper.stdin.close()  # what it waits for
    reaper.wait()
