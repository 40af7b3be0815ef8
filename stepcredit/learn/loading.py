"""Models of a run, as its config asks for them."""

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.learn.adapters import add_adapters, has_adapters
from stepcredit.learn.placement import Placement
from stepcredit.policy.forward import Policy
from stepcredit.policy.loading import load_policy


def load_model(config: Config, model: str, placement: Placement, option: str = "model") -> Policy:
    """A model of the config, which `option` names, on the device; one that will be sharded in the CPU's memory."""
    device, home = ("cpu", placement.device) if placement.sharded else (config.train.device, None)
    policy = load_policy(model, device, config.train.dtype, config.trust_remote_code, home, option)
    if config.train.gradient_checkpointing:
        policy.checkpoint_layers()
    return policy


def adapt(config: Config, policy: Policy) -> None:
    """Give a policy the adapters of the config, if any."""
    given = config.lora
    if given.rank:
        add_adapters(policy, given.rank, given.alpha, given.targets, config.train.seed)
    elif has_adapters(policy):
        raise UserError("model: it has adapters; make one model of them with 'stepcredit merge', then train that")
