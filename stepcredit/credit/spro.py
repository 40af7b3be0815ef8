"""SPRO: self-guided process rewards and the masked step advantage (arXiv 2507.01551)."""

from typing import Literal

import torch
from torch import Tensor

from stepcredit.credit.base import (
    CreditParts,
    completions,
    credit,
    judged_tokens,
    outcome_credit,
    to_tokens,
    whiten,
)
from stepcredit.credit.group import z_scores
from stepcredit.forest import Forest
from stepcredit.forest.ops import cumsum_along_path, mean_by


def cumulative_process_reward(forest: Forest, beta: float, cumsum: bool = True) -> Tensor:
    """CPR_{i,t} = beta * sum_{j <= t} log(pi_old / pi_ref)(y_{i,j}), t included (Eq. 11; V(s_0) cancels later).

    With `cumsum` off it is the log-ratio of token t alone. [num_tokens]; tokens that were not sampled add nothing.
    """
    log_ratio = (forest.token["old_logprobs"] - forest.token["ref_logprobs"]).float()
    log_ratio = torch.where(forest.token_sampled, log_ratio, 0.0)
    return beta * (cumsum_along_path(forest, log_ratio) if cumsum else log_ratio)


def masked_step_advantage(forest: Forest, cpr: Tensor) -> Tensor:
    """MSA_{i,t} = CPR_{i,t} - mean over the group's completions that still have a token at t, own included (Eq. 12).

    No division by a std. 0 where only one completion reaches t, hence for singletons. [num_tokens]
    """
    judged = judged_tokens(forest)
    mean, _ = mean_by(cpr, forest.token_tree, forest.token["position"], where=judged)
    return torch.where(judged, cpr - mean, 0.0)


@credit("old_logprobs", "ref_logprobs")
def spro(
    forest: Forest,
    beta: float = 0.05,
    uniform: Literal["keep", "drop"] = "keep",
    normalize: Literal["none", "batch"] = "none",
    sign: float = 1.0,
    cumsum: bool = True,
) -> CreditParts:
    """A_{i,t} = (r_i - mean) / (std + 1e-6) + MSA_{i,t} (Eq. 13): GRPO's outcome part and a process part.

    Both log-probabilities are of the distribution at the sampling temperature, by the trainer's own forward, at the
    start of the iteration. On the first iteration the policy is the reference and the process part is exactly 0.

    Args:
        beta: scale of the process part. The paper's value is not known; 0.05 is that of PRIME and of a published port.
        uniform: "drop" zeroes the process part in groups whose outcomes are all equal, where it alone moves the policy.
        normalize: "batch" gives the process part unit variance over the batch (a port's variant; not in the paper).
        sign: -1 turns the process part around: a penalty on leaving the reference, as in KL-regularised RL.
        cumsum: False takes the token's own log-ratio instead of the sum up to it (control without prefix noise).

    Degenerate: a group of equal outcomes has outcome part 0; a singleton has both parts 0.
    """
    rows = completions(forest)
    process = sign * masked_step_advantage(forest, cumulative_process_reward(forest, beta, cumsum))
    if uniform == "drop":
        process = process * to_tokens(forest, rows, rows.varied.float())
    if normalize == "batch":
        process = whiten(process, judged_tokens(forest))
    return CreditParts(outcome_credit(forest, rows, z_scores(rows)), process)
