"""What every shaper is built from, and how one is called safely.

A shaper is `shape(forest, **options) -> Forest`: it changes rewards or masks completions before credit is assigned. One
with a state, such as running statistics, is `shape(forest, state, **options) -> Shaped`; its state is numbers by name,
empty at first, and stands in checkpoints. Every process has the same forest, so it has the same state. `@shaper`
declares what one needs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.forest import Forest

RAW = "raw_reward"  # segment column: rewards as they were judged


class Shaped(NamedTuple):
    """
    Attributes:
        state: numbers that the next call gets.
        metrics: by name.
    """

    forest: Forest
    state: Mapping[str, float] = {}
    metrics: Mapping[str, float] = {}


ShapeFunction = Callable[..., Forest | Shaped]
Check = Callable[[Mapping[str, Any], Mapping[str, float]], None]


def _no_check(options: Mapping[str, Any], rewards: Mapping[str, float]) -> None:
    """Nothing to look at."""


@dataclass(frozen=True)
class ShaperNeeds:
    """What a shaper declares.

    Attributes:
        columns: token, segment or tree columns that it reads; `raw_reward` are the rewards as they were judged.
        state: it has a state.
        check: is called with its options and the weights of the run's reward functions by name before anything is
            sampled, and raises `UserError` where they do not go together.
    """

    columns: tuple[str, ...] = ()
    state: bool = False
    check: Check = _no_check


def shaper(*columns: str, state: bool = False, check: Check = _no_check) -> Callable[[ShapeFunction], ShapeFunction]:
    """Declare what a shaper needs; `ShaperNeeds` says what each means."""

    def declare(function: ShapeFunction) -> ShapeFunction:
        function.needs = ShaperNeeds(columns, state, check)  # type: ignore[attr-defined]
        return function

    return declare


def shaper_needs(function: ShapeFunction) -> ShaperNeeds:
    """What a shaper declared; one without a declaration reads no extra columns and has no state."""
    return getattr(function, "needs", ShaperNeeds())


@dataclass(frozen=True)
class Shaper:
    """A shaper that a config names, with its options."""

    name: str
    function: ShapeFunction
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> ShaperNeeds:
        return shaper_needs(self.function)

    def __call__(self, forest: Forest, state: Mapping[str, float] | None = None) -> Shaped:
        """
        Raises:
            UserError: a column is missing, or what comes back is no forest or has a reward that is not finite.
        """
        for column in self.needs.columns:
            if not forest.has(column):
                raise UserError(f"shaper '{self.name}' needs the column '{column}', which these rollouts do not have")
        given = (forest, dict(state or {})) if self.needs.state else (forest,)
        with torch.no_grad():
            result = self.function(*given, **self.options)
        if not isinstance(result, (Forest, Shaped)):
            raise UserError(f"shaper '{self.name}' returned a {type(result).__name__}; expected a Forest")
        shaped = Shaped(result) if isinstance(result, Forest) else result
        reward = shaped.forest.segment["reward"]
        if not bool(reward.isfinite().all()):
            segment = int((~reward.isfinite()).nonzero()[0])
            raise UserError(f"shaper '{self.name}': reward is not finite in {forest.describe_segment(segment)}")
        return shaped


def fresh_states(shapers: Sequence[Shaper]) -> list[dict[str, float]]:
    return [{} for _ in shapers]


# ---------------------------------------------------------------------- what shapers are built from


def judged_leaves(forest: Forest) -> Tensor:
    """[num_segments] True for leaves with a reward."""
    return forest.segment["is_leaf"] & forest.segment["has_reward"]


def only(forest: Forest, leaves: Tensor) -> Forest:
    """Mask all but these completions; a segment that several share stays where one of them does.

    Args:
        leaves: [num_segments] True for the leaves that stay.
    """
    stays = leaves.clone()
    for level in forest.levels_deepest_first():
        stays[forest.segment["parent"][level[stays[level]]]] = True
    return forest.with_segment(mask=forest.segment["mask"] & stays)


def path_sum(forest: Forest, values: Tensor) -> Tensor:
    """[num_segments] sum of `values` [num_segments] from the prompt to the end of each segment."""
    return forest.sum_over_ancestors(values) + values


def path_tokens(forest: Forest) -> Tensor:
    """[num_segments] sampled tokens from the prompt to the end of each segment."""
    return path_sum(forest, forest.segment["length"] * forest.segment["sampled"])


def check_not_negative(forest: Forest, values: Tensor, what: str, why: str) -> None:
    """Raise `UserError` where `values` [num_segments] has a number below 0."""
    below = (values < 0).nonzero()
    if len(below):
        segment = int(below[0])
        raise UserError(
            f"{what} is {float(values[segment]):g} in {forest.describe_segment(segment)}; it must not be below 0: {why}"
        )
