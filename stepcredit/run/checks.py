"""What is looked at before and while a run trains, so that it does not learn from something wrong for hours."""

import logging
from collections.abc import Collection, Sequence

import torch

from stepcredit.config import Config
from stepcredit.config.algorithms import algorithm
from stepcredit.credit import CreditFunction, needs_of
from stepcredit.errors import UserError
from stepcredit.estimators.table import PROVIDERS
from stepcredit.forest import Forest
from stepcredit.forest.made_up import made_up_forest
from stepcredit.forest.types import Problem
from stepcredit.growth.rollouts import Rollouts
from stepcredit.losses.objective import Objective
from stepcredit.policy.forward import Policy
from stepcredit.samplers.base import Traits
from stepcredit.samplers.table import AUTO, NONE
from stepcredit.tasks.base import Task
from stepcredit.verifiers.judging import Judge
from stepcredit.verifiers.options import RewardOptions

log = logging.getLogger("stepcredit")


def check_combination(config: Config, credit: CreditFunction, objective: Objective) -> None:
    """Refuse parts that each are right and together are not, and say what a combination changes.

    Raises:
        UserError: the credit is exactly on-policy and there are several optimiser steps, or it does not take a penalty
            in the reward.
    """
    _check_steps(config, objective)
    if objective.kl_in_reward:
        _check_penalty(config, credit)
    _check_warmup(config)


def _check_steps(config: Config, objective: Objective) -> None:
    """A loss without a ratio takes the samples for the policy's own, which they are for the first step alone."""
    optim = config.optim
    steps = optim.num_epochs * min(optim.num_minibatches, config.train.problems_per_iteration)
    if steps == 1 or objective.needs.ratio:
        return
    name = config.loss.name
    several = (
        f"optim.num_epochs {optim.num_epochs}, optim.num_minibatches {optim.num_minibatches}: {steps} optimiser steps "
        f"on a batch, and loss '{name}' has no ratio to the policy that sampled it"
    )
    if "opo" in config.credit.names:
        raise UserError(
            f"{several}; OPO is exactly on-policy: take --optim.num-epochs 1 --optim.num-minibatches 1, or a loss with "
            "a ratio (--loss.name clip)"
        )
    meant = algorithm(config.algorithm)
    if meant.several_steps and meant.loss.get("name") == name:
        log.info("%s. That is meant: %s", several, meant.several_steps)
        return
    log.warning(
        "%s. Steps after the first take the samples for the moved policy's own, so their gradient is biased; take one "
        "step, a loss with a ratio (clip), or, if your own loss has one, declare it with @loss(ratio=True)",
        several,
    )


def _check_penalty(config: Config, credit: CreditFunction) -> None:
    """Let the credit see token rewards of a size that the k1 penalty of a policy that has moved may have."""
    needs = needs_of(credit)
    forest = made_up_forest([*needs.columns, "token_rewards"], needs.forests == "tree")
    forest = forest.with_token(token_rewards=forest.token["token_rewards"] - forest.token_sampled.float())
    name = config.credit.name
    try:
        with torch.no_grad():
            credit(forest, **config.credit.options)
    except UserError as error:
        raise UserError(
            f"objective.kl.estimator k1: its penalty is taken from the rewards, which credit '{name}' does not allow "
            f"({error}); take --objective.kl.estimator k3 or k2, which act in the loss"
        ) from error
    except Exception as error:  # it may rely on what only real rollouts have
        log.debug("credit '%s' failed on made-up rollouts (%s)", name, error)


WITHOUT_SAMPLES = {"ref_logprobs", "old_logprobs", "entropy"}  # columns that need nothing but a forward


