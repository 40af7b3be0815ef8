"""Aggregators: the weight of each token of an optimiser step, one column computed once over all of it.

The loss is the sum of weight times loss of a token. Tokens that are not trained on have weight 0 and are in no
denominator; tokens of zero advantage are. Denominators are of the optimiser step, on all processes, never of a
micro-batch.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.ops import MAX_LOG_RATIO, segment_sum

Unit = Literal["completion", "segment"]


def _units(forest: Forest, kind: Unit) -> tuple[Tensor, Tensor]:
    """The unit that each token belongs to, and the active tokens of each unit ([num_segments], rows of units).

    A completion is named by its leaf.
    """
    unit = (forest.leaf if kind == "completion" else torch.arange(forest.num_segments))[forest.token["segment"]]
    return unit, segment_sum(forest.active.float(), unit, forest.num_segments)


def token_mean(forest: Forest, unit: Unit, constant: float) -> Tensor:
    """1 / (active tokens): every token counts the same (DAPO, arXiv 2503.14476)."""
    active = forest.active.float()
    return active / active.sum().clamp(min=1)


def seq_mean_token_mean(forest: Forest, unit: Unit, constant: float) -> Tensor:
    """1 / (units * tokens of the unit): every completion (or segment) counts the same (GRPO, arXiv 2402.03300)."""
    unit_of, size = _units(forest, unit)
    return forest.active / ((size > 0).sum().clamp(min=1) * size[unit_of].clamp(min=1))


def seq_mean_token_sum(forest: Forest, unit: Unit, constant: float) -> Tensor:
    """1 / units: the plain policy gradient, long completions weigh more."""
    _, size = _units(forest, unit)
    return forest.active / (size > 0).sum().clamp(min=1)


def sum_over_constant(forest: Forest, unit: Unit, constant: float) -> Tensor:
    """1 / (units * constant), the constant being `max_new_tokens` (Dr. GRPO, arXiv 2503.20783)."""
    _, size = _units(forest, unit)
    return forest.active / ((size > 0).sum().clamp(min=1) * constant)


AGGREGATORS = {
    "token_mean": token_mean,
    "seq_mean_token_mean": seq_mean_token_mean,
    "seq_mean_token_sum": seq_mean_token_sum,
    "sum_over_constant": sum_over_constant,
}


def by_depth(forest: Forest, weights: Tensor, depth_weights: Sequence[float]) -> Tensor:
    """Weights times those of their depth, scaled to the sum that they had."""
    depth = forest.segment["depth"]
    if len(depth) and int(depth.max()) >= len(depth_weights):
        raise UserError(
            f"objective.depth_weights has {len(depth_weights)} numbers; there are segments of {int(depth.max()) + 1} "
            "depths, give one for each"
        )
    changed = weights * torch.tensor(depth_weights)[depth][forest.token["segment"]]
    total = changed.sum()
    return changed * (weights.sum() / total) if float(total) > 0 else changed


def importance_weights(forest: Forest, sequence: bool, cap: float) -> Tensor:
    """[num_tokens] min(cap, pi_old / pi_sampler) of each token, or of all tokens from the prompt to its segment's end.

    Needs the columns `old_logprobs` and `rollout_logprobs`. In a tree a segment has the ratio of the path that ends
    with it, because that is what was sampled when its siblings were compared. As weights they scale the KL and entropy
    terms too.
    """
    log_ratio = (forest.token["old_logprobs"] - forest.token["rollout_logprobs"]) * forest.token_sampled
    if sequence:
        index = forest.token["segment"]
        own = segment_sum(log_ratio, index, forest.num_segments)
        log_ratio = own + forest.sum_over_ancestors(own)
        if forest.is_flat:
            log_ratio = log_ratio[forest.leaf]
        log_ratio = log_ratio[index]
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)
