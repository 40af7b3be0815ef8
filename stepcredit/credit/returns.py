"""Credit from returns: REINFORCE++, its group-baseline form, and reward-to-go on dense rewards."""

from typing import Literal

import torch
from torch import Tensor

from stepcredit.credit.base import completions, credit, judged_tokens, outcome_credit, to_tokens, whiten
from stepcredit.credit.group import leave_one_out
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.ops import mean_by, sum_to_end


def rewards_by_token(forest: Forest) -> Tensor:
    """[num_tokens] fp64, token rewards, plus the outcome reward on the last sampled token of each judged completion."""
    rewards = torch.zeros(forest.num_tokens, dtype=torch.float64)
    if "token_rewards" in forest.token:
        rewards += forest.token["token_rewards"] * judged_tokens(forest)
    sampled = judged_tokens(forest).nonzero().squeeze(1)
    leaf = forest.leaf[forest.token["segment"][sampled]]
    last = torch.full((forest.num_segments,), -1, dtype=torch.long)
    last = last.scatter_reduce(0, leaf, forest.token["position"][sampled], "amax")
    at_end = sampled[forest.token["position"][sampled] == last[leaf]]
    rewards[at_end] += forest.segment["reward"][forest.leaf[forest.token["segment"][at_end]]].double()
    return rewards


def _returns(forest: Forest, gamma: float) -> Tensor:
    if not 0.0 <= gamma <= 1.0:
        raise UserError(f"credit.gamma must lie in [0, 1], got {gamma}")
    return sum_to_end(forest, rewards_by_token(forest), gamma).float() * judged_tokens(forest)


@credit()
def reinforce_pp(forest: Forest, gamma: float = 1.0) -> Tensor:
    """A_t = whitened sum_{s >= t} gamma^(s-t) r_s over all judged tokens of the batch (REINFORCE++, arXiv 2501.03262).

    r_s holds the token rewards (the k1 penalty, when `objective.kl.estimator` is k1) and the outcome reward on the
    last sampled token. The mean and the unbiased std count every token once, so long completions weigh more. Needs no
    group; a batch in which all returns are equal gets 0.
    """
    return whiten(_returns(forest, gamma), judged_tokens(forest))


@credit()
def reinforce_pp_baseline(forest: Forest) -> Tensor:
    """A_i = r_i - group mean, then whitened over all judged tokens of the batch (arXiv 2501.03262, the k > 1 form).

    The divisor is the std of the centred returns, not of the raw ones. Singletons are centred to 0 before whitening.
    """
    rows = completions(forest)
    centred = outcome_credit(forest, rows, rows.returns - mean_by(rows.returns, rows.tree)[0])
    return whiten(centred, judged_tokens(forest))


@credit()
def reward_to_go(
    forest: Forest, gamma: float = 1.0, baseline: Literal["leave_one_out", "mean", "none"] = "leave_one_out"
) -> Tensor:
    """A_t = sum_{s >= t} gamma^(s-t) r_s - b_i, with token rewards and the outcome reward on the last sampled token.

    The baseline is one number for a completion, made from the undiscounted returns of its group, so it depends on the
    prompt alone: "leave_one_out" (unbiased), "mean" (own return included) or "none". A baseline per token index would
    be biased when lengths differ.

    Degenerate: without token rewards and with gamma 1 this is RLOO. A singleton has baseline 0 under "none" and gets 0
    otherwise.
    """
    returns = _returns(forest, gamma)
    if baseline == "none":
        return returns
    rows = completions(forest)
    mean, count = mean_by(rows.returns, rows.tree)
    centred = rows.returns - mean if baseline == "mean" else leave_one_out(rows)
    several = to_tokens(forest, rows, (count > 1).float())
    # Exactly 0 without token rewards and discount, so that rounding leaves no small numbers.
    later = returns - to_tokens(forest, rows, rows.returns)
    return (later + outcome_credit(forest, rows, centred)) * several
