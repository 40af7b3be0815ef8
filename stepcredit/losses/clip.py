"""PPO's clipped surrogate, with separate bounds and a dual clip."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.losses.base import LossParts, Tokens, loss


@loss(ratio=True, sparse=True)
def clip(
    tokens: Tokens,
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2,
    clip_high: Annotated[float, Field(ge=0)] = 0.2,
    dual_clip: Annotated[float, Field(ge=0)] = 0.0,
) -> LossParts:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = pi / pi_old (PPO, arXiv 1707.06347).

    Args:
        dual_clip: c > 1 bounds the loss of negative advantages, at -c A (arXiv 1912.09729; verl has 3); 0: no bound.
    """
    if 0 < dual_clip <= 1:
        raise UserError(f"loss.dual_clip must be above 1 (or 0 for none), got {dual_clip}")
    per_token, clipped = clipped_surrogate(tokens.log_ratio, tokens.advantages, clip_low, clip_high, dual_clip)
    return LossParts(per_token, {"policy/clip_fraction": clipped})


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The loss of each row, and where the clip acts; `clip` says what the bounds mean."""
    ratio = log_ratio.exp()
    plain = -ratio * advantages
    bounded = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    per_row = torch.maximum(plain, bounded)
    clipped = bounded > plain
    if dual_clip:
        ceiling = -dual_clip * advantages
        beyond = (advantages < 0) & (per_row > ceiling)
        per_row, clipped = torch.where(beyond, ceiling, per_row), clipped | beyond
    return per_row, clipped
