"""The loss: surrogate x aggregator x regularisers, all pure functions over the token table.

    loss = sum over tokens of weight * (surrogate + kl_coef * kl - entropy_coef * entropy)

The weight column is computed once over a whole optimiser step, so neither micro-batches nor processes change the
gradient: the sum is the same however it is cut.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.ops import KL_ESTIMATORS, MAX_LOG_RATIO, TokenScores, segment_sum

# ---------------------------------------------------------------------- aggregators: weights [num_tokens]


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


def _by_depth(forest: Forest, weights: Tensor, depth_weights: tuple[float, ...]) -> Tensor:
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
    with it, because that is what was sampled when its siblings were compared.
    """
    log_ratio = (forest.token["old_logprobs"] - forest.token["rollout_logprobs"]) * forest.token_sampled
    if sequence:
        index = forest.token["segment"]
        own = segment_sum(log_ratio, index, forest.num_segments)
        log_ratio = (own + forest.sum_over_ancestors(own))[forest.leaf if forest.is_flat else slice(None)][index]
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)


# ---------------------------------------------------------------------- surrogates: loss per token


@dataclass(frozen=True)
class Objective:
    """One choice of each part.

    Attributes:
        surrogate: "clip" or "reinforce".
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: bound c > 1 on the loss of negative advantages, at -c * A (arXiv 1912.09729); 0 is off.
        aggregate: a name of `AGGREGATORS`.
        kl_estimator: "k2" or "k3" act in the loss, "k1" is subtracted from the token rewards.
        kl_coef, entropy_coef: 0 is off.
        constant: divisor of sum_over_constant.
        unit: what counts as one sequence in the weights; None takes completions in flat forests, segments in others.
        importance: weigh tokens by pi_old / pi_sampler, where the sampler computes otherwise than the trainer: each by
            its own ratio ("token"), or all of a completion by the product of its ratios ("sequence"); at most
            `importance_cap` (truncated importance sampling).
        depth_weights: of the segments of each depth, from the prompt down; their sum over the forest stays what it was.
            Empty: all alike.
    """

    surrogate: Literal["clip", "reinforce"] = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    aggregate: str = "token_mean"
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    constant: float = 1.0
    unit: Unit | None = None
    depth_weights: tuple[float, ...] = ()
    importance: Literal["none", "token", "sequence"] = "none"
    importance_cap: float = 2.0

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_coef != 0 and self.kl_estimator != "k1"

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coef != 0 and self.kl_estimator == "k1"

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef != 0

    def weights(self, forest: Forest) -> Tensor:
        """The weight column of one optimiser step, [num_tokens]."""
        unit = self.unit or ("completion" if forest.is_flat else "segment")
        weights = AGGREGATORS[self.aggregate](forest, unit, self.constant)
        if self.depth_weights:
            weights = _by_depth(forest, weights, self.depth_weights)
        if self.importance == "none" or "rollout_logprobs" not in forest.token:
            return weights
        return weights * importance_weights(forest, self.importance == "sequence", self.importance_cap)

    def has_gradient(self, forest: Forest) -> Tensor:
        """[num_tokens] tokens whose loss can have a gradient: of non-zero weight, and advantage unless regularised."""
        weighted = forest.token["weights"] != 0
        if self.kl_in_loss or self.entropy_coef != 0:
            return weighted
        return weighted & (forest.token["advantages"] != 0)

    def loss(self, scores: TokenScores, forest: Forest) -> tuple[Tensor, dict[str, float]]:
        """The loss of a part of an optimiser step, and sums over its weighted tokens for the metrics (`TOKEN_SUMS`).

        Args:
            scores: of the current policy, with gradient.
            forest: columns `advantages` and `weights`; `old_logprobs` when the policy has moved since sampling (without
                them it is taken to be exactly on-policy, ratio 1); `ref_logprobs` for a KL term in the loss.
        """
        weights = forest.token["weights"].to(scores.logprobs.device)
        counted = weights != 0

        def used(values: Tensor) -> Tensor:
            """Only where there is weight: elsewhere not even a NaN may matter, in the backward neither."""
            return torch.where(counted, values.to(weights.device), 0.0)

        logprobs, advantages = used(scores.logprobs), used(forest.token["advantages"])
        old = used(forest.token["old_logprobs"]) if "old_logprobs" in forest.token else logprobs.detach()
        log_ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        if self.surrogate == "reinforce":
            per_token, clipped = -advantages * logprobs, torch.zeros_like(counted)
        else:
            per_token, clipped = clipped_surrogate(log_ratio, advantages, self.clip_low, self.clip_high, self.dual_clip)
        moved = log_ratio.detach()
        metrics = {
            "policy/clip_fraction": float(clipped[counted].sum()),
            "policy/kl_old": float((moved.exp() - 1 - moved).sum()),
            "policy/ratio_max": float(moved.max().exp()) if len(moved) else 1.0,
        }
        if self.kl_in_loss:
            ref = used(forest.token["ref_logprobs"])
            per_token = per_token + self.kl_coef * KL_ESTIMATORS[self.kl_estimator](logprobs, ref)
            metrics["policy/kl_ref_update"] = float((logprobs.detach() - ref).sum())
        if self.entropy_coef:
            per_token = per_token - self.entropy_coef * used(scores.entropy)
        return (weights * per_token).sum(), metrics


TOKEN_SUMS = ("policy/clip_fraction", "policy/kl_old", "policy/kl_ref_update")


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float = 0.0
) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) per token (PPO, arXiv 1707.06347), and where the clip acts.

    With `dual_clip` c the loss of a negative advantage is at most -c A (arXiv 1912.09729).
    """
    ratio = log_ratio.exp()
    plain = -ratio * advantages
    bounded = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = torch.maximum(plain, bounded)
    clipped = bounded > plain
    if dual_clip:
        ceiling = -dual_clip * advantages
        beyond = (advantages < 0) & (loss > ceiling)
        loss, clipped = torch.where(beyond, ceiling, loss), clipped | beyond
    return loss, clipped
