"""Credit brought to mean 0 and standard deviation 1, over the batch or within each group."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stepcredit.credit.base import STD_EPS, whiten
from stepcredit.forest import Forest
from stepcredit.forest.ops import segment_sum, spread_by

Normalize = Literal["none", "batch", "group"]


class Normalized(NamedTuple):
    """
    Attributes:
        outcome, process: [num_tokens] or None, as given.
        divisor: what both were divided by, a number or [num_tokens]; infinite where all values are equal.
    """

    outcome: Tensor | None
    process: Tensor | None
    divisor: Tensor


def normalized(
    forest: Forest, outcome: Tensor | None, process: Tensor | None, how: Normalize, where: Tensor
) -> Normalized:
    """(A - mean) / (std + 1e-6), A the sum of the two parts, on the tokens of `where`; 0 on all others.

    Both parts are divided by the same number; the mean is taken from the outcome part where there is one.

    "batch": mean and unbiased std over all tokens of `where` in the batch, each token once, so that long completions
    weigh more (`whiten`, as REINFORCE++ does). The batch is all groups of the iteration, on however many processes and
    in whatever micro-batches they are computed.

    "group": over the completions of a problem, each completion with the same weight, which its tokens share equally:

        mean = 1/n sum_i 1/T_i sum_t A_{i,t}        variance = 1/(n - 1) sum_i 1/T_i sum_t (A_{i,t} - mean)^2

    with n the completions of the group that have a token in `where` and T_i how many of completion i. Credit that is
    one number for a completion is thereby normalised as GRPO does it. In a tree a completion is the path to a leaf: a
    token that several completions share counts in each of them, and the group is the whole tree, not a group of
    siblings. All values of a group with one completion, or whose values are all equal, become 0.

    Args:
        where: [num_tokens] sampled tokens of judged completions.
    """
    if how == "none":
        return Normalized(outcome, process, torch.tensor(1.0))
    outcome, process = (None if part is None else torch.where(where, part, 0.0) for part in (outcome, process))
    total = process if outcome is None else outcome if process is None else outcome + process
    assert total is not None
    total, divisor = _by_batch(total, where) if how == "batch" else _by_group(forest, total, where)
    if outcome is None or process is None:
        return Normalized(None if outcome is None else total, None if process is None else total, divisor)
    process = process / divisor
    return Normalized(total - process, process, divisor)


def _by_batch(values: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    whitened = whiten(values, where)
    return whitened, values[where].std() + STD_EPS if bool(whitened.any()) else torch.tensor(torch.inf)


def _by_group(forest: Forest, values: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    share, count = completion_shares(forest, where)
    exact = values.double()
    mean = segment_sum(share * exact, forest.token_tree, forest.num_trees) / count.clamp(min=1)
    centred = exact - mean[forest.token_tree]
    square = segment_sum(share * centred.square(), forest.token_tree, forest.num_trees) / (count - 1).clamp(min=1)
    divisor = square.sqrt()[forest.token_tree] + STD_EPS
    largest = torch.zeros(forest.num_trees, dtype=torch.float64)
    largest = largest.scatter_reduce(0, forest.token_tree, torch.where(where, exact.abs(), 0.0), "amax")
    relative = exact / largest.clamp(min=torch.finfo(torch.float64).tiny)[forest.token_tree]
    varied = where & (spread_by(relative, forest.token_tree, where) > 0) & (count > 1)[forest.token_tree]
    divisor = torch.where(varied, divisor, torch.inf)
    return torch.where(varied, centred / divisor, 0.0).to(values.dtype), divisor.to(values.dtype)


def completion_shares(forest: Forest, where: Tensor) -> tuple[Tensor, Tensor]:
    """How much each token counts in the mean over the completions of its tree.

    Args:
        where: [num_tokens] tokens that count.

    Returns:
        [num_tokens] fp64, sum over the judged completions through the token of 1 / T, T the tokens of the completion
        that count; [num_trees] the judged completions that have such a token.
    """
    segment, parent = forest.token["segment"], forest.segment["parent"]
    own = segment_sum(where.double(), segment, forest.num_segments)
    length = own + forest.sum_over_ancestors(own)
    ends = forest.segment["is_leaf"] & forest.segment["has_reward"] & (length > 0)
    share = torch.where(ends, 1 / length.clamp(min=1), 0.0)
    for level in forest.levels_deepest_first():
        share.index_add_(0, parent[level], share[level])
    return share[segment] * where, segment_sum(ends.double(), forest.segment["tree"], forest.num_trees)
