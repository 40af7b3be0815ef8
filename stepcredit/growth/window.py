"""Groups whose completions are sampled window by window, over several iterations (partial rollouts; T-PPO's sampling,
arXiv 2506.15050)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.samplers.base import SamplerInWindows
from stepcredit.samplers.params import SamplingParams, Stream

VERSION = "version"  # token column of carried completions: of the weights that each token was sampled with
AGE = "age"  # token column of what is trained on: by how many versions these weights are older than the present ones


@dataclass(frozen=True)
class Carried:
    """A group on its way.

    Attributes:
        tree: its problem, its prompt, and a segment for each completion, of finish "open" until it has ended, without
            tokens until it has begun.
        number: of the problem; place: what the seed is made of.
        drawn: tokens of each completion that the last window added; 0 for those that had ended before.
    """

    tree: Tree
    number: int
    place: int
    drawn: tuple[int, ...] = ()

    @classmethod
    def begin(cls, problem: Problem, prompt: Sequence[int], number: int, place: int, group_size: int) -> "Carried":
        segments = [Segment([], finish="open") for _ in range(group_size)]
        return cls(Tree(problem, prompt, segments), number, place)

    @property
    def open(self) -> list[int]:
        """The completions that have not ended."""
        return [index for index, segment in enumerate(self.tree.segments) if segment.finish == "open"]

    @property
    def begun(self) -> bool:
        return any(len(segment.token_ids) for segment in self.tree.segments)


def sample_window(
    sampler: SamplerInWindows,
    groups: Sequence[Carried],
    params: SamplingParams,
    seeds: Sequence[int],
    window: int,
    version: int,
) -> list[Carried]:
    """The groups with at most `window` tokens more in each completion that has not ended.

    What is sampled with unchanged weights does not depend on the window: each completion goes on in its own random
    numbers, those that it has as one of `flat`'s group.

    Args:
        seeds: one for each group.
        version: of the sampler's weights.
    """
    rows = [(group, index) for group, carried in enumerate(groups) for index in carried.open]
    prompts, limits, streams = [], [], []
    for group, index in rows:
        tree = groups[group].tree
        tokens = tree.segments[index].token_ids
        prompts.append([*tree.prompt_ids, *tokens])
        limits.append(max(1, min(window, params.max_new_tokens - len(tokens))))
        streams.append(Stream(index, len(tree.segments), len(tokens)))
    drawn = sampler.sample(prompts, 1, params, [seeds[group] for group, _ in rows], limits, streams=streams)
    segments = [list(carried.tree.segments) for carried in groups]
    counts = [[0] * len(each) for each in segments]
    for (group, index), (more,) in zip(rows, drawn, strict=True):
        segments[group][index] = _longer(segments[group][index], more, params.max_new_tokens, version)
        counts[group][index] = len(more.token_ids)
    return [
        replace(carried, tree=replace(carried.tree, segments=own), drawn=tuple(count))
        for carried, own, count in zip(groups, segments, counts, strict=True)
    ]


def _longer(segment: Segment, more: Segment, limit: int, version: int) -> Segment:
    """A completion with what a window added."""
    tokens = [*segment.token_ids, *more.token_ids]
    added = more.columns | {VERSION: [float(version)] * len(more.token_ids)}
    columns: dict[str, Sequence[float]] = {
        name: [*segment.columns.get(name, ()), *values] for name, values in added.items()
    }
    goes_on = more.finish == "length" and len(tokens) < limit
    return Segment(tokens, finish="open" if goes_on else more.finish, columns=columns)


# ---------------------------------------------------------------------- what is trained on


def whole_tree(carried: Carried, version: int) -> Tree:
    """The tree of a group that has ended, with the age of each token."""
    tree = carried.tree
    return replace(tree, segments=[_part(one, 0, len(one.token_ids), version) for one in tree.segments])


def window_tree(carried: Carried, version: int) -> Tree:
    """The completions of a group that have new tokens; those of earlier windows stand in a segment before them."""
    segments: list[Segment] = []
    for one, count in zip(carried.tree.segments, carried.drawn, strict=True):
        if not count:
            continue
        total, parent = len(one.token_ids), -1
        if total > count:
            parent = len(segments)
            segments.append(replace(_part(one, 0, total - count, version), finish="cut"))
        segments.append(replace(_part(one, total - count, total, version), parent=parent))
    return replace(carried.tree, segments=segments)


def _part(segment: Segment, start: int, end: int, version: int) -> Segment:
    columns = {name: values[start:end] for name, values in segment.columns.items() if name != VERSION}
    columns[AGE] = [version - each for each in segment.columns[VERSION][start:end]]
    return Segment(segment.token_ids[start:end], finish=segment.finish, columns=columns)


def with_past(forest: Forest) -> Forest:
    """A forest of `window_tree`s whose segments say which are of earlier windows."""
    return forest.with_segment(past=~forest.segment["is_leaf"])


# ---------------------------------------------------------------------- in checkpoints


def to_state(groups: Sequence[Carried]) -> dict[str, Any]:
    """For `stepcredit.run.state`, bit for bit but for the problems, which the task draws again."""
    forest = Forest.from_trees([carried.tree for carried in groups])
    names = {name: torch.tensor([getattr(each, name) for each in groups]) for name in ("number", "place")}
    return forest.with_tree(**names).state_dict()


def from_state(state: dict[str, Any]) -> tuple[Carried, ...]:
    """The inverse of `to_state`."""
    forest = Forest.from_state(state)
    numbers, places = forest.tree["number"].tolist(), forest.tree["place"].tolist()
    return tuple(map(Carried, forest.to_trees(), numbers, places))
