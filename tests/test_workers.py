"""Reward functions in worker processes: whatever they do is an outcome, and nothing of them is left."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stepcredit.errors import UserError
from stepcredit.verifiers.reward import reward_function
from stepcredit.verifiers.workers import Outcome, RewardCall, Workers

TIMEOUT = 1.5


@pytest.fixture(scope="module")
def workers():
    made = Workers(TIMEOUT, count=8, memory_mb=2048)
    yield made
    made.close()


def calls(name: str, texts: list[str], **columns) -> list[RewardCall]:
    reward = reward_function(f"tests.user_rewards.{name}")
    arguments = reward.select({"prompts": ["p"] * len(texts), "completions": texts, **columns})
    return RewardCall(reward, arguments, len(texts)).rows()


def run(workers: Workers, name: str, texts: list[str], **columns) -> list[Outcome]:
    return [outcome for found in workers.run(calls(name, texts, **columns)) for outcome in found]


def stat(path: Path) -> tuple[str, int, int] | None:
    """State, parent and process group of a process; None once it has ended."""
    try:
        state, parent, group = (path / "stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return None
    return None if state == "Z" else (state, int(parent), int(group))


def everything() -> dict[int, tuple[str, int, int]]:
    found = {int(path.name): stat(path) for path in Path("/proc").glob("[0-9]*")}
    return {pid: what for pid, what in found.items() if what is not None}


def soon_empty(look) -> list[int]:
    """What `look` still finds after some seconds."""
    deadline = time.monotonic() + 60
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.mark.parametrize(
    ("name", "failure", "words"),
    [
        ("raises", "error", "KeyError: 'colour'"),
        ("exits", "error", "SystemExit: 0"),
        ("leaves", "error", "exit code 3"),
        ("kills_itself", "error", "SIGKILL"),
        ("segfaults", "error", "SIGSEGV"),
        ("sleeps", "timeout", "1.5 s"),
        ("spins", "timeout", "1.5 s"),
        ("big_power", "timeout", "1.5 s"),
        ("prints", "timeout", "1.5 s"),
        ("forks_and_hangs", "timeout", "1.5 s"),
        ("ignores_the_end", "timeout", "1.5 s"),
        ("memory", "error", "MemoryError"),
        ("recursion", "error", "RecursionError"),
        ("nan", "error", "NaN"),
        ("text", "error", "'yes'"),
        ("wrong_length", "error", "2 values for 1 completions"),
    ],
)
def test_a_bad_completion_fails_alone(workers, name: str, failure: str, words: str) -> None:
    """The others get their rewards, the bad one a failure that says what happened."""
    found = run(workers, name, ["good", "bad", "good", "good"])
    assert [outcome.value for outcome in found] == [1.0, None, 1.0, 1.0]
    assert [outcome.failure for outcome in found] == [None, failure, None, None]
    assert words in found[1].message


def test_forked_children_do_not_answer_twice(workers) -> None:
    assert [outcome.value for outcome in run(workers, "forks_twice", ["bad", "good"] * 4)] == [1.0] * 8
    assert [outcome.value for outcome in run(workers, "closes", ["bad", "good"] * 4)] == [1.0] * 8


def test_hanging_calls_wait_for_their_deadlines_side_by_side(workers) -> None:
    """Six that hang among 600 cost one deadline, not six."""
    texts = ["bad" if number % 100 == 7 else "good" for number in range(600)]
    run(workers, "sleeps", ["good"])
    started = time.monotonic()
    found = run(workers, "sleeps", texts)
    assert time.monotonic() - started < 6 * TIMEOUT
    assert sum(outcome.failure == "timeout" for outcome in found) == 6
    assert sum(outcome.value == 1.0 for outcome in found) == 594


def test_nothing_is_left_running() -> None:
    """What workers started ends with them: with one that is killed at its deadline, and with all at the close."""

    def members() -> list[int]:
        return [pid for pid, (_, _, group) in everything().items() if group in groups]

    workers = Workers(TIMEOUT, count=2)
    run(workers, "counts", ["good"])
    groups = {int(path.name) for path in workers._groups.iterdir()}
    run(workers, "forks_and_hangs", ["bad", "bad"])
    assert soon_empty(members) == []
    run(workers, "forks_and_leaves", ["bad"])
    groups = {int(path.name) for path in workers._groups.iterdir()}
    assert len(members()) == len(groups) + 1
    folder = workers._groups
    workers.close()
    assert soon_empty(members) == [] and not folder.exists()


def test_workers_die_with_a_killed_run(tmp_path) -> None:
    """SIGKILL of the process that has the pool leaves no worker behind, not even one that hangs."""
    script = """
import sys
from tests.test_workers import calls
from stepcredit.verifiers.workers import Workers
if __name__ == "__main__":
    workers = Workers(60, count=2)
    workers.run(calls("spins", ["good"]))
    print("ready", flush=True)
    workers.run(calls("spins", ["bad", "bad"]))
