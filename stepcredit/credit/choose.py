"""The credit function that a config names, checked before anything is sampled."""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from stepcredit import section
from stepcredit.config import CreditConfig
from stepcredit.credit import CREDIT
from stepcredit.credit.base import CreditFunction, assign, check_options, needs_of
from stepcredit.credit.sum import CreditSum, Term
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.made_up import made_up_forest
from stepcredit.imports import by_name

log = logging.getLogger("stepcredit")


def terms_of(config: CreditConfig) -> list[Term]:
    """The terms of a sum, or the one credit function, with options that fit.

    Raises:
        UserError: there is no such function, or its options do not fit.
    """
    if config.sum is None:
        return [_term("credit", config.name, config.options)]
    return [
        _term(f"credit.sum[{number}]", term.name, term.own_options, term.weight, term.part, term.normalize)
        for number, term in enumerate(config.sum)
    ]


def _term(option: str, name: str, options: Mapping[str, Any], *how: Any) -> Term:
    function = by_name(f"{option}.name", name, CREDIT)
    section.check_options(option, name, function, options)
    return Term(option, name, function, options, *how)


def credit_of(config: CreditConfig) -> CreditFunction:
    """The credit function that a config names, or the sum that it writes out.

    Raises:
        UserError: there is no such function, or its options do not fit.
    """
    terms = terms_of(config)
    if config.sum is None:
        return terms[0].function
    _warn_of_shadows(config, terms)
    function = CreditSum(terms)
    check_options(config.name, function, config.options)
    return function


def _warn_of_shadows(config: CreditConfig, terms: Sequence[Term]) -> None:
    """Say whose an option is that both a term and its function have."""
    for given, term in zip(config.sum or (), terms, strict=True):
        for name in list(inspect.signature(term.function).parameters)[1:]:
            if name in given.how:
                message = "%s.%s is that of the term; credit '%s' has an option of this name, too: %s.options.%s"
                log.warning(message, term.option, name, term.name, term.option, name)


def build_credit(config: CreditConfig) -> tuple[CreditFunction, Callable[[Forest], Forest]]:
    """The credit function, and the step that adds its advantages to a forest.

    The function is called once on made-up rollouts, so that its errors about options are raised now.

    Raises:
        UserError: there is no such function, or its options do not fit.
    """
    function = credit_of(config)
    needs = needs_of(function)
    try:
        with torch.no_grad():
            function(made_up_forest(needs.columns, needs.forests == "tree"), **config.options)
    except UserError:
        raise
    except Exception as error:  # it may rely on what only real rollouts have
        log.debug("credit '%s' failed on made-up rollouts (%s)", config.name, error)
    return function, partial(assign, name=config.name, function=function, options=config.options)
