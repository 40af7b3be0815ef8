"""The same rollouts under several credit functions: what each gives every token, and how alike they are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepcredit.config import CreditConfig, resolve
from stepcredit.config.algorithms import ALGORITHMS
from stepcredit.credit import CREDIT, needs_of
from stepcredit.credit.choose import build_credit
from stepcredit.display.rollouts import Group
from stepcredit.display.runs import Run
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.types import Segment, Tree


@dataclass(frozen=True)
class Blame:
    """Whether a credit function tells where a completion goes wrong, over wrong completions whose lines are checked.

    Attributes:
        count: such completions.
        silent: share of them in which all lines get the same: outcome credit says nothing about lines.
        found: share of the others whose lowest line is the first wrong one, equally low lines sharing the hit; None
            where there are none.
        chance: what a line taken at random would give for those.
    """

    count: int
    silent: float
    found: float | None
    chance: float | None


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        own: the run's credit function.
        scores: [num_tokens] advantages by credit function, in the order of the groups' segments.
        correlation: Pearson's, over the tokens that are trained on, rows and columns in the order of `scores`; None
            where one of the two is constant.
        spread: standard deviation over those tokens.
        blame: by credit function, of the embedded task.
        missing: credit functions that do not fit these rollouts, and why.
    """

    own: str
    scores: dict[str, Tensor]
    correlation: list[list[float | None]]
    spread: dict[str, float]
    blame: dict[str, Blame] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def compare_credits(run: Run, groups: Sequence[Group], names: Sequence[str] = ()) -> Comparison:
    """Give the groups the credit of several functions: the run's with its options, the others with their defaults.

    Functions for flat forests see each completion of a tree as one of a group; a token that several completions share
    gets the mean of what they give it. Means over the batch are over these groups alone.

    Args:
        names: of `CREDIT`, or dotted paths; empty: all that fit.

    Raises:
        UserError: a name that was given is not known or does not fit.
    """
    own = str(run.config.get("credit.name", ""))
    forest = Forest.from_trees([group.tree for group in groups])
    scores: dict[str, Tensor] = {}
    missing: dict[str, str] = {}
    for name in names or dict.fromkeys([*([own] if own else []), *CREDIT]):
        try:
            scores[name] = _score(forest, name, _options(run, name))
        except UserError as error:
            if names:
                raise
            missing[name] = str(error)
    active = (
        forest.judged[forest.token["segment"]] & forest.token_sampled & forest.segment["mask"][forest.token["segment"]]
    )
    kept = [score[active].double() for score in scores.values()]
    return Comparison(
        own,
        scores,
        [[_correlation(first, second) for second in kept] for first in kept],
        {name: float(score.std()) if len(score) > 1 else 0.0 for name, score in zip(scores, kept, strict=True)},
        {name: _blame(groups, score) for name, score in scores.items()},
        missing,
    )


def _options(run: Run, name: str) -> dict[str, Any]:
    """The run's own options for its credit function, an algorithm's defaults for another one."""
    if name == run.config.get("credit.name"):
        given = {key.removeprefix("credit."): value for key, value in run.config.items() if key.startswith("credit.")}
        return {key: value for key, value in given.items() if key != "name"}
    if name in ALGORITHMS:
        return resolve({"algorithm": name, "model": run.config.get("model", "embedded")}).credit.options
    return {}


def _score(forest: Forest, name: str, options: dict[str, Any]) -> Tensor:
    function, assign = build_credit(CreditConfig(name=name, **options))
    if needs_of(function).forests == "tree" or forest.is_flat:
        return assign(forest).token["advantages"]
    flat, source = unfold(forest)
    given = assign(flat).token["advantages"]
    judged = flat.judged[flat.token["segment"]]
    total = torch.zeros(forest.num_tokens).index_add(0, source[judged], given[judged])
    count = torch.zeros(forest.num_tokens).index_add(0, source[judged], torch.ones(int(judged.sum())))
    return total / count.clamp(min=1)


def unfold(forest: Forest) -> tuple[Forest, Tensor]:
    """Every completion by itself: a flat forest, and for each of its tokens the token of the forest that it copies."""
    trees: list[Tree] = []
    source: list[int] = []
    starts = iter(forest.segment["start"].tolist())
    for tree in forest.to_trees():
        first = [next(starts) for _ in tree.segments]
        parents = {segment.parent for segment in tree.segments}
        copies: list[Segment] = []
        for leaf in (number for number in range(len(tree.segments)) if number not in parents):
            path = [leaf]
            while (up := tree.segments[path[-1]].parent) >= 0:
                path.append(up)
            for number in reversed(path):
                segment = tree.segments[number]
                parent = len(copies) - 1 if number != path[-1] else -1
                copies.append(Segment(**(vars(segment) | {"parent": parent})))
                source += range(first[number], first[number] + len(segment.token_ids))
        trees.append(Tree(tree.problem, tree.prompt_ids, copies))
    return Forest.from_trees(trees), torch.tensor(source, dtype=torch.long)


def _correlation(first: Tensor, second: Tensor) -> float | None:
    first, second = first - first.mean(), second - second.mean()
    size = float(first.norm() * second.norm())
    return float(first @ second) / size if size > 1e-12 else None


def _blame(groups: Sequence[Group], score: Tensor) -> Blame:
    hits: list[float] = []
    chances: list[float] = []
    silent = start = 0
    for group in groups:
        sizes = [len(pieces) for pieces in group.pieces]
        first = [start + sum(sizes[:number]) for number in range(len(sizes))]
        start += sum(sizes)
        for leaf in group.leaves:
            path = group.path(leaf)
            reward = group.tree.segments[leaf].reward
            if reward is None or reward >= 1 or not any(group.wrong[segment] for segment in path):
                continue
            means, wrong = _lines(group, path, first, score)
            rounding = 1e-5 * max(1.0, max(map(abs, means)))
            lowest = [number for number, mean in enumerate(means) if mean <= min(means) + rounding]
            if len(lowest) == len(means):
                silent += 1
                continue
            hits.append((wrong in lowest) / len(lowest))
            chances.append(1 / len(means))
    count = len(hits) + silent
    share = silent / count if count else 0.0
    return Blame(count, share, *((sum(each) / len(each) if each else None) for each in (hits, chances)))


def _lines(group: Group, path: Sequence[int], first: Sequence[int], score: Tensor) -> tuple[list[float], int]:
    """The mean credit of each step of a completion, and the number of the one in which the first wrong line begins."""
    lines: list[list[int]] = []
    wrong = 0
    found = False
    for segment in path:
        span = group.wrong[segment]
        for place in range(len(group.pieces[segment])):
            if place in group.steps[segment] or not lines:
                lines.append([])
            lines[-1].append(first[segment] + place)
            if span and not found and place == span[0]:
                wrong, found = len(lines) - 1, True
    return [float(score[rows].mean()) for rows in lines], wrong
