"""The groups to train on: those neither too easy nor too hard (PRIME's online prompt filter, arXiv 2502.01456), or
those whose rewards differ (DAPO's dynamic sampling, arXiv 2503.14476)."""

import torch
from torch import Tensor

from stepcredit.forest import FINISH_CODE, Forest
from stepcredit.forest.ops import SAME, mean_by, segment_sum, spread_by
from stepcredit.shaping.options import FilterOptions

REASONS = ("hard", "easy", "truncated", "uniform", "unjudged")


def rejected(forest: Forest, window: FilterOptions) -> dict[str, Tensor]:
    """For each reason [num_trees] True where a group is not trained on for it; only the first reason counts."""
    leaf, tree = forest.segment["is_leaf"], forest.segment["tree"]
    judged = leaf & forest.segment["has_reward"]
    mean = torch.zeros(forest.num_trees).index_copy(0, tree, mean_by(forest.segment["reward"], tree, where=judged)[0])
    truncated = leaf & (forest.segment["finish"] == FINISH_CODE["length"])
    if not window.drop_truncated:
        truncated = torch.zeros_like(truncated)
    spread = torch.zeros(forest.num_trees).index_copy(0, tree, spread_by(forest.segment["reward"], tree, where=judged))
    by_mean = window.keep == "window"
    holds = {
        "unjudged": segment_sum(judged.float(), tree, forest.num_trees) == 0,
        "truncated": segment_sum(truncated.float(), tree, forest.num_trees) > 0,
        "hard": (mean < window.low - SAME) & by_mean,
        "easy": (mean > window.high + SAME) & by_mean,
        "uniform": (spread == 0) & (not by_mean),
    }
    first: dict[str, Tensor] = {}
    seen = torch.zeros(forest.num_trees, dtype=torch.bool)
    for reason, trees in holds.items():
        first[reason] = trees & ~seen
        seen = seen | trees
    return first
