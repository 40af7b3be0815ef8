"""SPO on trees: the change of value that a segment makes (arXiv 2505.23564)."""

import torch

from stepcredit.credit import tree
from stepcredit.credit.base import CreditParts, credit
from stepcredit.forest import Forest
from stepcredit.forest.ops import SAME


@credit(forests="tree")
def spo_tree(forest: Forest) -> CreditParts:
    """A = V(segment) - V(parent), V the mean of the judged children and a leaf's V its reward; divided by nothing.

    Segments whose advantage is 0, or so small that it is rounding (`SAME`), are pruned: advantage and weight 0, in no
    denominator. The paper's replay of old segments and its mask of likely tokens are not part of the credit and not
    done here.

    Degenerate: a segment without siblings, and siblings of equal value, are pruned and have advantage 0.

    >>> # leaves 0, 1 below one segment and 1, 1 below the other: the segments -.25, .25, the leaves -.5, .5, 0, 0
    """
    value = tree.values(forest)
    parent = tree.sibling_mean(forest, value)
    rounding = SAME * torch.maximum(value.abs(), parent.abs()).clamp(min=1)
    varied = forest.judged & (tree.sibling_range(forest, value) > 0) & ((value - parent).abs() > rounding)
    advantage = torch.where(varied, value - parent, 0.0)
    return CreditParts(tree.to_tokens(forest, advantage), value=value, kept=varied)