"""
    path = tmp_path / "run.py"
    path.write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    family = children(process.pid)
    assert len(family) >= 3
    process.kill()
    process.wait()
    assert soon_empty(lambda: [pid for pid in family if pid in everything()]) == []


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    below = [child for child, (_, parent, _) in everything().items() if parent == pid]
    return below + [one for child in below for one in children(child)]


def test_a_worker_killed_from_outside_is_replaced(workers) -> None:
    run(workers, "counts", ["good"])
    for group in list(workers._groups.iterdir())[:3]:
        os.kill(int(group.name), signal.SIGKILL)
    assert [outcome.value for outcome in run(workers, "counts", ["good"] * 20)] == [1.0] * 20


def test_async_functions_wait_together(workers) -> None:
    """40 calls of 0.3 s take far less than 12 s; one that hangs times out alone."""
    reward = reward_function("tests.user_rewards.waits")
    call = RewardCall(reward, {"completions": ["good"] * 39 + ["bad"]}, 40, together=True, separable=True)
    started = time.monotonic()
    (found,) = workers.run([call])
    assert time.monotonic() - started < 8
    assert [outcome.value for outcome in found] == [1.0] * 39 + [None] and found[-1].failure == "timeout"


def test_an_async_function_that_blocks_holds_up_no_other(workers) -> None:
    reward = reward_function("tests.user_rewards.blocks")
    (found,) = workers.run(
        [RewardCall(reward, {"completions": ["good", "bad", "good"]}, 3, together=True, separable=True)]
    )
    assert [outcome.failure for outcome in found] == [None, "timeout", None]


@pytest.mark.parametrize(("name", "failure"), [("raises", "error"), ("leaves", "error"), ("sleeps", "timeout")])
def test_one_completion_does_not_spoil_its_chunk(workers, name: str, failure: str) -> None:
    """A call of several that goes wrong is repeated one by one; where it may not be, all have failed."""
    whole = RewardCall(
        reward_function(f"tests.user_rewards.{name}"), {"prompts": ["p"] * 3, "completions": ["a", "bad", "b"]}, 3
    )
    (apart,), (one,) = workers.run([replace(whole, separable=True)]), workers.run([whole])
    assert [outcome.failure for outcome in apart] == [None, failure, None]
    assert [outcome.failure for outcome in one] == [failure] * 3


def test_from_another_thread_and_inside_asyncio(workers) -> None:
    found: list[list[Outcome]] = []
    thread = threading.Thread(target=lambda: found.append(run(workers, "raises", ["good", "bad"])))
    thread.start()
    thread.join()

    async def inside():
        here = Workers(count=0)
        call = RewardCall(reward_function("tests.user_rewards.waits"), {"completions": ["good"]}, 1)
        return run(workers, "raises", ["good", "bad"]), here.run([call])[0]

    also, in_process = asyncio.run(inside())
    assert [o.failure for o in found[0]] == [o.failure for o in also] == [None, "error"]
    assert in_process == [Outcome(1.0)]


def test_options_columns_and_verl(workers) -> None:
    reward = reward_function("tests.user_rewards.with_option", {"factor": 0.25})
    assert workers.run([RewardCall(reward, {"completions": ["a"]}, 1)]) == [[Outcome(0.25)]]
    with pytest.raises(UserError, match=r"reward.options.tests.user_rewards.with_option.fator.*did you mean 'factor'"):
        reward_function("tests.user_rewards.with_option", {"fator": 1})
    verl = reward_function("verl:tests.user_rewards.compute_score")
    columns = {"prompts": ["p"] * 2, "completions": ["5", "6"], "answer": ["5", "5"], "data_source": ["d"] * 2}
    call = RewardCall(verl, verl.select(columns | {"extra_info": [{"index": 3}] * 2}), 2)
    assert workers.run([call]) == [[Outcome(1.0), Outcome(0.0)]]
    assert verl.needs_answer


def test_columns_do_not_pass_for_options() -> None:
    """Data with columns `buffer` and `seconds` set no option of ours; a user's argument with a default is a column."""
    columns = {
        "prompts": [""],
        "completions": [""],
        "completion_ids": [[1]],
        "buffer": [9],
        "seconds": [1],
        "factor": [2],
    }
    assert reward_function("overlong").select(columns).keys() >= {"completion_ids", "seconds"}
    assert "buffer" not in reward_function("overlong").select(columns)
    assert "seconds" not in reward_function("code").select(columns)
    assert reward_function("tests.user_rewards.with_option").select(columns)["factor"] == [2]


def test_user_errors_come_through(workers) -> None:
    """A function that says that the input is wrong stops the run; it is no outcome."""
    reward = reward_function("overlong", {"max_tokens": 4, "buffer": 9})
    with pytest.raises(UserError, match="overlong"):
        workers.run([RewardCall(reward, {"prompts": [""], "completions": [""], "completion_ids": [[1]]}, 1)])


def test_workers_that_are_still_starting_end_without_a_word(tmp_path) -> None:
    """A run that needs few of its workers ends while others start; they still find the locks of the pool."""
    script = """
import signal, time
from dataclasses import replace
from stepcredit.verifiers.reward import reward_function
from stepcredit.verifiers.workers import Workers

class SlowToStart(str):  # the path that a worker gets before the locks
    def __reduce__(self):
        return slowly, (str(self),)

def slowly(path):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1)
    return path

if __name__ == "__main__":
    workers = Workers(60, count=4)
    workers.start([replace(reward_function("exact"), path=SlowToStart("stepcredit.verifiers.exact.verify"))])
    time.sleep(0.3)
    workers.close()
"""
    path = tmp_path / "run.py"
    path.write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run([sys.executable, str(path)], capture_output=True, env=environment, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
