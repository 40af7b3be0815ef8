"""Weights and regularisers of the loss."""

from typing import Literal

from pydantic import Field

from stepcredit.section import Numbers, Section


class KLOptions(Section):
    estimator: Literal["k1", "k2", "k3"] = "k3"  # k1 acts in the reward, k2 and k3 in the loss
    coef: float = 0.0


class ObjectiveOptions(Section):
    aggregate: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "sum_over_constant"] = "token_mean"
    kl: KLOptions = KLOptions()
    entropy_coef: float = 0.0  # of the entropy bonus; with a target the first one
    entropy_target: float | None = Field(None, ge=0)  # nats; the coefficient rises while the mean entropy is not above
    entropy_step: float = Field(0.005, gt=0)  # by which the coefficient changes in an iteration
    entropy_coef_max: float = Field(1.0, gt=0)  # that it reaches at most
    entropy_top: float = Field(1.0, gt=0, le=1)  # share of the tokens, by entropy, whose advantages count
    importance: Literal["none", "token", "sequence"] = "none"  # weights for what the sampler computes otherwise
    importance_cap: float = Field(2.0, gt=0)
    depth_weights: Numbers = []  # of segments by depth; empty: all alike
