"""The chain task as a Task: endless generated problems."""

from stepcredit.demo.chain import problems
from stepcredit.forest.types import Problem
from stepcredit.tasks.base import Task


class EmbeddedTask(Task):
    """Training problems depend on the seed; the held-out ones are the same for every seed, so runs can be compared."""

    name = "embedded chain task"
    reward_functions = ("chain",)
    step_delimiters = (".",)  # a line ends with it

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def draw(self, start: int, count: int) -> list[Problem]:
        return problems("train", self.seed, count, offset=start)

    def name_of(self, number: int) -> None:
        """No problem comes twice."""
        return None

    def held_out(self, count: int) -> list[Problem]:
        return problems("held_out", 0, count)
