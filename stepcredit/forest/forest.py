"""`Forest`: a batch of trees as three tables of columns, with no padding anywhere.

    tree     [num_trees]      prompt_start, prompt_length, and what is added: version (of the sampling weights)
    segment  [num_segments]   tree, parent, depth, start, length, is_leaf, sampled, finish, reward, has_reward, mask,
                              what a credit function of trees adds: value, kept; and where completions are sampled in
                              windows that are trained on one by one, `past`: tokens of earlier windows
    token    [num_tokens]     token_ids, segment, position, and whatever is added: old_logprobs, advantages, weights ...

Rows of a table are in the order of the trees. `segment["parent"]` is a row of the segment table (-1 = the prompt).
`token["position"]` counts the sampled tokens before this one on its path, over all segments of the path.

Example: the prompt `[1, 5]` with the completions `[7, 2]` and `[8, 9, 2]`.

>>> from stepcredit.forest.types import Problem, Segment, Tree
>>> forest = Forest.from_trees([Tree(Problem(id="a"), [1, 5], [Segment([7, 2], reward=1.0), Segment([8, 9, 2])])])
>>> forest.token["token_ids"].tolist(), forest.token["segment"].tolist(), forest.token["position"].tolist()
([7, 2, 8, 9, 2], [0, 0, 1, 1, 1], [0, 1, 0, 1, 2])
>>> forest.segment["reward"].tolist(), forest.segment["has_reward"].tolist()
([1.0, 0.0], [True, False])
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.forest.convert import fields_of_state, fields_of_trees, state_of, trees_of
from stepcredit.forest.rearrange import joined, ordered, selected
from stepcredit.forest.table import FINISH_CODE, Table
from stepcredit.forest.types import Problem, Tree

__all__ = ["FINISH_CODE", "Forest", "Table"]


@dataclass(frozen=True)
class Forest:
    """A batch of trees; immutable, every change makes a new one. Build it with `Forest.from_trees`."""

    problems: tuple[Problem, ...]
    prompt_ids: Tensor  # [num_prompt_tokens], the prompts of all trees one after the other
    tree: Table
    segment: Table
    token: Table
    details: tuple[dict[str, Any], ...] = field(repr=False)  # per segment: rewards by name, extra fields
    tree_extra: tuple[dict[str, Any], ...] = field(repr=False)

    # ------------------------------------------------------------------ building

    @classmethod
    def from_trees(cls, trees: Sequence[Tree]) -> "Forest":
        """Turn trees into columns.

        Raises:
            UserError: naming the tree and segment that break a rule of `Tree.validate` or lack a column.
        """
        forest = cls(**fields_of_trees(trees))
        return forest.with_token(position=forest._positions())

    def to_trees(self) -> list[Tree]:
        """The inverse of `from_trees`; token columns added since then become `Segment.columns`."""
        return trees_of(self)

    def state_dict(self) -> dict[str, Any]:
        """All tables with every column, for `stepcredit.run.state`; what JSON cannot express becomes text."""
        return state_of(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Forest":
        """The inverse of `state_dict`."""
        return cls(**fields_of_state(state))

    @classmethod
    def join(cls, forests: "Sequence[Forest]") -> "Forest":
        """All trees of several forests, one after the other, with every column but `source`.

        Raises:
            UserError: a forest lacks a column that another has.
        """
        return cls(**joined(forests)) if forests else cls.from_trees([])

    @classmethod
    def interleave(cls, forests: "Sequence[Forest]") -> "Forest":
        """The first tree of each forest, then the second of each, and so on; the first forests may be longer."""
        if len(forests) == 1:
            return forests[0]
        places = [(row, number) for number, forest in enumerate(forests) for row in range(forest.num_trees)]
        order = sorted(range(len(places)), key=places.__getitem__)
        return cls.join(forests).in_order(torch.tensor(order, dtype=torch.long))

    def in_order(self, order: Tensor) -> "Forest":
        """The same trees in another order.

        Args:
            order: `[num_trees]` row of the tree table that comes first, second, and so on.
        """
        return Forest(**ordered(self, order))

    def select(self, keep: Tensor) -> "Forest":
        """The forest of the kept segments and all their ancestors; trees without a kept segment are left out.

        Args:
            keep: `[num_segments]` bool.

        Returns:
            A forest whose table rows are rows of this one, in the same order. Its columns `segment["source"]` and
            `token["source"]` hold the row in the forest from which the first selection was made.
        """
        return Forest(**selected(self, keep))

    def with_token(self, **columns: Tensor) -> "Forest":
        """A forest with these token columns added or replaced, each `[num_tokens]`."""
        return replace(self, token=self.token.with_columns(columns))

    def with_segment(self, **columns: Tensor) -> "Forest":
        """A forest with these segment columns added or replaced, each `[num_segments]`."""
        return replace(self, segment=self.segment.with_columns(columns))

    def with_tree(self, **columns: Tensor) -> "Forest":
        """A forest with these tree columns added or replaced, each `[num_trees]`."""
        return replace(self, tree=self.tree.with_columns(columns))

    def has(self, column: str) -> bool:
        """Whether one of the tables has this column."""
        return column in self.token or column in self.segment or column in self.tree

    def without_token(self, *names: str) -> "Forest":
        return replace(self, token=Table(self.num_tokens, {k: v for k, v in self.token.items() if k not in names}))

    def select_trees(self, index: Tensor) -> "Forest":
        """The forest of these trees (row numbers of the tree table), in the order of this forest."""
        keep = torch.zeros(self.num_trees, dtype=torch.bool)
        keep[index] = True
        return self.select(keep[self.segment["tree"]])

    # ------------------------------------------------------------------ sizes and links

    @property
    def num_trees(self) -> int:
        return self.tree.num_rows

    @property
    def num_segments(self) -> int:
        return self.segment.num_rows

    @property
    def num_tokens(self) -> int:
        return self.token.num_rows

    @cached_property
    def is_flat(self) -> bool:
        """True when no segment has two children: every token then belongs to exactly one completion."""
        parents = self.segment["parent"][self.segment["parent"] >= 0]
        return len(parents) == len(parents.unique())

    @cached_property
    def ends(self) -> Tensor:
        """[num_segments] True for segments without children in this forest; after a selection not only for leaves."""
        ends = torch.ones(self.num_segments, dtype=torch.bool)
        parent = self.segment["parent"]
        ends[parent[parent >= 0]] = False
        return ends

    @cached_property
    def token_tree(self) -> Tensor:
        """[num_tokens] the tree of each token."""
        return self.segment["tree"][self.token["segment"]]

    @cached_property
    def token_sampled(self) -> Tensor:
        """[num_tokens] False for tool and user tokens."""
        return self.segment["sampled"][self.token["segment"]]

    @cached_property
    def path_offset(self) -> Tensor:
        """[num_segments] tokens (sampled or not) between the prompt and the segment's first token."""
        return self.sum_over_ancestors(self.segment["length"])

    @cached_property
    def path_length(self) -> Tensor:
        """[num_segments] tokens from the first of the prompt to the last of the segment."""
        return self.tree["prompt_length"][self.segment["tree"]] + self.path_offset + self.segment["length"]

    @cached_property
    def previous_token(self) -> Tensor:
        """[num_tokens] row of the token before this one on its path, -1 for the first after the prompt."""
        previous = torch.arange(self.num_tokens) - 1
        parent = self.segment["parent"]
        ends = self.segment["start"] + self.segment["length"] - 1
        previous[self.segment["start"]] = torch.where(parent < 0, -1, ends[parent.clamp(min=0)])
        return previous

    @cached_property
    def next_token(self) -> Tensor:
        """[num_tokens] row of the token after this one in its completion, -1 for the last. Flat forests only."""
        self.require_flat("next_token")
        following = torch.full((self.num_tokens,), -1, dtype=torch.long)
        has_previous = (self.previous_token >= 0).nonzero().squeeze(1)
        following[self.previous_token[has_previous]] = has_previous
        return following

    @cached_property
    def leaf(self) -> Tensor:
        """[num_segments] the leaf that each segment leads to. Flat forests only."""
        self.require_flat("leaf")
        leaf = torch.arange(self.num_segments)
        for level in self.levels_deepest_first():
            leaf[self.segment["parent"][level]] = leaf[level]
        return leaf

    @cached_property
    def siblings(self) -> Tensor:
        """[num_segments] a number for each group of segments that follow the same one, or the same prompt."""
        return torch.where(self.segment["parent"] < 0, -1 - self.segment["tree"], self.segment["parent"])

    @cached_property
    def judged(self) -> Tensor:
        """[num_segments] True where a completion through the segment has a reward."""
        judged = self.segment["has_reward"] & self.segment["is_leaf"]
        for level in self.levels_deepest_first():
            rows = level[judged[level]]
            judged[self.segment["parent"][rows]] = True
        return judged

    @cached_property
    def open(self) -> Tensor:
        """[num_segments] True for leaves of completions that go on in the next iteration."""
        return self.segment["is_leaf"] & (self.segment["finish"] == FINISH_CODE["open"])

    @cached_property
    def judged_or_open(self) -> Tensor:
        """[num_segments] True where a completion through the segment has a reward, or may still get one."""
        if not bool(self.open.any()):
            return self.judged
        either = self.judged | self.open
        for level in self.levels_deepest_first():
            either[self.segment["parent"][level[either[level]]]] = True
        return either

    @cached_property
    def past(self) -> Tensor:
        """[num_tokens] True for tokens of earlier windows, which the policy has learnt from already."""
        if "past" not in self.segment:
            return torch.zeros(self.num_tokens, dtype=torch.bool)
        return self.segment["past"][self.token["segment"]]

    @cached_property
    def fresh(self) -> Tensor:
        """[num_tokens] True for sampled tokens that are of the weights which learn from them, not of older ones."""
        return self.token_sampled & (self.token["age"] == 0) if "age" in self.token else self.token_sampled

    @cached_property
    def usable(self) -> Tensor:
        """[num_tokens] True for tokens that may be learnt from: sampled, judged or of a completion that goes on, not
        masked by a shaper, kept by credit."""
        segment = self.judged_or_open & self.segment["mask"] & self.segment["sampled"]
        if "kept" in self.segment:
            segment = segment & self.segment["kept"]
        return segment[self.token["segment"]]

    @cached_property
    def active(self) -> Tensor:
        """[num_tokens] True for tokens that the policy is trained on: usable ones, but for those of earlier windows."""
        return self.usable & ~self.past

    def require_flat(self, what: str) -> None:
        if not self.is_flat:
            index = int(_first_repeated(self.segment["parent"]))
            tree = self.problems[int(self.segment["tree"][index])].id
            raise UserError(
                f"{what} takes flat forests (one completion per path); tree '{tree}' branches below the prompt"
            )

    def describe_segment(self, index: int) -> str:
        """Name a row of the segment table for an error message: tree id and index within the tree."""
        tree = int(self.segment["tree"][index])
        first = int((self.segment["tree"] == tree).nonzero()[0])
        return f"tree '{self.problems[tree].id}', segment {index - first}"

    def completion_segments(self, leaf: int) -> list[int]:
        """Rows of the segment table on the path to this leaf, from the prompt down."""
        path = [leaf]
        while (parent := int(self.segment["parent"][path[-1]])) >= 0:
            path.append(parent)
        return path[::-1]

    def levels_deepest_first(self) -> Iterator[Tensor]:
        """Rows of each level below the first, deepest level first."""
        depth = self.segment["depth"]
        for level in range(int(depth.max()) if self.num_segments else 0, 0, -1):
            yield (depth == level).nonzero().squeeze(1)

    def sum_over_ancestors(self, values: Tensor) -> Tensor:
        """[num_segments] sum of `values` over the proper ancestors of each segment."""
        total = torch.zeros_like(values)
        parent, depth = self.segment["parent"], self.segment["depth"]
        for level in range(1, int(depth.max()) + 1 if self.num_segments else 1):
            rows = (depth == level).nonzero().squeeze(1)
            above = parent[rows]
            total[rows] = total[above] + values[above]
        return total

    def _positions(self) -> Tensor:
        counted = self.segment["length"] * self.segment["sampled"]
        before = self.sum_over_ancestors(counted)
        within = torch.arange(self.num_tokens) - self.segment["start"][self.token["segment"]]
        return before[self.token["segment"]] + within * self.token_sampled


def _first_repeated(parent: Tensor) -> Tensor:
    """Row of the first segment whose parent already has another child."""
    rows = (parent >= 0).nonzero().squeeze(1)
    _, inverse, counts = parent[rows].unique(return_inverse=True, return_counts=True)
    return rows[counts[inverse] > 1][0]
