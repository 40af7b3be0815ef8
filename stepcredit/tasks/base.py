"""The Task seam: problems to train on, held-out ones, and the reward that fits them."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

from stepcredit.errors import UserError
from stepcredit.forest.types import Problem

DRAWN = 64  # problems that stand for a task that makes them without end


class Task:
    """Subclass and fill in; see `demo/task.py` for the shortest one.

    Attributes:
        name: shown in logs.
        reward_functions: names or dotted paths used when the config names none.
        step_delimiters: what ends a step of a completion, as `growth.step.delimiters` has it.
    """

    name = "task"
    reward_functions: tuple[str, ...] = ()
    step_delimiters: tuple[str, ...] = ("newline",)

    def draw(self, start: int, count: int) -> list[Problem]:
        """Training problems number `start` .. `start + count`, in an order that depends on the seed alone."""
        raise NotImplementedError

    def name_of(self, number: int) -> str | None:
        """The id of training problem `number`; None where it never comes again, so that nothing is kept of it."""
        return self.draw(number, 1)[0].id

    @property
    def endless(self) -> bool:
        """Whether some of its training problems are made as they are drawn and never come again."""
        return self.name_of(0) is None

    def rows(self) -> list[Problem]:
        """The training problems that are rows of data; a few of those that are made without end."""
        return []

    def sources(self) -> list[str]:
        """What the training problems are from, the most frequent first; "" where the data do not say."""
        counts = Counter(problem.source for problem in self.rows())
        return [source for source, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]

    def fit(self, encode: Callable[[Problem], list[int]], long_prompts: str = "drop") -> None:
        """Check the prompts of all problems, where they are finitely many; `long_prompts` is "drop" or "raise"."""

    def leave_out(self, ids: Collection[str]) -> None:
        """Never draw these training problems.

        Raises:
            UserError: none would be left, or the task makes problems without end, of which none can be left out.
        """
        raise UserError(f"{self.name} makes problems without end, of which none can be left out (prepare.all_wrong)")

    def held_out(self, count: int) -> list[Problem]:
        """At most `count` problems that `draw` never gives."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of the training problems' contents; equal for equal problems in the same order, wherever they lie.

        A task that knows no end of problems is taken by the first it draws.
        """
        digest = hashlib.sha256()
        for problem in self.draw(0, DRAWN):
            digest.update(canonical(problem))
        return digest.hexdigest()


def canonical(problem: Problem) -> bytes:
    """The contents of a problem as canonical JSON, a line; what is no JSON as the text that it prints."""
    contents = [problem.question, problem.answer, problem.columns]
    return json.dumps(contents, sort_keys=True, default=_as_text, separators=(",", ":")).encode() + b"\n"


def _as_text(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else f"{type(value).__name__} {value}"
