"""The samplers: one row here for each, and the user's own by dotted path.

Rows are dotted paths of builders (`samplers/base.py`), so that only what is chosen is imported.
"""

import inspect
from functools import cache
from typing import TYPE_CHECKING

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.imports import by_name
from stepcredit.samplers.base import Builder, Sampler, Traits, traits_of
from stepcredit.samplers.options import SamplerOptions

if TYPE_CHECKING:
    from stepcredit.learn.placement import Placement
    from stepcredit.policy.forward import Policy

NONE = "none"  # of runs whose completions come from the data
AUTO = "auto"  # a run chooses (run/servers.py); what does not choose takes `name_of`
SAMPLERS = {
    "transformers": "stepcredit.samplers.transformers.build",
    "vllm": "stepcredit.samplers.remote.vllm.build",
    NONE: "stepcredit.samplers.nothing.build",
}


def sampler_builder(config: Config) -> Builder:
    """The builder that `sampler.name` names.

    Raises:
        UserError: there is none, or it does not take `sampler.options`.
    """
    given = config.sampler
    nothing = given.name == AUTO and config.growth.recorded
    builder = _named(NONE if nothing else name_of(given))
    if given.options and given.name in (AUTO, *SAMPLERS):
        names = ", ".join(given.options)
        raise UserError(
            f"sampler.options: {names}; they go to a sampler of your own, and sampler.name is {given.name}, whose "
            "options stand under sampler itself"
        )
    try:
        inspect.signature(builder).bind(config, None, None, **given.options)
    except TypeError as error:
        raise UserError(
            f"sampler.options: '{given.name}' is called as build(config, policy, placement, **options) and does not "
            f"take that ({error})"
        ) from error
    return builder


def name_of(given: SamplerOptions) -> str:
    """The sampler of options that may leave it open: servers where they are named, else the decode loop."""
    if given.name != AUTO:
        return given.name
    return "vllm" if given.server.urls or given.server.launch else "transformers"


@cache
def _named(name: str) -> Builder:
    """Once for each name, so that the log says once that code is the user's own."""
    return by_name("sampler.name", name, SAMPLERS)


def sampler_traits(config: Config) -> Traits:
    """What the sampler of a config gives, before it is built."""
    return traits_of(sampler_builder(config))


def build_sampler(config: Config, policy: "Policy", placement: "Placement") -> Sampler:
    """The sampler of a config, with the weights of a policy that is still whole."""
    made: Sampler = sampler_builder(config)(config, policy, placement, **config.sampler.options)
    return made


def check_training(config: Config) -> Traits:
    """What the sampler of a config gives, if a run can be trained with it.

    Importance weights need log-probabilities of the sampler; so does the comparison that finds one elsewhere to have
    other weights.

    Raises:
        UserError: segments will not have them, naming the options, and what to change.
    """
    traits = sampler_traits(config)
    users = []
    if config.objective.importance != "none":
        users.append(f"objective.importance {config.objective.importance}")
    if traits.elsewhere:
        users.append("the comparison with the trainer's log-probabilities")
    if not users:
        return traits
    name, needing = config.sampler.name, " and ".join(users)
    if "rollout_logprobs" not in traits.columns:
        raise UserError(
            f"sampler.name: '{name}' does not declare the column rollout_logprobs, which {needing} would go without; "
            "give it and declare it with @sampler(columns=...), or take another sampler"
        )
    if why := traits.why_no_logprobs(config.sampler):
        raise UserError(f"{why}; {needing} would go without rollout_logprobs")
    return traits
