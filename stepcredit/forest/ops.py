"""Vectorised sums and means over segments, groups and paths, the Kullback-Leibler estimators, and out-of-memory errors.

No loop over tokens: path sums take log2(longest path) rounds of pointer jumping.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stepcredit.forest import Forest

SAME = (
    1e-6  # smaller differences are rounding: of rewards such as 0.1, of sums of many, or of means over unlike branches
)
MOST_EMPTY = 4  # times as many possible keys as rows: beyond it keys are sorted rather than counted
MAX_LOG_RATIO = 20.0  # beyond it exp() of a log-ratio only overflows: the ratio is 5e8


class TokenScores(NamedTuple):
    """`logprobs` and `entropy`, each [num_tokens] fp32, of the full distribution at the sampling temperature."""

    logprobs: Tensor
    entropy: Tensor


def segment_sum(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Sum of `values` by row number.

    Args:
        values: [n]; index: [n] row in 0..num_segments-1.

    Returns:
        [num_segments], 0 where no value falls.

    >>> segment_sum(torch.tensor([1., 2., 3.]), torch.tensor([0, 2, 2]), 3).tolist()
    [1.0, 0.0, 5.0]
    """
    return torch.zeros(num_segments, dtype=values.dtype, device=values.device).index_add_(0, index, values)


