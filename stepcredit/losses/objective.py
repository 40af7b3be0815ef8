"""What an optimiser step minimises: a loss, weights and regularisers, all pure functions over the token table.

sum over tokens of weight * (loss + kl_coef * kl - entropy_coef * entropy)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stepcredit.forest import Forest
from stepcredit.forest.ops import KL_ESTIMATORS, TokenScores
from stepcredit.losses.base import COMPLETION, TREE, LossFunction, LossNeeds, LossParts, Tokens, loss_needs
from stepcredit.losses.clip import clip
from stepcredit.losses.options import ObjectiveOptions
from stepcredit.losses.weights import AGGREGATORS, Unit, by_depth, importance_weights

Number = Tensor | float  # a tensor without dimensions, on any device, until `read_sums`


@dataclass(frozen=True)
class Sums:
    """Of a part of an optimiser step: sums over the tokens that count, how many these are, and largest values.

    Attributes:
        added: names of the sums that are what they add up to; the others are reported as means over the tokens.
    """

    sums: dict[str, Number]
    count: int
    largest: dict[str, Number]
    added: frozenset[str] = frozenset()


def read_sums(parts: Sequence[Sums]) -> list[Sums]:
    """The same in numbers of Python; those on a device come from there in one transfer."""
    values = [value for part in parts for value in (*part.sums.values(), *part.largest.values())]
    tensors = [value.detach().double() for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else [])
    numbers = iter([next(read) if isinstance(value, Tensor) else float(value) for value in values])
    return [
        replace(
            part,
            sums={name: next(numbers) for name in part.sums},
            largest={name: next(numbers) for name in part.largest},
        )
        for part in parts
    ]


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

    @cached_property
    def needs(self) -> LossNeeds:
        return loss_needs(self.function, self.options)

    @property
    def kl_in_loss(self) -> bool:
        return self.given.kl.coef != 0 and self.given.kl.estimator != "k1"

    @property
    def kl_in_reward(self) -> bool:
        return self.given.kl.coef != 0 and self.given.kl.estimator == "k1"

    @property
    def needs_reference(self) -> bool:
        return self.given.kl.coef != 0

    @property
    def needs_entropy(self) -> str:
        """The option that reads the column `entropy`; empty: none."""
        if self.given.entropy_target is not None:
            return "objective.entropy_target"
        return "objective.entropy_top" if self.given.entropy_top < 1 else ""

    def with_entropy_coef(self, coef: float) -> "Objective":
        if coef == self.given.entropy_coef:
            return self
        return replace(self, given=self.given.model_copy(update={"entropy_coef": coef}))

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
        tokens = Tokens(forest, scores, self._read(forest))
        given = self.function(tokens, **self.options)
        per_token, means, weighted = given if isinstance(given, LossParts) else LossParts(given)
        moved = tokens.log_ratio.detach()
        sums: dict[str, Number] = {name: tokens.used(values.detach()).sum() for name, values in means.items()}
        sums |= {name: (tokens.weights * values.detach()).sum() for name, values in weighted.items()}
        sums["policy/kl_old"] = (moved.exp() - 1 - moved).sum()
        if self.kl_in_loss:
            kl, ref = self.given.kl, tokens.column("ref_logprobs")
            per_token = per_token + kl.coef * KL_ESTIMATORS[kl.estimator](tokens.logprobs, ref)
            sums["policy/kl_ref_update"] = (tokens.logprobs.detach() - ref).sum()
        if self.given.entropy_coef:
            per_token = per_token - self.given.entropy_coef * tokens.entropy
        largest: dict[str, Number] = {"policy/ratio_max": moved.max().exp() if len(moved) else 1.0}
        count = int((forest.token["weights"] != 0).sum())
        return (tokens.weights * per_token).sum(), Sums(sums, count, largest, frozenset(weighted))

    def _read(self, forest: Forest) -> tuple[str, ...]:
        """What the loss reads of each token."""
        names = ["weights", "advantages", "old_logprobs", *self.needs.columns]
        names += ["ref_logprobs"] if self.kl_in_loss else []
        rows: tuple[str, ...] = {"token": (), "completion": (COMPLETION,), "tree": (TREE,)}[self.needs.unit]
        if self.needs.flat and self.needs.unit == "tree":
            rows = (TREE, COMPLETION)
        return *(name for name in dict.fromkeys(names) if name in forest.token), *rows
