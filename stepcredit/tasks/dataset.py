"""Problems from a file (JSONL, JSON, CSV, parquet) or a hub data set."""

import csv
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from stepcredit.errors import UserError, did_you_mean
from stepcredit.tasks.base import Task
from stepcredit.types import Message, Problem

log = logging.getLogger("stepcredit")

QUESTION_COLUMNS = ("question", "problem", "prompt", "query", "instruction")
ANSWER_COLUMNS = ("answer", "final_answer", "ground_truth", "solution", "target", "response")
FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class DatasetTask(Task):
    """Rows in an order shuffled by the seed, every row once per pass; some are held out."""

    reward_functions = ("math",)

    def __init__(self, name: str, train: list[Problem], held_out: list[Problem], seed: int) -> None:
        self.name = name
        self.train, self._held_out, self.seed = train, held_out, seed
        self._orders: dict[int, list[int]] = {}  # of the last epoch drawn from

    def draw(self, start: int, count: int) -> list[Problem]:
        drawn = []
        for number in range(start, start + count):
            epoch, index = divmod(number, len(self.train))
            if epoch not in self._orders:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self._orders = {epoch: torch.randperm(len(self.train), generator=generator).tolist()}
            drawn.append(self.train[self._orders[epoch][index]])
        return drawn

    def known(self) -> list[Problem]:
        return self.train

    def held_out(self, count: int) -> list[Problem]:
        return self._held_out[:count]


def load_problems(source: str, split: str = "train", columns: Mapping[str, str] | None = None) -> list[Problem]:
    """Read problems and check every row.

    Args:
        source: a file, or a hub id such as `owner/name`.
        columns: which column holds "question" and "answer" (and "id"), where the names differ from the usual ones.

    Raises:
        UserError: naming the file and line or column at fault.
    """
    problems: list[Problem] = []
    without_answer: list[str] = []
    rows = list(_rows(source, split))
    if not rows:
        raise UserError(f"{source}: the data set is empty")
    chosen = _choose_columns(source, list(dict.fromkeys(name for _, row in rows for name in row)), columns or {})
    for where, row in rows:
        question, answer = _question(where, row, chosen["question"]), row.get(chosen["answer"])
        if answer is None or answer == "":
            without_answer.append(where)
            continue
        id_ = row.get(chosen["id"])
        problems.append(
            Problem(question, str(answer), where.rpartition(", ")[2] if id_ is None else str(id_), dict(row))
        )
    if not problems:
        raise UserError(
            f"{source}: no row has an answer in column '{chosen['answer']}'; name another with --task.columns.answer"
        )
    if without_answer:
        log.warning("%d rows without an answer were left out (first: %s)", len(without_answer), without_answer[0])
    return problems


def split_held_out(problems: list[Problem], share: float, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Hold out a share of the rows, the same for every training seed of a data set when `seed` is."""
    count = min(int(len(problems) * share), len(problems) - 1)
    if count < 1:
        log.warning("too few rows to hold any out: evaluating on the training problems")
        return problems, problems
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(seed)).tolist()
    return [problems[i] for i in sorted(order[count:])], [problems[i] for i in order[:count]]


def _rows(source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(source)
    if path.suffix in READERS and path.is_file():
        try:
            yield from READERS[path.suffix](path)
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from error
        return
    if path.is_dir():
        raise UserError(f"{source} is a folder; name a file ({', '.join(FILE_KINDS)}) or a hub id")
    if not path.is_file() and (path.suffix in FILE_KINDS or source.startswith((".", "/", "~"))):
        raise UserError(f"{source}: no such file")
    if path.is_file() and path.suffix not in FILE_KINDS:
        raise UserError(f"{source}: unknown kind of file '{path.suffix}'; use {', '.join(FILE_KINDS)}")
    import datasets

    datasets.disable_progress_bars()
    try:
        if path.is_file():
            table = datasets.load_dataset(FILE_KINDS[path.suffix], data_files=source, split="train")
        else:
            table = datasets.load_dataset(source, split=split)
    except Exception as error:  # every loader has its own kinds; all of them mean that the source cannot be read
        reason = str(error.__cause__ or error).strip().splitlines()[0] if str(error.__cause__ or error).strip() else ""
        raise UserError(f"{source}: cannot be read as a data set ({type(error).__name__}: {reason})") from error
    for number, row in enumerate(table, 1):
        yield f"{source}, row {number}", row


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
            yield where, row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every value as the text that it is: an answer 007 or 1.50 must not become a number."""
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        for row in reader:
            yield f"{path}, line {reader.line_num}", {name: value for name, value in row.items() if name is not None}


READERS = {".jsonl": _jsonl_rows, ".csv": _csv_rows}


def _choose_columns(source: str, found: list[str], named: Mapping[str, str]) -> dict[str, str]:
    for role, column in named.items():
        if role not in ("question", "answer", "id"):
            raise UserError(f"task.columns.{role}: {did_you_mean(role, ('question', 'answer', 'id'))}")
        if column not in found:
            raise UserError(f"{source}: no column '{column}' (task.columns.{role}); {did_you_mean(column, found)}")
    chosen = {"id": named.get("id", "id")}
    for role, usual in (("question", QUESTION_COLUMNS), ("answer", ANSWER_COLUMNS)):
        candidates = [named[role]] if role in named else [name for name in usual if name in found]
        if not candidates:
            raise UserError(
                f"{source}: no {role} column among {', '.join(found)}; name one with --task.columns.{role} COLUMN"
            )
        chosen[role] = candidates[0]
    return chosen


def _question(where: str, row: Mapping[str, Any], column: str) -> str | list[Message]:
    question = row.get(column)
    if isinstance(question, str) and question.strip():
        return question
    if isinstance(question, list) and question and all(_is_message(message) for message in question):
        return question
    raise UserError(
        f"{where}: column '{column}' must be text, or chat messages with role and content; found {question!r:.60}"
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and bool(message.get("content"))
