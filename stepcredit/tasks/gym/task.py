"""A task of reasoning-gym as a Task: endless problems made from seeds."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stepcredit.errors import UserError
from stepcredit.forest.types import Problem
from stepcredit.seeds import ROWS, mixed
from stepcredit.tasks.base import Task, canonical
from stepcredit.tasks.gym.maker import maker
from stepcredit.tasks.gym.names import check_task
from stepcredit.tasks.prompts import PromptTooLong

log = logging.getLogger("stepcredit")

INSTRUCTIONS = {
    "tags": "Give your final answer between <answer> and </answer>, nothing else between them.",
    "line": "Give your final answer on the last line, nothing else on it.",
    "plain": "",
}
SEED_BITS = 31  # one task takes seeds of no more than 32, and the last of these tells training from held-out
MAX_ATTEMPTS = 20  # seeds for one problem, where the task makes none of a seed or the prompt is too long
MOST_HELD_OUT = 100_000
TAKEN = 4  # problems that stand for all of a task
KEPT = 256  # problems that are kept, because the checks of a run look at its first ones


class GymTask(Task):
    """Problem i is made from a hash of the run's seed and i, held-out ones from other seeds, the same in all runs.

    Training seeds are even and held-out ones odd, so none is both. Tasks with few problems, such as coin flips, still
    make the same question from different seeds.

    Args:
        task: the name in reasoning-gym.
        options: checked by `check_task`.
        form: "tags", "line" or "plain", how an answer is asked for and read.
        seed: of the run.

    Raises:
        UserError: there is no such task, it is refused, or an option does not fit.
    """

    reward_functions = ("gym",)

    def __init__(self, task: str, options: Mapping[str, Any], form: str, seed: int) -> None:
        self.name, self.task, self.form, self.seed = f"gym:{task}", task, form, seed
        self.options = check_task(task, options)
        self.encode: Callable[[Problem], list[int]] | None = None
        self.long_prompts = "drop"
        self.replaced = 0  # seeds that made no problem, or one with too long a prompt
        self._kept: dict[tuple[int, bool], Problem] = {}

    def draw(self, start: int, count: int) -> list[Problem]:
        return [self._problem(number, held_out=False) for number in range(start, start + count)]

    def held_out(self, count: int) -> list[Problem]:
        if count > MOST_HELD_OUT:
            raise UserError(f"{self.name} makes problems without end; give --num-problems, at most {MOST_HELD_OUT}")
        problems: dict[str, Problem] = {}
        number = 0
        while len(problems) < count:  # by id: two numbers may have one seed
            problem = self._problem(number, held_out=True)
            problems[problem.id] = problem
            number += 1
        return list(problems.values())

    def name_of(self, number: int) -> None:
        """No problem comes twice."""
        return None

    def rows(self) -> list[Problem]:
        return self.draw(0, TAKEN)

    def fit(self, encode: Callable[[Problem], list[int]], long_prompts: str = "drop") -> None:
        """From now on another problem takes the place of each whose prompt is too long."""
        self.encode, self.long_prompts = encode, long_prompts
        self._kept.clear()
        self.draw(0, 1)

    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(map(canonical, self.draw(0, TAKEN)))).hexdigest()

    def from_ids(self, ids: Sequence[str]) -> list[Problem]:
        """The problems of these ids, those of other tasks left out."""
        seeds = [int(id_.rpartition(" ")[2]) for id_ in ids if id_.startswith(f"{self.name} ")]
        return [
            self._made(seed, made)
            for seed, made in zip(seeds, maker().make(self.task, self.options, seeds), strict=True)
            if "error" not in made
        ]

    def _problem(self, number: int, held_out: bool) -> Problem:
        key = number, held_out
        if key not in self._kept:
            if len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = self._new(number, held_out)
        return self._kept[key]

    def _new(self, number: int, held_out: bool) -> Problem:
        """A problem that can be made and whose prompt fits."""
        why: Exception | str = ""
        for attempt in range(MAX_ATTEMPTS):
            seed = seed_of(0 if held_out else self.seed, number, attempt, held_out)
            (made,) = maker().make(self.task, self.options, [seed])
            if "error" in made:
                why = f"{self.name}: the task makes no problem of seed {seed} ({made['error']})"
                self._say_replaced(why)
                continue
            problem = self._made(seed, made)
            try:
                if self.encode is not None:
                    self.encode(problem)
                return problem
            except PromptTooLong as error:
                if self.long_prompts == "raise":
                    raise
                why = error
                self._say_replaced(error)
        raise UserError(f"{why}; so did {MAX_ATTEMPTS - 1} more seeds: change the options task.gym.{self.task}")

    def _say_replaced(self, why: object) -> None:
        """Log the first, tenth, hundredth ... replacement."""
        self.replaced += 1
        if str(self.replaced).strip("0") == "1":
            log.warning("%s: another problem takes its place (%d so far); %s", self.name, self.replaced, why)

    def _made(self, seed: int, made: Mapping[str, Any]) -> Problem:
        question = f"{made['question'].rstrip()}\n\n{INSTRUCTIONS[self.form]}".rstrip()
        gym = {
            "task": self.task,
            "options": self.options,
            "seed": seed,
            "form": self.form,
            "entry": made["entry"],
        }
        return Problem(question, made["answer"], f"{self.name} {seed}", {"gym": gym}, self.name)


def seed_of(run_seed: int, number: int, attempt: int, held_out: bool) -> int:
    """A seed of 32 bits, odd for held-out problems."""
    return 2 * (mixed(run_seed, ROWS, held_out, number, attempt) % 2**SEED_BITS) + held_out
