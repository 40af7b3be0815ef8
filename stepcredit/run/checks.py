"""What is looked at before and while a run trains, so that it does not learn from something wrong for hours."""

import logging
from collections.abc import Sequence

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem
from stepcredit.growth.rollouts import Rollouts
from stepcredit.policy.forward import Policy
from stepcredit.samplers.base import Traits
from stepcredit.tasks.base import Task
from stepcredit.verifiers.judging import Judge
from stepcredit.verifiers.options import RewardOptions

log = logging.getLogger("stepcredit")


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
    far = (forest.token["old_logprobs"] - forest.token["rollout_logprobs"]).abs() * forest.token_sampled
    mean = float(far.sum() / forest.token_sampled.sum().clamp(min=1))
    if not mean <= tolerance:
        beyond = float((far[forest.token_sampled] > tolerance).float().mean())
        raise UserError(
            f"sampler: log-probabilities of the sampled tokens differ from the trainer's by {mean:.3g} nats on "
            f"average (at most {float(far.max()):.3g}, {beyond:.0%} of the tokens beyond sampler.server.tolerance "
            f"{tolerance:g}). {sampling.other_model}"
        )
