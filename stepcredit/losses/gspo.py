"""GSPO: one ratio for each completion, the geometric mean of its tokens', and its token form."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from stepcredit.losses.base import LossParts, Tokens, loss
from stepcredit.losses.clip import clipped_surrogate

Bound = Annotated[float, Field(ge=0)]


@loss(ratio=True, unit="completion", sparse=True, aggregate="seq_mean_token_mean", mixes=True)
def gspo(tokens: Tokens, clip_low: Bound = 3e-4, clip_high: Bound = 4e-4) -> LossParts:
    """-min(s_i A, clip(s_i, 1 - clip_low, 1 + clip_high) A), s_i = exp(mean_t log rho_{i,t}) (arXiv 2507.18071).

    Every token has the loss of its completion, so the paper's mean over completions is the aggregate
    seq_mean_token_mean. A clip takes out whole completions.

    Trap: the bounds are of another order than PPO's (the paper's 3e-4 and 4e-4 are the defaults), because s_i hardly
    moves; verl ignores the configured aggregate and always takes seq_mean_token_mean. With advantages that differ
    within a completion their weighted mean acts on all its tokens; `gspo_token` keeps them apart.

    Only tokens with weight are in the mean. At ratio 1 the gradient is that of `reinforce` under equal weights within
    each completion and one advantage for it.
    """
    return _clipped(tokens, tokens.mean_by_completion(tokens.log_ratio), clip_low, clip_high)


@loss(ratio=True, unit="completion", sparse=True, aggregate="seq_mean_token_mean")
def gspo_token(tokens: Tokens, clip_low: Bound = 3e-4, clip_high: Bound = 4e-4) -> LossParts:
    """As `gspo` with s_{i,t} = sg(s_i) pi_t / sg(pi_t): the same values, but each token has a gradient of its own.

    So advantages may differ from token to token, as a step credit's do. With one advantage for the completion and equal
    weights within it, the gradient is that of `gspo`.
    """
    sequence = tokens.mean_by_completion(tokens.log_ratio).detach()
    return _clipped(tokens, sequence + tokens.logprobs - tokens.logprobs.detach(), clip_low, clip_high)


def _clipped(tokens: Tokens, log_ratio: Tensor, clip_low: float, clip_high: float) -> LossParts:
    per_token, clipped = clipped_surrogate(log_ratio, tokens.advantages, clip_low, clip_high)
    return LossParts(per_token, {"policy/clip_fraction": clipped})
