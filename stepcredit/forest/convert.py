"""Forests from trees and from saved states, and back."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.forest.table import FINISH_CODE, ZERO_WHERE_ABSENT, Table
from stepcredit.forest.types import FINISHES, Problem, Segment, Tree

if TYPE_CHECKING:
    from stepcredit.forest.forest import Forest

_OWN_TOKEN_COLUMNS = {"token_ids", "segment", "position", "source"}
_SEGMENT_ROW = ("tree", "parent", "finish", "sampled", "reward", "has_reward", "mask")


def fields_of_trees(trees: Sequence[Tree]) -> dict[str, Any]:
    """The fields of the forest of these trees.

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
    columns = {name: _token_column(trees, segments, name) for name in _column_names(segments)}
    return {
        "problems": tuple(tree.problem for tree in trees),
        "prompt_ids": _flat([tree.prompt_ids for tree in trees], torch.long),
        "tree": Table(
            len(trees),
            {"prompt_start": prompt_length.cumsum(0) - prompt_length, "prompt_length": prompt_length},
        ),
        "segment": segment_table,
        "token": Table(
            int(length.sum()),
            {
                "token_ids": _flat([segment.token_ids for segment in segments], torch.long),
                "segment": torch.arange(len(segments)).repeat_interleave(length),
                **columns,
            },
        ),
        "details": tuple({"rewards": segment.rewards, "extra": segment.extra} for segment in segments),
        "tree_extra": tuple(tree.extra for tree in trees),
    }


def trees_of(forest: "Forest") -> list[Tree]:
    """The inverse of `fields_of_trees`; token columns added since then become `Segment.columns`."""
    bounds = [*forest.segment["start"].tolist(), forest.num_tokens]
    prompt_bounds = [*forest.tree["prompt_start"].tolist(), len(forest.prompt_ids)]
    token_ids = forest.token["token_ids"].tolist()
    prompt_ids = forest.prompt_ids.tolist()
    columns = {name: forest.token[name].tolist() for name in forest.token if name not in _OWN_TOKEN_COLUMNS}
    judged = forest.judged.tolist()
    values = forest.segment["value"].tolist() if "value" in forest.segment else None
    kept = forest.segment["kept"].tolist() if "kept" in forest.segment else None
    trees = [
        Tree(problem, prompt_ids[start:end], [], extra)
        for problem, start, end, extra in zip(
            forest.problems, prompt_bounds[:-1], prompt_bounds[1:], forest.tree_extra, strict=True
        )
    ]
    first: dict[int, int] = {}
    rows = zip(*(forest.segment[name].tolist() for name in _SEGMENT_ROW), strict=True)
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
                rewards=forest.details[index]["rewards"],
                masked=not mask,
                value=values[index] if values and judged[index] else None,
                pruned=kept is not None and not kept[index],
                columns={name: column[span] for name, column in columns.items()},
                extra=forest.details[index]["extra"],
            )
        )
    return trees


def state_of(forest: "Forest") -> dict[str, Any]:
    """All tables with every column, for `stepcredit.run.state`; what JSON cannot express becomes text."""
    return {
        "problems": [_plain(vars(problem)) for problem in forest.problems],
        "prompt_ids": forest.prompt_ids,
        **{name: dict(getattr(forest, name)) for name in ("tree", "segment", "token")},
        "details": [_plain(detail) for detail in forest.details],
        "tree_extra": [_plain(extra) for extra in forest.tree_extra],
    }


def fields_of_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `state_of`."""
    rows = {
        "tree": len(state["problems"]),
        "segment": len(state["details"]),
        "token": len(state["token"]["token_ids"]),
    }
    return {
        "problems": tuple(Problem(**problem) for problem in state["problems"]),
        "prompt_ids": state["prompt_ids"],
        **{name: Table(count, state[name]) for name, count in rows.items()},
        "details": tuple(state["details"]),
        "tree_extra": tuple(state["tree_extra"]),
    }


def _flat(rows: Sequence[Sequence[Any]], dtype: torch.dtype) -> Tensor:
    return torch.tensor(list(chain.from_iterable(rows)), dtype=dtype)


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
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
