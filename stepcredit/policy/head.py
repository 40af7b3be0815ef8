"""From hidden states to log-probabilities without ever holding a [num_tokens, vocabulary] tensor."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stepcredit.ops import TokenScores

LEAST = torch.finfo(torch.float32).min  # stands in for the log of 0, which times 0 is 0
MAX_LOGITS = 1 << 24  # logits that may exist at once: 64 MiB in fp32


def score_logits(logits: Tensor, targets: Tensor, temperature: float, entropy_grad: bool) -> TokenScores:
    """Log-probability of `targets` and entropy of softmax(logits / temperature), in fp32.

    Args:
        logits: [n, vocabulary]; targets: [n].
    """
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy = -(logprobs.exp() * logprobs.clamp(min=LEAST)).sum(-1)
    return TokenScores(logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy)


def score_states(
    states: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    temperature: float,
    *,
    entropy_grad: bool = False,
    vocabulary: int,
    max_logits: int = MAX_LOGITS,
) -> TokenScores:
    """`score_logits` of `head(states)` in chunks; each chunk's logits are computed again in the backward.

    Args:
        states: [n, hidden], the state that predicts each target; targets: [n].
    """

    def score(chunk: Tensor, target: Tensor) -> TokenScores:
        return score_logits(head(chunk), target, temperature, entropy_grad)

    rows = max(1, max_logits // vocabulary)
    if len(states) <= rows:
        return score(states, targets)
    parts = [
        checkpoint(score, chunk, target, use_reentrant=False)
        for chunk, target in zip(states.split(rows), targets.split(rows), strict=True)
    ]
    return TokenScores(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))
