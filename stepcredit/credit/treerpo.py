"""TreeRPO: a step is worth the mean outcome of its subtree, and is compared with its siblings (arXiv 2506.05183)."""

from typing import Literal

import torch
from torch import Tensor

from stepcredit.credit import tree
from stepcredit.credit.base import STD_EPS, CreditParts, credit
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.ops import SAME, mean_by


@credit(forests="tree")
def treerpo(
    forest: Forest,
    scale: Literal["variance", "sqrt", "std", "none"] = "variance",
    tau: float = 0.1,
    at_tau: Literal["drop", "keep"] = "drop",
) -> CreditParts:
    """A = (R - mu) / (mu (1 - mu) + 1e-6) over the siblings, mu their mean (Eq. 4); every token of a segment has it.

    R is the segment's value (`tree.values`). The divisor is the variance of a 0/1 outcome of chance mu, not its square
    root: a right one of a group gets 1/mu, a wrong one -1/(1 - mu), and |A| is at most the number of siblings. It needs
    rewards in [0, 1].

    A group is kept if its range, largest minus smallest R, is above `tau`; the others are pruned: weight 0, in no
    denominator.

    Args:
        scale: "variance" as above; "sqrt" divides by sqrt(mu (1 - mu)) + 1e-6; "std" by the unbiased standard
            deviation + 1e-6, as GRPO does; "none" divides by nothing.
        tau: in units of the reward.
        at_tau: what becomes of a group whose range is just `tau`. The paper drops it, the authors' code keeps it.

    Degenerate: a segment without siblings and a group of equal values are pruned and have advantage 0. On a forest of
    depth 1, "std" with tau 0 has the advantages of GRPO (whose uniform groups stay in the denominators, though).

    Raises:
        UserError: a value outside [0, 1] with "variance" or "sqrt".

    >>> # R = 0, 0, 1, 1: -2, -2, 2, 2; one right of 8: 8 and -8/7; .49, .49, .51, .51: pruned (+-0.04 before)
    """
    if tau < 0:
        raise UserError(f"credit.tau must not be negative, got {tau}")
    value, judged = tree.values(forest), forest.judged
    if scale in ("variance", "sqrt"):
        _refuse_outside(forest, value, scale)
    mean = tree.sibling_mean(forest, value)
    spread = tree.sibling_range(forest, value)
    least = max(0.0, tau - SAME) if at_tau == "keep" else tau + SAME
    kept = judged & (spread > least)
    centred = torch.where(judged & (spread > 0), value - mean, 0.0)
    return CreditParts(tree.to_tokens(forest, centred / _divisor(forest, value, mean, scale)), value=value, kept=kept)


def _divisor(forest: Forest, value: Tensor, mean: Tensor, scale: str) -> Tensor:
    variance = (mean * (1 - mean)).clamp(min=0)
    if scale == "variance":
        return variance + STD_EPS
    if scale == "sqrt":
        return variance.sqrt() + STD_EPS
    if scale == "std":
        square, count = mean_by((value - mean).square(), forest.siblings, where=forest.judged)
        return (square * count / (count - 1).clamp(min=1)).sqrt() + STD_EPS
    return torch.ones_like(mean)


def _refuse_outside(forest: Forest, value: Tensor, scale: str) -> None:
    outside = (value < -STD_EPS) | (value > 1 + STD_EPS)
    if bool(outside.any()):
        index = int(outside.nonzero()[0])
        raise UserError(
            f"credit 'treerpo': {forest.describe_segment(index)} is worth {float(value[index]):.4g}; scale '{scale}' "
            "needs rewards in [0, 1]. Scale the reward functions (--reward.weights), or take --credit.scale none or std"
        )
