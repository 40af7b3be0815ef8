"""The record format (version 1): one tree a line, JSON, plain or `.zst`. docs/records.md explains the fields."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import zstandard

from stepcredit.errors import UserError, did_you_mean
from stepcredit.forest import Forest
from stepcredit.forest.table import TERM
from stepcredit.forest.types import Problem, Segment, Tree

VERSION = 1
MAX_FLOAT = float(numpy.finfo(numpy.float32).max)
TOKEN_COLUMNS = (
    "rollout_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "prm_logprobs",
    "entropy",
    "age",
    "token_rewards",
    "greedy_return",
    "prefix_value",
    "prefix_error",
    "prefix_rollouts",
    "step_index",
    "prompt_value",
    "values",
    "value_target",
    "value_after",
)
CREDIT_COLUMNS = ("advantages", "process", "weights")
CREDIT_FIELDS = ("value", "pruned", "terms", *CREDIT_COLUMNS)
SEGMENT_FIELDS = ("parent", "token_ids", "finish", "sampled", "masked", "reward", "rewards", "logprobs", *TOKEN_COLUMNS)
TREE_FIELDS = ("version", "id", "iteration", "prompt", "prompt_ids", "segments")


def read_trees(path: str) -> Iterator[Tree]:
    """The trees of a record file.

    Raises:
        UserError: naming the file, the line and the field at fault.
    """
    for _, tree in read_records(path):
        yield tree


def read_records(path: str) -> Iterator[tuple[dict[str, Any], Tree]]:
    """The trees of a record file, each with its JSON object, credit fields included.

    Raises:
        UserError: naming the file, the line and the field at fault.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    for number, line in enumerate(_read_text(Path(path)).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            record = _record(line, where)
            yield record, _tree(record, where)


def write_trees(path: Path, forest: Forest, iteration: int | None = None, texts: list[str] | None = None) -> None:
    """Write the trees of a forest with all their columns, advantages included."""
    records = to_records(forest, iteration, texts)
    _write_text(path, (json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records))


def to_records(
    forest: Forest, iteration: int | None = None, texts: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """One dictionary per tree, as it is written to the file.

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
        if tree.problem.source:
            record["source"] = tree.problem.source
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
    if segment.masked:
        record["masked"] = True
    if segment.pruned:
        record["pruned"] = True
    if segment.value is not None:
        record["value"] = _short(segment.value)
    for name, values in segment.columns.items():
        if name in TOKEN_COLUMNS or (name in CREDIT_COLUMNS and not segment.pruned):
            record[name] = [_short(value) for value in values]
    terms = {name.removeprefix(TERM): values for name, values in segment.columns.items() if name.startswith(TERM)}
    if terms and not segment.pruned:
        record["terms"] = {name: [_short(value) for value in values] for name, values in terms.items()}
    if segment.reward is not None:
        record["reward"] = segment.reward
    if segment.rewards:
        record["rewards"] = segment.rewards
    return record


def _short(value: float) -> float:
    """The shortest decimal number that is this fp32 number."""
    return float(str(numpy.float32(value)))


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict) or not isinstance(record.get("segments"), list):
        raise UserError(f"{where}: a record is an object with a list 'segments'")
    if record.get("version", VERSION) != VERSION:
        raise UserError(f"{where}: version {record['version']!r} is not known; this program reads version {VERSION}")
    return record


def _tree(record: dict[str, Any], where: str) -> Tree:
    segments = [_segment(segment, f"{where}, segment {index}") for index, segment in enumerate(record["segments"])]
    parents = {segment.parent for segment in segments}
    for index, segment in enumerate(segments):
        segment.finish = record["segments"][index].get("finish") or ("cut" if index in parents else "stop")
    prompt_ids = record.get("prompt_ids", [])
    _check_ids(prompt_ids, f"{where}: prompt_ids")
    problem = Problem(record.get("prompt", ""), record.get("answer"), str(record.get("id", where.rpartition(", ")[2])))
    source = record.get("source")
    problem.source = source if isinstance(source, str) else ""
    extra = {key: value for key, value in record.items() if key not in TREE_FIELDS and key != "answer"}
    if "iteration" in record:
        extra["iteration"] = record["iteration"]
    tree = Tree(problem, prompt_ids, segments, extra)
    try:
        tree.validate()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return tree


def _segment(record: Any, where: str) -> Segment:
    if not isinstance(record, dict) or "token_ids" not in record:
        raise UserError(f"{where}: a segment is an object with 'token_ids'")
    _check_ids(record["token_ids"], f"{where}: token_ids")
    parent, sampled, reward = record.get("parent", -1), record.get("sampled", True), record.get("reward")
    if not isinstance(parent, int) or isinstance(parent, bool):
        raise UserError(f"{where}: parent {parent!r} is not an index (-1 means the prompt)")
    masked = record.get("masked", False)
    for name, flag in (("sampled", sampled), ("masked", masked)):
        if not isinstance(flag, bool):
            raise UserError(f"{where}: {name} must be true or false, found {flag!r}")
    if reward is not None and not _is_finite(reward):
        raise UserError(f"{where}: reward must be a finite number, or null for unjudged; found {reward!r}")
    rewards = record.get("rewards") or {}
    if not isinstance(rewards, dict) or not all(value is None or _is_finite(value) for value in rewards.values()):
        raise UserError(f"{where}: rewards must name finite numbers or null, found {rewards!r:.40}")
    columns: dict[str, Sequence[float]] = {}
    for name in (*TOKEN_COLUMNS, "logprobs"):
        if record.get(name) is not None:
            column = "rollout_logprobs" if name == "logprobs" else name
            if column in columns:
                raise UserError(f"{where}: both '{column}' and its alias '{name}' are given; keep one")
            columns[column] = _column(record[name], f"{where}: {name}", len(record["token_ids"]))
    extra = {key: value for key, value in record.items() if key not in SEGMENT_FIELDS and key not in CREDIT_FIELDS}
    return Segment(
        token_ids=record["token_ids"],
        parent=parent,
        sampled=sampled,
        reward=None if reward is None else float(reward),
        rewards=rewards,
        masked=masked,
        columns=columns,
        extra=extra,
    )


def _column(values: Any, where: str, length: int) -> list[float]:
    if not isinstance(values, list):
        raise UserError(f"{where} must be a list with one number per token, found {values!r:.40}")
    if len(values) != length:
        raise UserError(f"{where} has {len(values)} values for {length} tokens; give one number per token")
    for index, value in enumerate(values):
        if not _is_finite(value):
            raise UserError(f"{where}[{index}] is not a finite number: {value!r}")
    return [float(value) for value in values]


def _is_finite(value: Any) -> bool:
    """True for a number that fp32 can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_FLOAT


def _check_ids(ids: Any, where: str) -> None:
    if not isinstance(ids, list) or any(type(token) is not int or not 0 <= token < 2**31 for token in ids):
        raise UserError(f"{where} must be a list of token ids, whole numbers from 0 on")


def _read_text(path: Path) -> str:
    """The text of a plain or `.zst` file."""
    try:
        raw = path.read_bytes()
        if path.suffix == ".zst":
            stream = zstandard.ZstdDecompressor().decompressobj()
            raw = stream.decompress(raw)
            if not stream.eof:
                raise UserError(f"{path}: the compressed file ends too early; it was cut short when written or copied")
        return raw.decode("utf-8")
    except (UnicodeDecodeError, zstandard.ZstdError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error


def _write_text(path: Path, lines: Iterable[str]) -> None:
    text = "".join(line + "\n" for line in lines).encode("utf-8")
    path.write_bytes(zstandard.ZstdCompressor().compress(text) if path.suffix == ".zst" else text)


def check_columns(path: str, trees: list[Tree], names: Iterable[str]) -> None:
    """Raise `UserError` when a token column that is needed is nowhere in the file."""
    present = {name for tree in trees for segment in tree.segments for name in segment.columns}
    for name in names:
        if name not in present:
            names_present = ", ".join(sorted(present)) or "none"
            hint = did_you_mean(name, present) if present else "add it to every segment"
            raise UserError(f"{path}: no segment has '{name}' (token columns found: {names_present}); {hint}")
