"""Problems from files (JSONL, JSON, CSV, TSV, parquet), a saved data set or a hub data set."""

import hashlib
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stepcredit.errors import UserError, did_you_mean
from stepcredit.forest.types import Problem, look
from stepcredit.seeds import ROWS, generator, mixed
from stepcredit.tasks.base import Task, canonical
from stepcredit.tasks.messages import question_of
from stepcredit.tasks.prompts import PromptTooLong
from stepcredit.tasks.sources import Row, find_sources, read_rows
from stepcredit.verifiers import gym
from stepcredit.verifiers.code import has_tests

log = logging.getLogger("stepcredit")

USUAL_COLUMNS = {  # the first of them that the data have; a dot looks inside a column, as in verl's reward_model
    "question": ("question", "problem", "prompt", "messages", "conversations", "query", "instruction"),
    "answer": (
        "reward_model.ground_truth",
        "answer",
        "final_answer",
        "ground_truth",
        "solution",
        "target",
        "response",
    ),
    "id": ("id", "task_id", "problem_id", "unique_id"),
    "source": ("source", "data_source"),
}
MAX_SOURCE = 60  # characters of a source that are kept
UNSEEN = ("image", "images", "video", "videos", "audio", "audios")


class DatasetTask(Task):
    """Rows in an order shuffled by the seed, every row once per pass; some are held out."""

    def __init__(self, name: str, train: list[Problem], held_out: list[Problem], seed: int) -> None:
        self.name = name
        self.train, self._held_out, self.seed = train, held_out, seed
        self.reward_functions = _functions(train)
        self._orders: dict[int, list[int]] = {}  # of the last epoch drawn from

    def draw(self, start: int, count: int) -> list[Problem]:
        drawn = []
        for number in range(start, start + count):
            epoch, index = divmod(number, len(self.train))
            if epoch not in self._orders:
                shuffle = generator(mixed(self.seed, ROWS, epoch))
                self._orders = {epoch: shuffle.permutation(len(self.train)).tolist()}
            drawn.append(self.train[self._orders[epoch][index]])
        return drawn

    def rows(self) -> list[Problem]:
        return self.train

    def leave_out(self, ids: Collection[str]) -> None:
        kept = [problem for problem in self.train if problem.id not in ids]
        if not kept:
            raise UserError(f"{self.name}: all {len(self.train)} rows would be left out")
        self.train, self._orders = kept, {}

    def held_out(self, count: int) -> list[Problem]:
        return self._held_out[:count]

    def fingerprint(self) -> str:
        """Of all training rows, in their order, whatever they are named."""
        digest = hashlib.sha256()
        for problem in self.train:
            digest.update(canonical(problem))
        return digest.hexdigest()

    def fit(self, encode: Callable[[Problem], list[int]], long_prompts: str = "drop") -> None:
        """Check that every row makes a prompt; leave out those that are too long, and say how many.

        Raises:
            UserError: a prompt is wrong, or too long where that is an error, or none is left.
        """
        same = self._held_out is self.train
        self.train = _fitting(self.train, f"{self.name}", encode, long_prompts)
        self._held_out = (
            self.train if same else _fitting(self._held_out, f"{self.name}, held out", encode, long_prompts)
        )
        self._orders = {}


def _functions(problems: Sequence[Problem]) -> tuple[str, ...]:
    """What judges the rows: programs by their tests, gym tasks by their scorers, other rows as mathematics."""
    kinds = {_kind(problem) for problem in problems}
    return tuple(name for name in ("math", "code", "gym") if name in kinds)


def _kind(problem: Problem) -> str:
    if gym.unfit(problem) is None:
        return "gym"
    return "code" if has_tests(problem.columns | {"answer": problem.answer}) else "math"


def _fitting(
    problems: list[Problem], what: str, encode: Callable[[Problem], list[int]], long_prompts: str
) -> list[Problem]:
    kept: list[Problem] = []
    first: PromptTooLong | None = None
    for problem in problems:
        try:
            encode(problem)
            kept.append(problem)
        except PromptTooLong as error:
            if long_prompts == "raise":
                raise
            first = first or error
    if first is not None:
        if not kept:
            raise UserError(f"{what}: every prompt is too long; first {first}")
        log.warning("%s: %d of %d rows left out; %s", what, len(problems) - len(kept), len(problems), first)
    return kept


