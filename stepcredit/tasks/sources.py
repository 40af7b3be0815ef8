"""Rows of files, saved data sets and the hub, every value with the type that it has there.

Numbers of 32 and 16 bits are read as the shortest decimal that they stand for, bytes that are UTF-8 as text; dates,
times and decimals as the text that a person reads.
"""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy
import zstandard

from stepcredit.errors import UserError

if TYPE_CHECKING:
    import pyarrow

OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": zstandard.open,
}
FORMS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
UTF_16 = "; it is UTF-16, save it as UTF-8"
MAX_CSV_FIELD = 1 << 30
BATCH = 1000  # rows of a table that are converted at once


@dataclass(frozen=True)
class Row:
    """A row, where it stands for error messages, and a name for it within its source."""

    where: str
    place: str
    values: dict[str, Any]


def find_sources(source: str) -> list[str]:
    """The files, folders and hub ids that a source names: one, several with commas between, or a pattern with `*`.

    Raises:
        UserError: a pattern fits no file.
    """
    if Path(source).expanduser().exists():
        return [source]
    if "," in source:
        parts = [part.strip() for part in source.split(",") if part.strip()]
        found = [each for part in parts for each in find_sources(part)]
        if len(set(found)) < len(found):
            twice = next(each for each in found if found.count(each) > 1)
            raise UserError(f"{source}: {twice} is named twice")
        return found
    if any(mark in source for mark in "*?["):
        files = sorted(glob.glob(str(Path(source).expanduser()), recursive=True))
        if not files:
            raise UserError(f"{source}: no file fits this pattern")
        return files
    return [source]


def read_rows(source: str, split: str, several: bool = False) -> Iterator[Row]:
    """The rows of one file, saved data set or hub data set.

    Args:
        several: the place of a row names its source, too.

    Raises:
        UserError: naming the file and line at fault.
    """
    for place, values in _rows(source, split):
        yield Row(f"{source}, {place}", f"{source} {place}" if several else place, values)


def _rows(source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(source).expanduser()
    form, packing = form_of(path)
    saved = path.is_dir() and any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    if path.is_dir() and not saved:
        raise UserError(
            f"{source} is a folder, and none that `datasets` saved; name its files, such as '{source}/*.parquet' "
            f"({', '.join(FORMS)}), or a hub id"
        )
    if path.is_file():
        if form is None:
            kinds = f"{', '.join(FORMS)}, all but the last also with {', '.join(OPENERS)} behind"
            raise UserError(f"{source}: unknown kind of file '{path.suffix}'; use {kinds}")
        if form == ".parquet":
            yield from _parquet(path)
        else:
            yield from _text_rows(path, form, packing)
        return
    if not saved and (form is not None or source.startswith((".", "/", "~"))):
        raise UserError(f"{source}: no such file")
    yield from _with_datasets(source, split, saved)


def form_of(path: Path) -> tuple[str | None, str]:
    """The kind of a file by its name, as one of `FORMS`, and the ending of how it is compressed ("" for not)."""
    name = path.name.lower()
    packing = next((ending for ending in OPENERS if name.endswith(ending)), "")
    ending = Path(name.removesuffix(packing)).suffix
    return ending if ending in FORMS and not (packing and ending == ".parquet") else None, packing


# ---------------------------------------------------------------------- text


def _text_rows(path: Path, form: str, packing: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with _opened(path, packing) as lines:
        if form in (".csv", ".tsv"):
            yield from _csv(path, lines, "\t" if form == ".tsv" else ",")
        elif form == ".json":
            yield from _json(path, lines.read())
        else:
            yield from _json_lines(path, lines)


@contextmanager
def _opened(path: Path, packing: str) -> Iterator[IO[str]]:
    """A text file without its byte order mark; what is wrong with its bytes is said."""
    opener: Callable[..., Any] = OPENERS.get(packing, open)
    try:
        with opener(path, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
            yield text
    except UnicodeDecodeError as error:
        start = path.read_bytes()[:2]
        hints = {b"\xff\xfe": UTF_16, b"\xfe\xff": UTF_16, b"\x1f\x8b": "; it is packed by gzip, name it .gz"}
        hint = hints.get(start, "; save it as UTF-8")
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}){hint}") from error
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError) as error:
        raise UserError(f"{path}: cannot be unpacked ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _json_lines(path: Path, lines: IO[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"line {number}"
            yield place, _object(f"{path}, {place}", _loaded(f"{path}, {place}", line))


def _json(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A list of objects; an object with one such list, or with columns of one length; or JSON lines after all."""
    try:
        loaded = json.loads(text, object_pairs_hook=_unique) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _json_lines(path, io.StringIO(text))
            return
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    for number, row in enumerate(_listed(path, loaded), 1):
        yield f"row {number}", _object(f"{path}, row {number}", row)


def _listed(path: Path, loaded: Any) -> list[Any]:
    if isinstance(loaded, list):
        return loaded
    items = list(loaded.items()) if isinstance(loaded, dict) else []
    values = [value for _, value in items]
    tables = [name for name, value in items if isinstance(value, list) and value and isinstance(value[0], dict)]
    lists = [name for name, value in items if isinstance(value, list)]
    if len(tables) == 1 and len(lists) == 1:
        return list(loaded[tables[0]])
    if len(tables) > 1 and len(tables) == len(values):
        raise UserError(f"{path}: has several lists of objects ({', '.join(tables)}); make a file of each")
    if values and all(isinstance(value, list) and len(value) == len(values[0]) for value in values):
        return [dict(zip(loaded, row, strict=True)) for row in zip(*values, strict=True)]
    raise UserError(
        f"{path}: expected a list of objects, or an object with one; found {type(loaded).__name__}"
        + (f" with {', '.join(map(str, loaded))}"[:80] if isinstance(loaded, dict) else "")
    )


def _loaded(where: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
        raise UserError(f"{where}: cannot be read ({error})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice}' stands twice in one object")
    return found


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _csv(path: Path, lines: IO[str], delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every value as the text that it is: an answer 007 or 1.50 must not become a number."""
    csv.field_size_limit(MAX_CSV_FIELD)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        names = [name.strip() for name in header]
        _check_header(path, names, delimiter)
        before = 0  # lines that another reader has read
        if any(name.startswith(" ") for name in header):
            before = reader.line_num
            reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
        for values in reader:
            place = f"line {reader.line_num + before}"
            if not values:
                continue
            if len(values) > len(names):
                what = "comma" if delimiter == "," else "tab"
                raise UserError(
                    f"{path}, {place}: more values than the header has columns; is a {what} without quotes around it?"
                )
            if len(values) < len(names):
                raise UserError(f"{path}, {place}: {len(values)} values for {len(names)} columns; is the row cut off?")
            yield place, dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error}); are quotes closed and doubled?") from error


