"""PRIME: an outcome advantage plus the return of an implicit process reward model (arXiv 2502.01456)."""

from typing import Literal

import torch
from torch import Tensor

from stepcredit.credit.base import (
    STD_EPS,
    Completions,
    CreditParts,
    completions,
    credit,
    group_std,
    judged_tokens,
    outcome_credit,
    to_tokens,
    whiten,
)
from stepcredit.credit.group import leave_one_out, z_scores
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.ops import mean_by, segment_sum, spread_by, sum_to_end


def implicit_rewards(forest: Forest, beta: float) -> Tensor:
    """x_t = beta * log(pi_phi / pi_ref)(y_t), phi the reward model; 0 off the sampled, judged tokens. [num_tokens]"""
    log_ratio = (forest.token["prm_logprobs"] - forest.token["ref_logprobs"]).float()
    return beta * torch.where(judged_tokens(forest), log_ratio, 0.0)


def mean_scores(forest: Forest, rows: Completions, scores: Tensor) -> Completions:
    """The completions that have a sampled token, with m = the mean of `scores` over those tokens as their return."""
    total = segment_sum(scores, forest.leaf[forest.token["segment"]], forest.num_segments)[rows.leaf]
    some = rows.length > 0
    return Completions(rows.leaf[some], rows.tree[some], (total / rows.length)[some], rows.length[some])


@credit("prm_logprobs", "ref_logprobs")
def prime(
    forest: Forest,
    beta: float = 0.05,
    gamma: float = 1.0,
    estimator: Literal["rloo", "grpo", "reinforce"] = "rloo",
    outcome_coef: float = 1.0,
    process_coef: float = 1.0,
    centering: Literal["paper", "authors"] = "paper",
    batch_norm: bool = False,
    last_token: Literal["keep", "zero"] = "keep",
    whitening: bool = False,
) -> CreditParts:
    """A_{i,t} = [r_i - mean_{j != i} r_j] + sum_{s >= t} gamma^(s-t) [x_{i,s} - mean_{j != i} m_j].

    x are the implicit rewards (`implicit_rewards`), m_j is the mean of x over the T_j sampled tokens of completion j,
    and r the return of `completions`. Both parts have their own baseline and are then added. The two log-probabilities
    must be at one temperature, or x is not 0 where the models agree.

    The baseline is a mean per token. Eq. 5 of the paper (v1, v2) prints the sum over the completion in its place, which
    is a misprint: the text, the GRPO form (Eq. 7), the algorithm in the authors' blog and both codes divide by T_j.

    "The original" below is the code of PRIME-RL/PRIME, "verl" the recipe in verl. With "centering: authors" and
    "batch_norm" and "whitening" on this is the original; verl has "last_token: zero" besides.

    Args:
        beta: scale of x, in the reward model's loss too. The original leaves it out of x; `batch_norm` cancels it.
        gamma: discount of the process part alone, over sampled tokens. The original has one for each part, the
            outcome's from the last token back; all are 1 in the paper and in both codes, and the outcome's is here.
        estimator: "rloo" as above. "grpo" divides both parts: the outcome is a z-score, and x less the mean of all m_j
            of the group is divided by their unbiased std + 1e-6. "reinforce" has no baseline: r_i and the sum of x.
            The last two are in the paper (Eq. 7, appendix B.3) and in neither code.
        outcome_coef, process_coef: weights of the parts. 1 and 1 in the paper and the original; verl has 5 and 5, a
            common scale that whitening takes away.
        centering: "paper" as above. "authors" is what both codes do: x K/(K-1) - sum_k m_k / (K-1) for K completions,
            which is "paper" plus (x_{i,s} - m_i) / (K-1). That sums to 0 over a completion: the first tokens agree.
            For "rloo" only.
        batch_norm: divide x by the largest |sum_{s >= t} x_s| of the batch + 1e-6, before all else. On in both codes,
            which take the largest of each data-parallel rank; not in the paper. A reward model that hardly differs
            from the reference then weighs as much as any other.
        last_token: "zero" sets x of the last sampled token to 0, and still counts it in T_i (verl only).
        whitening: shift and scale the sum of both parts to mean 0 and unbiased variance 1 over all judged sampled
            tokens of the batch, those with advantage 0 too. On in both codes; not in the paper. Both parts are divided
            by the std; the mean is taken from the outcome part.

    Degenerate: a singleton has both parts 0 (not with "reinforce"). A group of equal outcomes has outcome part 0 and
    keeps its process part. Where the reward model is the reference (the first iteration) the process part is exactly 0.
    With "grpo" it is 0 also where all m_j are within 1e-6, and large (hundreds) where they are nearly so: the std of
    means divides single tokens.

    Raises:
        UserError: gamma outside [0, 1], beta not above 0, "centering: authors" without "rloo".

    >>> # x = (3, 1), (0), (1, 2, 3, -2), so m = 2, 0, 1 and baselines 1/2, 3/2, 1:
    >>> # process (3, 1/2), (-3/2), (0, 0, -1, -3); outcomes 1, 0, 0: 1, -1/2, -1/2
    """
    if not 0.0 <= gamma <= 1.0:
        raise UserError(f"credit.gamma must lie in [0, 1], got {gamma}")
    if beta <= 0:
        raise UserError(f"credit.beta must be above 0, got {beta}")
    if centering == "authors" and estimator != "rloo":
        raise UserError(f"credit.centering: authors is a form of estimator rloo, not of {estimator}")
    rows, judged = completions(forest), judged_tokens(forest)
    scores = implicit_rewards(forest, beta)
    if last_token == "zero":
        is_last = forest.token["position"] == to_tokens(forest, rows, rows.length) - 1
        scores = torch.where(is_last, 0.0, scores)
    if batch_norm and forest.num_tokens:
        scores = scores / (sum_to_end(forest, scores).abs().max() + STD_EPS)
    if estimator == "reinforce":
        outcome = to_tokens(forest, rows, rows.returns)
    else:
        outcome = outcome_credit(forest, rows, z_scores(rows) if estimator == "grpo" else leave_one_out(rows))
        means = mean_scores(forest, rows, scores)
        shift, scale = _baseline(means, estimator, centering)
        scores = (scores - to_tokens(forest, means, shift)) * to_tokens(forest, means, scale)
    process = sum_to_end(forest, scores, gamma) * judged
    outcome, process = outcome_coef * outcome, process_coef * process
    return _whitened(outcome, process, judged) if whitening else CreditParts(outcome, process)


def _baseline(means: Completions, estimator: str, centering: str) -> tuple[Tensor, Tensor]:
    """[n] the baseline to subtract from the scores of each completion, and [n] the factor to multiply them by then."""
    mean, std = group_std(means.returns, means.tree)
    count = mean_by(means.returns, means.tree)[1]
    several = (count > 1).float()
    if estimator == "grpo":
        spread = spread_by(means.returns, means.tree)
        return mean, torch.where(spread > STD_EPS, 1 / (std + STD_EPS), 0.0)
    if centering == "authors":
        return mean, several * count / (count - 1).clamp(min=1)
    return means.returns - leave_one_out(means), several


def _whitened(outcome: Tensor, process: Tensor, where: Tensor) -> CreditParts:
    total = outcome + process
    whitened = whiten(total, where)
    if not bool(whitened.any()):
        return CreditParts(whitened, whitened)
    process = process / (total[where].std() + STD_EPS)
    return CreditParts(whitened - process, process)
