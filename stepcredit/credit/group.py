"""Outcome credit from the group: GRPO, Dr. GRPO, RLOO. One number for a whole completion.

r_i is the return of completion i of a group of G: its outcome reward plus its token rewards (a KL penalty in the
reward, dense rewards), if there are any. Unjudged completions are in no mean. A singleton and a group of equal returns
get 0.
"""

from torch import Tensor

from stepcredit.credit.base import STD_EPS, Completions, completions, credit, group_std, outcome_credit
from stepcredit.forest import Forest
from stepcredit.forest.ops import mean_by


def z_scores(rows: Completions) -> Tensor:
    """(r_i - mean) / (std + 1e-6) within each group, std unbiased; [n]."""
    mean, std = group_std(rows.returns, rows.tree)
    return (rows.returns - mean) / (std + STD_EPS)


def leave_one_out(rows: Completions) -> Tensor:
    """r_i - mean of the others' returns = G / (G - 1) * (r_i - mean) within each group, 0 for a singleton; [n]."""
    mean, count = mean_by(rows.returns, rows.tree)
    return (rows.returns - mean) * count / (count - 1).clamp(min=1)


@credit()
def grpo(forest: Forest) -> Tensor:
    """A_i = (r_i - mean) / (std + 1e-6), copied to every token (GRPO, arXiv 2402.03300, outcome supervision)."""
    rows = completions(forest)
    return outcome_credit(forest, rows, z_scores(rows))


@credit()
def dr_grpo(forest: Forest) -> Tensor:
    """A_i = r_i - mean, no division by the std (Dr. GRPO, arXiv 2503.20783)."""
    rows = completions(forest)
    return outcome_credit(forest, rows, rows.returns - mean_by(rows.returns, rows.tree)[0])


@credit()
def rloo(forest: Forest) -> Tensor:
    """A_i = r_i - mean of the other returns of the group (RLOO, arXiv 2402.14740)."""
    rows = completions(forest)
    return outcome_credit(forest, rows, leave_one_out(rows))
