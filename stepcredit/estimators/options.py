"""Models beside the policy, and what is prepared before training."""

from typing import Literal

from pydantic import Field

from stepcredit.errors import UserError
from stepcredit.learn.options import AdamWOptions
from stepcredit.section import Place, Section


class PRMOptions(AdamWOptions):
    model: Place | None = None  # folder | hub id; None: the policy as it is at first
    reference: Literal["start", "policy"] = "start"  # the frozen start, or the policy's own old log-probabilities
    update: Literal["after", "before", "none"] = "after"  # of the rewards of the same batch
    grad_clip: float = Field(10.0, gt=0)


class PrepareOptions(Section):
    file: Place | None = None  # values of prompts, made by 'stepcredit prepare'; None: the run makes them at its start
    num_samples: int = Field(8, ge=1)  # completions of the reference for each prompt
    value: Literal["soft", "mean", "max", "zero"] = "soft"  # beta log mean exp(r / beta); its limits; 0 for all
    beta: float = Field(0.5)  # of the soft value
    all_wrong: Literal["keep", "skip"] = "keep"  # prompts none of whose samples was rewarded: skip leaves them out

    @property
    def samples(self) -> bool:
        """Whether anything is to be sampled."""
        return self.value != "zero" or self.all_wrong == "skip"

    def check(self) -> None:
        """Raise `UserError` for options that do not fit together."""
        if self.beta <= 0:
            raise UserError(
                f"prepare.beta must be above 0, got {self.beta:g}; what the paper's code calls 0 is --prepare.value "
                "mean, what it calls -1 is --prepare.value zero, and the limit of the formula at 0 is max"
            )
        if self.file is not None and not self.samples:
            raise UserError("prepare.file: with --prepare.value zero nothing is read from it; leave one of them out")


class CriticOptions(AdamWOptions):
    model: Place | None = None  # folder | hub id; None: the policy as it is at first
    backbone: Literal["own", "policy"] = "own"  # a model of its own, or a head on the policy's states, which stay
    update: Literal["after", "none"] = "after"  # it learns from a batch after giving its values, or stays as it is
    loss: Literal["mse", "bce", "hl_gauss"] = "mse"  # squares | success probability | cross-entropy on bins of values
    clip: float = Field(0.0, ge=0)  # mse: bounds how far a batch moves a value; 0: not
    low: float = 0.0  # hl_gauss: least and largest value, how many bins between them, and the width of a target in bins
    high: float = 1.0
    num_bins: int = Field(51, ge=2)
    sigma: float = Field(0.75, gt=0)
    learn_from: Literal["all", "finished"] = "all"  # finished: not from completions that were cut off
    warmup: int = Field(0, ge=0)  # first iterations, in which the critic learns and the policy does not
    num_epochs: int = Field(1, ge=1)
    learning_rate: float = Field(1e-5, gt=0)
