"""An audit of credit: saved completions, rollouts from their steps, and the credit that functions give them.

What is measured is kept in a file of records, a tree a line, as soon as it is there, so that an audit which was killed
goes on where it was.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.records import to_records
from stepcredit.forest.types import Tree
from stepcredit.growth.options import PrefixValueOptions
from stepcredit.growth.prefix_values import Plan, Prefix, Returns, Rollouts, Steps, measure, with_values
from stepcredit.policy.forward import Policy
from stepcredit.report.agreement import HALVES, Array, StepValues
from stepcredit.report.gradients import GradientFit, fit, gradients

log = logging.getLogger("stepcredit")

RIGHT = 1.0  # a completion that gets so much is right


def choose(steps: Sequence[Steps], count: int) -> list[Steps]:
    """Completions of several steps, right and wrong ones in turn, from as many problems as there are.

    Where there are too few of one kind the other fills the place. In the order of the forest.
    """
    several = [each for each in steps if len(each.starts) > 1]
    kinds = [_spread([each for each in several if (each.total >= RIGHT) == right]) for right in (True, False)]
    turns = [each for pair in zip_longest(*kinds) for each in pair if each is not None]
    return sorted(turns[:count], key=lambda each: each.leaf)


def _spread(steps: Sequence[Steps]) -> list[Steps]:
    """The first completion of every tree, then the second of each, and so on."""
    seen: dict[int, int] = {}
    keys = []
    for each in steps:
        seen[each.tree] = seen.get(each.tree, 0) + 1
        keys.append((seen[each.tree], each.leaf))
    return [each for _, each in sorted(zip(keys, steps, strict=True), key=lambda pair: pair[0])]


# ---------------------------------------------------------------------- what was measured before


class Book:
    """Measured trees in a file of records; the first line has the settings.

    A line that was cut short by a kill is dropped, and measured again.

    Args:
        settings: all that the values depend on.

    Raises:
        UserError: the file is of other settings, or of something else.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.records: dict[int, dict[str, Any]] = {}
        if path is None or not path.is_file() or not path.stat().st_size:
            return
        whole, dropped = [], 0
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
                audit = record["audit"]
                tree = int(audit["tree"])
            except (json.JSONDecodeError, KeyError, TypeError, ValueError):
                dropped += bool(line.strip())
                continue
            self._compare(audit["settings"])
            self.records[tree] = record
            whole.append(line + "\n")
        if not whole:
            raise UserError(f"--out: {path} is not a file of an audit; name another")
        if dropped:
            log.warning("%s: %d lines cannot be read; what they held is measured again", path, dropped)
        beside = path.with_name(f".part-{path.name}")
        beside.write_text("".join(whole), encoding="utf-8")
        beside.replace(path)
        log.warning("going on with %d trees of %s", len(whole), path)

    def _compare(self, before: Mapping[str, Any]) -> None:
        for name, value in self.settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"--out: {self.path} was measured with another {name} ({before.get(name)!r:.60}, now "
                    f"{value!r:.60}); remove it or name another"
                )

    def returns(self, steps: Sequence[Steps]) -> dict[Prefix, list[float]]:
        """What is known of the prefixes of these completions."""
        found: dict[Prefix, list[float]] = {}
        for each in steps:
            rows = self.records.get(each.tree, {}).get("audit", {}).get("returns", {})
            known = rows.get(str(each.leaf))
            if known is not None:
                found |= zip(each.prefixes, known, strict=True)
        return found

    def write(self, forest: Forest, steps: Sequence[Steps], returns: Returns) -> None:
        """Append trees that were measured whole; `steps` are those of their completions."""
        if self.path is None:
            return
        forest, _ = with_values(forest, steps, returns)
        lines = []
        for tree in dict.fromkeys(each.tree for each in steps):
            own = {
                each.leaf: [list(returns[prefix]) for prefix in each.prefixes] for each in steps if each.tree == tree
            }
            (one,) = forest.select_trees(torch.tensor([tree])).to_trees()
            one.extra = one.extra | {"audit": {"tree": tree, "returns": own, "settings": self.settings}}
            lines += [json.dumps(record, ensure_ascii=False) for record in to_records(Forest.from_trees([one]))]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))


def measure_all(
    rollouts: Rollouts,
    forest: Forest,
    made: Plan,
    given: PrefixValueOptions,
    book: Book,
    on_progress: Callable[[int], None] = lambda completions: None,
    forget: Callable[[], None] = lambda: None,
) -> dict[Prefix, list[float]]:
    """The returns of all prefixes of a plan, whole trees at a time; those in the book are not sampled again.

    Args:
        on_progress: called with the number of completions that are done.
        forget: called after each batch of trees, to free what a sampler keeps of them.
    """
    returns = book.returns(made.steps)
    known = [each for each in made.steps if all(prefix in returns for prefix in each.prefixes)]
    on_progress(len(known))
    for batch in _batches(made, rollouts.sampler.max_rows, {each.leaf for each in known}):
        found = measure(rollouts, forest, Plan(batch, made.num_rollouts, made.every), given)
        returns |= {prefix: list(row) for prefix, row in found.items()}
        book.write(forest, batch, returns)
        on_progress(len(batch))
        forget()
    return returns


