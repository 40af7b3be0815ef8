"""The AuxModel seam."""

from typing import Any

from stepcredit.forest import Forest
from stepcredit.learn.learner import Learner


class AuxModel:
    """Adds columns to a forest and, where it learns, updates itself while doing so.

    Attributes:
        metrics: of the last forest.
        trained: what is saved with every checkpoint, as a folder that `from_pretrained` loads; None: nothing.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.trained: Learner | None = None

    def observe(self, forest: Forest) -> Forest:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, `trained` left out."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
