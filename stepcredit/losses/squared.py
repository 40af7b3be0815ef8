"""Regression of log-ratios on advantages: A*-PO, REBEL, APA and Direct Advantage Policy Optimization in one loss."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.forest.ops import segment_sum
from stepcredit.losses.base import LossNeeds, LossParts, LossUnit, Tokens, loss

RegressionUnit = Literal["token", "step", "completion"]
Anchor = Literal["old", "reference"]
Centre = Literal["none", "pair", "group"]


def _needs(unit: RegressionUnit, anchor: Anchor, centre: Centre, scale: float) -> LossNeeds:
    """Segments are never cut. A regression is good for several steps on a batch: what it solves does not depend on who
    sampled, only how much each completion counts in it does."""
    columns = ("ref_logprobs",) if anchor == "reference" else ()  # several steps on a batch have old_logprobs anyway
    together: LossUnit = "completion" if unit == "completion" else "token"
    if centre != "none":
        together = "tree"
    mean = "token_mean" if unit == "token" else "seq_mean_token_mean"
    return LossNeeds(columns, ratio=True, unit=together, flat=unit == "completion", aggregate=mean)


@loss(by_options=_needs)
def squared(
    tokens: Tokens,
    unit: RegressionUnit = "completion",
    anchor: Anchor = "old",
    centre: Centre = "none",
    scale: Annotated[float, Field(gt=0)] = 1.0,
) -> LossParts:
    """(scale D - A)^2 of each unit, D = sum over its tokens of log pi - log pi_anchor, A its mean advantage.

    Every token has the loss of its unit, so that seq_mean_token_mean makes it a mean over completions (over segments
    for credit on trees). Where the advantage is 0 there still is a gradient: D is drawn to 0.

    - A*-PO (arXiv 2505.20686): completion, reference, A = r - V*(x), `scale` its beta_2.
    - REBEL (arXiv 2404.16767): completion, old, pair or group, A = r but for what all of a group share, `scale` 1/eta.
      The paper has pairs of completions; "group" is the mean of ((scale D_i - A_i) - (scale D_j - A_j))^2 over all
      pairs of a group: 2 / (G - 1) times the sum of (x_i - mean x)^2, x = scale D - A.
    - APA (arXiv 2306.02231): token, reference, A of a critic, `scale` its lambda; its loss is (D - A / lambda)^2, this
      one lambda^2 times that. The released code's "old" log-probabilities are the reference's.
    - Direct Advantage Policy Optimization (arXiv 2412.18279): step, reference, `scale` its beta; half of this one.

    Args:
        unit: "step" is what `step_index` numbers (credit `vine`), otherwise a segment of the forest; a completion of
            one segment is one step. In a mean over completions a step counts as its tokens do.
        anchor: the policy that the batch began with, or the reference.
        centre: the rest x less its mean over the group, or over two completions of it that stand together. What has
            no partner has no loss and is counted (policy/unpaired).

    At D = 0 the gradient is -2 scale A grad D (`reinforce` times 2 scale, weights seq_mean_token_sum); with "group"
    it is `reinforce` with RLOO's advantages times 4 scale.

    Trap: only the product of `scale` and D is seen, so a small `scale` makes gradients small until D has grown. AdamW
    does not mind; a gradient clip acts later than with other losses.
    """
    if centre != "none" and unit != "completion":
        raise UserError(f"loss.centre {centre} is for --loss.unit completion, got {unit}")
    log_ratio = _log_ratio(tokens, anchor)
    if unit == "token":
        return LossParts((scale * log_ratio - tokens.advantages).square(), {"policy/log_ratio": log_ratio})
    place, most = _steps(tokens) if unit == "step" else (tokens.completion, tokens.forest.num_segments)
    size = _sum(tokens, tokens.counted.to(log_ratio.dtype), place, most)
    moved = _sum(tokens, log_ratio, place, most)
    rest = scale * moved - _sum(tokens, tokens.advantages, place, most) / size.clamp(min=1)
    means = {"policy/log_ratio": moved[place]}
    if centre == "none":
        return LossParts(rest.square()[place], means)
    by_pairs, alone = _over_pairs(tokens, rest, size > 0, centre)
    return LossParts(by_pairs[place], means | {"policy/unpaired": alone[place]})


def _log_ratio(tokens: Tokens, anchor: Anchor) -> Tensor:
    """[num_tokens] log(pi / pi_anchor), without a bound: nothing overflows here, and beyond one was no gradient."""
    if anchor == "reference":
        return tokens.logprobs - tokens.column("ref_logprobs")
    if "old_logprobs" in tokens.forest.token:
        return tokens.logprobs - tokens.column("old_logprobs")
    return tokens.logprobs - tokens.logprobs.detach()


def _steps(tokens: Tokens) -> tuple[Tensor, int]:
    """For each token the number of its step, and how many there are."""
    if "step_index" not in tokens.forest.token:
        return tokens.segment, tokens.forest.num_segments
    index = tokens.column("step_index").long()
    names, place = torch.unique(tokens.segment * (int(index.max()) + 1) + index, return_inverse=True)
    return place, len(names)


def _sum(tokens: Tokens, values: Tensor, place: Tensor, most: int) -> Tensor:
    """[most] the sum of `values` over the tokens of each unit that count."""
    return segment_sum(tokens.used(values), place, most)


def _over_pairs(tokens: Tokens, rest: Tensor, there: Tensor, centre: Centre) -> tuple[Tensor, Tensor]:
    """Of each completion, a row of the segment table, its share of the squared differences, and whether it is alone.

    The mean over the completions of a group of n is the mean over its pairs, as sum over pairs of (x_i - x_j)^2 is
    n times the sum of (x_i - mean)^2.

    Args:
        there: rows that are completions with tokens that count.
    """
    group, most = _groups(tokens, there, centre), tokens.forest.num_segments + 1
    count = segment_sum(there.to(rest.dtype), group, most)
    mean = segment_sum(torch.where(there, rest, 0.0), group, most) / count.clamp(min=1)
    count = count[group]
    share = torch.where(count > 1, 2 * count / (count - 1).clamp(min=1), 0.0)
    return share * (rest - mean[group]).square(), count == 1


def _groups(tokens: Tokens, there: Tensor, centre: Centre) -> Tensor:
    """[num_segments] a number for the completions that are compared with each other."""
    forest = tokens.forest
    tree = forest.segment["tree"].to(there.device)
    if centre == "group":
        return tree
    size = segment_sum(there.long(), tree, forest.num_trees)
    place = there.cumsum(0) - 1 - (size.cumsum(0) - size)[tree]  # in the tree; its rows stand together
    pairs = (size + 1) // 2
    return (pairs.cumsum(0) - pairs)[tree] + place.clamp(min=0) // 2
