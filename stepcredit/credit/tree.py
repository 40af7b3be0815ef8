"""Parts of credit functions for trees: values backed up from the leaves, and groups of siblings.

The siblings of a segment are the segments that follow the same one, or the same prompt. Unjudged segments (without a
judged completion through them) are in no mean and no group.
"""

import torch
from torch import Tensor

from stepcredit.forest import Forest
from stepcredit.forest.ops import mean_by, segment_sum, spread_by


def values(forest: Forest) -> Tensor:
    """[num_segments] fp64, the mean outcome below each segment; 0 where unjudged.

    A leaf has its reward, any other segment the mean of its judged children, not of the leaves below it: the two differ
    where some children end early. Token rewards, if there are any, are added up from each segment's first token on.
    """
    judged, parent = forest.judged, forest.segment["parent"]
    own = torch.zeros(forest.num_segments, dtype=torch.float64)
    if "token_rewards" in forest.token:
        rewards = forest.token["token_rewards"].double() * forest.token_sampled
        own = segment_sum(rewards, forest.token["segment"], forest.num_segments)
    value = own + torch.where(forest.segment["is_leaf"], forest.segment["reward"], 0.0)
    for level in forest.levels_deepest_first():
        rows = level[judged[level]]
        mean, _ = mean_by(value[rows], parent[rows])
        value[parent[rows]] = own[parent[rows]] + mean
    return torch.where(judged, value, 0.0)


def sibling_mean(forest: Forest, value: Tensor) -> Tensor:
    """[num_segments] mean value of the judged siblings, the segment itself included: the value of the parent."""
    return mean_by(value, forest.siblings, where=forest.judged)[0]


def sibling_range(forest: Forest, value: Tensor) -> Tensor:
    """[num_segments] largest minus smallest value of the judged siblings; exactly 0 for equal values and singletons."""
    return spread_by(value, forest.siblings, where=forest.judged)


def to_tokens(forest: Forest, by_segment: Tensor) -> Tensor:
    """[num_tokens] every sampled token gets its segment's number."""
    return by_segment.float()[forest.token["segment"]] * forest.token_sampled
