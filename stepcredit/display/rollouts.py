"""Saved rollouts, read for display: texts of tokens, their numbers, where steps and first wrong lines are."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepcredit.display.runs import Run
from stepcredit.display.token_texts import TokenTexts, visible
from stepcredit.errors import UserError
from stepcredit.forest.records import read_records
from stepcredit.forest.table import TERM
from stepcredit.forest.types import Tree

COLUMNS = {  # numbers of tokens: column to title, in the order in which they are offered
    "advantages": "advantage",
    "process": "process part",
    "logprobs": "log-probability",
    "entropy": "entropy",
    "log_ratio": "log-ratio to the reference",
    "prm_log_ratio": "log-ratio of the reward model",
    "token_rewards": "token reward",
    "prefix_value": "value before the step",
    "values": "value",
    "value_target": "what the critic learns",
    "weights": "weight in the loss",
}


def title_of(column: str) -> str:
    """What is said of a column; `term/NAME` is what a term of a sum of credits adds to the advantage."""
    return f"term {column.removeprefix(TERM)}" if column.startswith(TERM) else COLUMNS.get(column, column)


@dataclass(frozen=True)
class SavedGroup:
    """The saved completions of one problem; every list has an entry for each segment of the tree.

    Attributes:
        tree: what the record holds, without credit; to compute other credit on.
        question: of the problem, as text.
        texts: of the tokens.
        columns: by the names of `COLUMNS`, and `term/NAME` for the terms of a sum of credits, numbers of the tokens;
            None for segments that have none (pruned ones).
        values: values of the segments, where the credit function has any.
        pruned: left out of the loss by the credit function.
        steps: tokens with which a step begins, counted within the segment.
        wrong: first and last (exclusive) token of the part of the first wrong line that lies within the segment, where
            lines can be checked.
    """

    tree: Tree
    question: str
    texts: list[list[str]]
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
        path = []
        while segment >= 0:
            path.append(segment)
            segment = self.tree.segments[segment].parent
        return path[::-1]

    @property
    def rewards(self) -> list[float]:
        """Of the judged completions."""
        rewards = [self.tree.segments[leaf].reward for leaf in self.leaves]
        return [reward for reward in rewards if reward is not None]


def read_groups(run: Run, iteration: int, token_texts: TokenTexts) -> list[SavedGroup]:
    """The groups that the run saved in an iteration.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    return read_groups_of_file(run.files[iteration], token_texts, run.config.get("task.data") == "embedded")


def read_groups_of_file(path: Path, token_texts: TokenTexts, embedded: bool = False) -> list[SavedGroup]:
    """The groups of a record file.

    Args:
        embedded: the problems are those of the embedded task, whose lines can be checked.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    records = list(read_records(str(path)))
    token_texts.load(token for _, tree in records for segment in tree.segments for token in segment.token_ids)
    return [
        _group(record, tree, token_texts, embedded, f"{path}: tree '{tree.problem.id}'") for record, tree in records
    ]


def _group(record: dict[str, Any], tree: Tree, token_texts: TokenTexts, embedded: bool, where: str) -> SavedGroup:
    texts = [token_texts.of(segment.token_ids) for segment in tree.segments]
    segments = record["segments"]
    _check_lengths(segments, texts, where)
    terms = dict.fromkeys(TERM + name for segment in segments for name in segment.get("terms") or ())
    columns = {name: [_column(segment, name) for segment in segments] for name in (*COLUMNS, *terms)}
    group = SavedGroup(
        tree=tree,
        question=visible(_question_text(tree.problem.question)),
        texts=texts,
        columns={name: rows for name, rows in columns.items() if any(row is not None for row in rows)},
        values=[segment.get("value") for segment in segments],
        pruned=[bool(segment.get("pruned")) for segment in segments],
        steps=list(_step_starts(tree, texts, "." if embedded else "\n")),
        wrong=[None] * len(texts),
    )
    if embedded:
        _mark_first_wrong_lines(group)
    return group


def _check_lengths(segments: Sequence[dict[str, Any]], texts: Sequence[list[str]], where: str) -> None:
    for number, (segment, tokens) in enumerate(zip(segments, texts, strict=True)):
        terms = segment.get("terms") or {}
        if not isinstance(terms, dict):
            raise UserError(f"{where}, segment {number}: terms has not a list of numbers for each name")
        given = {name: segment.get(name) for name in ("advantages", "process", "weights")}
        for name, values in (given | {f"terms.{term}": values for term, values in terms.items()}).items():
            if values is not None and not (isinstance(values, list) and len(values) == len(tokens)):
                raise UserError(
                    f"{where}, segment {number}: {name} has not one number for each of {len(tokens)} tokens"
                )


def _column(segment: dict[str, Any], name: str) -> list[float] | None:
    if name == "logprobs":
        return segment.get("old_logprobs") or segment.get("rollout_logprobs") or segment.get("logprobs")
    if name in ("log_ratio", "prm_log_ratio"):
        first = segment.get("old_logprobs" if name == "log_ratio" else "prm_logprobs")
        reference = segment.get("ref_logprobs")
        if not first or not reference:
            return None
        return [logprob - other for logprob, other in zip(first, reference, strict=True)]
    if name.startswith(TERM):
        terms: dict[str, list[float]] = segment.get("terms") or {}
        return terms.get(name.removeprefix(TERM))
    return segment.get(name)


def _question_text(question: str | list[dict[str, str]]) -> str:
    if isinstance(question, str):
        return question
    messages = (message if isinstance(message, dict) else {"content": message} for message in question)
    return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in messages)


def _step_starts(tree: Tree, texts: Sequence[list[str]], delimiter: str) -> Iterator[list[int]]:
    """Where steps begin: after a delimiter; a segment that has a sibling is a step of its own."""
    parents = [segment.parent for segment in tree.segments]
    children = Counter(parents)
    step_is_over: dict[int, bool] = {-1: True}  # at the end of each segment
    for number, tokens in enumerate(texts):
        is_over = step_is_over[parents[number]] or children[parents[number]] > 1
        starts = []
        for place, text in enumerate(tokens):
            if is_over:
                starts.append(place)
            is_over = delimiter in text
        step_is_over[number] = is_over
        yield starts


def _mark_first_wrong_lines(group: SavedGroup) -> None:
    """Find the first wrong line of every completion; those whose text has not the form of the task are left out."""
    from stepcredit.demo.chain import check_lines

    for leaf in group.leaves:
        tokens = [(segment, place) for segment in group.path(leaf) for place in range(len(group.texts[segment]))]
        texts = [group.texts[segment][place] for segment, place in tokens]
        ends = [place + 1 for place, text in enumerate(texts) if text.strip() == "."]
        lines = [(start, end) for start, end in zip([0, *ends], [*ends, len(texts)], strict=True) if end > start]
        try:
            checks = check_lines(group.question, "".join(texts))
        except (ValueError, KeyError, IndexError):
            continue  # a problem of the user's own
        wrong = next((number for number, check in enumerate(checks) if not check.ok), None)
        if wrong is None or len(lines) != len(checks):
            continue
        start, end = lines[wrong]
        for segment, place in tokens[start:end]:
            first, last = group.wrong[segment] or (place, place)
            group.wrong[segment] = min(first, place), max(last, place + 1)


def find_group(groups: Sequence[SavedGroup], problem: str) -> SavedGroup:
    """The group of a problem, by its id or its number from 1 on.

    Raises:
        UserError: there is none; the message names some ids.
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