def _batches(made: Plan, max_rows: int, known: set[int]) -> Iterable[list[Steps]]:
    """Completions of whole trees, enough to fill the sampler's rows."""
    batch: list[Steps] = []
    size = 0
    for tree in dict.fromkeys(each.tree for each in made.steps if each.leaf not in known):
        own = [each for each in made.steps if each.tree == tree]
        batch += own
        size += made.num_rollouts * len({prefix for each in own for prefix in each.prefixes})
        if size >= max_rows:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Measured:
    """Completions whose steps have values: with the steps that rollouts could tell apart."""

    steps: list[Steps]
    values: list[StepValues]

    @classmethod
    def of(cls, forest: Forest, steps: Sequence[Steps], returns: Returns) -> "Measured":
        """Completions whose prompt and at least one later prefix have judged rollouts.

        Args:
            forest: flat, with the rewards inside completions that it was saved with.
        """
        inside = forest.token.get("token_rewards", torch.zeros(forest.num_tokens)).double()
        kept, values = [], []
        for each in steps:
            starts = [start for start, prefix in zip(each.starts, each.prefixes, strict=True) if returns.get(prefix)]
            if len(starts) < 2 or starts[0] != 0:
                continue
            own = Steps(each.leaf, each.tree, each.rows, each.token_ids, tuple(starts), each.total)
            rewards = [float(inside[part].sum()) for part in parts(own)]
            kept.append(own)
            outcome = float(forest.segment["reward"][each.leaf])
            values.append(StepValues([list(returns[prefix]) for prefix in own.prefixes], rewards, outcome))
        return cls(kept, values)

    def by_step(self, advantages: Tensor) -> list[Array]:
        """[steps] of each completion: the mean credit of a step's tokens, given that of all tokens."""
        return [numpy.array([float(advantages[part].double().mean()) for part in parts(each)]) for each in self.steps]

    def by_token(self, forest: Forest, part: slice = slice(None)) -> Tensor:
        """[num_tokens] the Monte-Carlo advantage of each token's step, of a part of the rollouts; 0 elsewhere."""
        advantages = torch.zeros(forest.num_tokens, dtype=torch.float64)
        for each, values in zip(self.steps, self.values, strict=True):
            for rows, value in zip(parts(each), values.advantages(part)[0], strict=True):
                advantages[rows] = float(value)
        return advantages

    def tokens(self, forest: Forest) -> Tensor:
        """[num_tokens] the tokens of these completions."""
        own = torch.zeros(forest.num_tokens, dtype=torch.bool)
        for each in self.steps:
            own[each.rows] = True
        return own


CEILING = "noise ceiling"


def gradient_fits(
    policy: Policy, forest: Forest, measured: Measured, credits: Mapping[str, Tensor], config: Config
) -> dict[str, GradientFit]:
    """How well the policy gradient by each credit points where that by the Monte-Carlo advantages does.

    The last one, `CEILING`, is that of the advantages by one half of the rollouts with those by the other; it is absent
    with a single rollout of a prefix.

    Args:
        forest: flat.
        credits: [num_tokens] advantages.
    """
    own = measured.tokens(forest)
    columns = {name: torch.where(own, values.double(), 0.0) for name, values in credits.items()}
    columns["truth"] = measured.by_token(forest)
    if all(len(row) > 1 for each in measured.values for row in each.returns):
        columns |= {f"half/{n}": measured.by_token(forest, half) for n, half in enumerate(HALVES)}
    temperature = config.sampler.temperature or 1.0
    made = gradients(policy, forest, columns, temperature, config.optim.max_tokens_per_micro_batch)
    fits = {name: fit(made[name], made["truth"]) for name in credits}
    if "half/0" in made:
        fits[CEILING] = fit(made["half/0"], made["half/1"])
    return fits


def parts(steps: Steps) -> list[Tensor]:
    """Rows of the tokens of each step."""
    ends = [*steps.starts[1:], len(steps.token_ids)]
    return [steps.rows[start:end] for start, end in zip(steps.starts, ends, strict=True)]


def check_trees(source: str, trees: Sequence[Tree], policy: Policy) -> None:
    """Refuse rollouts that the model cannot go on from.

    Raises:
        UserError: a tree has no prompt, or token ids are beyond the model.
    """
    for tree in trees:
        if not tree.prompt_ids:
            raise UserError(f"{source}: tree '{tree.problem.id}' has no prompt_ids, so nothing can go on from it")
        highest = max([*tree.prompt_ids, *(token for segment in tree.segments for token in segment.token_ids)])
        if highest >= policy.vocabulary:
            raise UserError(
                f"{source}: tree '{tree.problem.id}' has token id {highest}; the vocabulary of --model ends at "
                f"{policy.vocabulary - 1}"
            )
