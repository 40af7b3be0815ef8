"""Models of a run, as its config asks for them."""

import logging

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.learn.adapters import add_adapters, has_adapters
from stepcredit.learn.placement import Placement
from stepcredit.policy.forward import Policy
from stepcredit.policy.loading import Loaded, empty_policy, load_policy

log = logging.getLogger("stepcredit")


def load_model(config: Config, model: str, placement: Placement, option: str = "model") -> Policy:
    """A model of the config, which `option` names, on the device; one that will be sharded in the CPU's memory.

    Of one that will be sharded the main process alone reads the weights, where the others can do without them.
    """
    if placement.sharded:
        policy = _load_for_shards(config, model, placement, option)
        policy.compute_device = placement.device
    else:
        policy = load_policy(model, config.train.device, config.train.dtype, config.trust_remote_code, option=option)
    if config.train.gradient_checkpointing:
        policy.checkpoint_layers()
    return policy


def _load_for_shards(config: Config, model: str, placement: Placement, option: str) -> Policy:
    ranks, dtype, trusted = placement.ranks, config.train.dtype, config.trust_remote_code
    read: list[Policy] = []

    def load() -> Loaded:
        read.append(load_policy(model, "cpu", dtype, trusted, placement.device, option))
        return Loaded.of(read[0])

    loaded = ranks.on_main(load)
    policy = read[0] if ranks.main else empty_policy(model, loaded, dtype, placement.device, trusted)
    reading = [rank for rank, lacks in enumerate(ranks.gather(policy is None)) if lacks]
    if reading:
        log.warning(
            "%s: '%s' cannot be made from its config.json alone, so processes %s read all weights, too",
            option,
            model,
            ", ".join(map(str, reading)),
        )
    return policy or load_policy(model, "cpu", dtype, trusted, placement.device, option)


def adapt(config: Config, policy: Policy) -> None:
    """Give a policy the adapters of the config, if any."""
    given = config.lora
    if given.rank:
        add_adapters(policy, given.rank, given.alpha, given.targets, config.train.seed)
    elif has_adapters(policy):
        raise UserError("model: it has adapters; make one model of them with 'stepcredit merge', then train that")
