"""CISPO: importance weights are clipped, tokens never lose their gradient."""

from typing import Annotated

from pydantic import Field

from stepcredit.losses.base import LossParts, Tokens, loss


@loss(ratio=True, sparse=True)
def cispo(
    tokens: Tokens,
    clip_low: Annotated[float, Field(ge=0, le=1)] = 1.0,
    clip_high: Annotated[float, Field(ge=0)] = 4.0,
) -> LossParts:
    """-sg(clip(rho, 1 - clip_low, 1 + clip_high)) A log pi, rho = pi / pi_old, sg: no gradient (arXiv 2506.13585).

    The paper's mean over tokens is the aggregate token_mean.

    Trap: the bounds are distances from 1, as in `clip` and in verl (0.2 and 0.2 there), while TRL's epsilon_high is
    the upper bound itself and there is no lower one: its advised 5.0 is `clip_high` 4. The paper sets no lower bound
    either, so `clip_low` is 1 here, and tunes the upper one without naming it; 5 is ScaleRL's.

    At ratio 1 the gradient is that of `reinforce`.
    """
    ratio = tokens.log_ratio.detach().exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = -weight * tokens.advantages * tokens.logprobs
    return LossParts(per_token, {"policy/clip_fraction": weight != ratio})
