"""The same rollouts under several credit functions: what each gives every token, and how alike they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from stepcredit.config import CreditConfig, resolve
from stepcredit.config.algorithms import ALGORITHMS
from stepcredit.credit import CREDIT, needs_of
from stepcredit.credit.choose import build_credit
from stepcredit.display.rollouts import SavedGroup
from stepcredit.display.runs import Run
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.types import Segment, Tree


@dataclass(frozen=True)
class FirstErrorDetection:
    """Whether credit tells where a completion goes wrong, over the wrong completions whose lines can be checked.

    Attributes:
        count: such completions.
        uniform: share of them in which all lines get the same credit, as of outcome credit.
        accuracy: share of the others whose line with the lowest credit is the first wrong one, equally low lines
            sharing the hit; None where there are no others.
        chance: the accuracy of a line taken at random; None where there are no others.
    """

    count: int
    uniform: float
    accuracy: float | None
    chance: float | None


@dataclass(frozen=True)
class CreditComparison:
    """
    Attributes:
        own: the run's credit function, or the label of its sum of several.
        scores: [num_tokens] advantages by credit function, in the order of the groups' segments.
        correlation: Pearson's, over the tokens that are trained on, rows and columns in the order of `scores`; None
            where one of the two is constant.
        spread: standard deviation over those tokens.
        first_error: by credit function, of the embedded task.
        missing: credit functions that do not fit these rollouts, and why.
    """

    own: str
    scores: dict[str, Tensor]
    correlation: list[list[float | None]]
    spread: dict[str, float]
    first_error: dict[str, FirstErrorDetection] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def compare_credits(
    run: Run, groups: Sequence[SavedGroup], names: Sequence[str | CreditConfig] = ()
) -> CreditComparison:
    """Give the groups the credit of several functions: the run's with its options, the others with their defaults.

    Functions for flat forests see each completion of a tree as one of a group; a token that several completions share
    gets the mean of what they give it. Means over the batch are over these groups alone.

    Args:
        names: of `CREDIT`, or dotted paths; or credit with options or sums of several. Empty: all that fit.

    Raises:
        UserError: a name that was given is not known or does not fit.
    """
    own = label_of_run(run)
    forest = Forest.from_trees([group.tree for group in groups])
    scores: dict[str, Tensor] = {}
    missing: dict[str, str] = {}
    for label, config in _configs(run, names).items():
        try:
            scores[label] = score_tokens(forest, config())
        except UserError as error:
            if names:
                raise
            missing[label] = str(error)
    active = (
        forest.judged[forest.token["segment"]] & forest.token_sampled & forest.segment["mask"][forest.token["segment"]]
    )
    active_scores = [score[active].double() for score in scores.values()]
    return CreditComparison(
        own,
        scores,
        [[_correlation(first, second) for second in active_scores] for first in active_scores],
        {
            name: float(score.std()) if len(score) > 1 else 0.0
            for name, score in zip(scores, active_scores, strict=True)
        },
        {name: _first_error_detection(groups, score) for name, score in scores.items()},
        missing,
    )


def _configs(run: Run, names: Sequence[str | CreditConfig]) -> dict[str, Callable[[], CreditConfig]]:
    """Credit to compute, by label: the run's own with its options, a function that is named with its algorithm's."""
    configs: dict[str, Callable[[], CreditConfig]] = {}
    own = run.config.get("credit.name")
    for given in names or dict.fromkeys([*([str(own)] if own else []), *CREDIT]):
        if isinstance(given, str):
            label = label_of_run(run) if given == own else given
            configs[label] = partial(_own if given == own else _named, run, given)
        else:
            options = "".join(f" {name} {value}" for name, value in given.options.items() if given.sum is None)
            configs[given.label + options] = partial(lambda config: config, given)
    return configs


def label_of_run(run: Run) -> str:
    """The name of the run's credit function, or its sum of several as a formula; empty where it is not known."""
    name = str(run.config.get("credit.name", ""))
    return _own(run, name).label if run.config.get("credit.sum") else name


def _own(run: Run, name: str) -> CreditConfig:
    given = {key.removeprefix("credit."): value for key, value in run.config.items() if key.startswith("credit.")}
    return resolve({"model": "none", "credit": given | {"name": name}}).credit


def _named(run: Run, name: str) -> CreditConfig:
    if name in ALGORITHMS and ALGORITHMS[name].credit == name:
        return resolve({"algorithm": name, "model": run.config.get("model", "embedded")}).credit
    return CreditConfig(name=name)


def score_tokens(forest: Forest, config: CreditConfig) -> Tensor:
    """[num_tokens] the credit of a forest, which may branch where the function is for flat ones (`unfold`)."""
    function, assign = build_credit(config)
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
        first = [next(starts) for _ in tree.segments]  # rows of the first tokens
        parents = {segment.parent for segment in tree.segments}
        copies: list[Segment] = []
        for leaf in (number for number in range(len(tree.segments)) if number not in parents):
            path = [leaf]
            while (parent := tree.segments[path[-1]].parent) >= 0:
                path.append(parent)
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


def _first_error_detection(groups: Sequence[SavedGroup], score: Tensor) -> FirstErrorDetection:
    hits: list[float] = []
    chances: list[float] = []
    uniform = start = 0
    for group in groups:
        sizes = [len(texts) for texts in group.texts]
        first = [start + sum(sizes[:number]) for number in range(len(sizes))]
        start += sum(sizes)
        for leaf in group.leaves:
            path = group.path(leaf)
            reward = group.tree.segments[leaf].reward
            if reward is None or reward >= 1 or not any(group.wrong[segment] for segment in path):
                continue
            means, wrong = _step_means(group, path, first, score)
            rounding = 1e-5 * max(1.0, max(map(abs, means)))
            lowest = [number for number, mean in enumerate(means) if mean <= min(means) + rounding]
            if len(lowest) == len(means):
                uniform += 1
                continue
            hits.append((wrong in lowest) / len(lowest))
            chances.append(1 / len(means))
    count = len(hits) + uniform
    if not hits:
        return FirstErrorDetection(count, 1.0 if count else 0.0, None, None)
    return FirstErrorDetection(count, uniform / count, sum(hits) / len(hits), sum(chances) / len(chances))


def _step_means(group: SavedGroup, path: Sequence[int], first: Sequence[int], score: Tensor) -> tuple[list[float], int]:
    """The mean credit of each step of a completion, and the number of the one in which the first wrong line begins.

    Args:
        first: of each segment of the group the row of its first token in `score`.
    """
    steps: list[list[int]] = []  # rows of their tokens
    wrong: int | None = None
    for segment in path:
        span = group.wrong[segment]
        for place in range(len(group.texts[segment])):
            if place in group.steps[segment] or not steps:
                steps.append([])
            steps[-1].append(first[segment] + place)
            if span and wrong is None and place == span[0]:
                wrong = len(steps) - 1
    return [float(score[rows].mean()) for rows in steps], wrong or 0
