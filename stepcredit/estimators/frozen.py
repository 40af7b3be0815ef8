"""Models that do not learn: the policy at the start of the iteration, and the reference."""

from collections.abc import Collection, Iterator
from functools import cached_property
from typing import Any

import torch

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.estimators.base import Context, Estimator, Load, provider
from stepcredit.forest import Forest
from stepcredit.learn.adapters import adapters_off, has_adapters
from stepcredit.learn.placement import UNSHARDED, Placement
from stepcredit.learn.spread import shared_copy
from stepcredit.policy.forward import Policy, score
from stepcredit.policy.loading import frozen_copy


class OldPolicy(Estimator):
    """Adds `old_logprobs`: the policy at the start of the iteration, by the trainer's own forward.

    And `entropy`, where the sampler does not give it.
    """

    def __init__(self, policy: Policy, temperature: float, max_tokens: int) -> None:
        super().__init__()
        self.policy, self.temperature, self.max_tokens = policy, temperature, max_tokens

    def observe(self, forest: Forest) -> Forest:
        scores = score(self.policy, forest, self.temperature, self.max_tokens)
        if "entropy" not in forest.token:
            forest = forest.with_token(entropy=scores.entropy)
        return forest.with_token(old_logprobs=scores.logprobs)


class SameAsOld(Estimator):
    """Takes `old_logprobs` for `ref_logprobs`: the policy itself, as it is now, is the reference."""

    def observe(self, forest: Forest) -> Forest:
        return forest.with_token(ref_logprobs=forest.token["old_logprobs"])


class Reference(Estimator):
    """Adds `ref_logprobs`: the policy as it was when training began, frozen.

    Its weights are not saved: a resumed run starts from the same model. Their fingerprint is, so that a model that has
    changed in the meantime is found.
    """

    def __init__(self, policy: Policy, temperature: float, max_tokens: int, placement: Placement = UNSHARDED) -> None:
        super().__init__()
        own = shared_copy(policy).requires_grad_(False) if placement.sharded else frozen_copy(policy)
        self.policy, self.temperature, self.max_tokens = own, temperature, max_tokens
        self._remember(placement)
        placement.place(self.policy)

    def _remember(self, placement: Placement) -> None:
        """Take the fingerprint now where it cannot be had later."""
        if placement.sharded:
            self.__dict__["fingerprint"] = placement.ranks.on_main(lambda: fingerprint(self.policy))

    @cached_property
    def fingerprint(self) -> int:
        return fingerprint(self.policy)

    def observe(self, forest: Forest) -> Forest:
        return forest.with_token(ref_logprobs=score(self.policy, forest, self.temperature, self.max_tokens).logprobs)

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.fingerprint:
            raise UserError(
                "--resume: the model is not the one that the run began with, so its reference would be another; put "
                "the model back or start a new run"
            )


class ReferenceWithoutAdapters(Reference):
    """Adds `ref_logprobs` of a policy with adapters: the policy itself without them, so there is no second copy."""

    def __init__(self, policy: Policy, temperature: float, max_tokens: int, placement: Placement = UNSHARDED) -> None:
        Estimator.__init__(self)
        self.policy, self.temperature, self.max_tokens = policy, temperature, max_tokens
        self._remember(placement)

    def observe(self, forest: Forest) -> Forest:
        with adapters_off(self.policy):
            return super().observe(forest)


@provider()
def old_policy(context: Context) -> OldPolicy:
    config = context.config
    return OldPolicy(context.policy, config.sampler.temperature, config.optim.max_tokens_per_micro_batch)


def _own(config: Config, needed: Collection[str]) -> bool:
    """Whether the policy is the process reward model's reference."""
    return "prm_logprobs" in needed and config.prm.reference == "policy"


def _reference_needs(config: Config, needed: Collection[str]) -> Iterator[str]:
    if _own(config, needed):
        yield "old_logprobs"


def _reference_loads(config: Config, needed: Collection[str]) -> Iterator[Load]:
    model = (config.prm.model if "prm_logprobs" in needed else None) or config.model
    without_adapters = config.lora.rank > 0 and model == config.model
    if not _own(config, needed) and not without_adapters:
        yield Load("reference", model)


@provider(needs=_reference_needs, loads=_reference_loads)
def reference(context: Context) -> Estimator:
    """The policy as it is at first, or what the process reward model starts from, at its temperature."""
    config = context.config
    if _own(config, context.needed):
        return SameAsOld()
    start = context.prm_start
    temperature = 1.0 if "prm_logprobs" in context.needed else config.sampler.temperature
    kind = ReferenceWithoutAdapters if start is context.policy and has_adapters(start) else Reference
    return kind(start, temperature, config.optim.max_tokens_per_micro_batch, context.placement)


def fingerprint(policy: Policy) -> int:
    """A number that changes with any bit of any weight but the adapters'; the same on every device.

    And the same for weights in bf16 as for these in fp32: a run may go on with another `train.dtype`.
    """
    total = 0
    weights = [weight for name, weight in policy.state_dict().items() if "lora_" not in name]
    for number, weight in enumerate(weights, 1):
        place = number
        weight = weight.float() if weight.dtype == torch.bfloat16 else weight
        for piece in weight.contiguous().flatten().view(torch.uint8).split(1 << 24):
            factors = torch.arange(place, place + len(piece), device=piece.device) % 65521 + 1
            total = (total * 31 + int((piece.to(torch.int64) * factors).sum())) % (1 << 61)
            place += len(piece)
    return total
