"""Models that do not learn: the policy at the start of the iteration, and the reference."""

import logging
from collections.abc import Collection, Iterator
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.estimators.base import Context, Estimator, Load, Passes, provider
from stepcredit.forest import Forest
from stepcredit.forest.ops import TokenScores
from stepcredit.learn.adapters import adapters_off, has_adapters
from stepcredit.learn.placement import UNSHARDED, Placement
from stepcredit.learn.spread import shared_copy
from stepcredit.policy.forward import Policy, score
from stepcredit.policy.loading import frozen_copy
from stepcredit.samplers.table import sampler_traits

log = logging.getLogger("stepcredit")

Source = Literal["auto", "sampler", "forward"]

AGREES = 1e-3  # nats; fp32 passes of the same weights differ by a tenth of it
PROBED = 16  # one in so many trees is scored to compare


class OldPolicy(Estimator):
    """Adds `old_logprobs`: of the policy at the start of the iteration, by a forward of the trainer's own or as the
    sampler gave them. And `entropy`, where the sampler does not give it.

    A sampler that computes with the same weights gives the same numbers up to rounding, so that a pass over all tokens
    can be left out. The first forest is scored to see that it is so, and of later ones a few trees.

    Tokens that older weights have sampled (column `age`) are compared with nothing.

    Args:
        source: "forward"; "sampler"; "auto": the sampler, as long as it agrees.
        as_sampled: tokens of older weights have the sampler's numbers, so that the loss's ratio is to what sampled
            them. Otherwise importance weights are the ratio of the present weights to these.
    """

    def __init__(
        self, policy: Policy, temperature: float, max_tokens: int, source: Source = "forward", as_sampled: bool = True
    ) -> None:
        super().__init__()
        self.policy, self.temperature, self.max_tokens, self.source = policy, temperature, max_tokens, source
        self.as_sampled = as_sampled
        self.compared = False

    def observe(self, forest: Forest) -> Forest:
        self.metrics = {}
        compares = self.source != "forward" and {"rollout_logprobs", "entropy"} <= forest.token.keys()
        if compares and (self.compared or self.source == "sampler"):
            some = forest.select_trees(torch.arange(max(1, forest.num_trees // PROBED)))
            if self._agrees(some, self._scores(some).logprobs) or self.source == "sampler":
                return forest.with_token(old_logprobs=forest.token["rollout_logprobs"])
            compares = False
        scores = self._scores(forest)
        if (
            compares
        ):  # the first forest: all of it is compared, and a policy that has not moved is exactly the reference
            self._agrees(forest, scores.logprobs)
        if "entropy" not in forest.token:
            forest = forest.with_token(entropy=scores.entropy)
        old = scores.logprobs
        if self.as_sampled and "age" in forest.token:
            old = torch.where(forest.token_sampled & ~forest.fresh, forest.token["rollout_logprobs"], old)
        return forest.with_token(old_logprobs=old)

    def _scores(self, forest: Forest) -> TokenScores:
        return score(self.policy, forest, self.temperature, self.max_tokens)

    def _agrees(self, forest: Forest, own: Tensor) -> bool:
        """Whether the sampler's log-probabilities can be taken; with "auto" from now on never, once they differ."""
        gap = (own - forest.token["rollout_logprobs"]).abs()[forest.fresh]
        largest, mean = (float(gap.max()), float(gap.mean())) if len(gap) else (0.0, 0.0)
        self.metrics = {"sampler/logprob_diff": largest, "sampler/logprob_diff_mean": mean}
        agrees = largest <= AGREES
        if not agrees and self.source == "auto":
            self.source = "forward"
        if not (self.compared and agrees):
            taken = "a forward of the trainer's own" if self.source == "forward" else "the sampler's from now on"
            log.log(
                logging.INFO if agrees else logging.WARNING,
                "old log-probabilities: %s; the two differ by at most %.2g (%.2g are allowed) on %d tokens",
                taken,
                largest,
                AGREES,
                len(gap),
            )
        self.compared = True
        return agrees

    def state_dict(self) -> dict[str, Any]:
        return {"source": self.source, "compared": self.compared}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.source == "auto":
            self.source = state.get("source", "forward")
        self.compared = state.get("compared", False)


class SameAsOld(Estimator):
    """Takes `old_logprobs` for `ref_logprobs`: the policy itself, as it is now, is the reference."""

    def observe(self, forest: Forest) -> Forest:
        return forest.with_token(ref_logprobs=forest.token["old_logprobs"])


class Frozen(Estimator):
    """Scores rollouts with a model that stays as it is.

    Its weights are not saved: a resumed run starts from the same model. Their fingerprint is, so that a model that has
    changed in the meantime is found.

    Args:
        policy: of this estimator alone.
    """

    named = "the model"  # by the config
    what = "its reference"
    adapters = True  # they are a part of the model

    def __init__(self, policy: Policy, temperature: float, max_tokens: int, placement: Placement = UNSHARDED) -> None:
        super().__init__()
        self.policy, self.temperature, self.max_tokens = policy, temperature, max_tokens
        self._remember(placement)
        placement.place(self.policy)

    def score(self, forest: Forest) -> Tensor:
        """[num_tokens] log-probabilities."""
        return score(self.policy, forest, self.temperature, self.max_tokens).logprobs

    def _remember(self, placement: Placement) -> None:
        """Take the fingerprint now where it cannot be had later."""
        if placement.sharded:
            self.__dict__["fingerprint"] = placement.ranks.on_main(lambda: fingerprint(self.policy, self.adapters))

    @cached_property
    def fingerprint(self) -> int:
        return fingerprint(self.policy, self.adapters)

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.fingerprint:
            raise UserError(
                f"--resume: {self.named} is not the one that the run began with, so {self.what} would be another; put "
                "the model back or start a new run"
            )


class Reference(Frozen):
    """Adds `ref_logprobs`: the policy as it was when training began, frozen."""

    def __init__(self, policy: Policy, temperature: float, max_tokens: int, placement: Placement = UNSHARDED) -> None:
        own = shared_copy(policy).requires_grad_(False) if placement.sharded else frozen_copy(policy)
        super().__init__(own, temperature, max_tokens, placement)

    def observe(self, forest: Forest) -> Forest:
        return forest.with_token(ref_logprobs=self.score(forest))


class ReferenceWithoutAdapters(Reference):
    """Adds `ref_logprobs` of a policy with adapters: the policy itself without them, so there is no second copy."""

    adapters = False

    def __init__(self, policy: Policy, temperature: float, max_tokens: int, placement: Placement = UNSHARDED) -> None:
        Estimator.__init__(self)
        self.policy, self.temperature, self.max_tokens = policy, temperature, max_tokens
        self._remember(placement)

    def observe(self, forest: Forest) -> Forest:
        with adapters_off(self.policy):
            return super().observe(forest)


def _may_take(config: Config) -> bool:
    """Whether the sampler's log-probabilities may serve."""
    sampling, steps = sampler_traits(config), config.optim.num_epochs * config.optim.num_minibatches
    same = not sampling.elsewhere and "rollout_logprobs" in sampling.columns
    return same and steps == 1 and config.objective.importance == "none"


@provider(passes=lambda config, needed: Passes(forward=1, spared=int(_may_take(config))))
def old_policy(context: Context) -> OldPolicy:
    """By the sampler where it gives the full distribution's log-probabilities from the same weights, else by a forward.

    With several optimiser steps a batch the loss measures by them how far the policy has moved, so that rounding of the
    sampler, which depends on what it decodes together, would stand in every ratio: they are the trainer's own. So they
    are with importance weights, which are the ratio of the two.
    """
    return _old_policy(context, "auto" if _may_take(context.config) else "forward")


@provider(passes=lambda config, needed: Passes(forward=1))
def by_forward(context: Context) -> OldPolicy:
    return _old_policy(context, "forward")


@provider(passes=lambda config, needed: Passes())
def by_sampler(context: Context) -> OldPolicy:
    """
    Raises:
        UserError: the sampler does not give them, is another program, or importance weights need both.
    """
    config, sampling = context.config, sampler_traits(context.config)
    why = ""
    if sampling.elsewhere:
        why = f"'{config.sampler.name}' is another program, which computes otherwise"
    elif "rollout_logprobs" not in sampling.columns:
        why = f"'{config.sampler.name}' gives no rollout_logprobs"
    elif config.objective.importance != "none":
        why = "objective.importance is the ratio of the trainer's to the sampler's"
    if why:
        raise UserError(f"estimators.old_logprobs: sampler does not go here: {why}; take forward")
    return _old_policy(context, "sampler")


def _old_policy(context: Context, source: Source) -> OldPolicy:
    config = context.config
    as_sampled, budget = config.objective.importance == "none", config.optim.max_tokens_per_micro_batch
    return OldPolicy(context.policy, config.sampler.temperature, budget, source, as_sampled)


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


@provider(
    _reference_needs,
    _reference_loads,
    passes=lambda config, needed: Passes(forward=int(not _own(config, needed))),
)
def reference(context: Context) -> Estimator:
    """The policy as it is at first, or what the process reward model starts from, at its temperature."""
    config = context.config
    if _own(config, context.needed):
        return SameAsOld()
    start = context.prm_start
    temperature = 1.0 if "prm_logprobs" in context.needed else config.sampler.temperature
    kind = ReferenceWithoutAdapters if start is context.policy and has_adapters(start) else Reference
    return kind(start, temperature, config.optim.max_tokens_per_micro_batch, context.placement)


def fingerprint(policy: nn.Module, adapters: bool = False) -> int:
    """A number that changes with any bit of any weight, of adapters if asked for; the same on every device.

    And the same for weights in bf16 as for these in fp32: a run may go on with another `train.dtype`.
    """
    total = 0
    weights = [weight for name, weight in policy.state_dict().items() if adapters or "lora_" not in name]
    for number, weight in enumerate(weights, 1):
        place = number
        weight = weight.float() if weight.dtype == torch.bfloat16 else weight
        for piece in weight.contiguous().flatten().view(torch.uint8).split(1 << 24):
            factors = torch.arange(place, place + len(piece), device=piece.device) % 65521 + 1
            total = (total * 31 + int((piece.to(torch.int64) * factors).sum())) % (1 << 61)
            place += len(piece)
    return total
