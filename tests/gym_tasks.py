"""What every task of reasoning-gym does here, as a table: `python tests/gym_tasks.py docs/gym_tasks.md`.

Of each task: whether its own answers score 1, what answers without sense get, whether a seed makes the same problem in
another process and another order, and how long one takes. `tests/test_gym.py` asserts the same of fewer problems.
"""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from stepcredit.tasks.gym.maker import Maker
from stepcredit.tasks.gym.names import LICENCES, REFUSED, names
from stepcredit.tasks.gym.task import GymTask
from stepcredit.verifiers.gym import stated
from stepcredit.verifiers.judging import Judge, outcome_reward
from stepcredit.verifiers.reward import reward_function
from stepcredit.verifiers.workers import Workers

NONSENSE = ("zzz", "§")  # no answer to anything
WRONG = ("-987654321", "I do not know")  # wrong, in a form that some tasks give something for
ACCEPTED, NOTHING = 1.0, 0.1  # what an own answer must get, and what nonsense must stay below


@dataclass
class Seen:
    """What a task did on some problems.

    Attributes:
        gold: the least that its own answers got; None where it gives none.
        nonsense, wrong: the most that such answers got.
        problems: how many.
        differ: how many came out otherwise in another process and order.
        failures: what its scorer raised.
        seconds: to make one, the mean.
    """

    name: str
    gold: float | None
    nonsense: float
    wrong: float
    problems: int
    differ: int
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def faults(self) -> list[str]:
        """Why it is to be refused; nothing where it can be trained on."""
        faults = []
        if self.gold is None:
            faults.append("no answer")
        elif self.gold < ACCEPTED:
            faults.append(f"its own answers get {self.gold:g}")
        if self.nonsense >= NOTHING:
            faults.append(f"nonsense gets {self.nonsense:g}")
        if self.failures:
            faults.append("its scorer fails")
        if self.differ:
            faults.append("not the same in another process")
        return faults


def look_at(task_names: Sequence[str], count: int) -> list[Seen]:
    """All tasks on `count` problems each."""
    judge = Judge({"gym": reward_function("gym")}, [1.0], None, Workers(timeout_s=60.0))
    again = Maker()
    try:
        return [_seen(name, count, judge, again) for name in task_names]
    finally:
        judge.close()


def _seen(name: str, count: int, judge: Judge, again: Maker) -> Seen:
    task = GymTask(name, {"allow": True} if name in REFUSED else {}, "tags", seed=0)
    started = time.monotonic()
    problems = task.draw(0, count)
    seconds = (time.monotonic() - started) / count
    seeds = [problem.columns["gym"]["seed"] for problem in problems]
    backwards = again.make(name, task.options, seeds[::-1])[::-1]
    entries = [problem.columns["gym"]["entry"] for problem in problems]
    differ = sum(one != other.get("entry") for one, other in zip(entries, backwards, strict=True))
    golds = [problem for problem in problems if problem.answer is not None]
    failures: list[str] = []

    def scores(some: list, answers: Sequence[str]) -> list[float]:
        asked = [(problem, stated(answer, "tags")) for problem, answer in zip(some, answers, strict=True)]
        outcomes = judge.judge([problem for problem, _ in asked], [text for _, text in asked])["gym"]
        failures.extend(outcome.message for outcome in outcomes if outcome.failure)
        return [reward for outcome in outcomes if (reward := outcome_reward(outcome)) is not None]

    gold = min(scores(golds, [problem.answer for problem in golds]), default=None)
    nonsense = max((score for text in NONSENSE for score in scores(problems, [text] * count)), default=0.0)
    wrong = max((score for text in WRONG for score in scores(problems, [text] * count)), default=0.0)
    return Seen(name, gold, nonsense, wrong, count, differ, failures, seconds)


def table(seen: Sequence[Seen]) -> str:
    nonsense, wrong = (", ".join(f"`{text}`" for text in texts) for texts in (NONSENSE, WRONG))
    lines = [
        f"# The tasks of reasoning-gym {version('reasoning-gym')}",
        "",
        "Written by `python tests/gym_tasks.py docs/gym_tasks.md`, with the default options of each task, of "
        f"{seen[0].problems} problems: the least that its own answers get, the most that nonsense ({nonsense}) gets "
        f"and the most that wrong answers ({wrong}) get, all in tags; whether the problems are the same, made again in "
        "another process in another order; the time to make one on a slow core.",
        "",
        "| task | own answer | nonsense | wrong | ms | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for each in seen:
        notes = [f"**refused**: {REFUSED[each.name]}"] if each.name in REFUSED else []
        notes += [f"licence: {LICENCES[each.name]}"] if each.name in LICENCES else []
        notes += [f"{len(each.failures)} answers made its scorer fail"] if each.failures else []
        notes += [f"{each.differ} problems differ in another process"] if each.differ else []
        gold = "none" if each.gold is None else f"{each.gold:g}"
        numbers = f"{gold} | {each.nonsense:.2g} | {each.wrong:.2g} | {1000 * each.seconds:.0f}"
        lines.append(f"| {each.name} | {numbers} | {'; '.join(notes)} |")
    lines.append("| composite | | | | | not offered: a mixture of other tasks, which `gym:a,b` makes |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    Path(sys.argv[1]).write_text(table(look_at(names(), count=8)), encoding="utf-8")