def _check_header(path: Path, names: list[str], delimiter: str) -> None:
    if len(names) == 1 and len(others := [mark for mark in ";\t|," if mark in names[0]]) > 0:
        raise UserError(
            f"{path}: its columns seem to be separated by {others[0]!r}; save it with commas as .csv or tabs as .tsv"
        )
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path}: the header has column '{twice}' twice; rename one")


# ---------------------------------------------------------------------- tables


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                for row in table_rows(pyarrow.Table.from_batches([batch])):
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: cannot be read as parquet ({reason}), after {number} rows") from error


def _with_datasets(source: str, split: str, saved: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        if saved:
            table = datasets.load_from_disk(str(Path(source).expanduser()))
            table = table[split] if isinstance(table, datasets.DatasetDict) else table
        else:
            table = datasets.load_dataset(source, split=split)
    except Exception as error:  # every loader has its own kinds; all of them mean that the source cannot be read
        reason = str(error.__cause__ or error).strip().splitlines()[0] if str(error.__cause__ or error).strip() else ""
        raise UserError(f"{source}: cannot be read as a data set ({type(error).__name__}: {reason})") from error
    batches = (table_rows(batch) for batch in table.with_format("arrow").iter(BATCH))
    for number, row in enumerate(chain.from_iterable(batches), 1):
        yield f"row {number}", row


def table_rows(table: "pyarrow.Table") -> Iterator[dict[str, Any]]:
    """The rows of a table as plain values."""
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        convert = _converter(column.type)
        columns[name] = column.to_pylist() if convert is None else [convert(each) for each in column.to_pylist()]
    for number in range(table.num_rows):
        yield {name: values[number] for name, values in columns.items()}


def _converter(kind: "pyarrow.DataType") -> Callable[[Any], Any] | None:
    """What makes a plain value of one of this type; None where it is one."""
    from pyarrow import types

    if types.is_float32(kind) or types.is_float16(kind):
        narrow = numpy.float32 if types.is_float32(kind) else numpy.float16
        return _unless_none(lambda value: float(str(narrow(value))))
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return _unless_none(_decoded)
    if types.is_temporal(kind) or types.is_decimal(kind):
        return _unless_none(str)
    if types.is_dictionary(kind):
        return _converter(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _converter(kind.value_type)
        return None if inner is None else _unless_none(lambda values: [inner(value) for value in values])
    if types.is_struct(kind):
        fields = {field.name: made for field in kind if (made := _converter(field.type)) is not None}
        return _unless_none(lambda value: _converted(value, fields)) if fields else None
    return _unless_none(dict) if types.is_map(kind) else None


def _unless_none(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else convert(value)


def _converted(value: dict[str, Any], fields: dict[str, Callable[[Any], Any]]) -> dict[str, Any]:
    return value | {name: convert(value[name]) for name, convert in fields.items()}


def _decoded(value: bytes) -> str | bytes:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value
