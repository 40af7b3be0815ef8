"""Saved rollouts as they are looked at: texts of tokens, the numbers behind them, where steps and wrong lines are."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepcredit.display.pieces import Pieces, visible
from stepcredit.display.runs import Run
from stepcredit.errors import UserError
from stepcredit.forest.records import read_records
from stepcredit.forest.types import Tree

COLUMNS = {  # of a token: what it is called, in the order of the switch
    "advantages": "advantage",
    "process": "process part",
    "logprobs": "log-probability",
    "entropy": "entropy",
    "log_ratio": "log-ratio to the reference",
    "prm_log_ratio": "log-ratio of the reward model",
    "token_rewards": "token reward",
    "weights": "weight in the loss",
}


@dataclass(frozen=True)
class Group:
    """The completions of one problem; every list has an entry for each segment of the tree.

    Attributes:
        tree: what the record holds, without credit; for scoring it anew.
        question: of the problem, as text.
        pieces: texts of the tokens.
        columns: by the names of `COLUMNS`, numbers of the tokens; None for segments that have none (pruned ones).
        values: what the credit took segments to be worth, where it says so.
        pruned: left out of the loss by the credit.
        steps: tokens with which a step begins, within the segment.
        wrong: first and last (exclusive) token of what lies of the first wrong line within the segment, where lines
            can be checked.
    """

    tree: Tree
    question: str
    pieces: list[list[str]]
    columns: dict[str, list[list[float] | None]]
    values: list[float | None]
    pruned: list[bool]
    steps: list[list[int]]
    wrong: list[tuple[int, int] | None]

    @property
    def leaves(self) -> list[int]:
        """Segments that end a completion."""
        parents = {segment.parent for segment in self.tree.segments}
        return [number for number in range(len(self.tree.segments)) if number not in parents]

    def path(self, segment: int) -> list[int]:
        """Segments from the prompt down to this one."""
        found = []
        while segment >= 0:
            found.append(segment)
            segment = self.tree.segments[segment].parent
        return found[::-1]

    @property
    def rewards(self) -> list[float]:
        """Of the judged completions."""
        found = [self.tree.segments[leaf].reward for leaf in self.leaves]
        return [reward for reward in found if reward is not None]


def read_groups(run: Run, iteration: int, pieces: Pieces) -> list[Group]:
    """The groups that the run saved in an iteration.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    return groups_of(run.files[iteration], pieces, embedded=run.config.get("task.data") == "embedded")


def groups_of(path: Path, pieces: Pieces, embedded: bool = False) -> list[Group]:
    """The groups of a record file.

    Args:
        embedded: the problems are those of the embedded task, whose lines can be checked.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    records = list(read_records(str(path)))
    pieces.learn(token for _, tree in records for segment in tree.segments for token in segment.token_ids)
    return [_group(record, tree, pieces, embedded, f"{path}: tree '{tree.problem.id}'") for record, tree in records]


def _group(record: dict[str, Any], tree: Tree, pieces: Pieces, embedded: bool, where: str) -> Group:
    texts = [pieces.of(segment.token_ids) for segment in tree.segments]
    saved = record["segments"]
    for name in ("advantages", "process", "weights"):
        for number, (segment, text) in enumerate(zip(saved, texts, strict=True)):
            values = segment.get(name)
            if values is not None and not (isinstance(values, list) and len(values) == len(text)):
                raise UserError(f"{where}, segment {number}: {name} has not one number for each of {len(text)} tokens")
    columns = {name: [_column(segment, name) for segment in saved] for name in COLUMNS}
    group = Group(
        tree=tree,
        question=visible(_question(tree.problem.question)),
        pieces=texts,
        columns={name: rows for name, rows in columns.items() if any(row is not None for row in rows)},
        values=[segment.get("value") for segment in saved],
        pruned=[bool(segment.get("pruned")) for segment in saved],
        steps=[],
        wrong=[None] * len(texts),
    )
    group.steps.extend(_steps(group, "." if embedded else "\n"))
    if embedded:
        _mark_wrong(group)
    return group


def _column(segment: dict[str, Any], name: str) -> list[float] | None:
    if name == "logprobs":
        return segment.get("old_logprobs") or segment.get("rollout_logprobs") or segment.get("logprobs")
    if name in ("log_ratio", "prm_log_ratio"):
        first = segment.get("old_logprobs" if name == "log_ratio" else "prm_logprobs")
        reference = segment.get("ref_logprobs")
        return [one - ref for one, ref in zip(first, reference, strict=True)] if first and reference else None
    return segment.get(name)


def _question(question: str | list[dict[str, str]]) -> str:
    if isinstance(question, str):
        return question
    said = (message if isinstance(message, dict) else {"content": message} for message in question)
    return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in said)


def _steps(group: Group, delimiter: str) -> Iterator[list[int]]:
    """Where steps begin: behind a delimiter; a segment that has a sibling is a step of its own."""
    parents = [segment.parent for segment in group.tree.segments]
    children = Counter(parents)
    ends: dict[int, bool] = {-1: True}  # whether a step ends with the segment
    for number, texts in enumerate(group.pieces):
        closed = ends[parents[number]] or children[parents[number]] > 1
        starts = []
        for place, text in enumerate(texts):
            if closed:
                starts.append(place)
            closed = delimiter in text
        ends[number] = closed
        yield starts


def _mark_wrong(group: Group) -> None:
    """Find the first wrong line of every completion; completions whose lines do not have their form are left out."""
    from stepcredit.demo.chain import check_lines

    for leaf in group.leaves:
        path = group.path(leaf)
        tokens = [(segment, place) for segment in path for place in range(len(group.pieces[segment]))]
        texts = [group.pieces[segment][place] for segment, place in tokens]
        ends = [place + 1 for place, text in enumerate(texts) if text.strip() == "."]
        lines = [(start, end) for start, end in zip([0, *ends], [*ends, len(texts)], strict=True) if end > start]
        try:
            checks = check_lines(group.question, "".join(texts))
        except (ValueError, KeyError, IndexError):
            continue  # a problem of the user's own
        wrong = next((number for number, check in enumerate(checks) if not check.ok), None)
        if wrong is None or len(lines) != len(checks):
            continue
        for segment, place in tokens[slice(*lines[wrong])]:
            first, last = group.wrong[segment] or (place, place)
            group.wrong[segment] = min(first, place), max(last, place + 1)


def choose(groups: Sequence[Group], problem: str) -> Group:
    """The group of a problem, by its id or its number from 1 on.

    Raises:
        UserError: there is none; the ids that there are.
    """
    for group in groups:
        if group.tree.problem.id == problem:
            return group
    if problem.isdigit() and 1 <= int(problem) <= len(groups):
        return groups[int(problem) - 1]
    ids = ", ".join(visible(group.tree.problem.id) for group in groups[:6])
    raise UserError(
        f"no problem '{problem}' among the {len(groups)} saved; give 1 to {len(groups)} or an id ({ids} ...)"
    )
