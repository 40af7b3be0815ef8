"""Reward functions as users write them, the worst ones included; tests name them by dotted path.

Each does what its name says where the completion is "bad", and gives 1 otherwise.
"""

import asyncio
import os
import signal
import sys
import time


def _rows(bad):
    def function(prompts, completions, **columns):
        return [bad() if text == "bad" else 1.0 for text in completions]

    return function


def _fork_and_leave():
    """Leaves a process behind, which writes its number where the test looks."""
    if os.fork() == 0:
        time.sleep(60)
    return 1.0


def _fork_and_hang():
    os.fork()
    time.sleep(60)


def _print_forever():
    while True:
        print("x" * 10000)


def _memory():
    return float(len(bytearray(1 << 40)))


def _recursion():
    return _recursion()


def _ignore_the_end():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def _big_power():
    return float((9**9**9) % 7)  # one long stretch inside C, deaf to signals


def _spin():
    while True:
        pass


def _fork_twice():
    os.fork()
    os.fork()
    return 1.0


def _raise():
    raise KeyError("colour")


raises = _rows(_raise)
exits = _rows(lambda: sys.exit(0))
leaves = _rows(lambda: os._exit(3))
kills_itself = _rows(lambda: os.kill(os.getpid(), signal.SIGKILL))
segfaults = _rows(lambda: os.kill(os.getpid(), signal.SIGSEGV))
sleeps = _rows(lambda: time.sleep(60))
spins = _rows(_spin)
big_power = _rows(_big_power)
prints = _rows(_print_forever)
memory = _rows(_memory)
recursion = _rows(_recursion)
forks_and_hangs = _rows(_fork_and_hang)
forks_and_leaves = _rows(_fork_and_leave)
forks_twice = _rows(_fork_twice)
ignores_the_end = _rows(_ignore_the_end)
nan = _rows(lambda: float("nan"))
text = _rows(lambda: "yes")
closes = _rows(lambda: os.closerange(0, 3) or 1.0)


def wrong_length(prompts, completions, **columns):
    return [1.0] * (len(completions) + ("bad" in completions))


def counts(prompts, completions, **columns):
    """How many completions a call got."""
    return [float(len(completions))] * len(completions)


def with_option(completions, factor=1.0, **columns):
    return [factor] * len(completions)


def dense(completions, completion_ids, **columns):
    return [{"reward": 1.0, "token": [0.5] * len(ids)} for ids in completion_ids]


async def waits(completions, **columns):
    """Each call waits; together they take as long as one."""
    await asyncio.sleep(60 if completions == ["bad"] else 0.3)
    return [1.0] * len(completions)


async def blocks(completions, **columns):
    if "bad" in completions:
        time.sleep(60)
    return [1.0] * len(completions)


def compute_score(data_source, solution_str, ground_truth, extra_info):
    """verl's form."""
    right = solution_str == ground_truth and data_source == "d" and extra_info == {"index": 3}
    return {"score": float(right), "other": 1.0}


def fails_in_process_1(prompts, completions, **columns):
    """Of a run by several processes."""
    if os.environ.get("RANK") == "1":
        raise ValueError("no gold here")
    return [1.0] * len(completions)
