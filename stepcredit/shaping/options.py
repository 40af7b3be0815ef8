"""Which groups are trained on."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from stepcredit.errors import UserError
from stepcredit.section import Section


def overlong_options(given: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """The options of the punishment for length (a shaper and a reward function) with what 0 or nothing stands for.

    Args:
        longest: `sampler.max_new_tokens`.
    """
    max_tokens = given.get("max_tokens") or longest
    return {**given, "max_tokens": max_tokens, "buffer": given.get("buffer") or max(1, max_tokens // 5)}


class FilterOptions(Section):
    enabled: bool = False
    keep: Literal["window", "varied"] = "window"  # groups by their mean reward, or those whose rewards differ (DAPO)
    low: float = 0.2  # smallest and largest mean reward of a group, both included
    high: float = 0.8
    drop_truncated: bool = False  # reject groups with a truncated completion
    oversample: float = Field(1.0, ge=1)  # problems sampled for each that is missing
    history: int = Field(0, ge=0)  # skip a problem whose last groups, so many, were all right or all wrong; 0: none
    explore: float = Field(0.1, gt=0, le=1)  # chance that such a problem is sampled all the same
    max_draws: float = Field(4.0, ge=1)  # problems sampled at most in an iteration, in multiples of the batch

    def check(self) -> None:
        """Raise `UserError` for an empty window, one that is not looked at, or a history without a filter."""
        default = type(self)()
        if self.keep == "varied" and (self.low, self.high) != (default.low, default.high):
            raise UserError("filter.low and filter.high are for --filter.keep window; with varied no mean is looked at")
        if self.enabled and self.low > self.high:
            raise UserError(f"filter.low ({self.low:g}) is above filter.high ({self.high:g})")
        idle = ("low", "high", "drop_truncated", "oversample", "max_draws")
        unused = [name for name in idle if getattr(self, name) != getattr(default, name)]
        if unused and not self.enabled:
            raise UserError(
                f"filter.{unused[0]} has no effect without --filter.enabled true; add that, or leave it out"
            )
        if self.history and not self.enabled:
            raise UserError(
                "filter.history goes with --filter.enabled true; to sample all others whatever their rewards, set "
                "--filter.low and --filter.high to the least and the most that a group can get"
            )
