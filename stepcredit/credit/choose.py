"""The credit function that a config names, checked before anything is sampled."""

import logging
from collections.abc import Callable
from functools import partial

import torch

from stepcredit.credit import CREDIT
from stepcredit.credit.base import CreditFunction, assign, check_options, needs_of
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.made_up import made_up_forest
from stepcredit.imports import by_name
from stepcredit.section import Choice

log = logging.getLogger("stepcredit")


def build_credit(config: Choice) -> tuple[CreditFunction, Callable[[Forest], Forest]]:
    """The credit function, and the step that adds its advantages to a forest.

    The function is called once on made-up rollouts, so that its errors about options are raised now.

    Raises:
        UserError: there is no such function, or its options do not fit.
    """
    function = by_name("credit.name", config.name, CREDIT)
    check_options(config.name, function, config.options)
    needs = needs_of(function)
    try:
        with torch.no_grad():
            function(made_up_forest(needs.columns, needs.forests == "tree"), **config.options)
    except UserError:
        raise
    except Exception as error:  # it may rely on what only real rollouts have
        log.debug("credit '%s' failed on made-up rollouts (%s)", config.name, error)
    return function, partial(assign, name=config.name, function=function, options=config.options)
