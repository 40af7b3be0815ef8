"""Curves of metrics as lines of block characters."""

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from stepcredit.display.numbers import number

BLOCKS = "▁▂▃▄▅▆▇█"
MAX_WIDTH = 80  # characters of a curve
COLUMN_GAP = 2


def blocks(values: Sequence[float | None]) -> str:
    """A block for each number, by its size between the least and the largest; a space for None.

    >>> blocks([0, 1, 2, None, 7])
    '▁▂▃ █'
    """
    present = [value for value in values if value is not None]
    low, high = min(present, default=0.0), max(present, default=0.0)
    return "".join(" " if value is None else _block(value, low, high) for value in values)


def _block(value: float, low: float, high: float) -> str:
    top = len(BLOCKS) - 1
    level = round((value - low) / (high - low) * top) if high > low else top // 2
    return BLOCKS[level]


def sparkline(places: Sequence[float], values: Sequence[float], span: tuple[float, float], width: int) -> str:
    """A curve over `span`: each block is the mean of the values that fall on it, else the value before it."""
    start, stop = span
    cells: list[list[float]] = [[] for _ in range(width)]
    for place, value in zip(places, values, strict=True):
        share = (place - start) / (stop - start) if stop > start else 0.0
        cells[min(width - 1, round(share * (width - 1)))].append(value)
    heights: list[float | None] = []
    latest: float | None = None
    for cell in cells:
        latest = sum(cell) / len(cell) if cell else latest
        heights.append(latest)
    return blocks(heights)


def curves(columns: Mapping[str, tuple[list[float], list[float]]], width: int) -> Table:
    """A line for each metric: its curve, first and last value, least and largest.

    Args:
        columns: by metric, where its values stand, and the values; none is empty.
    """
    ends = [place for places, _ in columns.values() for place in (places[0], places[-1])]
    span = min(ends), max(ends)
    rows = {
        name: [number(value) for value in (values[0], values[-1], min(values), max(values))]
        for name, (_, values) in columns.items()
    }
    titles = ("first", "last", "min", "max")
    widths = [max(map(len, column)) for column in zip(titles, *rows.values(), strict=True)]
    room = width - max(map(len, columns)) - sum(widths) - COLUMN_GAP * (len(titles) + 1)
    length = max(4, min(room, MAX_WIDTH, 1 + int(span[1] - span[0])))
    table = Table(box=None, padding=(0, COLUMN_GAP, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column(f"{number(span[0])} … {number(span[1])}"[:length], no_wrap=True, style="cyan")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for name, (places, values) in columns.items():
        first, last, low, high = rows[name]
        table.add_row(Text(name), sparkline(places, values, span, length), first, Text(last, "bold"), low, high)
    return table
