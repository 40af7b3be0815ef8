"""What an optimiser step minimises: a loss, weights and regularisers, all pure functions over the token table.

sum over tokens of weight * (loss + kl_coef * kl - entropy_coef * entropy)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepcredit.forest import Forest
from stepcredit.forest.ops import KL_ESTIMATORS, TokenScores
from stepcredit.losses.base import LossFunction, LossNeeds, LossParts, Tokens, loss_needs
from stepcredit.losses.clip import clip
from stepcredit.losses.options import ObjectiveOptions
from stepcredit.losses.weights import AGGREGATORS, Unit, by_depth, importance_weights


@dataclass(frozen=True)
class Sums:
    """Of a part of an optimiser step: sums over the tokens that count, how many these are, and largest values."""

    sums: dict[str, float]
    count: int
    largest: dict[str, float]


@dataclass(frozen=True)
class Objective:
    """
    Attributes:
        function, options: the loss, and its own options.
        given: aggregate, regularisers and importance weights.
        constant: divisor of sum_over_constant.
        unit: what counts as one sequence in the weights; None takes completions in flat forests, segments in others.
    """

    function: LossFunction = clip
    options: Mapping[str, Any] = field(default_factory=dict)
    given: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    constant: float = 1.0
    unit: Unit | None = None

    @property
    def needs(self) -> LossNeeds:
        return loss_needs(self.function)

    @property
    def kl_in_loss(self) -> bool:
        return self.given.kl.coef != 0 and self.given.kl.estimator != "k1"

    @property
    def kl_in_reward(self) -> bool:
        return self.given.kl.coef != 0 and self.given.kl.estimator == "k1"

    @property
    def needs_reference(self) -> bool:
        return self.given.kl.coef != 0

    def weights(self, forest: Forest) -> Tensor:
        """The weight column of one optimiser step, [num_tokens]."""
        given = self.given
        unit = self.unit or ("completion" if forest.is_flat else "segment")
        weights = AGGREGATORS[given.aggregate](forest, unit, self.constant)
        if given.depth_weights:
            weights = by_depth(forest, weights, given.depth_weights)
        if given.importance == "none" or "rollout_logprobs" not in forest.token:
            return weights
        return weights * importance_weights(forest, given.importance == "sequence", given.importance_cap)

    def has_gradient(self, forest: Forest) -> Tensor:
        """[num_tokens] tokens that must be computed: of non-zero weight, and where the loss is sparse and nothing
        regularises, of non-zero advantage; with all that the loss must see together with these."""
        weighted = forest.token["weights"] != 0
        if self.kl_in_loss or self.given.entropy_coef != 0 or not self.needs.sparse:
            return weighted
        active = weighted & (forest.token["advantages"] != 0)
        if self.needs.unit == "token":
            return active
        whole = forest.leaf[forest.token["segment"]] if self.needs.unit == "completion" else forest.token_tree
        touched = torch.zeros(forest.num_segments, dtype=torch.bool)
        touched[whole[active]] = True
        return weighted & touched[whole]

    def loss(self, scores: TokenScores, forest: Forest) -> tuple[Tensor, Sums]:
        """The loss of a part of an optimiser step, and sums over its weighted tokens for the metrics.

        Args:
            scores: of the current policy, with gradient.
            forest: columns `advantages` and `weights`; `old_logprobs` when the policy has moved since sampling (without
                them it is taken to be exactly on-policy, ratio 1); `ref_logprobs` for a KL term in the loss; and what
                the loss declared.
        """
        tokens = Tokens(forest, scores)
        given = self.function(tokens, **self.options)
        per_token, means = given if isinstance(given, LossParts) else (given, {})
        moved = tokens.log_ratio.detach()
        sums = {name: float(values[tokens.counted].sum()) for name, values in means.items()}
        sums["policy/kl_old"] = float((moved.exp() - 1 - moved).sum())
        if self.kl_in_loss:
            kl, ref = self.given.kl, tokens.column("ref_logprobs")
            per_token = per_token + kl.coef * KL_ESTIMATORS[kl.estimator](tokens.logprobs, ref)
            sums["policy/kl_ref_update"] = float((tokens.logprobs.detach() - ref).sum())
        if self.given.entropy_coef:
            per_token = per_token - self.given.entropy_coef * tokens.entropy
        largest = {"policy/ratio_max": float(moved.max().exp()) if len(moved) else 1.0}
        return (tokens.weights * per_token).sum(), Sums(sums, int(tokens.counted.sum()), largest)
