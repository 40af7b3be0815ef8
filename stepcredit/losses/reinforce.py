"""The plain policy gradient."""

import torch

from stepcredit.losses.base import LossParts, Tokens, loss


@loss(sparse=True)
def reinforce(tokens: Tokens) -> LossParts:
    """-A log pi: exact on-policy, without ratio or clip (OPO, arXiv 2505.23585), so for one step on a batch."""
    per_token = -tokens.advantages * tokens.logprobs
    return LossParts(per_token, {"policy/clip_fraction": torch.zeros_like(tokens.counted)})
