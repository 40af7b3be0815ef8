"""The objective that a config names, checked before anything is sampled."""

import logging

import torch

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.forest.made_up import made_up_forest
from stepcredit.forest.ops import TokenScores
from stepcredit.imports import by_name
from stepcredit.losses.objective import Objective
from stepcredit.losses.table import LOSSES
from stepcredit.section import check_options

log = logging.getLogger("stepcredit")


def build_objective(config: Config, flat: bool) -> Objective:
    """The objective; credit of flat forests is weighed by completions, that of trees by segments.

    The loss is called once, so that what it says of its options is said now.

    Args:
        flat: the credit function takes flat forests alone.

    Raises:
        UserError: there is no such loss, its options do not fit, or it is one over completions and they share tokens.
    """
    name, options = config.loss.name, config.loss.options
    function = by_name("loss.name", name, LOSSES)
    check_options("loss", name, function, options)
    config.objective.check()
    constant = float(config.sampler.max_new_tokens)
    objective = Objective(function, options, config.objective, constant, "completion" if flat else "segment")
    if not flat and objective.needs.reads_completions:
        raise UserError(
            f"loss '{name}' is over completions, credit '{config.credit.name}' is of trees, whose completions share "
            "tokens; take another loss (clip, cispo) or another credit"
        )
    if config.objective.entropy_top < 1 and objective.needs.mixes:
        raise UserError(
            f"objective.entropy_top: under loss '{name}' the advantages of a completion act on all its tokens, so that "
            "none can be left out; take gspo_token"
        )
    if config.objective.entropy_top < 1 and not objective.needs.sparse:
        raise UserError(
            f"objective.entropy_top makes advantages 0, which is a gradient under loss '{name}'; leave it out, or "
            "declare the loss with @loss(sparse=True) where it is none"
        )
    if objective.needs.aggregate and config.objective.aggregate != objective.needs.aggregate:
        log.warning(
            "objective.aggregate %s weighs the units of loss '%s' in another way than was published, which is %s",
            config.objective.aggregate,
            name,
            objective.needs.aggregate,
        )
    _try(objective, name)
    return objective


def _try(objective: Objective, name: str) -> None:
    forest = made_up_forest(["old_logprobs", "ref_logprobs", "advantages", *objective.needs.columns])
    zeros = torch.zeros(forest.num_tokens)
    try:
        with torch.no_grad():
            objective.loss(TokenScores(zeros, zeros), forest.with_token(weights=zeros + 1))
    except UserError:
        raise
    except Exception as error:  # it may rely on what only real rollouts have
        log.debug("loss '%s' failed on made-up rollouts (%s)", name, error)
