"""OPO: the length-weighted optimal baseline (arXiv 2505.23585)."""

from torch import Tensor

from stepcredit.credit.base import completions, credit, outcome_credit
from stepcredit.forest import Forest
from stepcredit.forest.ops import mean_by


@credit()
def opo(forest: Forest, leave_one_out: bool = False) -> Tensor:
    """A_i = r_i - sum_k l_k r_k / sum_k l_k over the group, l the number of sampled tokens; no division by the std.

    The baseline minimises the gradient's variance when token gradients are orthogonal and of equal norm. It contains
    the completion itself, as in the paper, which turns the gradient's direction slightly for small groups;
    `leave_one_out` takes the sums over k != i and is unbiased.

    Degenerate: equal lengths give r_i - mean; equal returns and singletons give 0. In every group
    sum_i l_i A_i = 0 (paper form).

    >>> # lengths 100, 400, 300, 200 and rewards 1, 0, 1, 0: baseline 0.4, advantages .6, -.4, .6, -.4
    """
    rows = completions(forest)
    mean_product, count = mean_by(rows.length * rows.returns, rows.tree)
    product, length = mean_product * count, mean_by(rows.length, rows.tree)[0] * count
    if leave_one_out:
        product, length = product - rows.length * rows.returns, length - rows.length
    return outcome_credit(forest, rows, rows.returns - product / length.clamp(min=1))
