"""Models beside the policy."""

from typing import Literal

from pydantic import Field

from stepcredit.learn.options import AdamWOptions


class PRMOptions(AdamWOptions):
    model: str | None = None  # folder | hub id; None: the policy as it is at first
    reference: Literal["start", "policy"] = "start"  # the frozen start, or the policy's own old log-probabilities
    update: Literal["after", "before", "none"] = "after"  # of the rewards of the same batch
    grad_clip: float = Field(10.0, gt=0)
