"""Selecting, joining and reordering forests, table by table, so that every column is included."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.forest.table import SOURCE_COLUMNS, ZERO_WHERE_ABSENT, Table

if TYPE_CHECKING:
    from stepcredit.forest.forest import Forest


def selected(forest: "Forest", keep: Tensor) -> dict[str, Any]:
    """The fields of the forest of the kept segments and all their ancestors."""
    keep = with_ancestors(forest, keep)
    segments = keep.nonzero().squeeze(1)
    tokens = keep[forest.token["segment"]].nonzero().squeeze(1)
    kept_trees = torch.zeros(forest.num_trees, dtype=torch.bool)
    kept_trees[forest.segment["tree"][segments]] = True
    trees = kept_trees.nonzero().squeeze(1)
    new_segment = keep.cumsum(0) - 1
    new_tree = kept_trees.cumsum(0) - 1
    parent = forest.segment["parent"][segments]
    length = forest.segment["length"][segments]
    prompt_length = forest.tree["prompt_length"][trees]
    tree_of_prompt = torch.arange(forest.num_trees).repeat_interleave(forest.tree["prompt_length"])
    segment_table = forest.segment.rows(segments).with_columns(
        {
            "tree": new_tree[forest.segment["tree"][segments]],
            "parent": torch.where(parent < 0, parent, new_segment[parent.clamp(min=0)]),
            "start": length.cumsum(0) - length,
            "source": forest.segment["source"][segments] if "source" in forest.segment else segments,
        }
    )
    token_table = forest.token.rows(tokens).with_columns(
        {
            "segment": new_segment[forest.token["segment"][tokens]],
            "source": forest.token["source"][tokens] if "source" in forest.token else tokens,
        }
    )
    return {
        "problems": tuple(forest.problems[index] for index in trees.tolist()),
        "prompt_ids": forest.prompt_ids[kept_trees[tree_of_prompt]],
        "tree": forest.tree.rows(trees).with_columns({"prompt_start": prompt_length.cumsum(0) - prompt_length}),
        "segment": segment_table,
        "token": token_table,
        "details": tuple(forest.details[index] for index in segments.tolist()),
        "tree_extra": tuple(forest.tree_extra[index] for index in trees.tolist()),
    }


def with_ancestors(forest: "Forest", keep: Tensor) -> Tensor:
    """[num_segments] True for the kept segments and all their ancestors."""
    keep = keep.clone()
    for level in forest.levels_deepest_first():
        rows = level[keep[level]]
        keep[forest.segment["parent"][rows]] = True
    return keep


def joined(forests: "Sequence[Forest]") -> dict[str, Any]:
    """The fields of the forest of all trees of one or more forests.

    Raises:
        UserError: a forest lacks a column that another has.
    """
    shifts = {
        name: _shifts([getattr(forest, f"num_{name}s") for forest in forests]) for name in ("tree", "segment", "token")
    }
    prompts = _shifts([len(forest.prompt_ids) for forest in forests])
    moved = []
    for number, forest in enumerate(forests):
        parent = forest.segment["parent"]
        moved.append(
            replace(
                forest.with_segment(
                    tree=forest.segment["tree"] + shifts["tree"][number],
                    parent=torch.where(parent < 0, parent, parent + shifts["segment"][number]),
                    start=forest.segment["start"] + shifts["token"][number],
                ).with_token(segment=forest.token["segment"] + shifts["segment"][number]),
                tree=forest.tree.with_columns({"prompt_start": forest.tree["prompt_start"] + prompts[number]}),
            )
        )
    return {
        "problems": tuple(chain.from_iterable(forest.problems for forest in moved)),
        "prompt_ids": torch.cat([forest.prompt_ids for forest in moved]),
        "tree": _stacked(moved, "tree"),
        "segment": _stacked(moved, "segment"),
        "token": _stacked(moved, "token"),
        "details": tuple(chain.from_iterable(forest.details for forest in moved)),
        "tree_extra": tuple(chain.from_iterable(forest.tree_extra for forest in moved)),
    }


def ordered(forest: "Forest", order: Tensor) -> dict[str, Any]:
    """The fields of the forest of the same trees in another order."""
    sizes = torch.zeros(forest.num_trees, dtype=torch.long).index_add_(
        0, forest.segment["tree"], torch.ones(forest.num_segments, dtype=torch.long)
    )
    segments = _ranges(sizes.cumsum(0) - sizes, sizes, order)
    tokens = _ranges(forest.segment["start"], forest.segment["length"], segments)
    prompt_tokens = _ranges(forest.tree["prompt_start"], forest.tree["prompt_length"], order)
    new_tree, new_segment = torch.empty_like(order), torch.empty_like(segments)
    new_tree[order], new_segment[segments] = torch.arange(len(order)), torch.arange(len(segments))
    parent = forest.segment["parent"][segments]
    length = forest.segment["length"][segments]
    prompt_length = forest.tree["prompt_length"][order]
    return {
        "problems": tuple(forest.problems[index] for index in order.tolist()),
        "prompt_ids": forest.prompt_ids[prompt_tokens],
        "tree": forest.tree.rows(order).with_columns({"prompt_start": prompt_length.cumsum(0) - prompt_length}),
        "segment": forest.segment.rows(segments).with_columns(
            {
                "tree": new_tree[forest.segment["tree"][segments]],
                "parent": torch.where(parent < 0, parent, new_segment[parent.clamp(min=0)]),
                "start": length.cumsum(0) - length,
            }
        ),
        "token": forest.token.rows(tokens).with_columns({"segment": new_segment[forest.token["segment"][tokens]]}),
        "details": tuple(forest.details[index] for index in segments.tolist()),
        "tree_extra": tuple(forest.tree_extra[index] for index in order.tolist()),
    }


def _shifts(sizes: Sequence[int]) -> list[int]:
    """The number of rows before each of several tables of these sizes."""
    return [0, *accumulate(sizes)][:-1]


def _ranges(start: Tensor, length: Tensor, rows: Tensor) -> Tensor:
    """The numbers from start to start + length of each of these rows, one range after the other.

    >>> _ranges(torch.tensor([0, 2, 5]), torch.tensor([2, 3, 1]), torch.tensor([2, 0])).tolist()
    [5, 0, 1]
    """
    sizes = length[rows]
    before = sizes.cumsum(0) - sizes
    return torch.arange(int(sizes.sum())) + (start[rows] - before).repeat_interleave(sizes)


def _stacked(forests: "Sequence[Forest]", name: str) -> Table:
    """The rows of one table of all forests, one forest after the other."""
    tables: list[Table] = [getattr(forest, name) for forest in forests]
    columns = {column: table[column] for table in tables for column in table if column not in SOURCE_COLUMNS}
    joined_columns: dict[str, Tensor] = {}
    for column, example in columns.items():
        pieces = []
        for forest, table in zip(forests, tables, strict=True):
            if column not in table and column not in ZERO_WHERE_ABSENT:
                which = f"'{forest.problems[0].id}'" if forest.problems else "none"
                raise UserError(
                    f"forests cannot be joined: trees from {which} on lack the {name} column '{column}', others have it"
                )
            pieces.append(table.get(column, example.new_zeros((table.num_rows, *example.shape[1:]))))
        joined_columns[column] = torch.cat(pieces)
    return Table(sum(table.num_rows for table in tables), joined_columns)