def mean_by(values: Tensor, *keys: Tensor, where: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean over the rows that share all keys, given back at every row.

    Args:
        values: [n]; keys: each [n] integers; where: [n] bool, rows that count (all by default).

    Returns:
        mean [n] (0 where no row of the group counts) and count [n], the number of counted rows in the group.

    >>> mean, count = mean_by(torch.tensor([1., 3., 5.]), torch.tensor([0, 0, 1]))
    >>> mean.tolist(), count.tolist()
    ([2.0, 2.0, 5.0], [2.0, 2.0, 1.0])
    """
    weight = torch.ones_like(values) if where is None else where.to(values.dtype)
    group, num_groups = _group_ids(keys)
    # A value that does not count must not matter, not even NaN.
    total = segment_sum(torch.where(weight > 0, values, 0.0), group, num_groups)
    count = segment_sum(weight, group, num_groups)
    return (total / count.clamp(min=1))[group], count[group]


def spread_by(values: Tensor, key: Tensor, where: Tensor | None = None) -> Tensor:
    """Largest minus smallest value of the rows that share the key, given back at every row; 0 where none counts.

    Exactly 0 for equal values, which a standard deviation is not, and where `SAME` times the largest size among them,
    or times 1 where that is smaller, is not exceeded: sums that are equal differ by their rounding.

    >>> spread_by(torch.tensor([0.1 + 0.2, 0.3, 5.0, 7.0], dtype=torch.float64), torch.tensor([0, 0, 1, 1])).tolist()
    [0.0, 0.0, 2.0, 2.0]
    """
    group, num_groups = _group_ids((key,))
    rows = torch.ones_like(key, dtype=torch.bool) if where is None else where
    empty = torch.full((num_groups,), -torch.inf, dtype=values.dtype)
    high = empty.scatter_reduce(0, group[rows], values[rows], "amax")
    low = -empty.scatter_reduce(0, group[rows], -values[rows], "amax")
    spread, size = (high - low).clamp(min=0), torch.maximum(high.abs(), low.abs())
    return torch.where(spread > SAME * size.clamp(min=1), spread, 0.0)[group]


def _group_ids(keys: tuple[Tensor, ...]) -> tuple[Tensor, int]:
    """The number of each row's combination of keys, in ascending order, and how many there are."""
    combined = keys[0]
    for key in keys[1:]:
        num_values = int(key.max()) + 1 if len(key) else 1
        combined = combined * num_values + key
    countable = combined.dtype == torch.long and len(combined) > 0
    if countable and int(combined.min()) >= 0 and int(combined.max()) < MOST_EMPTY * len(combined):
        present = torch.zeros(int(combined.max()) + 1, dtype=torch.bool).index_fill_(0, combined, True)
        numbers = present.long().cumsum(0) - 1
        return numbers.index_select(0, combined), int(numbers[-1]) + 1
    unique, inverse = combined.unique(return_inverse=True)
    return inverse, len(unique)


def cumsum_along_path(forest: Forest, values: Tensor) -> Tensor:
    """Sum of `values` over the path from the prompt to each token, that token included.

    Args:
        values: [num_tokens]; summed in fp64 where they are, else in fp32.

    Returns:
        [num_tokens].
    """
    values = _at_least_fp32(values)
    return _scan(values, forest.previous_token)


def sum_to_end(forest: Forest, values: Tensor, discount: float = 1.0) -> Tensor:
    """Discounted sum of `values` from each token to the end of its completion, in fp64 where they are, else in fp32.

    G_t = x_t + discount * G_{t+1}; the discount counts sampled tokens only, as positions do. Flat forests only (a token
    of a branching tree has several ends).
    """
    values = _at_least_fp32(values)
    factor = None if discount == 1.0 else torch.where(forest.token_sampled, discount, 1.0).to(values.dtype)
    return _scan(values, forest.next_token, factor)


class BackedUp(NamedTuple):
    """`values` at each token, and `following`, what stands behind each token; both [num_tokens] fp64."""

    values: Tensor
    following: Tensor


def back_up(forest: Forest, values: Tensor, factor: Tensor, end: Tensor) -> BackedUp:
    """y_t = x_t + factor_t * (what follows t), from the leaves of trees to their first tokens, in fp64.

    Behind the last token of a segment follows the mean over its judged children, of y at their first tokens, and behind
    a leaf its `end`. Tokens of unjudged segments get numbers that mean nothing.

    Args:
        values, factor: [num_tokens], finite; end: [num_segments], read at leaves.

    >>> from stepcredit.forest.types import Problem, Segment, Tree
    >>> leaves = [Segment([2], parent=0, reward=1.0), Segment([3], parent=0, reward=0.0)]
    >>> forest = Forest.from_trees([Tree(Problem(), [1], [Segment([5, 6], finish="cut"), *leaves])])
    >>> back_up(forest, torch.zeros(4), torch.tensor([1.0, 0.5, 1.0, 1.0]), forest.segment["reward"]).values.tolist()
    [0.25, 0.25, 1.0, 0.0]
    """
    start, segment = forest.segment["start"], forest.token["segment"]
    last = start + forest.segment["length"] - 1
    at_end = torch.zeros(forest.num_tokens, dtype=torch.bool).index_fill_(0, last, True)
    link = torch.where(at_end, -1, torch.arange(forest.num_tokens) + 1)
    factor = factor.double()
    within = _scan(values.double(), link, factor)
    to_end = _scan(torch.where(at_end, factor, 0.0), link, factor)  # product of the factors up to the segment's end
    behind = torch.where(forest.segment["is_leaf"], end.double(), 0.0)
    parent, judged = forest.segment["parent"], forest.judged_or_open
    for level in forest.levels_deepest_first():
        rows = level[judged[level]]
        first = start[rows]
        mean, _ = mean_by(within[first] + to_end[first] * behind[rows], parent[rows])
        behind[parent[rows]] = mean
    found = within + to_end * behind[segment]
    return BackedUp(found, torch.where(at_end, behind[segment], found.roll(-1)))


def last_sampled(forest: Forest, values: Tensor) -> Tensor:
    """[num_tokens] the value at the last sampled token of the path up to each token, itself included; 0 before any."""
    sampled = forest.token_sampled
    return _scan(torch.where(sampled, values, 0.0), forest.previous_token, (~sampled).to(values.dtype))


def _at_least_fp32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _scan(values: Tensor, link: Tensor, factor: Tensor | None = None) -> Tensor:
    """y = x + factor * y[link] along the chains of `link` (row of the next one, -1 at the end) by pointer jumping.

    Where every row's next one is its neighbour, the jumps are shifts of the whole tensor, which read no indices; the
    sums are the same, in the same order.

    Args:
        factor: None: 1 everywhere.
    """
    for step in (-1, 1):
        if bool(((link < 0) | (link == torch.arange(len(link)) + step)).all()):
            return _scan_neighbours(values, link, factor, backwards=step == 1)
    total, factor, link = values.clone(), None if factor is None else factor.clone(), link.clone()
    while (rows := (link >= 0).nonzero().squeeze(1)).numel():
        step_to = link[rows]
        next_total, next_link = total[step_to], link[step_to]
        if factor is None:
            total[rows] += next_total
        else:
            next_factor = factor[step_to]
            total[rows] += factor[rows] * next_total
            factor[rows] *= next_factor
        link[rows] = next_link
    return total


def _scan_neighbours(values: Tensor, link: Tensor, factor: Tensor | None, backwards: bool) -> Tensor:
    """`_scan` where the next of a row is the row before it, or with `backwards` the row behind it."""
    if backwards:
        values, link = values.flip(0), link.flip(0)
        factor = None if factor is None else factor.flip(0)
    total, factor = values.clone(), None if factor is None else factor.clone()
    first = (link < 0).nonzero().squeeze(1)  # of each chain
    length = torch.cat([first, first.new_tensor([len(link)])]).diff()
    distance = torch.arange(len(link)) - first.repeat_interleave(length)
    longest, jump = int(length.max()) - 1 if len(length) else 0, 1
    while jump <= longest:
        reached, added = distance[jump:] >= jump, total[:-jump]
        if factor is not None:
            added = factor[jump:] * added
            factor[jump:] *= torch.where(reached, factor[:-jump], 1.0)
        total[jump:] += torch.where(reached, added, -0.0)  # which changes no number, not even a 0
        jump *= 2
    return total.flip(0) if backwards else total


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k1 = log(pi / pi_ref) per token: unbiased for KL(pi, pi_ref) under samples of pi, of either sign."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k2 = (log(pi / pi_ref))^2 / 2 per token; its mean gradient is that of the KL."""
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = exp(u) - u - 1, u = log(pi_ref / pi), per token: unbiased, never negative (arXiv 2402.03300)."""
    log_ratio = (ref_logprobs - logprobs).clamp(max=MAX_LOG_RATIO)
    return log_ratio.exp() - log_ratio - 1


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that a device or the CPU is out of memory."""
    words = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "out of memory" in words or "can't allocate memory" in words or "not enough memory" in words
    )


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
