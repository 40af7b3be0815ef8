"""What an algorithm is made of, needs and costs, read from its parts: nothing of it is written down a second time."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stepcredit.config import Config, resolve
from stepcredit.config.algorithms import algorithm
from stepcredit.credit.choose import terms_of
from stepcredit.estimators.base import Load, Passes
from stepcredit.estimators.reads import observers_of
from stepcredit.imports import by_name
from stepcredit.losses.table import LOSSES
from stepcredit.plan.memory import bytes_per_weight

POLICY = "policy"


@dataclass(frozen=True)
class AlgorithmFacts:
    """
    Attributes:
        paper, summary, data: as in its row of `ALGORITHMS`.
        advantage, loss_formula: first sentences of the credit's and the loss's docstrings.
        config: what it amounts to: a config that trains with it, with the defaults of credit and loss written out.
        columns: that credit, loss and estimators read, in the order of their names.
        models: beside the policy, on every GPU.
        passes: over each token of the batch in an iteration, by who computes them, "policy" for its own update.
        bytes_per_weight: of models, gradients and optimiser state for each weight of the policy, in fp32 on one GPU.
        branching: trees are grown instead of groups.
        completions: of a problem at most.
    """

    name: str
    paper: str
    summary: str
    data: str
    advantage: str
    loss_formula: str
    config: dict[str, Any]
    columns: tuple[str, ...]
    models: tuple[Load, ...]
    passes: Mapping[str, Passes]
    bytes_per_weight: float
    branching: bool
    completions: int

    @property
    def total(self) -> Passes:
        each = self.passes.values()
        return Passes(*(sum(counts) for counts in zip(*each, strict=True)))


def facts_of(name: str) -> AlgorithmFacts:
    """What an algorithm is with its defaults, for a model that is not the embedded one.

    Raises:
        UserError: there is no such algorithm.
    """
    row = algorithm(name)
    config = resolve({"algorithm": name, "model": "none"})
    observers = observers_of(config)
    terms = terms_of(config.credit)
    formulas = [first_sentence(term.function) for term in terms]
    advantage = formulas[0] if config.credit.sum is None else f"{config.credit.label}: {'; '.join(formulas)}"
    epochs = config.optim.num_epochs
    return AlgorithmFacts(
        name=name,
        paper=row.paper,
        summary=row.summary,
        data=row.data,
        advantage=advantage,
        loss_formula=first_sentence(by_name("loss.name", config.loss.name, LOSSES)),
        config=_written_out(config),
        columns=tuple(sorted(observers.needed)),
        models=tuple(observers.loads(config)),
        passes={POLICY: Passes(epochs, epochs)} | observers.passes(config),
        bytes_per_weight=bytes_per_weight(config),
        branching=config.growth.name != "flat" and not config.growth.recorded,
        completions=config.growth.completions(),
    )


def first_sentence(function: Callable[..., Any]) -> str:
    """Of a docstring, on one line, without papers and numbers of equations in brackets; empty where there is none.

    >>> def mean(): "A_i = r_i - mean (RLOO, arXiv 2402.14740). More."
    >>> first_sentence(mean)
    'A_i = r_i - mean'
    """
    text = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
    text = re.sub(r" \([^()]*(arXiv|Eq\.)[^()]*\)", "", text)
    return re.split(r"\.(?: |$)", text)[0]


def _written_out(config: Config) -> dict[str, Any]:
    """The options that are not as in the schema, and all of the credit's and the loss's."""
    changed = config.model_dump(mode="json", exclude_defaults=True, exclude={"model", "credit", "loss"})
    credit = config.credit.model_dump(mode="json")
    if config.credit.sum is None:
        credit = _options(terms_of(config.credit)[0].function) | credit
    loss = _options(by_name("loss.name", config.loss.name, LOSSES)) | config.loss.model_dump(mode="json")
    name = {"algorithm": config.algorithm}
    return name | {"credit": _name_first(credit), "loss": _name_first(loss)} | changed


def _options(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def _name_first(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": options["name"], **options}
