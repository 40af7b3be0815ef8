"""The parts of a rollout before it becomes columns: `Problem`, `Segment`, `Tree`.

Example: two completions of the prompt `[1, 5]`, the first one right.

>>> tree = Tree(
...     Problem(question="2 + 2 ?", answer="4", id="p0"),
...     prompt_ids=[1, 5],
...     segments=[Segment([7, 2], reward=1.0), Segment([8, 9, 2], reward=0.0)],
... )
>>> tree.validate()
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stepcredit.errors import UserError

Finish = Literal["stop", "length", "cut", "open"]
FINISHES: tuple[Finish, ...] = ("stop", "length", "cut", "open")

Message = dict[str, Any]


def look(row: Mapping[str, Any], column: str | None) -> Any:
    """The value of a column; `a.b` is entry b of column a, where no column has that very name. None: there is none."""
    if column is None or column in row:
        return row.get(column or "")
    name, dot, inner = column.partition(".")
    value = row.get(name)
    if dot and isinstance(value, str) and value.lstrip()[:1] == "{":  # tables of text have structures as JSON
        value = _from_json(value)
    return look(value, inner) if dot and isinstance(value, Mapping) else None


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


@dataclass
class Problem:
    """A question with its checkable answer.

    Attributes:
        question: plain text, or chat messages `[{"role": ..., "content": ...}]`.
        answer: what the verifier compares with, of the type that the data give it; None where the task needs none.
        id: names the problem in records and errors.
        columns: every further column of the data row, handed to verifiers by name.
        source: what it is from, for metrics of each source of mixed data; "" for none.
    """

    question: str | list[Message] = ""
    answer: Any = None
    id: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass
class Segment:
    """A run of tokens after its parent.

    Attributes:
        token_ids: at least one token; the sampled stop token is included.
        parent: index of the parent segment in the same tree, -1 for the prompt. Parents come before children.
        finish: "stop" (a stop token was sampled), "length" (truncated), "cut" (has children) or "open" (a window of
            sampling ended here, and the completion goes on in the next iteration).
        sampled: False for tool or user tokens: encoded, never weighted, not counted in lengths or positions.
        reward: outcome of the completion that ends here (leaves only); None means unjudged.
        rewards: the named parts of `reward`.
        masked: True when a shaper took it out of the loss.
        value: the value that the credit function gave the segment; never read.
        pruned: True when the credit function left it out of the loss; never read.
        columns: per-token columns by name ("rollout_logprobs", "old_logprobs", "token_rewards" ...).
        extra: anything else that a record carried; kept, never read.
    """

    token_ids: Sequence[int]
    parent: int = -1
    finish: Finish = "stop"
    sampled: bool = True
    reward: float | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    masked: bool = False
    value: float | None = None
    pruned: bool = False
    columns: dict[str, Sequence[float]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Tree:
    """All rollouts of one problem. A completion is a root-to-leaf path; a depth-1 tree is a GRPO group."""

    problem: Problem
    prompt_ids: Sequence[int]
    segments: list[Segment]
    extra: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """Raise `UserError` naming the tree and the segment at fault."""
        name = f"tree '{self.problem.id}'"
        if not self.segments:
            raise UserError(f"{name} has no segments: give it at least one completion")
        parents = {segment.parent for segment in self.segments}
        for index, segment in enumerate(self.segments):
            where = f"{name}, segment {index}"
            if not -1 <= segment.parent < len(self.segments):
                raise UserError(
                    f"{where}: parent {segment.parent} does not exist (the tree has {len(self.segments)} segments; "
                    "-1 means the prompt)"
                )
            if segment.parent >= index:
                raise UserError(f"{where}: parent {segment.parent} must come before its children")
            if len(segment.token_ids) == 0:
                raise UserError(f"{where}: token_ids is empty; a segment needs at least one token")
            if min(segment.token_ids) < 0:
                raise UserError(f"{where}: token_ids has a negative id")
            if segment.finish not in FINISHES:
                raise UserError(f"{where}: finish '{segment.finish}' is not one of {', '.join(FINISHES)}")
            if index in parents and segment.reward is not None:
                raise UserError(f"{where}: has children and a reward; rewards belong to leaves")
            if segment.reward is not None and segment.reward != segment.reward:
                raise UserError(f"{where}: reward is NaN; use null for an unjudged completion")
            for column, values in segment.columns.items():
                if len(values) != len(segment.token_ids):
                    raise UserError(
                        f"{where}: {column} has {len(values)} values for {len(segment.token_ids)} tokens; "
                        "give one number per token"
                    )
