"""How well predictions fit outcomes."""

import torch
from torch import Tensor

from stepcredit.forest import Forest
from stepcredit.forest.ops import SAME, cumsum_along_path
from stepcredit.shaping.base import RAW

RIGHT = 0.5  # an outcome of at least so much counts as right


def area_under_curve(score: Tensor, right: Tensor) -> float:
    """The chance that a right one has a higher score than a wrong one; ties count half.

    Args:
        score: [n]; right: [n] bool, with both kinds.

    >>> area_under_curve(torch.tensor([0.8, 0.5, 0.5, 0.1]), torch.tensor([True, True, False, False]))
    0.875
    """
    wrong = score[~right].sort().values
    below, up_to = (torch.searchsorted(wrong, score[right], right=ties) for ties in (False, True))
    return float((below + up_to).double().mean() / 2 / len(wrong))


def value_metrics(forest: Forest, values: Tensor, returns: Tensor) -> dict[str, float]:
    """How well values fit what came of them, over active tokens of completions that have ended.

    `critic/explained_variance` is 1 - var(return - value) / var(return), absent where all returns are equal;
    `critic/auc` the chance that a right completion's mean value is above a wrong one's, right by its reward before
    shapers, absent when all are alike;
    `critic/value` and `critic/return` are means.

    Args:
        values, returns: [num_tokens].
    """
    rows = forest.active & forest.judged[forest.token["segment"]] & values.isfinite()
    if not bool(rows.any()):
        return {}
    value, target = values[rows].double(), returns[rows].double()
    found = {"critic/value": float(value.mean()), "critic/return": float(target.mean())}
    if float(target.max() - target.min()) > SAME * float(target.abs().max()):
        left = (target - value).var(correction=0) / target.var(correction=0)
        found["critic/explained_variance"] = float(1 - left)
    leaf, mean = _mean_values(forest, values)
    right = forest.segment[RAW if RAW in forest.segment else "reward"][leaf] >= RIGHT
    if bool(right.any()) and not bool(right.all()):
        found["critic/auc"] = area_under_curve(mean, right)
    return found


def _mean_values(forest: Forest, values: Tensor) -> tuple[Tensor, Tensor]:
    """Judged leaves that are not masked, and the mean value over the sampled tokens of their completions."""
    sampled = forest.token_sampled
    total = cumsum_along_path(forest, torch.where(sampled, values, 0.0).double())
    count = cumsum_along_path(forest, sampled.double())
    leaf = (forest.segment["is_leaf"] & forest.judged & forest.segment["mask"]).nonzero().squeeze(1)
    last = (forest.segment["start"] + forest.segment["length"] - 1)[leaf]
    leaf, last = leaf[count[last] > 0], last[count[last] > 0]
    mean = total[last] / count[last]
    return leaf[mean.isfinite()], mean[mean.isfinite()]
