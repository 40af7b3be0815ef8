"""An iteration that is under way, so that a run can stop between its optimiser steps and go on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.run.by_source import NO_SOURCES, Sources
from stepcredit.run.clock import Clock
from stepcredit.run.metrics import forest_metrics
from stepcredit.run.source import Position


@dataclass
class Work:
    """
    Attributes:
        forest: judged, observed, with advantages.
        position: in the problems, behind this iteration's.
        observed: metrics from before the first optimiser step.
        learnt: metrics of the optimiser steps taken so far.
    """

    forest: Forest
    position: Position
    clock: Clock
    observed: dict[str, float]
    learnt: list[dict[str, float]] = field(default_factory=list)

    def metrics(self, config: Config, sources: Sources = NO_SOURCES) -> dict[str, float]:
        metrics = forest_metrics(self.forest, config, sources) | self.observed | average(self.learnt)
        for name in ("tokens/left_out", "tokens/greedy", "tokens/rollouts", "tokens/prepared"):
            metrics["tokens/sampled"] += self.observed.get(name, 0.0)
        return metrics | self.clock.metrics(metrics["tokens/sampled"] - self.observed.get("tokens/prepared", 0.0))

    def state_dict(self, steps: list[int]) -> dict[str, Any]:
        """Args: steps: what decides how a batch becomes optimiser steps."""
        return {
            "forest": self.forest.state_dict(),
            "position": self.position.state_dict(),
            "seconds": self.clock.seconds,
            "observed": self.observed,
            "learnt": self.learnt,
            "steps": steps,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], steps: list[int]) -> "Work":
        """The inverse of `state_dict`.

        Raises:
            UserError: the rest of the iteration would be cut into other optimiser steps.
        """
        if state["steps"] != steps:
            raise UserError(
                "--resume: the run stopped between the optimiser steps of an iteration, so optim.num_epochs and "
                "optim.num_minibatches must stay as they were until it is over"
            )
        forest, position = Forest.from_state(state["forest"]), Position.from_state(state["position"])
        return cls(forest, position, Clock(state["seconds"]), state["observed"], state["learnt"])


def average(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Over the optimiser steps of an iteration: token counts add up, maxima stay maxima, the rest is a mean."""
    merged: dict[str, float] = {}
    for name in sorted({name for row in rows for name in row}):
        values = [row[name] for row in rows if name in row]
        if name.startswith("tokens/"):
            merged[name] = sum(values)
        else:
            merged[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    if "tokens/computed" in merged:
        merged["tokens/sharing"] = merged["tokens/unshared"] / merged["tokens/computed"]
    return merged
