"""Trees: completions that branch at the ends of their steps (arXiv 2506.05183, section 3.1).

All nodes of a level of all trees are sampled in one call, so that there are many rows and short ones are replaced by
others, and the sampler reuses the keys and values of what it has sampled before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
        """Add what was sampled after this node, cut at these numbers of tokens: a child, its child, and so on."""
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
        """Merge the only child, its only child, and so on, into this node."""
        while self.children:
            (child,) = self.children
            self.token_ids += child.token_ids
            self.columns = {name: values + child.columns[name] for name, values in self.columns.items()}
            self.finish, self.path, self.children = child.finish, child.path, child.children


class _GrowingTree:
    """The tree of one problem while it is sampled.

    Attributes:
        open: nodes of the last level that may branch.
        stopped: nodes that were stopped and will not branch; they are yet to be completed.
    """

    def __init__(self, problem: Problem, prompt: list[int], seed: int) -> None:
        self.problem, self.prompt, self.seed = problem, prompt, seed
        self.root = _Node()
        self.open = [self.root]
        self.stopped: list[_Node] = []
        self.branched = 0

    def next_seed(self) -> int:
        """The seed of the next node; that of the root is the tree's own, so that trees of depth 1 are groups."""
        self.branched += 1
        return self.seed if self.branched == 1 else mixed(self.seed, self.branched)

    def nodes(self) -> list[tuple[_Node, int]]:
        """All nodes but the root with the index of their parent, parents first, a path's nodes together."""
        nodes: list[tuple[_Node, int]] = []
        waiting = [(child, -1) for child in reversed(self.root.children)]
        while waiting:
            node, parent = waiting.pop()
            waiting += [(child, len(nodes)) for child in reversed(node.children)]
            nodes.append((node, parent))
        return nodes

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
    within its limits even if all of its new completions run to the length limit; otherwise its completion is finished
    as a single segment.

    Args:
        rule: where a segment ends before the end of its completion.
    """
    trees = [_GrowingTree(problem, encode(problem), seed) for problem, seed in zip(problems, seeds, strict=True)]
    grow = _complete if shape.mode == "complete" else _stepwise
    for level in range(shape.depth):
        limit = params.max_new_tokens
        nodes = [(growing, node) for growing in trees for node in _nodes_to_branch(growing, shape, level, limit)]
        if nodes:
            grow(sampler, nodes, params, shape, rule, level)
    _finish(sampler, [(growing, node) for growing in trees for node in growing.stopped], params)
    return Forest.from_trees([growing.to_tree() for growing in trees])


def _nodes_to_branch(growing: _GrowingTree, shape: TreeOptions, level: int, limit: int) -> list[_Node]:
    """The open nodes of a tree that branch now; the others are completed without branching."""
    waiting, growing.open = growing.open, []
    if level == 0:  # `check_limits` has made sure that it fits
        return waiting
    present = [node for node, _ in growing.nodes()]
    segments, tokens = len(present), sum(len(node.token_ids) for node in present)
    tokens += sum(limit - len(node.path) for node in [*waiting, *growing.stopped] if not node.children)  # yet to come
    complete = shape.mode == "complete"
    more_segments = (shape.num_branches - 1) * (shape.depth - level) if complete else shape.num_branches
    branching = []
    for node in waiting:
        more_tokens = (shape.num_branches - 1) * (limit - len(node.path))
        if 0 < shape.max_segments < segments + more_segments or 0 < shape.max_tokens < tokens + more_tokens:
            node.absorb()
            if not complete:
                growing.stopped.append(node)
        else:
            segments, tokens = segments + more_segments, tokens + more_tokens
            branching.append(node)
    return branching


GrowingNodes = Sequence[tuple[_GrowingTree, _Node]]


def _complete(
    sampler: Sampler, nodes: GrowingNodes, params: SamplingParams, shape: TreeOptions, rule: StepRule, level: int
) -> None:
    """Sample to the end and cut: a node has as many children as the tree has branches, one of them from before."""
    max_cuts = shape.depth - 1 - level  # of a completion that begins at this level

    def num_reusable(token_ids: list[int]) -> int:
        return max(rule.ends(token_ids, max_cuts), default=0)

    rows = shape.num_branches if level == 0 else shape.num_branches - 1  # below the root one child is there already
    groups = _sample(sampler, nodes, rows, params, params.max_new_tokens, num_reusable if max_cuts else None)
    for (_, node), group in zip(nodes, groups, strict=True):
        for sampled in group:
            node.add(sampled, rule.ends(sampled.token_ids, max_cuts))
    for growing, node in nodes:
        growing.open += [child for child in node.children if child.children]


def _stepwise(
    sampler: Sampler, nodes: GrowingNodes, params: SamplingParams, shape: TreeOptions, rule: StepRule, level: int
) -> None:
    """Sample to the end of the step, on the last level to the end of the completion."""
    last = level == shape.depth - 1
    stop = set(sampler.stop_token_ids if params.stop_token_ids is None else params.stop_token_ids)
    step_params, most = params, params.max_new_tokens
    if not last:
        step_params = params.model_copy(update={"stop_token_ids": sorted(stop | rule.delimiters)})
        most = rule.tokens or most

    def num_reusable(token_ids: list[int]) -> int:
        return 0 if token_ids[-1] in stop else len(token_ids)

    groups = _sample(sampler, nodes, shape.num_branches, step_params, most, None if last else num_reusable)
    for (growing, node), group in zip(nodes, groups, strict=True):
        for sampled in group:
            node.add(sampled, ())
            child = node.children[-1]
            if child.token_ids[-1] in stop:
                child.finish = "stop"
            elif len(child.path) >= params.max_new_tokens:
                child.finish = "length"
            else:
                child.finish = "cut"
                growing.open.append(child)


def _finish(sampler: Sampler, nodes: GrowingNodes, params: SamplingParams) -> None:
    """Complete nodes that were stopped and did not branch."""
    if not nodes:
        return
    for (_, node), group in zip(nodes, _sample(sampler, nodes, 1, params, params.max_new_tokens, None), strict=True):
        node.add(group[0], ())
        node.absorb()


def _sample(
    sampler: Sampler,
    nodes: GrowingNodes,
    rows: int,
    params: SamplingParams,
    most: int,
    num_reusable: Callable[[list[int]], int] | None,
) -> list[list[Segment]]:
    """`rows` completions of each node, of at most `most` tokens; no path is longer than `params.max_new_tokens`."""
    return sampler.sample(
        [[*growing.prompt, *node.path] for growing, node in nodes],
        rows,
        params,
        [growing.next_seed() for growing, _ in nodes],
        [min(most, params.max_new_tokens - len(node.path)) for _, node in nodes],
        num_reusable,
    )
