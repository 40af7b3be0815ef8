"""ReMax: the reward of one greedy completion is the baseline of its problem."""

import torch
from torch import Tensor

from stepcredit.credit.base import completions, credit, judged_tokens, to_tokens
from stepcredit.forest import Forest


@credit("greedy_return")
def remax(forest: Forest) -> Tensor:
    """A_i = r_i - r(greedy completion of the same problem) (ReMax, arXiv 2310.10505).

    The baseline does not depend on the samples, so one completion of a problem is enough, and is the paper's setting
    (`growth.group_size` 1); with several each gets its own difference. A k1 penalty in the rewards is in r_i alone. A
    group of equal returns does not get 0 here: it may be better or worse than the greedy one.
    """
    rows = completions(forest)
    outcome = to_tokens(forest, rows, rows.returns)
    return torch.where(judged_tokens(forest), outcome - forest.token["greedy_return"], 0.0)
