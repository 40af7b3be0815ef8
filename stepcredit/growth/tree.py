"""Trees: completions that branch at the ends of their steps (arXiv 2506.05183, section 3.1).

All nodes of a level of all trees are sampled in one call, so that rows are many and short ones make room for others,
and the sampler goes on from the keys and values of what it has sampled before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.types import Finish, Problem, Segment, Tree
from stepcredit.growth.options import TreeOptions
from stepcredit.growth.steps import StepRule
from stepcredit.samplers.base import Sampler
from stepcredit.samplers.params import SamplingParams
from stepcredit.seeds import mixed


def check_limits(shape: TreeOptions, max_new_tokens: int) -> None:
    """Raise `UserError` when not even the first level fits into the limits of a tree."""
    segments = shape.num_branches * (shape.depth if shape.mode == "complete" else 1)
    if 0 < shape.max_segments < segments:
        raise UserError(f"growth.max_segments: the first completions alone may have {segments}, got less")
    if 0 < shape.max_tokens < shape.num_branches * max_new_tokens:
        raise UserError(
            f"growth.max_tokens: the first {shape.num_branches} completions alone may have "
            f"{shape.num_branches * max_new_tokens} (x sampler.max_new_tokens), got {shape.max_tokens}"
        )


@dataclass(eq=False)
class _Node:
    """A segment that is being grown; the root has no tokens."""

    token_ids: list[int] = field(default_factory=list)
    columns: dict[str, list[float]] = field(default_factory=dict)
    finish: Finish = "cut"
    path: list[int] = field(default_factory=list)  # token ids up to its end, without the prompt
    children: "list[_Node]" = field(default_factory=list)

    def add(self, sampled: Segment, ends: Sequence[int]) -> None:
        """What was sampled behind it, cut at these numbers of tokens: a child, its child, and so on."""
        node = self
        for start, end in pairwise([0, *ends, len(sampled.token_ids)]):
            child = _Node(
                list(sampled.token_ids[start:end]),
                {name: list(values[start:end]) for name, values in sampled.columns.items()},
                path=[*node.path, *sampled.token_ids[start:end]],
            )
            node.children.append(child)
            node = child
        node.finish = sampled.finish

    def absorb(self) -> None:
        """Take over the only child, its only child, and so on."""
        while self.children:
            (child,) = self.children
            self.token_ids += child.token_ids
            self.columns = {name: values + child.columns[name] for name, values in self.columns.items()}
            self.finish, self.path, self.children = child.finish, child.path, child.children


class _Growing:
    """The tree of one problem, and what it may still take.

    Attributes:
        open: nodes of the last level that go on.
        cut: nodes that were stopped and will not branch; they are yet to be completed.
    """

    def __init__(self, problem: Problem, prompt: list[int], seed: int) -> None:
        self.problem, self.prompt, self.seed = problem, prompt, seed
        self.root = _Node()
        self.open = [self.root]
        self.cut: list[_Node] = []
        self.branched = 0

    def next_seed(self) -> int:
        """The tree's own for its root, so that trees of depth 1 are groups."""
        self.branched += 1
        return self.seed if self.branched == 1 else mixed(self.seed, self.branched)

    def nodes(self) -> list[tuple[_Node, int]]:
        """All nodes but the root with the index of their parent, parents first, a path's nodes together."""
        found: list[tuple[_Node, int]] = []
        waiting = [(child, -1) for child in reversed(self.root.children)]
        while waiting:
            node, parent = waiting.pop()
            waiting += [(child, len(found)) for child in reversed(node.children)]
            found.append((node, parent))
        return found

    def to_tree(self) -> Tree:
        segments = [
            Segment(node.token_ids, parent, node.finish, columns=dict(node.columns)) for node, parent in self.nodes()
        ]
        return Tree(self.problem, self.prompt, segments)


def tree(
    sampler: Sampler,
    problems: Sequence[Problem],
    encode: Callable[[Problem], list[int]],
    params: SamplingParams,
    seeds: Sequence[int],
    shape: TreeOptions,
    rule: StepRule,
) -> Forest:
    """A tree of each problem. `params.max_new_tokens` bounds each path; token ids are cut, text is never encoded.

    In mode "complete" whole completions are sampled and cut into segments, so that a node has one child already and
    needs `num_branches - 1` more (the authors' way); "stepwise" stops at the end of a segment and then branches. In
    both, each token is sampled once and each path is a sample of the policy. A node is branched only if the tree stays
    within its limits even when all that it begins runs to the length limit; one that is not runs to its end as a single
    segment.

    Args:
        rule: where a segment ends before the end of its completion.
    """
    trees = [_Growing(problem, encode(problem), seed) for problem, seed in zip(problems, seeds, strict=True)]
    grow = _complete if shape.mode == "complete" else _stepwise
    for level in range(shape.depth):
        chosen = [(one, node) for one in trees for node in _chosen(one, shape, level, params.max_new_tokens)]
        if chosen:
            grow(sampler, chosen, params, shape, rule, level)
    _finish(sampler, [(one, node) for one in trees for node in one.cut], params)
    return Forest.from_trees([one.to_tree() for one in trees])


