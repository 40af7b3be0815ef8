"""What every credit function is built from, and how one is called safely.

A credit function is `credit(forest, **options) -> [num_tokens]`: pure, no gradient, finite everywhere. It may return
`CreditParts` instead, to add a process part or values of segments. `@credit` declares what it needs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stepcredit import section
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.ops import SAME, mean_by, segment_sum, spread_by
from stepcredit.forest.table import TERM

STD_EPS = 1e-6


class CreditParts(NamedTuple):
    """Advantages as a sum, and segment columns of a credit function for trees.

    Attributes:
        outcome, process: [num_tokens] each; the advantage is their sum.
        value: [num_segments] the value of each segment; not read for unjudged ones.
        kept: [num_segments] False for segments that leave the loss and its denominators.
        terms: of a sum of credits what each adds to the advantage, by name, each [num_tokens].
    """

    outcome: Tensor
    process: Tensor | None = None
    value: Tensor | None = None
    kept: Tensor | None = None
    terms: Mapping[str, Tensor] | None = None

    @property
    def advantages(self) -> Tensor:
        """[num_tokens] the sum of the parts."""
        return self.outcome if self.process is None else self.outcome + self.process


CreditFunction = Callable[..., Tensor | CreditParts]


@dataclass(frozen=True)
class Needs:
    """What a credit function reads: token, segment or tree columns by name, and whether it takes only flat forests.

    Attributes:
        readers: of a sum of credits the term that reads a column, by column.
        flat: of a sum of credits the term that takes flat forests alone.
        unfinished: it gives tokens of completions that go on in the next iteration (finish "open") their credit.
    """

    columns: tuple[str, ...] = ()
    forests: Literal["flat", "tree"] = "flat"
    readers: Mapping[str, str] = field(default_factory=dict)
    flat: str = ""
    unfinished: bool = False


def credit(
    *columns: str, forests: Literal["flat", "tree"] = "flat", unfinished: bool = False
) -> Callable[[CreditFunction], CreditFunction]:
    """Declare the columns (of tokens, segments or trees) that a credit function reads and the forests that it takes."""

    def declare(function: CreditFunction) -> CreditFunction:
        function.needs = Needs(columns, forests, unfinished=unfinished)  # type: ignore[attr-defined]
        return function

    return declare


def needs_of(function: CreditFunction) -> Needs:
    """What `function` declared; a function without a declaration takes flat forests and no extra columns."""
    return getattr(function, "needs", Needs())


def check_options(name: str, function: CreditFunction, options: Mapping[str, Any]) -> None:
    """Raise `UserError` when `options` has a name or a value that the credit function does not take."""
    section.check_options("credit", name, function, options)


def assign(forest: Forest, name: str, function: CreditFunction, options: Mapping[str, Any]) -> Forest:
    """Run a credit function and add its results to the forest as columns.

    These are the token columns `advantages` and, if given, `process` and `term/NAME`, and the segment columns `value`
    and `kept`.

    Raises:
        UserError: a column or a flat forest is missing, or the function returns the wrong length or a value that is
            not finite.
    """
    parts = call(forest, "credit", name, function, options)
    tokens = {"advantages": parts.advantages}
    if parts.process is not None:
        tokens["process"] = parts.process
    tokens |= {TERM + term: values for term, values in (parts.terms or {}).items()}
    segments = {} if parts.value is None else {"value": parts.value.float()}
    segments |= {} if parts.kept is None else {"kept": parts.kept}
    forest = forest.with_segment(**segments)
    return forest.with_token(**{column: values.float() for column, values in tokens.items()})


def call(forest: Forest, option: str, name: str, function: CreditFunction, options: Mapping[str, Any]) -> CreditParts:
    """What a credit function gives this forest, checked.

    Args:
        option: where the config names it, for errors: "credit", or a term of a sum, "credit.sum[1]".

    Raises:
        UserError: as `assign`.
    """
    needs, who = needs_of(function), f"{option} '{name}'"
    if needs.forests == "flat":
        forest.require_flat(needs.flat or who)
    for column in needs.columns:
        if not forest.has(column):
            reader = needs.readers.get(column, who)
            raise UserError(f"{reader} needs the column '{column}', which these rollouts do not have")
    with torch.no_grad():
        try:
            result = function(forest, **options)
        except UserError as error:
            raise UserError(_of_option(option, who, str(error))) from error
    if not isinstance(result, (Tensor, CreditParts)):
        raise UserError(f"{who} returned a {type(result).__name__}; expected a tensor [num_tokens]")
    parts = CreditParts(result) if isinstance(result, Tensor) else result
    tokens = {"advantages": parts.advantages}
    if parts.process is not None:
        tokens["process"] = parts.process
    for column, values in tokens.items():
        _check(forest, who, column, values, forest.token["segment"], "tokens")
    for column, given in (("value", parts.value), ("kept", parts.kept)):
        if given is not None:
            _check(forest, who, column, given, torch.arange(forest.num_segments), "segments")
    return parts


def _of_option(option: str, who: str, message: str) -> str:
    """What a function says of its options, as said of the option of the config that has them."""
    if option == "credit":
        return message
    return option + message.removeprefix("credit") if message.startswith("credit.") else f"{who}: {message}"


def _check(forest: Forest, who: str, column: str, values: Tensor, segment_of: Tensor, rows: str) -> None:
    """Raise `UserError` unless `values` has a finite number for each row; `segment_of` names the segment of each."""
    if values.shape != segment_of.shape:
        raise UserError(
            f"{who} returned {column} of shape {tuple(values.shape)}; expected one number for "
            f"each of the {len(segment_of)} {rows}"
        )
    if not bool(values.isfinite().all()):
        segment = int(segment_of[(~values.isfinite()).nonzero()[0]])
        raise UserError(f"{who}: {column} is not finite in {forest.describe_segment(segment)}")


# ---------------------------------------------------------------------- completions of flat forests


@dataclass(frozen=True)
class Completions:
    """The judged completions of a flat forest as rows, in the order of their leaves.

    Attributes:
        leaf: [n] row of the segment table; tree: [n] the group; returns: [n] outcome reward plus the token rewards of
        the path, summed in fp64; length: [n] sampled tokens.
    """

    leaf: Tensor
    tree: Tensor
    returns: Tensor
    length: Tensor

    @property
    def varied(self) -> Tensor:
        """[n] False for singletons and for groups of returns that differ by no more than rounding (`spread_by`).

        Their outcome credit is exactly 0.
        """
        return spread_by(self.returns, self.tree) > 0


def completions(forest: Forest) -> Completions:
    """The completions that have a reward; the others are left out of every baseline."""
    leaf = (forest.segment["is_leaf"] & forest.segment["has_reward"]).nonzero().squeeze(1)
    token_leaf = forest.leaf[forest.token["segment"]]
    returns = forest.segment["reward"].double()
    if "token_rewards" in forest.token:
        rewards = forest.token["token_rewards"].double() * forest.token_sampled
        returns += segment_sum(rewards, token_leaf, forest.num_segments)
    length = segment_sum(forest.token_sampled.float(), token_leaf, forest.num_segments)
    return Completions(leaf, forest.segment["tree"][leaf], returns[leaf].float(), length[leaf])


def outcome_credit(forest: Forest, rows: Completions, values: Tensor) -> Tensor:
    """`to_tokens`, but exactly 0 for singletons and groups of equal returns, where rounding could leave a remainder."""
    return to_tokens(forest, rows, torch.where(rows.varied, values, 0.0))


def to_tokens(forest: Forest, rows: Completions, values: Tensor) -> Tensor:
    """Give every sampled token of a completion its completion's value; 0 elsewhere.

    Args:
        values: [n], one for each row.
    """
    by_segment = torch.zeros(forest.num_segments).index_copy_(0, rows.leaf, values.float())
    return by_segment[forest.leaf][forest.token["segment"]] * forest.token_sampled


def judged_tokens(forest: Forest) -> Tensor:
    """[num_tokens] True for sampled tokens of judged completions."""
    return forest.judged[forest.token["segment"]] & forest.token_sampled


def counted_tokens(forest: Forest) -> Tensor:
    """[num_tokens] True for sampled tokens of completions that are judged, or that go on in the next iteration."""
    return forest.judged_or_open[forest.token["segment"]] & forest.token_sampled


def group_std(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation (ddof 1) of each row's group; the deviation of a singleton is 0."""
    mean, count = mean_by(values, groups)
    variance = mean_by((values - mean).square(), groups)[0] * count / (count - 1).clamp(min=1)
    return mean, variance.sqrt()


def whiten(values: Tensor, where: Tensor) -> Tensor:
    """(values - mean) / (std + 1e-6) over the rows of `where`, std unbiased; 0 elsewhere and when all are equal.

    Values are equal when they differ by no more than `SAME` times the largest size among them.
    """
    counted = values[where]
    if len(counted) < 2 or bool(counted.max() - counted.min() <= SAME * counted.abs().max()):
        return torch.zeros_like(values)
    return torch.where(where, (values - counted.mean()) / (counted.std() + STD_EPS), 0.0)
