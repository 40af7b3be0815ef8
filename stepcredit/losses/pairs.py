"""Losses over pairs of completions, a better and a worse one: DPO, IPO and hinge, each a function of one margin."""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from stepcredit.forest.ops import SAME, segment_sum
from stepcredit.losses.base import LossParts, Tokens, loss

TIE = 1e-4  # nats; margins that are smaller are rounding

Beta = Annotated[float, Field(gt=0)]


@loss("ref_logprobs", ratio=True, unit="tree", flat=True, aggregate="seq_mean_token_mean")
def dpo(tokens: Tokens, beta: Beta = 0.1) -> LossParts:
    """-log sigmoid(beta h) of each pair, h = D_chosen - D_rejected (DPO, arXiv 2305.18290).

    D is the sum of log pi - log pi_ref over the tokens of a completion. Where policy and reference are the same it is
    log 2, and its gradient -beta / 2 times that of h.
    """
    return _over_pairs(tokens, beta, lambda h: -functional.logsigmoid(beta * h))


@loss("ref_logprobs", ratio=True, unit="tree", flat=True, aggregate="seq_mean_token_mean")
def ipo(tokens: Tokens, beta: Beta = 0.1, average: bool = False) -> LossParts:
    """(h - 1 / (2 beta))^2 of each pair, h = D_chosen - D_rejected (IPO, arXiv 2310.12036, Eq. 17; beta is its tau).

    Args:
        average: D is the mean of the log-ratios of a completion's tokens instead of their sum, as in the authors'
            experiments and in TRL; the paper's formula has the sum.
    """
    return _over_pairs(tokens, beta, lambda h: (h - 1 / (2 * beta)).square(), average)


@loss("ref_logprobs", ratio=True, unit="tree", flat=True, aggregate="seq_mean_token_mean")
def hinge(tokens: Tokens, beta: Beta = 0.1) -> LossParts:
    """max(0, 1 - beta h) of each pair, h = D_chosen - D_rejected (SLiC, arXiv 2305.10425, with the reference of RSO,
    arXiv 2309.06657): nothing to gain beyond a margin of 1 / beta."""
    return _over_pairs(tokens, beta, lambda h: (1 - beta * h).clamp(min=0))


class _Pairs(NamedTuple):
    """Of each tree the rows of the segment table of its two sides, whether it has any, and how many completions."""

    chosen: Tensor
    rejected: Tensor
    there: Tensor
    size: Tensor


def _over_pairs(tokens: Tokens, beta: float, of_margin: Callable[[Tensor], Tensor], average: bool = False) -> LossParts:
    """The loss of each tree's pair: its completions of the highest and of the lowest advantage.

    A completion's advantage is the mean over its tokens; of equal ones the first is taken. Trees whose completions are
    all alike have no pair and no loss. The loss stands at the tokens of both sides, times half the number of the tree's
    completions, so that a mean over completions (seq_mean_token_mean) is one over trees.

    Args:
        of_margin: from h, [num_trees], to the loss.
        average: D is a mean over tokens.
    """
    rows, place = tokens.forest.num_segments, tokens.completion
    count = segment_sum(tokens.counted.to(tokens.logprobs.dtype), place, rows)
    moved = segment_sum(tokens.used(tokens.logprobs - tokens.column("ref_logprobs")), place, rows)
    moved = moved / count.clamp(min=1) if average else moved
    advantage = segment_sum(tokens.advantages, place, rows) / count.clamp(min=1)
    tree = tokens.forest.segment["tree"].to(place.device)
    pairs = _pairs(advantage, count > 0, tree, tokens.forest.num_trees)
    chosen, rejected = moved[pairs.chosen], moved[pairs.rejected]
    margin = torch.where(pairs.there, chosen - rejected, 0.0)
    row = torch.arange(rows, device=place.device)
    side = pairs.there[tree] & ((row == pairs.chosen[tree]) | (row == pairs.rejected[tree]))

    def at_tokens(values: Tensor) -> Tensor:
        return torch.where(side, (values * pairs.size / 2)[tree], 0.0)[place]

    metrics = {
        "pair/accuracy": (margin > TIE) + 0.5 * (margin.abs() <= TIE),
        "pair/margin": beta * margin,
        "pair/chosen_log_ratio": chosen,
        "pair/rejected_log_ratio": rejected,
    }
    return LossParts(at_tokens(of_margin(margin)), weighted={name: at_tokens(each) for name, each in metrics.items()})


def _pairs(advantage: Tensor, there: Tensor, tree: Tensor, num_trees: int) -> _Pairs:
    """Args: there: rows of the segment table that are completions with tokens that count."""

    def extreme(sign: int) -> tuple[Tensor, Tensor]:
        """The largest of sign * advantage in each tree, and the first row that has it."""
        values = torch.where(there, sign * advantage, -torch.inf)
        top = values.new_full((num_trees,), -torch.inf).scatter_reduce(0, tree, values, "amax")
        near = there & (values >= top[tree] - SAME * values.abs().clamp(min=1))
        row = torch.where(near, torch.arange(len(tree), device=tree.device), len(tree))
        return top, row.new_full((num_trees,), len(tree)).scatter_reduce(0, tree, row, "amin")

    (top, chosen), (low, rejected) = extreme(1), extreme(-1)
    apart = top + low > SAME * top.abs().clamp(min=1)  # low is minus the lowest
    size = segment_sum(there.to(advantage.dtype), tree, num_trees)
    inside = max(0, len(tree) - 1)
    return _Pairs(chosen.clamp(max=inside), rejected.clamp(max=inside), apart & (size > 1), size)
