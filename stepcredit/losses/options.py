"""Weights and regularisers of the loss."""

from typing import Literal

from pydantic import Field

from stepcredit.errors import UserError
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

    def check(self) -> None:
        """Raise `UserError` for options of the entropy bonus that do not go together."""
        default = type(self)()
        if self.entropy_target is None:
            for name in ("entropy_step", "entropy_coef_max"):
                if getattr(self, name) != getattr(default, name):
                    raise UserError(f"objective.{name} goes with --objective.entropy-target")
        elif not 0 <= self.entropy_coef <= self.entropy_coef_max:
            raise UserError(
                f"objective.entropy_coef ({self.entropy_coef:g}): with a target the coefficient begins there, so it "
                f"must lie between 0 and objective.entropy_coef_max ({self.entropy_coef_max:g})"
            )
