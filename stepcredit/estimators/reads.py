"""The columns that the parts of a run read, and the estimators that follow from them."""

from collections.abc import Sequence

from stepcredit.config import Config
from stepcredit.credit import CreditFunction, needs_of
from stepcredit.credit.choose import credit_of
from stepcredit.estimators.base import Load
from stepcredit.estimators.table import Observers, observers
from stepcredit.losses.choose import build_objective
from stepcredit.losses.objective import Objective
from stepcredit.samplers.table import sampler_traits
from stepcredit.shaping.base import RAW, Shaper
from stepcredit.shaping.choose import build_shapers


def run_observers(
    config: Config, credit: CreditFunction, objective: Objective, shapers: Sequence[Shaper] = ()
) -> Observers:
    """What adds the columns that shapers, credit, loss and regularisers of a run read and its rollouts do not bring."""
    sampler, optim = sampler_traits(config), config.optim
    read = {column: f"loss '{config.loss.name}'" for column in objective.needs.columns}
    needs = needs_of(credit)
    read |= {column: needs.readers.get(column, f"credit '{config.credit.name}'") for column in needs.columns}
    read |= {column: f"shaper '{shaper.name}'" for shaper in shapers for column in shaper.needs.columns}
    if objective.needs_reference:
        read["ref_logprobs"] = "objective.kl.coef"
    if objective.needs_entropy:
        read["entropy"] = objective.needs_entropy
    brought = {*sampler.columns, "token_rewards", RAW}
    if objective.kl_in_reward or "token_rewards" in config.estimators:
        read["token_rewards"] = "objective.kl.coef" if objective.kl_in_reward else "estimators.token_rewards"
        brought.remove("token_rewards")
    older = config.sampler.window > 0 and not needs.unfinished  # groups that several versions of the weights sampled
    several = optim.num_epochs * optim.num_minibatches > 1
    if objective.given.importance != "none" or sampler.elsewhere or several or older:
        read["old_logprobs"] = "the loss"
    return observers(config, read, brought)


def models_beside(config: Config) -> list[Load]:
    """The models that a run holds on every GPU beside the policy and what its sampler holds."""
    return observers_of(config).loads(config)


def observers_of(config: Config) -> Observers:
    """What a run of this config observes with."""
    credit = credit_of(config.credit)
    objective = build_objective(config, needs_of(credit).forests == "flat")
    return run_observers(config, credit, objective, build_shapers(config))
