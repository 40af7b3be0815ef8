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
    entropy_coef: float = 0.0
    importance: Literal["none", "token", "sequence"] = "none"  # weights for what the sampler computes otherwise
    importance_cap: float = Field(2.0, gt=0)
    depth_weights: Numbers = []  # of segments by depth; empty: all alike
