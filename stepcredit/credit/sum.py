"""Weighted sums of credits: `credit: {sum: [{name: grpo}, {name: spro, weight: 0.5, part: process}]}`."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stepcredit.credit.base import CreditFunction, CreditParts, Needs, call, counted_tokens, needs_of
from stepcredit.credit.normalize import Normalize, normalized
from stepcredit.errors import UserError
from stepcredit.forest import Forest

Part = Literal["outcome", "process"]


class Added(NamedTuple):
    """What a term adds to the parts of the advantage, None where it adds nothing; the rest as in `CreditParts`."""

    outcome: Tensor | None
    process: Tensor | None
    value: Tensor | None
    kept: Tensor | None

    @property
    def advantages(self) -> Tensor:
        added = _total([self.outcome, self.process])
        assert added is not None
        return added


@dataclass(frozen=True)
class Term:
    """A credit function that a config names, and how it is added.

    Attributes:
        option: where the config names it, such as "credit.sum[1]"; "credit" where it stands alone.
        part: of its advantage, the one that is added; None: all of it.
    """

    option: str
    name: str
    function: CreditFunction
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    part: Part | None = None
    normalize: Normalize = "none"

    @property
    def who(self) -> str:
        return f"{self.option} '{self.name}'"

    def of(self, forest: Forest) -> Added:
        """What it adds.

        Raises:
            UserError: the function does not have the part, or what `call` raises.
        """
        given = call(forest, self.option, self.name, self.function, self.options)
        if self.part == "process" and given.process is None:
            raise UserError(
                f"{self.option}.part: credit '{self.name}' has no process part; leave part out, or take outcome"
            )
        outcome = None if self.part == "process" else given.outcome
        process = None if self.part == "outcome" else given.process
        where = counted_tokens(forest) & ~forest.past
        if given.kept is not None:
            where = where & given.kept[forest.token["segment"]]
        outcome, process, _ = normalized(forest, outcome, process, self.normalize, where)
        outcome, process = (None if part is None else self.weight * part for part in (outcome, process))
        return Added(outcome, process, given.value, given.kept if self.weight else None)


class CreditSum:
    """A credit function that is a weighted sum of others.

    A = sum_k w_k N_k(A_k): A_k the advantage of term k or a part of it, N_k its normalisation (`normalized`), w_k its
    weight. `normalize` does the same to the sum, after its terms. The outcome part is the sum of the terms' outcome
    parts, the process part that of their process parts.

    This is where step advantages are added to outcome advantages as "Rewarding Progress" has it (arXiv 2410.08146): as
    rewards they would telescope, the sum from each token on of V_{s+1} - V_s being r - V_t, and leave the outcome's
    gradient, scaled.

    It takes branching forests if all terms do. A segment is pruned if all terms of weight other than 0 prune it; to one
    that others keep, a term that prunes it adds nothing. `value` is that of the first term that has one. A term of
    weight 0 is computed and adds 0. A single term of weight 1 is that credit, bit for bit.

    >>> # rewards 1, 0, 0 and lengths 1, 2, 1: rloo + 0.5 dr_grpo is 1 + 1/3, then three times -1/2 - 1/6
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms, self.names = tuple(terms), labels(terms)
        needs = [(term, needs_of(term.function)) for term in terms]
        flat = next((term.who for term, need in needs if need.forests == "flat"), "")
        readers = {column: term.who for term, need in reversed(needs) for column in need.columns}
        columns = tuple(dict.fromkeys(column for _, need in needs for column in need.columns))
        unfinished = all(need.unfinished for _, need in needs)
        self.needs = Needs(columns, "flat" if flat else "tree", readers, flat, unfinished)

    def __call__(self, forest: Forest, normalize: Normalize = "none") -> CreditParts:
        given = [term.of(forest) for term in self.terms]
        kept = _kept(forest, self.terms, given)
        given = [_within_kept(forest, added, kept) for added in given]
        outcome, process = _total([added.outcome for added in given]), _total([added.process for added in given])
        terms = {name: added.advantages for name, added in zip(self.names, given, strict=True)}
        if normalize != "none":
            where = counted_tokens(forest) & ~forest.past
            where = where if kept is None else where & kept[forest.token["segment"]]
            outcome, process, divisor = normalized(forest, outcome, process, normalize, where)
            terms = {name: torch.where(where, values, 0.0) / divisor for name, values in terms.items()}
        outcome = torch.zeros(forest.num_tokens) if outcome is None else outcome
        value = next((added.value for added in given if added.value is not None), None)
        return CreditParts(outcome, process, value, kept, terms)


def labels(terms: Sequence[Term]) -> list[str]:
    """A short name for each term: `grpo`, `spro.process`, `my_credit` of `./my_file.py:my_credit`; `spro[2]` twice.

    What comes twice has the number of its term, counted from 0, behind it.
    """
    names = [re.split(r"[.:]", term.name)[-1] + (f".{term.part}" if term.part else "") for term in terms]
    count = Counter(names)
    return [name if count[name] == 1 else f"{name}[{number}]" for number, name in enumerate(names)]


def _total(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return reduce(torch.add, present) if present else None


def _kept(forest: Forest, terms: Sequence[Term], given: Sequence[Added]) -> Tensor | None:
    """[num_segments] what some term keeps; None where no term prunes."""
    if all(parts.kept is None for parts in given):
        return None
    everything = torch.ones(forest.num_segments, dtype=torch.bool)
    weighing = [parts for term, parts in zip(terms, given, strict=True) if term.weight]
    return reduce(torch.logical_or, [everything if parts.kept is None else parts.kept for parts in weighing])


def _within_kept(forest: Forest, added: Added, kept: Tensor | None) -> Added:
    """The term without what it gives to segments that it prunes itself and others keep."""
    if added.kept is None or kept is None:
        return added
    adds = (added.kept | ~kept)[forest.token["segment"]]
    outcome, process = (None if part is None else torch.where(adds, part, 0.0) for part in added[:2])
    return added._replace(outcome=outcome, process=process)
