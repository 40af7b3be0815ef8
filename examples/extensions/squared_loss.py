"""A loss of your own: regression of each completion's mean log-ratio on its advantage (`squared` takes the sum).

stepcredit train --loss.name squared_loss.squared --loss.scale 0.1 --objective.aggregate seq_mean_token_mean
"""

from torch import Tensor

from stepcredit.losses.base import Tokens, loss


@loss("old_logprobs", ratio=True, unit="completion")
def squared(tokens: Tokens, scale: float = 0.1) -> Tensor:
    """(mean over t of log rho_{i,t} - scale * A)^2, given to every token of completion i.

    It reads all tokens of a completion at once (`unit`), and has a gradient where the advantage is 0 (not `sparse`).
    """
    return (tokens.mean_by_completion(tokens.log_ratio) - scale * tokens.advantages).square()
