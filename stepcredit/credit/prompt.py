"""Outcome credit against a value of the prompt that does not come from the group: A*-PO (arXiv 2505.20686)."""

import torch
from torch import Tensor

from stepcredit.credit.base import completions, credit, judged_tokens, to_tokens
from stepcredit.forest import Forest


@credit("prompt_value")
def prompt_baseline(forest: Forest) -> Tensor:
    """A_i = r_i - V(x), V the value of the prompt.

    V(x) is the column `prompt_value` (estimators/prompt_value.py says what values there are). It needs no group: a
    single completion has r - V(x), and a group of equal returns has that too, not 0.

    >>> # rewards 1 and 0, V(x) = 0.25: advantages 0.75 and -0.25
    """
    rows = completions(forest)
    outcome = to_tokens(forest, rows, rows.returns)
    return torch.where(judged_tokens(forest), outcome - forest.token["prompt_value"], 0.0)
