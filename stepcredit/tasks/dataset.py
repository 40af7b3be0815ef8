"""Problems from a file (JSONL, JSON, CSV, parquet), a saved data set or a hub data set."""

import csv
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stepcredit.errors import UserError, did_you_mean
from stepcredit.forest.types import Message, Problem
from stepcredit.seeds import ROWS, generator, mixed
from stepcredit.tasks.base import Task
from stepcredit.tasks.prompts import PromptTooLong

log = logging.getLogger("stepcredit")

USUAL_COLUMNS = {  # the first of them that the data have; a dot looks inside a column, as in verl's reward_model
    "question": ("question", "problem", "prompt", "messages", "query", "instruction"),
    "answer": (
        "answer",
        "final_answer",
        "ground_truth",
        "reward_model.ground_truth",
        "solution",
        "target",
        "response",
    ),
    "id": ("id", "task_id", "problem_id", "unique_id"),
}
TEST_COLUMNS = {"test_list", "tests", "input_output", "entry_point"}  # of programs: the rows are judged by "code"
FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
MAX_CSV_FIELD = 1 << 30


class DatasetTask(Task):
    """Rows in an order shuffled by the seed, every row once per pass; some are held out."""

    def __init__(self, name: str, train: list[Problem], held_out: list[Problem], seed: int) -> None:
        self.name = name
        self.train, self._held_out, self.seed = train, held_out, seed
        self.reward_functions = ("code",) if has_tests(train[0].columns) else ("math",)
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

    def held_out(self, count: int) -> list[Problem]:
        return self._held_out[:count]

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


def has_tests(columns: Mapping[str, Any]) -> bool:
    """Whether rows with these columns ask for programs."""
    return not TEST_COLUMNS.isdisjoint(columns)


def load_problems(
    source: str, split: str = "train", columns: Mapping[str, str] | None = None, needs_answer: bool | None = None
) -> list[Problem]:
    """Read problems and check every row.

    Args:
        source: a file, a folder that `datasets` saved, or a hub id such as `owner/name`.
        columns: which column holds "question" and "answer" (and "id"), where the names differ from the usual ones.
        needs_answer: rows without an answer are left out, and counted. None: unless there are tests for programs.

    Raises:
        UserError: naming the file and line or column at fault.
    """
    problems: list[Problem] = []
    places: list[str] = []
    without_answer: list[str] = []
    rows = list(_rows(source, split))
    if not rows:
        raise UserError(f"{source}: the data set is empty")
    found = list(dict.fromkeys(name for _, row in rows for name in row))
    needed = not has_tests(dict.fromkeys(found)) if needs_answer is None else needs_answer
    chosen = _choose_columns(source, found, rows[0][1], columns or {}, needed)
    for where, row in rows:
        question, answer = _question(where, row, chosen["question"]), _answer(_look(row, chosen["answer"]))
        if answer is None and needed:
            without_answer.append(where)
            continue
        id_ = _look(row, chosen["id"])
        place = where.rpartition(", ")[2]
        problems.append(Problem(question, answer, place if id_ is None else str(id_), dict(row)))
        places.append(place)
    if not problems:
        raise UserError(
            f"{source}: no row has an answer in column '{chosen['answer']}'; name another with --task.columns.answer"
        )
    if without_answer:
        log.warning("%d rows without an answer were left out (first: %s)", len(without_answer), without_answer[0])
    _check_ids(source, problems, places, chosen["id"], named="id" in (columns or {}))
    return problems


def _check_ids(source: str, problems: list[Problem], places: Sequence[str], column: str | None, named: bool) -> None:
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


def _rows(source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(source)
    if path.suffix in READERS and path.is_file():
        try:
            yield from READERS[path.suffix](path)
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from error
        return
    saved = path.is_dir() and any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    if path.is_dir() and not saved:
        raise UserError(
            f"{source} is a folder, and none that `datasets` saved; name a file ({', '.join(FILE_KINDS)}) or a hub id"
        )
    if not saved and not path.is_file() and (path.suffix in FILE_KINDS or source.startswith((".", "/", "~"))):
        raise UserError(f"{source}: no such file")
    if path.is_file() and path.suffix not in FILE_KINDS:
        raise UserError(f"{source}: unknown kind of file '{path.suffix}'; use {', '.join(FILE_KINDS)}")
    import datasets

    datasets.disable_progress_bars()
    try:
        if saved:
            table = datasets.load_from_disk(source)
            table = table[split] if isinstance(table, datasets.DatasetDict) else table
        elif path.is_file():
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
            except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
                raise UserError(f"{where}: cannot be read ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
            yield where, row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every value as the text that it is: an answer 007 or 1.50 must not become a number."""
    csv.field_size_limit(MAX_CSV_FIELD)
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row:
                    raise UserError(
                        f"{where}: more values than the header has columns; is a comma without quotes around it?"
                    )
                yield where, row
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


READERS = {".jsonl": _jsonl_rows, ".csv": _csv_rows}


def _choose_columns(
    source: str, found: list[str], row: Mapping[str, Any], named: Mapping[str, str], needs_answer: bool
) -> dict[str, str | None]:
    """The column of each role; None for an answer or id that there is not."""
    for role, column in named.items():
        if role not in USUAL_COLUMNS:
            raise UserError(f"task.columns.{role}: {did_you_mean(role, USUAL_COLUMNS)}")
        if column not in found and column.partition(".")[0] not in found:
            raise UserError(f"{source}: no column '{column}' (task.columns.{role}); {did_you_mean(column, found)}")
    chosen: dict[str, str | None] = {}
    for role, usual in USUAL_COLUMNS.items():
        present = [name for name in usual if name in found or _look(row, name) is not None]
        chosen[role] = named.get(role) or (present[0] if present else None)
        if chosen[role] is None and (role == "question" or (role == "answer" and needs_answer)):
            raise UserError(
                f"{source}: no {role} column among {', '.join(found)}; name one with --task.columns.{role} COLUMN"
            )
    return chosen


def _look(row: Mapping[str, Any], column: str | None) -> Any:
    """The value of a column; `a.b` is entry b of column a, where no column has that very name."""
    if column is None or column in row:
        return row.get(column or "")
    name, dot, inner = column.partition(".")
    value = row.get(name)
    return _look(value, inner) if dot and isinstance(value, Mapping) else None


def _answer(value: Any) -> str | None:
    """An answer as text; structures, such as the tests of a program, as JSON."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _question(where: str, row: Mapping[str, Any], column: str | None) -> str | list[Message]:
    question = _look(row, column)
    if isinstance(question, str) and question.strip():
        _check_text(where, column, question)
        return question
    if isinstance(question, list) and question and all(_is_message(message) for message in question):
        asked = question[:-1] if question[-1]["role"] == "assistant" else question  # the last is a solution
        if asked:
            for message in asked:
                _check_text(where, column, str(message["content"]))
            return asked
    raise UserError(
        f"{where}: column '{column}' must be text, or chat messages with role and content; found {question!r:.60}"
    )


def _check_text(where: str, column: str | None, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: column '{column}' has half a surrogate pair at character {error.start}") from error


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and bool(message.get("content"))
