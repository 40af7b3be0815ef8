"""Models beside the policy."""

from typing import Literal

from pydantic import Field

from stepcredit.learn.options import AdamWOptions
from stepcredit.section import Place


class PRMOptions(AdamWOptions):
    model: Place | None = None  # folder | hub id; None: the policy as it is at first
    reference: Literal["start", "policy"] = "start"  # the frozen start, or the policy's own old log-probabilities
    update: Literal["after", "before", "none"] = "after"  # of the rewards of the same batch
    grad_clip: float = Field(10.0, gt=0)