def _chosen(one: _Growing, shape: TreeOptions, level: int, limit: int) -> list[_Node]:
    """The open nodes of a tree that branch now; the others are completed as they are."""
    waiting, one.open = one.open, []
    if level == 0:  # `check_limits` has seen to it
        return waiting
    nodes = [node for node, _ in one.nodes()]
    segments, tokens = len(nodes), sum(len(node.token_ids) for node in nodes)
    tokens += sum(limit - len(node.path) for node in [*waiting, *one.cut] if not node.children)  # yet to come
    complete = shape.mode == "complete"
    more_segments = (shape.num_branches - 1) * (shape.depth - level) if complete else shape.num_branches
    chosen = []
    for node in waiting:
        more_tokens = (shape.num_branches - 1) * (limit - len(node.path))
        if 0 < shape.max_segments < segments + more_segments or 0 < shape.max_tokens < tokens + more_tokens:
            node.absorb()
            one.cut += [] if complete else [node]
        else:
            segments, tokens = segments + more_segments, tokens + more_tokens
            chosen.append(node)
    return chosen


Chosen = Sequence[tuple[_Growing, _Node]]


def _complete(
    sampler: Sampler, chosen: Chosen, params: SamplingParams, shape: TreeOptions, rule: StepRule, level: int
) -> None:
    """Sample to the end and cut: a node has as many children as the tree has branches, one of them from before."""
    below = shape.depth - 1 - level  # cuts that a completion from here may have

    def keep(token_ids: list[int]) -> int:
        return max(rule.ends(token_ids, below), default=0)

    rows = shape.num_branches - (1 if level else 0)
    groups = _sample(sampler, chosen, rows, params, params.max_new_tokens, keep if below else None)
    for (_, node), group in zip(chosen, groups, strict=True):
        for sampled in group:
            node.add(sampled, rule.ends(sampled.token_ids, below))
    for one, node in chosen:
        one.open += [child for child in node.children if child.children]


def _stepwise(
    sampler: Sampler, chosen: Chosen, params: SamplingParams, shape: TreeOptions, rule: StepRule, level: int
) -> None:
    """Sample to the end of the step, on the last level to the end of the completion."""
    last = level == shape.depth - 1
    stop = set(sampler.stop_token_ids if params.stop_token_ids is None else params.stop_token_ids)
    until, most = params, params.max_new_tokens
    if not last:
        until = replace(params, stop_token_ids=tuple(sorted(stop | rule.delimiters)))
        most = rule.tokens or most

    def keep(token_ids: list[int]) -> int:
        return 0 if token_ids[-1] in stop else len(token_ids)

    groups = _sample(sampler, chosen, shape.num_branches, until, most, None if last else keep)
    for (one, node), group in zip(chosen, groups, strict=True):
        for sampled in group:
            node.add(sampled, ())
            child = node.children[-1]
            stopped = child.token_ids[-1] in stop
            ended = stopped or len(child.path) >= params.max_new_tokens
            child.finish = "stop" if stopped else "length" if ended else "cut"
            if not ended:
                one.open.append(child)


def _finish(sampler: Sampler, cut: Chosen, params: SamplingParams) -> None:
    """Complete nodes that were stopped and did not branch."""
    if not cut:
        return
    for (_, node), group in zip(cut, _sample(sampler, cut, 1, params, params.max_new_tokens, None), strict=True):
        node.add(group[0], ())
        node.absorb()


def _sample(
    sampler: Sampler,
    chosen: Chosen,
    rows: int,
    params: SamplingParams,
    most: int,
    keep: Callable[[list[int]], int] | None,
) -> list[list[Segment]]:
    """So many rows behind each node, of at most `most` tokens; no path is longer than `params.max_new_tokens`."""
    return sampler.sample(
        [[*one.prompt, *node.path] for one, node in chosen],
        rows,
        params,
        [one.next_seed() for one, _ in chosen],
        [min(most, params.max_new_tokens - len(node.path)) for _, node in chosen],
        keep,
    )
