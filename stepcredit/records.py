"""The record format (version 1): one tree a line, JSON, plain or `.zst`. DESIGN of the fields in docs/records.md."""

import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from stepcredit.errors import UserError, did_you_mean
from stepcredit.forest import Forest
from stepcredit.types import Problem, Segment, Tree

VERSION = 1
TOKEN_COLUMNS = (
    "rollout_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "prm_logprobs",
    "entropy",
    "token_rewards",
)
CREDIT_COLUMNS = ("advantages", "process", "weights")
SEGMENT_FIELDS = ("parent", "token_ids", "finish", "sampled", "reward", "rewards", "logprobs", *TOKEN_COLUMNS)
TREE_FIELDS = ("version", "id", "iteration", "prompt", "prompt_ids", "segments")


def read_trees(path: str) -> Iterator[Tree]:
    """The trees of a record file.

    Raises:
        UserError: naming the file, the line and the field at fault.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    with _open(Path(path), "r") as lines:
        for number, line in enumerate(_decoded(lines, path), 1):
            if line.strip():
                yield _tree(line, f"{path}, line {number}")


def write_trees(path: Path, forest: Forest, iteration: int | None = None, texts: list[str] | None = None) -> None:
    """Write the trees of a forest with all their columns, advantages included."""
    with _open(path, "w") as out:
        for record in to_records(forest, iteration, texts):
            out.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def to_records(
    forest: Forest, iteration: int | None = None, texts: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """One dictionary per tree, as it stands in the file.

    Args:
        texts: the text of each segment, in the order of the segment table.
    """
    row = 0
    for tree in forest.to_trees():
        record: dict[str, Any] = {**tree.extra, "version": VERSION, "id": tree.problem.id}
        if iteration is not None:
            record["iteration"] = iteration
        if tree.problem.question:
            record["prompt"] = tree.problem.question
        if tree.problem.answer is not None:
            record["answer"] = tree.problem.answer
        record["prompt_ids"] = list(tree.prompt_ids)
        record["segments"] = []
        for segment in tree.segments:
            record["segments"].append(_segment_record(segment, texts[row] if texts else None))
            row += 1
        yield record


def _segment_record(segment: Segment, text: str | None) -> dict[str, Any]:
    record: dict[str, Any] = {**segment.extra, "parent": segment.parent, "token_ids": list(segment.token_ids)}
    if text is not None:
        record["text"] = text
    record["finish"] = segment.finish
    if not segment.sampled:
        record["sampled"] = False
    for name, values in segment.columns.items():
        if name in TOKEN_COLUMNS or name in CREDIT_COLUMNS:
            record[name] = [_short(value) for value in values]
    if segment.reward is not None:
        record["reward"] = segment.reward
    if segment.rewards:
        record["rewards"] = segment.rewards
    return record


def _short(value: float) -> float:
    """Seven significant digits: all that fp32 has."""
    return float(f"{value:.7g}")


def _tree(line: str, where: str) -> Tree:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict) or not isinstance(record.get("segments"), list):
        raise UserError(f"{where}: a record is an object with a list 'segments'")
    if record.get("version", VERSION) != VERSION:
        raise UserError(f"{where}: version {record['version']!r} is not known; this program reads version {VERSION}")
    parents = {segment.get("parent", -1) for segment in record["segments"] if isinstance(segment, dict)}
    segments = [
        _segment(segment, f"{where}, segment {index}", index in parents)
        for index, segment in enumerate(record["segments"])
    ]
    prompt_ids = record.get("prompt_ids", [])
    _check_ids(prompt_ids, f"{where}: prompt_ids")
    problem = Problem(record.get("prompt", ""), record.get("answer"), str(record.get("id", "")))
    extra = {key: value for key, value in record.items() if key not in TREE_FIELDS and key != "answer"}
    if "iteration" in record:
        extra["iteration"] = record["iteration"]
    tree = Tree(problem, prompt_ids, segments, extra)
    try:
        tree.validate()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return tree


def _segment(record: Any, where: str, has_children: bool) -> Segment:
    if not isinstance(record, dict) or "token_ids" not in record:
        raise UserError(f"{where}: a segment is an object with 'token_ids'")
    _check_ids(record["token_ids"], f"{where}: token_ids")
    parent, sampled, reward = record.get("parent", -1), record.get("sampled", True), record.get("reward")
    if not isinstance(parent, int) or isinstance(parent, bool):
        raise UserError(f"{where}: parent {parent!r} is not an index (-1 means the prompt)")
    if not isinstance(sampled, bool):
        raise UserError(f"{where}: sampled must be true or false, found {sampled!r}")
    if reward is not None and (
        isinstance(reward, bool) or not isinstance(reward, (int, float)) or not math.isfinite(reward)
    ):
        raise UserError(f"{where}: reward must be a finite number, or null for unjudged; found {reward!r}")
    columns: dict[str, Sequence[float]] = {}
    for name in (*TOKEN_COLUMNS, "logprobs"):
        if record.get(name) is not None:
            column = "rollout_logprobs" if name == "logprobs" else name
            if column in columns:
                raise UserError(f"{where}: both '{column}' and its alias '{name}' are given; keep one")
            columns[column] = _column(record[name], f"{where}: {name}", len(record["token_ids"]))
    extra = {key: value for key, value in record.items() if key not in SEGMENT_FIELDS and key not in CREDIT_COLUMNS}
    return Segment(
        token_ids=record["token_ids"],
        parent=parent,
        finish=record.get("finish") or ("cut" if has_children else "stop"),
        sampled=sampled,
        reward=None if reward is None else float(reward),
        rewards=record.get("rewards") or {},
        columns=columns,
        extra=extra,
    )


def _column(values: Any, where: str, length: int) -> list[float]:
    if not isinstance(values, list):
        raise UserError(f"{where} must be a list with one number per token, found {values!r:.40}")
    if len(values) != length:
        raise UserError(f"{where} has {len(values)} values for {length} tokens; give one number per token")
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{where}[{index}] is not a finite number: {value!r}")
    return [float(value) for value in values]


def _check_ids(ids: Any, where: str) -> None:
    if not isinstance(ids, list) or any(not isinstance(token, int) or isinstance(token, bool) for token in ids):
        raise UserError(f"{where} must be a list of whole numbers")


@contextmanager
def _open(path: Path, mode: str) -> Iterator[IO[str]]:
    """Text lines of a plain or `.zst` file."""
    if path.suffix != ".zst":
        with path.open(mode, encoding="utf-8") as file:
            yield file
    elif mode == "r":
        with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            yield io.TextIOWrapper(stream, encoding="utf-8")
    else:
        with path.open("wb") as packed, zstandard.ZstdCompressor().stream_writer(packed) as sink:
            text = io.TextIOWrapper(sink, encoding="utf-8", write_through=True)
            yield text
            text.flush()


def _decoded(lines: Iterable[str], path: str) -> Iterator[str]:
    try:
        yield from lines
    except (UnicodeDecodeError, zstandard.ZstdError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error


def check_columns(path: str, trees: list[Tree], names: Iterable[str]) -> None:
    """Raise `UserError` when a token column that is needed stands nowhere in the file."""
    present = {name for tree in trees for segment in tree.segments for name in segment.columns}
    for name in names:
        if name not in present:
            found = ", ".join(sorted(present)) or "none"
            hint = did_you_mean(name, present) if present else "add it to every segment"
            raise UserError(f"{path}: no segment has '{name}' (token columns found: {found}); {hint}")