def load_problems(
    source: str, split: str = "train", columns: Mapping[str, str] | None = None, needs_answer: bool | None = None
) -> list[Problem]:
    """Read problems and check every row.

    Args:
        source: a file, a folder that `datasets` saved, or a hub id such as `owner/name`; several with commas between,
            or a pattern such as `data/*.jsonl`.
        columns: which column holds "question" and "answer" (and "id", "source"), where it has another name than usual.
        needs_answer: rows without an answer are left out, and counted. None: those that have no tests for programs.

    Raises:
        UserError: naming the file and line or column at fault.
    """
    problems: list[Problem] = []
    places: list[str] = []
    without_answer: list[str] = []
    named = columns or {}
    sources = find_sources(source)
    labels = source_labels(source)
    for each in sources:
        rows = list(read_rows(each, split, several=len(sources) > 1))
        if not rows:
            raise UserError(f"{each}: the data set is empty")
        needed = [needs_answer if needs_answer is not None else not has_tests(row.values) for row in rows]
        chosen = _choose_columns(each, rows, named, any(needed))
        for row, needs in zip(rows, needed, strict=True):
            problem = _problem(row, chosen)
            if problem.answer is None and needs:
                without_answer.append(row.where)
                continue
            problem.source = problem.source or labels.get(each, "")
            problems.append(problem)
            places.append(row.place)
    if not problems:
        raise UserError(
            f"{source}: no row has an answer in column '{chosen['answer']}'; name another with --task.columns.answer"
        )
    if without_answer:
        log.warning("%d rows without an answer were left out (first: %s)", len(without_answer), without_answer[0])
    check_ids(source, problems, places, named="id" in named)
    for column in UNSEEN:
        if unseen := [problem.id for problem in problems if problem.columns.get(column)]:
            text = "%s: %d rows have something in column '%s', which no prompt shows (first: '%s')"
            log.warning(text, source, len(unseen), column, unseen[0])
    return problems


def _problem(row: Row, chosen: Mapping[str, str | None]) -> Problem:
    question = question_of(row.where, chosen["question"], look(row.values, chosen["question"]))
    answer = _answer(row.where, chosen["answer"], look(row.values, chosen["answer"]))
    id_ = look(row.values, chosen["id"])
    source = look(row.values, chosen["source"])
    label = " ".join(source.split())[:MAX_SOURCE] if isinstance(source, str) else ""
    return Problem(question, answer, row.place if id_ is None else str(id_), dict(row.values), label)


def source_labels(source: str) -> dict[str, str]:
    """How each file, folder or hub id of several that `find_sources` finds is called; of one alone, none."""
    parts = [part.strip() for part in source.split(",") if part.strip()]
    if len(parts) < 2 or Path(source).expanduser().exists():
        return {}
    return {each: label for part, label in zip(parts, called(parts), strict=True) for each in find_sources(part)}


def called(sources: Sequence[str]) -> list[str]:
    """The last names of files, patterns and hub ids; the whole ones where two would be the same."""
    short = [Path(source).name for source in sources]
    return short if len(set(short)) == len(short) else list(sources)


def check_ids(source: str, problems: list[Problem], places: Sequence[str], named: bool) -> None:
    """No two rows may have one id: an error where the column was chosen, otherwise rows are named by their places."""
    seen: dict[str, str] = {}
    for problem, place in zip(problems, places, strict=True):
        if problem.id in seen:
            twice = f"{source}: id '{problem.id}' of {place} stands in {seen[problem.id]} already"
            if named:
                raise UserError(f"{twice}; name a column of unique values with --task.columns.id")
            log.warning("%s; rows are named by their places instead", twice)
            for each, name in zip(problems, places, strict=True):
                each.id = name
            return
        seen[problem.id] = place


def split_held_out(problems: list[Problem], share: float, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Hold out a share of the rows, the same for every training seed of a data set when `seed` is."""
    count = min(int(len(problems) * share), len(problems) - 1)
    if count < 1:
        log.warning("too few rows to hold any out: evaluating on the training problems")
        return problems, problems
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(seed)).tolist()
    return [problems[i] for i in sorted(order[count:])], [problems[i] for i in order[:count]]


def _choose_columns(
    source: str, rows: Sequence[Row], named: Mapping[str, str], needs_answer: bool
) -> dict[str, str | None]:
    """The column of each role; None for an answer or id that there is not."""
    found = list(dict.fromkeys(name for row in rows for name in row.values))
    for role, column in named.items():
        if role not in USUAL_COLUMNS:
            raise UserError(f"task.columns.{role}: {did_you_mean(role, USUAL_COLUMNS)}")
        if column not in found and column.partition(".")[0] not in found:
            raise UserError(f"{source}: no column '{column}' (task.columns.{role}); {did_you_mean(column, found)}")
    chosen: dict[str, str | None] = {}
    for role, usual in USUAL_COLUMNS.items():
        present = [name for name in usual if name in found or ("." in name and _somewhere(rows, name))]
        chosen[role] = named.get(role) or (present[0] if present else None)
        if chosen[role] is None and (role == "question" or (role == "answer" and needs_answer)):
            raise UserError(
                f"{source}: no {role} column among {', '.join(found)}; name one with --task.columns.{role} COLUMN"
            )
    return chosen


def _somewhere(rows: Sequence[Row], column: str) -> bool:
    return any(look(row.values, column) is not None for row in rows)


def _answer(where: str, column: str | None, value: Any) -> Any:
    """An answer as the data have it; None for none."""
    if isinstance(value, bytes):
        raise UserError(
            f"{where}: column '{column}' has bytes that are no text; name another with --task.columns.answer"
        )
    if isinstance(value, str) and not value.strip():
        return None
    return None if isinstance(value, float) and math.isnan(value) else value
