"""`Forest`: a batch of trees as three tables of columns, with no padding anywhere.

    tree     [num_trees]      prompt_start, prompt_length
    segment  [num_segments]   tree, parent, depth, start, length, is_leaf, sampled, finish, reward, has_reward, mask,
                              and what a credit function of trees adds: value, kept
    token    [num_tokens]     token_ids, segment, position, and whatever is added: old_logprobs, advantages, weights ...

Rows of a table stand in the order of the trees. `segment["parent"]` is a row of the segment table (-1 = the prompt).
`token["position"]` counts the sampled tokens before this one on its path, over all segments of the path.

Example: the prompt `[1, 5]` with the completions `[7, 2]` and `[8, 9, 2]`.

>>> from stepcredit.forest.types import Problem, Segment, Tree
>>> forest = Forest.from_trees([Tree(Problem(id="a"), [1, 5], [Segment([7, 2], reward=1.0), Segment([8, 9, 2])])])
>>> forest.token["token_ids"].tolist(), forest.token["segment"].tolist(), forest.token["position"].tolist()
([7, 2, 8, 9, 2], [0, 0, 1, 1, 1], [0, 1, 0, 1, 2])
>>> forest.segment["reward"].tolist(), forest.segment["has_reward"].tolist()
([1.0, 0.0], [True, False])
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.forest.types import FINISHES, Problem, Segment, Tree

FINISH_CODE = {name: code for code, name in enumerate(FINISHES)}
ZERO_WHERE_ABSENT = {"token_rewards"}  # token columns that may be missing from some segments; absent means 0


class Table(Mapping[str, Tensor]):
    """Named columns of equal length: a read-only mapping of tensors."""

    def __init__(self, num_rows: int, columns: Mapping[str, Tensor]) -> None:
        for name, column in columns.items():
            if column.shape[:1] != (num_rows,):
                raise ValueError(f"column '{name}' has shape {tuple(column.shape)}, the table has {num_rows} rows")
        self.num_rows = num_rows
        self._columns = dict(columns)

    def __getitem__(self, name: str) -> Tensor:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def with_columns(self, columns: Mapping[str, Tensor]) -> "Table":
        return Table(self.num_rows, {**self._columns, **columns})

    def rows(self, index: Tensor) -> "Table":
        return Table(len(index), {name: column[index] for name, column in self._columns.items()})


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
        for tree in trees:
            tree.validate()
        segments = [segment for tree in trees for segment in tree.segments]
        sizes = torch.tensor([len(tree.segments) for tree in trees], dtype=torch.long)
        first = sizes.cumsum(0) - sizes
        tree_of = torch.arange(len(trees)).repeat_interleave(sizes)
        parent = torch.tensor([segment.parent for segment in segments], dtype=torch.long)
        parent = torch.where(parent < 0, parent, parent + first[tree_of])
        length = torch.tensor([len(segment.token_ids) for segment in segments], dtype=torch.long)
        depth = torch.zeros_like(parent)
        is_leaf = torch.ones(len(segments), dtype=torch.bool)
        for index, up in enumerate(parent.tolist()):
            if up >= 0:
                depth[index] = depth[up] + 1
                is_leaf[up] = False
        prompt_length = torch.tensor([len(tree.prompt_ids) for tree in trees], dtype=torch.long)
        sampled = torch.tensor([segment.sampled for segment in segments], dtype=torch.bool)
        segment_table = Table(
            len(segments),
            {
                "tree": tree_of,
                "parent": parent,
                "depth": depth,
                "start": length.cumsum(0) - length,
                "length": length,
                "is_leaf": is_leaf,
                "sampled": sampled,
                "finish": torch.tensor([FINISH_CODE[segment.finish] for segment in segments], dtype=torch.long),
                "reward": torch.tensor([float(segment.reward or 0.0) for segment in segments], dtype=torch.float32),
                "has_reward": torch.tensor([segment.reward is not None for segment in segments], dtype=torch.bool),
                "mask": torch.tensor([not segment.masked for segment in segments], dtype=torch.bool),
            },
        )
        forest = cls(
            problems=tuple(tree.problem for tree in trees),
            prompt_ids=_flat([tree.prompt_ids for tree in trees], torch.long),
            tree=Table(
                len(trees),
                {"prompt_start": prompt_length.cumsum(0) - prompt_length, "prompt_length": prompt_length},
            ),
            segment=segment_table,
            token=Table(
                int(length.sum()),
                {
                    "token_ids": _flat([segment.token_ids for segment in segments], torch.long),
                    "segment": torch.arange(len(segments)).repeat_interleave(length),
                },
            ),
            details=tuple({"rewards": segment.rewards, "extra": segment.extra} for segment in segments),
            tree_extra=tuple(tree.extra for tree in trees),
        )
        columns = {name: _token_column(trees, segments, name) for name in _column_names(segments)}
        return forest.with_token(position=forest._positions(), **columns)

    def to_trees(self) -> list[Tree]:
        """The inverse of `from_trees`; columns added since then come along as `Segment.columns`."""
        bounds = [*self.segment["start"].tolist(), self.num_tokens]
        prompt_bounds = [*self.tree["prompt_start"].tolist(), len(self.prompt_ids)]
        token_ids = self.token["token_ids"].tolist()
        prompt_ids = self.prompt_ids.tolist()
        columns = {name: self.token[name].tolist() for name in self.token if name not in _OWN_TOKEN_COLUMNS}
        judged = self.judged.tolist()
        values = self.segment["value"].tolist() if "value" in self.segment else None
        kept = self.segment["kept"].tolist() if "kept" in self.segment else None
        trees = [
            Tree(problem, prompt_ids[start:end], [], extra)
            for problem, start, end, extra in zip(
                self.problems, prompt_bounds[:-1], prompt_bounds[1:], self.tree_extra, strict=True
            )
        ]
        first: dict[int, int] = {}
        rows = zip(*(self.segment[name].tolist() for name in _SEGMENT_ROW), strict=True)
        for index, (tree, parent, finish, sampled, reward, has_reward, mask) in enumerate(rows):
            first.setdefault(tree, index)
            span = slice(bounds[index], bounds[index + 1])
            trees[tree].segments.append(
                Segment(
                    token_ids=token_ids[span],
                    parent=-1 if parent < 0 else parent - first[tree],
                    finish=FINISHES[finish],
                    sampled=sampled,
                    reward=reward if has_reward else None,
                    rewards=self.details[index]["rewards"],
                    masked=not mask,
                    value=values[index] if values and judged[index] else None,
                    pruned=kept is not None and not kept[index],
                    columns={name: column[span] for name, column in columns.items()},
                    extra=self.details[index]["extra"],
                )
            )
        return trees

    @classmethod
    def join(cls, forests: "Sequence[Forest]") -> "Forest":
        """All trees of several forests, one after the other."""
        return cls.from_trees([tree for forest in forests for tree in forest.to_trees()])

    @classmethod
    def interleave(cls, forests: "Sequence[Forest]") -> "Forest":
        """The first tree of each forest, then the second of each, and so on; the first forests may be longer."""
        if len(forests) == 1:
            return forests[0]
        dealt = [forest.to_trees() for forest in forests]
        return cls.from_trees([trees[row] for row in range(len(dealt[0])) for trees in dealt if row < len(trees)])

    def state_dict(self) -> dict[str, Any]:
        """All tables with every column, for `stepcredit.run.state`; what JSON cannot say of a problem becomes text."""
        return {
            "problems": [_plain(vars(problem)) for problem in self.problems],
            "prompt_ids": self.prompt_ids,
            **{name: dict(getattr(self, name)) for name in ("tree", "segment", "token")},
            "details": [_plain(detail) for detail in self.details],
            "tree_extra": [_plain(extra) for extra in self.tree_extra],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Forest":
        """The inverse of `state_dict`."""
        rows = {
            "tree": len(state["problems"]),
            "segment": len(state["details"]),
            "token": len(state["token"]["token_ids"]),
        }
        return cls(
            problems=tuple(Problem(**problem) for problem in state["problems"]),
            prompt_ids=state["prompt_ids"],
            **{name: Table(count, state[name]) for name, count in rows.items()},
            details=tuple(state["details"]),
            tree_extra=tuple(state["tree_extra"]),
        )

    def with_token(self, **columns: Tensor) -> "Forest":
        """A forest with these token columns added or replaced, each `[num_tokens]`."""
        return replace(self, token=self.token.with_columns(columns))

    def with_segment(self, **columns: Tensor) -> "Forest":
        """A forest with these segment columns added or replaced, each `[num_segments]`."""
        return replace(self, segment=self.segment.with_columns(columns))

    def without_token(self, *names: str) -> "Forest":
        return replace(self, token=Table(self.num_tokens, {k: v for k, v in self.token.items() if k not in names}))

    def select(self, keep: Tensor) -> "Forest":
        """The forest of the kept segments and all their ancestors; trees with nothing kept are gone.

        Args:
            keep: `[num_segments]` bool.

        Returns:
            A forest whose table rows are rows of this one, in the same order. Its columns `segment["source"]` and
            `token["source"]` hold the row in the forest that was selected from first.
        """
        keep = self._with_ancestors(keep)
        segments = keep.nonzero().squeeze(1)
        tokens = keep[self.token["segment"]].nonzero().squeeze(1)
        kept_trees = torch.zeros(self.num_trees, dtype=torch.bool)
        kept_trees[self.segment["tree"][segments]] = True
        trees = kept_trees.nonzero().squeeze(1)
        new_segment = keep.cumsum(0) - 1
        new_tree = kept_trees.cumsum(0) - 1
        parent = self.segment["parent"][segments]
        length = self.segment["length"][segments]
        prompt_length = self.tree["prompt_length"][trees]
        tree_of_prompt = torch.arange(self.num_trees).repeat_interleave(self.tree["prompt_length"])
        segment_table = self.segment.rows(segments).with_columns(
            {
                "tree": new_tree[self.segment["tree"][segments]],
                "parent": torch.where(parent < 0, parent, new_segment[parent.clamp(min=0)]),
                "start": length.cumsum(0) - length,
                "source": self.segment["source"][segments] if "source" in self.segment else segments,
            }
        )
        token_table = self.token.rows(tokens).with_columns(
            {
                "segment": new_segment[self.token["segment"][tokens]],
                "source": self.token["source"][tokens] if "source" in self.token else tokens,
            }
        )
        return Forest(
            problems=tuple(self.problems[index] for index in trees.tolist()),
            prompt_ids=self.prompt_ids[kept_trees[tree_of_prompt]],
            tree=self.tree.rows(trees).with_columns({"prompt_start": prompt_length.cumsum(0) - prompt_length}),
            segment=segment_table,
            token=token_table,
            details=tuple(self.details[index] for index in segments.tolist()),
            tree_extra=tuple(self.tree_extra[index] for index in trees.tolist()),
        )

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
        """[num_segments] True where nothing of this forest comes after; of a selected forest not only at leaves."""
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
    def active(self) -> Tensor:
        """[num_tokens] True for tokens that are trained on: sampled, judged, not masked by a shaper, kept by credit."""
        segment = self.judged & self.segment["mask"] & self.segment["sampled"]
        if "kept" in self.segment:
            segment = segment & self.segment["kept"]
        return segment[self.token["segment"]]

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
        while (up := int(self.segment["parent"][path[-1]])) >= 0:
            path.append(up)
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
            up = parent[rows]
            total[rows] = total[up] + values[up]
        return total

    # ------------------------------------------------------------------ internals

    def _with_ancestors(self, keep: Tensor) -> Tensor:
        keep = keep.clone()
        for level in self.levels_deepest_first():
            rows = level[keep[level]]
            keep[self.segment["parent"][rows]] = True
        return keep

    def _positions(self) -> Tensor:
        counted = self.segment["length"] * self.segment["sampled"]
        before = self.sum_over_ancestors(counted)
        within = torch.arange(self.num_tokens) - self.segment["start"][self.token["segment"]]
        return before[self.token["segment"]] + within * self.token_sampled


_OWN_TOKEN_COLUMNS = {"token_ids", "segment", "position", "source"}
_SEGMENT_ROW = ("tree", "parent", "finish", "sampled", "reward", "has_reward", "mask")


def _flat(rows: Sequence[Sequence[Any]], dtype: torch.dtype) -> Tensor:
    return torch.tensor(list(chain.from_iterable(rows)), dtype=dtype)


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    return json.loads(json.dumps(value, default=str))


def _column_names(segments: Sequence[Segment]) -> list[str]:
    return sorted({name for segment in segments for name in segment.columns})


def _token_column(trees: Sequence[Tree], segments: Sequence[Segment], name: str) -> Tensor:
    """[num_tokens] fp32; tokens that were not sampled may lack the column and get 0."""
    for tree in trees:
        for index, segment in enumerate(tree.segments):
            if name not in segment.columns and segment.sampled and name not in ZERO_WHERE_ABSENT:
                raise UserError(
                    f"tree '{tree.problem.id}', segment {index}: {name} is missing, other segments have it; "
                    "give it for every sampled segment or for none"
                )
    return _flat([segment.columns.get(name, [0.0] * len(segment.token_ids)) for segment in segments], torch.float32)


def _first_repeated(parent: Tensor) -> Tensor:
    """Row of the first segment whose parent already has another child."""
    rows = (parent >= 0).nonzero().squeeze(1)
    _, inverse, counts = parent[rows].unique(return_inverse=True, return_counts=True)
    return rows[counts[inverse] > 1][0]
