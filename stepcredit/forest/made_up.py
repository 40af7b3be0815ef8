"""Small made-up forests on which functions are tried before anything is sampled."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from stepcredit.forest.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree


def made_up_forest(columns: Iterable[str] = (), branching: bool = False) -> Forest:
    """Two groups with right and wrong completions, and token columns of these names, all 0."""
    ends = [Segment([1, 2, 3], reward=1.0), Segment([4, 5], reward=0.0)]
    if branching:
        steps = [Segment([6], finish="cut"), Segment([7, 8], finish="cut")]
        ends = steps + [replace(end, parent=parent) for parent in range(2) for end in ends]
    forest = Forest.from_trees([Tree(Problem(id=f"made-up-{number}"), [1, 2], ends) for number in range(2)])
    return forest.with_token(**{name: torch.zeros(forest.num_tokens) for name in columns})