def check_recorded(config: Config, needed: Collection[str]) -> None:
    """Refuse what needs samples where the completions are the data's, and the sampler of such runs elsewhere.

    Args:
        needed: columns that the run reads.

    Raises:
        UserError: naming the option.
    """
    growth, sampler = config.growth, config.sampler.name
    if not growth.recorded:
        if sampler == NONE:
            raise UserError(f"sampler.name: none is for completions of the data, and growth.name {growth.name} samples")
        return
    why = f"growth.name {growth.name} takes completions and preferences from the data"
    if sampler not in (AUTO, NONE):
        raise UserError(f"sampler.name: {why}, so that '{sampler}' has nothing to sample; leave it out")
    if config.reward.functions or config.reward.kinds:
        raise UserError(f"reward: {why}, so that reward functions have nothing to judge; leave them out")
    if config.sampler.temperature != 1:
        raise UserError(
            f"sampler.temperature {config.sampler.temperature:g}: {why}, and their likelihood is one at temperature 1; "
            "leave it out"
        )
    for shaper in config.shapers:
        if shaper.name not in ("drop_uniform", "mask_truncated"):
            raise UserError(f"shapers: {why}, so that '{shaper.name}' has no rewards to change; leave it out")
    if config.filter.enabled:
        raise UserError(f"filter.enabled: {why}, so that there is nothing to filter by; leave it out")
    sampling = [column for column in PROVIDERS if column in needed and column not in WITHOUT_SAMPLES]
    if missing := [column for column in sampling if column not in config.estimators]:
        raise UserError(
            f"{why}; column {missing[0]}, which credit '{config.credit.label}', loss '{config.loss.name}' or a penalty "
            "reads, needs samples of the policy"
        )


def _check_warmup(config: Config) -> None:
    warmup, iterations = config.optim.warmup, config.train.iterations
    if warmup >= iterations:
        log.warning(
            "optim.warmup %d is not below train.iterations %d: the learning rate rises to the end and does not reach "
            "optim.learning_rate %g",
            warmup,
            iterations,
            config.optim.learning_rate,
        )


def check_gold(judge: Judge, task: Task, given: RewardOptions) -> None:
    """Refuse to train against a reward that does not know the right answers."""
    drawn = {problem.id: problem for problem in task.draw(0, given.gold_check)}
    problems = list(drawn.values())  # of few rows the draw would have some twice
    if not problems:
        return
    for name, check in judge.check_gold(problems).items():
        if not check.failed:
            continue
        share = 1 - len(check.failed) / check.total
        problem, why = check.failed[0]
        text = f"reward function '{name}' accepts {share:.0%} of {check.total} gold answers; '{problem.id}': {why}"
        if share < given.gold_threshold:
            raise UserError(
                f"{text}. That is under reward.gold_threshold ({given.gold_threshold:.0%}); see all with "
                "'stepcredit score --gold', or train all the same with --reward.gold-check 0"
            )
        log.warning("%s", text)


def check_sampling(rollouts: Rollouts, held_out: Sequence[Problem]) -> None:
    """Say what truncated sampling means, and refuse held-out problems whose prompts do not fit."""
    if rollouts.params.truncates:
        log.warning("top_p or top_k cuts the distribution that is sampled; log-probabilities are of the full one")
    for problem in held_out:
        rollouts.encode(problem)


def check_agreement(forest: Forest, config: Config, sampling: Traits, policy: Policy) -> None:
    """Stop when a sampler elsewhere samples from another model than the one trained here."""
    if not sampling.elsewhere:
        return
    if "rollout_logprobs" not in forest.token:
        raise UserError(
            f"sampler: the segments of '{config.sampler.name}' lack the column rollout_logprobs, so nothing tells "
            "whether it samples from the model that is trained here; give it to every segment"
        )
    tolerance = config.sampler.server.tolerance or (0.05 if policy.autocast else 0.005)  # bf16, fp32
    far = (forest.token["old_logprobs"] - forest.token["rollout_logprobs"]).abs() * forest.fresh
    mean = float(far.sum() / forest.fresh.sum().clamp(min=1))
    if not mean <= tolerance:
        beyond = float((far[forest.fresh] > tolerance).float().mean())
        raise UserError(
            f"sampler: log-probabilities of the sampled tokens differ from the trainer's by {mean:.3g} nats on "
            f"average (at most {float(far.max()):.3g}, {beyond:.0%} of the tokens beyond sampler.server.tolerance "
            f"{tolerance:g}). {sampling.other_model}"
        )
