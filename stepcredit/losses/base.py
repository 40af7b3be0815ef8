"""What every loss is built from, and what it declares.

A loss is `loss(tokens, **options) -> [num_tokens]`: the loss of each token, to be multiplied by its weight and summed,
so that neither micro-batches nor processes change the gradient. One over completions or trees gives each of their
tokens the loss of the whole; weights that add up to the same for all completions (`seq_mean_token_mean`) then make it
their mean. It may return `LossParts` to have metrics of its own. `@loss` declares what it needs.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stepcredit.forest import Forest
from stepcredit.forest.ops import MAX_LOG_RATIO, TokenScores, segment_sum

LossUnit = Literal["token", "completion", "tree"]

COMPLETION, TREE = "completion of the token", "tree of the token"  # beside the names of columns


class LossParts(NamedTuple):
    """
    Attributes:
        per_token: [num_tokens] the loss.
        means: metrics by name, each [num_tokens]; reported as means over the tokens that count.
        weighted: the like, reported as sums over the tokens with their weights, as the loss is: of a loss over
            completions or pairs their mean.
    """

    per_token: Tensor
    means: Mapping[str, Tensor] = {}
    weighted: Mapping[str, Tensor] = {}


LossFunction = Callable[..., Tensor | LossParts]


@dataclass(frozen=True)
class LossNeeds:
    """What a loss declares.

    Attributes:
        columns: token, segment or tree columns that it reads, beside `advantages`.
        ratio: it reads the ratio of the policy to the one that sampled. Without one, more than one optimiser step on a
            batch is biased, because later steps take the samples for the moved policy's own.
        unit: what must stand in one micro-batch: any tokens, whole completions or whole trees.
        sparse: where the advantage is 0 there is no gradient, so such tokens (of such completions, of such trees) need
            not be computed. A squared loss is not sparse.
        flat: it reads completions, which must not share tokens; so does every loss whose unit is the completion.
        aggregate: the `objective.aggregate` that makes it what was published, where tokens have the loss of a unit.
        mixes: the advantage of a token acts on other tokens of its completion, so that masking it does not spare them.
    """

    columns: tuple[str, ...] = ()
    ratio: bool = False
    unit: LossUnit = "token"
    sparse: bool = False
    flat: bool = False
    aggregate: str = ""
    mixes: bool = False

    @property
    def reads_completions(self) -> bool:
        return self.flat or self.unit == "completion"


def loss(
    *columns: str,
    ratio: bool = False,
    unit: LossUnit = "token",
    sparse: bool = False,
    flat: bool = False,
    aggregate: str = "",
    mixes: bool = False,
    by_options: Callable[..., LossNeeds] | None = None,
) -> Callable[[LossFunction], LossFunction]:
    """Declare what a loss needs; `LossNeeds` says what each means.

    Args:
        by_options: where that depends on the loss's options: a function of all of them, by name.
    """

    def declare(function: LossFunction) -> LossFunction:
        own = LossNeeds(columns, ratio, unit, sparse, flat, aggregate, mixes)
        function.needs = by_options or own  # type: ignore[attr-defined]
        return function

    return declare


def loss_needs(function: LossFunction, options: Mapping[str, Any]) -> LossNeeds:
    """What a loss declared; one without a declaration is cut and thinned out nowhere, and has no ratio."""
    declared = getattr(function, "needs", LossNeeds(unit="tree"))
    if isinstance(declared, LossNeeds):
        return declared
    arguments = list(inspect.signature(function).parameters.values())[1:]
    needs: LossNeeds = declared(**{each.name: each.default for each in arguments} | dict(options))
    return needs


@dataclass(frozen=True)
class Tokens:
    """The tokens of a part of an optimiser step, as a loss sees them, on the policy's device.

    A token without weight must not matter, not even by a NaN and not in the backward either: it reads as 0 everywhere.

    Attributes:
        forest: columns `advantages` and `weights`, and those that the loss declared.
        scores: of the current policy, with gradient.
        read: token columns that go to the device together, with `COMPLETION` or `TREE` for a loss over these; others go
            there when they are read.
    """

    forest: Forest
    scores: TokenScores = field(repr=False)
    read: tuple[str, ...] = ()

    @cached_property
    def _on_device(self) -> dict[str, Tensor]:
        return to_device({name: self._on_cpu(name) for name in self.read}, self.scores.logprobs.device)

    def _on_cpu(self, name: str) -> Tensor:
        if name == COMPLETION:
            return self.forest.leaf[self.forest.token["segment"]]
        return self.forest.token_tree if name == TREE else self.forest.token[name]

    def _column(self, name: str) -> Tensor:
        return self._on_device[name] if name in self._on_device else self._on_cpu(name)

    @cached_property
    def weights(self) -> Tensor:
        return self._column("weights").to(self.scores.logprobs.device)

    @cached_property
    def counted(self) -> Tensor:
        """[num_tokens] True where there is weight."""
        return self.weights != 0

    def used(self, values: Tensor) -> Tensor:
        """`values` [num_tokens] where there is weight, 0 elsewhere."""
        return torch.where(self.counted, values.to(self.weights.device), 0.0)

    def column(self, name: str) -> Tensor:
        """A token column, 0 where there is no weight."""
        return self.used(self._column(name))

    @cached_property
    def logprobs(self) -> Tensor:
        """[num_tokens] log pi of each token, with gradient."""
        return self.used(self.scores.logprobs)

    @cached_property
    def entropy(self) -> Tensor:
        return self.used(self.scores.entropy)

    @cached_property
    def advantages(self) -> Tensor:
        return self.column("advantages")

    @cached_property
    def log_ratio(self) -> Tensor:
        """[num_tokens] log(pi / pi_old); without `old_logprobs` the policy is the one that sampled, and it is 0."""
        old = self.column("old_logprobs") if "old_logprobs" in self.forest.token else self.logprobs.detach()
        return (self.logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    @cached_property
    def segment(self) -> Tensor:
        """[num_tokens] the segment of each token."""
        return self._column("segment").to(self.weights.device)

    @cached_property
    def completion(self) -> Tensor:
        """[num_tokens] the completion of each token, a row of the segment table (its leaf). Flat forests only."""
        return self._column(COMPLETION).to(self.weights.device)

    @cached_property
    def tree(self) -> Tensor:
        """[num_tokens] the tree of each token."""
        return self._column(TREE).to(self.weights.device)

    def mean_by_completion(self, values: Tensor) -> Tensor:
        """[num_tokens] at each token the mean of `values` over the tokens of its completion that count."""
        rows = self.forest.num_segments
        total = segment_sum(self.used(values), self.completion, rows)
        count = segment_sum(self.counted.to(values.dtype), self.completion, rows)
        return (total / count.clamp(min=1))[self.completion]


def to_device(columns: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Columns [n] on a device: all whose numbers 32 bits hold in one transfer, which does not wait for the device."""
    if device.type == "cpu":
        return dict(columns)
    moved = {name: values.to(device) for name, values in columns.items() if not _fits_in_32_bits(values)}
    narrow = {name: values for name, values in columns.items() if name not in moved}
    if narrow:
        bits = packed(narrow)
        bits = bits.pin_memory() if device.type == "cuda" else bits
        moved |= unpacked(bits.to(device, non_blocking=True), narrow)
    return moved


def _fits_in_32_bits(values: Tensor) -> bool:
    if values.dtype.is_floating_point:
        return values.dtype == torch.float32
    return not len(values) or (int(values.min()) >= -(1 << 31) and int(values.max()) < 1 << 31)


def packed(columns: Mapping[str, Tensor]) -> Tensor:
    """[columns, n] int32: the bits of fp32, other numbers as they are."""
    return torch.stack(
        [values.view(torch.int32) if values.dtype == torch.float32 else values.int() for values in columns.values()]
    )


def unpacked(bits: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `packed`, for columns of these names and types."""
    return {
        name: row.view(torch.float32) if values.dtype == torch.float32 else row.to(values.dtype)
        for row, (name, values) in zip(bits, like.items(), strict=True)
    }
