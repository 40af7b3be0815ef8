"""Group policy gradient: the group mean as the baseline, scaled by how many groups have a gradient."""

from typing import Literal

from torch import Tensor

from stepcredit.credit.base import completions, credit, outcome_credit
from stepcredit.forest import Forest
from stepcredit.forest.ops import mean_by


@credit()
def gpg(forest: Forest, alpha: Literal["varied", "nonzero", "none"] = "varied") -> Tensor:
    """A_i = alpha (r_i - group mean), alpha = B / (B - M) (GPG, arXiv 2504.02546, with F_norm 1).

    B are the judged completions of the batch, M those in groups of equal returns: they have no gradient and yet stand
    in the denominators, which alpha makes up for. Completions that a shaper masked stand in none and are in neither.
    A singleton and a group of equal returns get 0.

    Args:
        alpha: "nonzero": B over the completions whose return is not 0, as verl has it; "none": 1.
    """
    rows = completions(forest)
    trained = forest.segment["mask"][rows.leaf]
    counted = (rows.varied if alpha == "varied" else rows.returns != 0) & trained
    scale = 1.0 if alpha == "none" else int(trained.sum()) / max(1, int(counted.sum()))
    return outcome_credit(forest, rows, scale * (rows.returns - mean_by(rows.returns, rows.tree)[0]))
