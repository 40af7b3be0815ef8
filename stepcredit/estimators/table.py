"""The estimators by the column that they add, and the order in which they observe a forest.

One row for each column; a user's own stand in the config (`--estimators.COLUMN my_package.my_builder`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.estimators.base import Builder, Context, Estimator, Load, Passes, declared
from stepcredit.estimators.critic import critic
from stepcredit.estimators.frozen import by_forward, by_sampler, old_policy, reference
from stepcredit.estimators.greedy import greedy_return
from stepcredit.estimators.penalty import log_ratio, reward_penalty
from stepcredit.estimators.prefix_values import prefix_values
from stepcredit.estimators.prm import implicit_prm
from stepcredit.estimators.prompt_value import prompt_value
from stepcredit.imports import by_name
from stepcredit.section import check_options

PROVIDERS: dict[str, Builder] = {
    "old_logprobs": old_policy,
    "entropy": old_policy,  # where the sampler does not give it
    "ref_logprobs": reference,
    "token_rewards": reward_penalty,
    "greedy_return": greedy_return,
    "prm_logprobs": implicit_prm,
    "prefix_value": prefix_values,
    "prefix_error": prefix_values,
    "prefix_rollouts": prefix_values,
    "step_index": prefix_values,
    "prompt_value": prompt_value,
    "values": critic,
    "value_target": critic,
}
NAMES: dict[str, dict[str, Builder]] = {  # that the config may give, for a column, beside dotted paths
    "old_logprobs": {"forward": by_forward, "sampler": by_sampler},
    "token_rewards": {"log_ratio": log_ratio},
}


@dataclass(frozen=True)
class Provider:
    """A builder with the options that the config gives it."""

    builder: Builder
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Observers:
    """The estimators of a run by a column that each adds, in the order in which they observe.

    Attributes:
        needed: all columns that something reads.
        reads: of each column that an estimator adds, the column that names the estimator, and what it reads.
    """

    providers: dict[str, Provider]
    needed: frozenset[str]
    reads: Mapping[str, tuple[str, frozenset[str]]] = field(default_factory=dict)

    def before(self, columns: Iterable[str]) -> list[str]:
        """The names of the estimators that add these columns, and of those before them, in their order."""
        waiting, seen = [column for column in columns if column in self.reads], set[str]()
        while waiting:
            column = waiting.pop()
            if column not in seen:
                seen.add(column)
                waiting += [each for each in self.reads[column][1] if each in self.reads]
        names = {self.reads[column][0] for column in seen}
        return [name for name in self.providers if name in names]

    def loads(self, config: Config) -> list[Load]:
        """The models that they hold on every GPU."""
        each = [declared(provider.builder) for provider in self.providers.values()]
        return [load for one in each for load in one.loads(config, self.needed)]

    def passes(self, config: Config) -> dict[str, Passes]:
        """What they compute, by a column that each adds."""
        return {
            column: declared(provider.builder).passes(config, self.needed)
            for column, provider in self.providers.items()
        }

    def build(self, context: Context) -> dict[str, Estimator]:
        return {column: one.builder(context, **one.options) for column, one in self.providers.items()}


def observers(config: Config, wanted: Mapping[str, str], there: Iterable[str] = ()) -> Observers:
    """What adds the wanted columns, and all that these need, each behind what it reads.

    Args:
        wanted: columns that credit, loss and regularisers read, with who reads each, for the error.
        there: columns that rollouts bring.

    Raises:
        UserError: nothing adds a column, some wait for each other, or one does not fit the config.
    """
    table, brought = providers(config), set(there)
    readers = {column: who for column, who in wanted.items() if column not in brought}
    while True:  # what an estimator needs may depend on which others there are
        reads = {column: _reads(table, column, config, readers) - brought for column in readers}
        more = {column: f"the estimator of {reader}" for reader, columns in reads.items() for column in sorted(columns)}
        if more.keys() <= readers.keys():
            break
        readers = more | readers
    try:
        order = list(TopologicalSorter({column: sorted(reads[column]) for column in sorted(reads)}).static_order())
    except CycleError as error:
        raise UserError(
            f"estimators: {' needs '.join(error.args[1][::-1])}; one cannot come before the other"
        ) from error
    first = {id(provider): column for column, provider in reversed(table.items())}  # one provider may add several
    chosen = {first[id(table[column])]: table[column] for column in order}
    named = {column: (first[id(table[column])], frozenset(reads[column])) for column in order}
    return Observers(chosen, frozenset(readers) | (wanted.keys() & brought), named)


def providers(config: Config) -> dict[str, Provider]:
    """The provider of each column: the table's, and those that the config names."""
    shared = {builder: Provider(builder) for builder in PROVIDERS.values()}
    named = {column: shared[builder] for column, builder in PROVIDERS.items()}
    for column, choice in config.estimators.items():
        section = f"estimators.{column}"
        names = NAMES.get(column, {})
        builder = by_name(section, choice.name, names)
        check_options(section, choice.name, builder, choice.options)
        named[column] = Provider(builder, choice.options)
        if choice.name in names:  # for all columns that it adds
            named |= {other: named[column] for other, one in PROVIDERS.items() if one is PROVIDERS[column]}
    return named


def _reads(table: Mapping[str, Provider], column: str, config: Config, readers: Mapping[str, str]) -> set[str]:
    """The columns that the estimator of this one needs."""
    if column not in table:
        raise UserError(
            f"{readers[column]} needs {column}, which nothing here provides; name an estimator for it with "
            f"--estimators.{column} my_package.my_builder"
        )
    return set(declared(table[column].builder).needs(config, readers.keys()))
