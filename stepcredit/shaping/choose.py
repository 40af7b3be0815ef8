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
from stepcredit.shaping.shapers import SHAPERS

log = logging.getLogger("stepcredit")


def build_shapers(config: Config) -> list[Shaper]:
    """The shapers of a run in their order.

    Each is called once on made-up rollouts, so that its errors about options are raised now.

    Raises:
        UserError: there is no such shaper, or its options do not fit.
    """
    longest = config.sampler.max_new_tokens
    defaults = {"overlong": {"max_tokens": longest, "buffer": max(1, longest // 5)}}
    shapers = []
    for given in config.shapers:
        function = by_name("shapers", given.name, SHAPERS)
        check_options("shaper", given.name, function, given.options, 2 if shaper_needs(function).state else 1)
        shapers.append(Shaper(given.name, function, defaults.get(given.name, {}) | given.options))
        _try(shapers[-1])
    return shapers


def check_shapers(shapers: Sequence[Shaper], rewards: Mapping[str, float]) -> None:
    """Refuse shapers that do not go with the reward functions of the run.

    Args:
        rewards: weights by name.
    """
    for shaper in shapers:
        shaper.needs.check(shaper.options, rewards)


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
