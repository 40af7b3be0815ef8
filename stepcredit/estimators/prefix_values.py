"""Values of prefixes by rollouts, on the fly."""

from collections.abc import Collection, Iterator

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.estimators.base import Context, Estimator, Load, Passes, provider
from stepcredit.forest import Forest
from stepcredit.growth.options import PrefixValueOptions
from stepcredit.growth.prefix_values import Count, Rollouts, continue_from, prefix_value_metrics
from stepcredit.growth.steps import StepRule, step_rule
from stepcredit.policy.forward import Policy
from stepcredit.policy.limits import check_shared_vocabulary
from stepcredit.policy.loading import load_policy
from stepcredit.samplers.base import rest
from stepcredit.shaping.choose import warn_of_raw_values


class PrefixValues(Estimator):
    """Adds `prefix_value`, `prefix_error`, `prefix_rollouts` and `step_index` (`growth/prefix_values.py`).

    It has no state: what it draws follows from the seed of the run, the iteration and the tokens.

    Args:
        prover: whose completions these are not: a sampler of another model; None: the policy continues them.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        rule: StepRule,
        given: PrefixValueOptions,
        prover: Policy | None = None,
    ) -> None:
        super().__init__()
        self.rollouts, self.rule, self.given, self.prover = rollouts, rule, given, prover

    def observe(self, forest: Forest) -> Forest:
        """Flat forests of sampled tokens."""
        self.rollouts.count = Count()
        forest, steps, made, _ = continue_from(self.rollouts, forest, self.rule, self.given)
        if self.prover is not None:
            self.rollouts.sampler.sync(self.prover)  # forgets the keys and values of this batch
        rest(self.rollouts.sampler)
        self.metrics = prefix_value_metrics(forest, steps, made, self.rollouts.count)
        return forest


def _loads(config: Config, needed: Collection[str]) -> Iterator[Load]:
    if config.prefix_values.model is not None:
        yield Load("prover", config.prefix_values.model)


@provider(loads=_loads, passes=lambda config, needed: Passes())  # it samples
def prefix_values(context: Context) -> PrefixValues:
    """
    Raises:
        UserError: no token ends a step, or the prover has another vocabulary.
    """
    config, parts = context.config, context.rollouts
    if parts is None:
        raise UserError("prefix_values: there is nothing to sample with here")
    given = config.prefix_values
    warn_of_raw_values(config, "values of prefixes")
    rule = step_rule(
        given.step.tokens,
        given.step.delimiters,
        context.policy.tokenizer,
        parts.task.step_delimiters,
        "prefix_values.step",
    )
    prover = None
    sampler = parts.sampler
    if given.model is not None:
        from stepcredit.samplers.transformers import TransformersSampler  # heavy, and few runs need it

        prover = load_prover(config, context.policy)
        sampler = TransformersSampler(prover, config.sampler.max_rows, keep_mb=config.sampler.keep_mb)
    rollouts = Rollouts(sampler, parts.params, parts.judge, config.train.seed, parts.ranks)
    return PrefixValues(rollouts, rule, given, prover)


def load_prover(config: Config, policy: Policy) -> Policy:
    """The model that continues completions in the policy's place, whole on every device."""
    option, model = "prefix_values.model", str(config.prefix_values.model)
    prover = load_policy(model, config.train.device, config.train.dtype, config.trust_remote_code, option=option)
    if prover.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise UserError(f"{option}: '{model}' has another vocabulary than the policy")
    check_shared_vocabulary(prover, policy, f"{option}: '{model}'")
    return prover.requires_grad_(False)
