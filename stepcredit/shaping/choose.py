"""The shapers that a config names, checked before anything is sampled."""

import logging
from collections.abc import Mapping, Sequence

import torch

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.made_up import made_up_forest
from stepcredit.imports import by_name
from stepcredit.section import check_options
from stepcredit.shaping.base import RAW, Shaper, shaper_needs
from stepcredit.shaping.options import overlong_options
from stepcredit.shaping.shapers import SHAPERS

log = logging.getLogger("stepcredit")


def build_shapers(config: Config) -> list[Shaper]:
    """The shapers of a run in their order.

    Each is called once on made-up rollouts, so that its errors about options are raised now.

    Raises:
        UserError: there is no such shaper, or its options do not fit.
    """
    longest = config.sampler.max_new_tokens
    shapers = []
    for given in config.shapers:
        function = by_name("shapers", given.name, SHAPERS)
        check_options("shaper", given.name, function, given.options, 2 if shaper_needs(function).state else 1)
        options = overlong_options(given.options, longest) if given.name == "overlong" else given.options
        shapers.append(Shaper(given.name, function, options))
        _try(shapers[-1])
    return shapers


ONLY_MASK = ("mask_truncated", "positives_only", "drop_uniform")  # leave completions out and change no reward


def reward_changes(config: Config) -> list[str]:
    """What makes rewards of this run others than they were judged: shapers, and the k1 penalty."""
    changes = [f"shaper {shaper.name}" for shaper in config.shapers if shaper.name not in ONLY_MASK]
    if config.objective.kl.estimator == "k1" and config.objective.kl.coef:
        changes.append("the k1 penalty")
    return changes


def warn_of_raw_values(config: Config, what: str) -> None:
    """Warn where values of rewards as they are judged are compared with rewards that are changed afterwards."""
    if changes := reward_changes(config):
        log.warning(
            "%s are of rewards as they are judged; %s changes what they are compared with", what, " and ".join(changes)
        )


def check_shapers(shapers: Sequence[Shaper], rewards: Mapping[str, float]) -> None:
    """Refuse shapers that do not go with the reward functions of the run.

    Args:
        rewards: weights by name.
    """
    for shaper in shapers:
        shaper.needs.check(shaper.options, rewards)


def warn_of_filter(config: Config) -> None:
    """Warn where the prompt filter, which sees rewards before shapers, takes away what a shaper is for."""
    if config.filter.enabled and any(shaper.name == "outcome_gate" for shaper in config.shapers):
        log.warning(
            "filter.enabled leaves out groups whose completions are all right before outcome_gate can tell them apart; "
            "take --filter.enabled false, and drop_uniform behind the gate"
        )


def with_raw_rewards(forest: Forest) -> Forest:
    """The forest with the column `raw_reward`: what rewards are before the first shaper."""
    return forest.with_segment(**{RAW: forest.segment["reward"]})


def _try(shaper: Shaper) -> None:
    forest = made_up_forest(column for column in shaper.needs.columns if column != RAW)
    try:
        with torch.no_grad():
            shaper(with_raw_rewards(forest))
    except UserError:
        raise
    except Exception as error:  # it may rely on what only real rollouts have
        log.debug("shaper '%s' failed on made-up rollouts (%s)", shaper.name, error)
