"""The Task seam: problems to train on, held-out ones, and the reward that fits them."""

from stepcredit.types import Problem


class Task:
    """Subclass and fill in; see `tasks/embedded.py` for the shortest one.

    Attributes:
        name: shown in logs.
        reward_functions: names or dotted paths used when the config names none.
    """

    name = "task"
    reward_functions: tuple[str, ...] = ()

    def draw(self, start: int, count: int) -> list[Problem]:
        """Training problems number `start` .. `start + count`, in an order that depends on the seed alone."""
        raise NotImplementedError

    def known(self) -> list[Problem]:
        """All training problems, when they are finitely many: they are checked before the run starts."""
        return []

    def held_out(self, count: int) -> list[Problem]:
        """At most `count` problems that `draw` never gives."""
        raise NotImplementedError
