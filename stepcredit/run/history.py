"""What is known of problems that were sampled before: their running accuracy, and which are skipped for it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepcredit.forest import Forest
from stepcredit.seeds import EXPLORING, generator, mixed

Groups = tuple[
    tuple[float, bool], ...
]  # of the last groups of a problem the accuracy, and whether all values were alike
History = Mapping[str, Groups]  # by the id of the problem


@dataclass(frozen=True)
class Chosen:
    """The next problems.

    Attributes:
        numbers: of the problems.
        drawn: training problems taken from the task, skipped ones too.
        right, wrong: how many were skipped because they are always right, or always wrong.
        explored: how many are among the numbers although they are one of these.
    """

    numbers: list[int]
    drawn: int
    right: int = 0
    wrong: int = 0
    explored: int = 0


def choose(
    history: History,
    length: int,
    drawn: int,
    count: int,
    name_of: Callable[[int], str | None],
    chance: Callable[[int], bool],
) -> Chosen:
    """The next `count` problems from number `drawn` on, settled ones skipped.

    Args:
        length: groups after which a problem can be settled; 0 skips none.
        name_of: the id of a problem by its number; None where it comes only once.
        chance: by its number, whether a settled problem is taken all the same; now and then it must be.
    """
    if not length:
        return Chosen(list(range(drawn, drawn + count)), drawn + count)
    numbers: list[int] = []
    right = wrong = explored = 0
    while len(numbers) < count:
        name = name_of(drawn)
        groups = history.get(name, ()) if name is not None else ()
        if not settled(groups, length):
            numbers.append(drawn)
        elif chance(drawn):
            explored += 1
            numbers.append(drawn)
        elif accuracy(groups) == 1:
            right += 1
        else:
            wrong += 1
        drawn += 1
    return Chosen(numbers, drawn, right, wrong, explored)


def accuracy(groups: Groups) -> float:
    """A problem's running accuracy: mean over its last groups of the share of right completions."""
    return sum(share for share, _ in groups) / len(groups)


def settled(groups: Groups, length: int) -> bool:
    """Whether there is nothing to learn from a problem.

    In each of its last `length` groups all completions were right, or in each all were wrong and alike: the first
    reward function gave them one value. Partial credit that differs is no reason to skip.
    """
    return len(groups) >= length and all(alike for _, alike in groups) and accuracy(groups) in (0.0, 1.0)


def with_groups(history: History, forest: Forest, names: Sequence[str | None], length: int) -> dict[str, Groups]:
    """A history with the groups of a judged forest; those without a judged completion say nothing.

    Args:
        names: the id of each tree's problem; None where it is not to be kept.
    """
    trees = forest.segment["tree"].tolist()
    judged = (forest.segment["is_leaf"] & forest.segment["has_reward"]).nonzero().squeeze(1).tolist()
    values: dict[int, list[float]] = {}
    for leaf in judged:
        parts = forest.details[leaf]["rewards"].values()
        value = next(iter(parts), float(forest.segment["reward"][leaf]))
        if value is not None:
            values.setdefault(trees[leaf], []).append(value)
    after = dict(history)
    for tree, of_tree in sorted(values.items()):
        if (name := names[tree]) is not None:
            share = sum(value >= 1 for value in of_tree) / len(of_tree)
            after[name] = (*after.get(name, ()), (share, len(set(of_tree)) == 1))[-length:]
    return after


def from_state(state: Mapping[str, Any]) -> History:
    """A history as a checkpoint has it: lists for tuples."""
    return {name: tuple((share, alike) for share, alike in groups) for name, groups in state.items()}


def is_explored(seed: int, number: int, explore: float) -> bool:
    """Whether a settled problem is sampled all the same: chance `explore`, fixed by the run's seed and the number."""
    return bool(generator(mixed(seed, EXPLORING, number)).random() < explore)
