"""The Task seam: problems to train on, held-out ones, and the reward that fits them."""

from collections.abc import Callable

from stepcredit.forest.types import Problem


class Task:
    """Subclass and fill in; see `tasks/embedded.py` for the shortest one.

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

    def fit(self, encode: Callable[[Problem], list[int]], long_prompts: str = "drop") -> None:
        """Check the prompts of all problems, where they are finitely many; `long_prompts` is "drop" or "raise"."""

    def held_out(self, count: int) -> list[Problem]:
        """At most `count` problems that `draw` never gives."""
        raise NotImplementedError
