"""Runs in the terminal: curves of block characters, completions whose tokens are shaded by their numbers, trees.

Only rendering: every function makes something that rich prints. Text of a run is never read as markup, and signs are
told by more than colour: underlined where there are styles, written out where there are none (`plain`).
"""

import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from io import TextIOWrapper
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from stepcredit.display.pieces import visible

if TYPE_CHECKING:
    from stepcredit.display.rollouts import Group

BLOCKS = "▁▂▃▄▅▆▇█"
LEVELS = 5  # shades of a sign
NEGLIGIBLE = 0.01  # of the scale; smaller numbers are not marked
DARK = {  # by rising size, on a dark background: blue is positive, orange negative
    1: ("#12283d", "#16406b", "#1a5b9c", "#1f77cc", "#3a95f0"),
    -1: ("#38220d", "#5c360c", "#8a4f0c", "#bb6a08", "#ef8a17"),
}
LIGHT = {
    1: ("#e3eefb", "#bcd9f5", "#8bbdec", "#4f97dc", "#1c68b8"),
    -1: ("#fdeedd", "#fbd5a8", "#f7b569", "#ea8b22", "#b85c00"),
}
MINUS = "\N{MINUS SIGN}"
RIGHT, WRONG, UNJUDGED = "✓", "✗", "?"
MARKS = {RIGHT: "right", WRONG: "wrong", UNJUDGED: "unjudged"}
OPEN, CLOSE = "«✗ ", "»"  # around the first wrong line


@dataclass(frozen=True)
class Tokens:
    """What is shaded: texts of tokens one after the other, each with its number.

    Attributes:
        starts: tokens with which a step begins.
        wrong: first and last (exclusive) token of the first wrong line.
    """

    texts: Sequence[str]
    values: Sequence[float | None]
    starts: Sequence[int] = (0,)
    wrong: tuple[int, int] | None = None

    def varies(self, scale: float) -> bool:
        """Whether the numbers differ by more than what is shown of them."""
        found = [value for value in self.values if value is not None]
        return bool(found) and signed(max(found), scale) != signed(min(found), scale)

    def means(self, scale: float) -> dict[int, float | None]:
        """Of the steps, by their first tokens; nothing where they look all the same."""
        bounds = [*sorted({0, *self.starts}), len(self.values)]
        found = {start: mean(self.values[start:end]) for start, end in pairwise(bounds)}
        return found if len({signed(value, scale) for value in found.values()}) > 1 else {}


@dataclass(frozen=True)
class Shading:
    """How numbers become shades.

    Attributes:
        name: what the numbers are.
        scale: the size of the darkest shade.
        plain: the output has no styles, so that signs stand in the text.
    """

    name: str
    scale: float
    plain: bool = False


# ---------------------------------------------------------------------- numbers


def number(value: float) -> str:
    """Three digits, thousands whole.

    >>> number(0.00917), number(251409), number(-2)
    ('0.00917', '251,409', '−2')
    """
    text = f"{abs(value):,.0f}" if abs(value) >= 1000 else f"{abs(value):.3g}"
    return MINUS + text if value < 0 else text


def signed(value: float | None, scale: float = 1.0) -> str:
    """With a sign, and as many decimals as numbers of this size need.

    >>> signed(0.714), signed(-0.2), signed(-0.0031, 0.04), signed(0)
    ('+0.71', '−0.20', '−0.003', '0.00')
    """
    if value is None:
        return "·"
    power = math.floor(math.log10(scale)) if scale > 0 else 0
    text = f"{abs(value):.1e}" if power < -6 or power > 6 else f"{abs(value):,.{max(0, 1 - min(power, -1))}f}"
    text = text.partition(".")[0] if 1 < power <= 6 else text
    return ("+" if value > 0 else MINUS if value < 0 else "") + text


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that there are."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def numbers(values: Sequence[Any] | None, length: int) -> list[float | None]:
    """One finite number or None for each token, whatever a file holds."""
    return [_finite(value) for value in values] if values else [None] * length


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def spread(rows: Iterable[Sequence[Any] | None]) -> tuple[float, float] | None:
    """Least and largest number of a column."""
    found = [value for row in rows for value in numbers(row, 0) if value is not None]
    return (min(found), max(found)) if found else None


# ---------------------------------------------------------------------- curves


def blocks(values: Sequence[float | None]) -> str:
    """A block for each number, by its size between the least and the largest; a space where there is none.

    >>> blocks([0, 1, 2, None, 7])
    '▁▂▃ █'
    """
    found = [value for value in values if value is not None]
    low, high = min(found, default=0.0), max(found, default=0.0)
    top = len(BLOCKS) - 1
    return "".join(
        " " if value is None else BLOCKS[round((value - low) / (high - low) * top) if high > low else top // 2]
        for value in values
    )


def sparkline(places: Sequence[float], values: Sequence[float], span: tuple[float, float], width: int) -> str:
    """A curve over `span`: each block is the mean of the values that fall on it, else the value before it."""
    start, stop = span
    cells: list[list[float]] = [[] for _ in range(width)]
    for place, value in zip(places, values, strict=True):
        share = (place - start) / (stop - start) if stop > start else 0.0
        cells[min(width - 1, round(share * (width - 1)))].append(value)
    held: list[float | None] = []
    for cell in cells:
        held.append(sum(cell) / len(cell) if cell else held[-1] if held else None)
    return blocks(held)


def curves(found: Mapping[str, tuple[list[float], list[float]]], width: int) -> Table:
    """A line for each metric: its curve, first and last value, least and largest.

    Args:
        found: by metric, where its values stand, and the values; none is empty.
    """
    ends = [place for places, _ in found.values() for place in (places[0], places[-1])]
    span = min(ends), max(ends)
    rows = {
        name: [number(value) for value in (values[0], values[-1], min(values), max(values))]
        for name, (_, values) in found.items()
    }
    titles = ("first", "last", "min", "max")
    widths = [max(map(len, column)) for column in zip(titles, *rows.values(), strict=True)]
    room = width - max(map(len, found)) - sum(widths) - 2 * 5
    length = max(4, min(room, 80, 1 + int(span[1] - span[0])))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column(f"{number(span[0])} … {number(span[1])}"[:length], no_wrap=True, style="cyan")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for name, (places, values) in found.items():
        first, last, low, high = rows[name]
        table.add_row(Text(name), sparkline(places, values, span, length), first, Text(last, "bold"), low, high)
    return table


# ---------------------------------------------------------------------- shaded tokens


def style_of(value: float | None, scale: float) -> Style:
    """Blue above zero; orange and underlined below; the larger, the stronger."""
    if value is None or not scale or abs(value) < NEGLIGIBLE * scale:
        return Style.null()
    level = min(LEVELS, max(1, math.ceil(LEVELS * abs(value) / scale)))
    return _style(1 if value > 0 else -1, level)


@cache
def _style(sign: int, level: int) -> Style:
    light = _is_light(os.environ.get("COLORFGBG", ""))
    strong = level == LEVELS
    ink = "#ffffff" if light == strong else "#101010"
    return Style(color=ink, bgcolor=(LIGHT if light else DARK)[sign][level - 1], underline=sign < 0 or None)


def _is_light(given: str) -> bool:
    """Whether the terminal says that its background is light (`COLORFGBG`, such as 0;15)."""
    last = given.rpartition(";")[2]
    return last.isdigit() and int(last) in (7, *range(9, 16))


def one_line(text: str) -> str:
    """Text of a run on one line, without anything that acts on a terminal."""
    return visible(text).replace("\n", "↵ ").replace("\t", " ")


def shaded(tokens: Tokens, shading: Shading, flat: bool = False, limit: int | None = None) -> Text:
    """Tokens over shades of their numbers.

    Args:
        flat: on one line.
        limit: about how many characters; tokens in the middle are left out beyond.
    """
    parts: list[tuple[str, Style | str]] = []
    hidden = _hidden(tokens.texts, limit)
    means = tokens.means(shading.scale) if shading.plain else {}
    for place, (piece, value) in enumerate(zip(tokens.texts, tokens.values, strict=True)):
        if hidden and place == hidden.start:
            parts.append((f" … {len(hidden)} tokens … ", "dim italic"))
        shown, style = place not in hidden, style_of(value, shading.scale)
        rest = piece.lstrip(" ")
        if shown and place:
            parts.append((piece[: len(piece) - len(rest)], style))
        if shown and place in means:
            parts.append((f"[{signed(means[place], shading.scale)}] ", ""))
        if tokens.wrong and place == tokens.wrong[0]:
            parts.append((OPEN, "bold red"))
        if shown:
            parts.append((_written(rest, flat), style))
        if tokens.wrong and place == tokens.wrong[1] - 1:
            parts.append((CLOSE, "bold red"))
    runs = groupby(((text, style) for text, style in parts if text), key=lambda part: part[1])
    return Text.assemble(*(("".join(text for text, _ in run), style) for style, run in runs))


def _written(piece: str, flat: bool) -> str:
    return one_line(piece) if flat else visible(piece).replace("\n", "↵\n")


def _hidden(texts: Sequence[str], limit: int | None) -> range:
    """The tokens in the middle that go beyond the limit; two thirds of the rest stand before them."""
    if limit is None or sum(map(len, texts)) <= limit:
        return range(0)
    head = tail = size = 0
    while head < len(texts) and size + len(texts[head]) <= limit * 2 // 3:
        size += len(texts[head])
        head += 1
    while tail < len(texts) - head and size + len(texts[-1 - tail]) <= limit:
        size += len(texts[-1 - tail])
        tail += 1
    return range(head, len(texts) - tail)


def steps_line(tokens: Tokens, shading: Shading) -> Text | None:
    """The mean of each step, where they differ; in plain text they stand before the steps instead."""
    means = {} if shading.plain else tokens.means(shading.scale)
    parts = [Text(signed(value, shading.scale), style_of(value, shading.scale)) for value in means.values()]
    return Text(" │ ").join(parts) if parts else None


# ---------------------------------------------------------------------- groups and trees


def mark(reward: float | None) -> Text:
    """Right, wrong or unjudged."""
    if reward is None:
        return Text(UNJUDGED, "bold")
    return Text(RIGHT, "bold green") if reward >= 1 else Text(WRONG, "bold red")


def marks(group: "Group") -> Text:
    """Right and wrong completions at a glance."""
    return Text().join(mark(group.tree.segments[leaf].reward) for leaf in group.leaves)


def shading_of(group: "Group", column: str, name: str, plain: bool) -> Shading:
    """The scale is the largest number of the group."""
    return Shading(name, max(map(abs, spread(group.columns.get(column, [])) or (0.0,))), plain)


def tokens_of(group: "Group", path: Sequence[int], column: str) -> Tokens:
    """What stands on a path, one token after the other."""
    texts: list[str] = []
    values: list[float | None] = []
    starts: list[int] = []
    wrong: list[int] = []
    rows = group.columns.get(column) or [None] * len(group.pieces)
    for segment in path:
        starts += [len(texts) + start for start in group.steps[segment]]
        if (span := group.wrong[segment]) is not None:
            wrong += [len(texts) + end for end in span]
        texts += group.pieces[segment]
        values += numbers(rows[segment], len(group.pieces[segment]))
    return Tokens(texts, values, starts, (min(wrong), max(wrong)) if wrong else None)


def is_branching(group: "Group") -> bool:
    """Whether completions share tokens."""
    parents = [segment.parent for segment in group.tree.segments if segment.parent >= 0]
    return len(parents) != len(set(parents))


def picked(group: "Group", most: int) -> list[int]:
    """At most so many completions, right and wrong ones in turn, in their own order."""
    leaves = group.leaves
    if len(leaves) <= most:
        return leaves
    rewards = {leaf: group.tree.segments[leaf].reward for leaf in leaves}
    right = [leaf for leaf in leaves if (rewards[leaf] or 0.0) >= 1]
    rest = [leaf for leaf in leaves if leaf not in right]
    order = sorted(range(len(leaves)), key=lambda place: place if place < len(right) else place - len(right))
    return sorted([(right + rest)[place] for place in order][:most])


def group_view(group: "Group", column: str, shading: Shading, most: int, width: int, limit: int | None) -> Stack:
    """The question, the answer and the completions of a problem, as a tree where they share tokens.

    Args:
        most: completions that are shown.
        limit: lines of a completion, about; None for all.
    """
    leaves = picked(group, most)
    parts: list[RenderableType] = [Text(visible(group.question), "bold")]
    if group.tree.problem.answer is not None:
        parts.append(Text("answer ", "dim").append(one_line(str(group.tree.problem.answer)), "not dim"))
    parts.append(Text())
    if is_branching(group):
        parts.append(tree_view(group, column, shading, leaves))
    else:
        for leaf in leaves:
            parts += completion(group, leaf, column, shading, None if limit is None else limit * (width - 4))
    if more := len(group.leaves) - len(leaves):
        parts += [Text(f"{more} more (--completions {len(group.leaves)})", "dim"), Text()]
    return Stack(*parts, *([Text()] if is_branching(group) else []), *legend(group, column, shading))


def completion(
    group: "Group", leaf: int, column: str, shading: Shading, limit: int | None = None
) -> list[RenderableType]:
    """Its marks, its shaded tokens, and the means of its steps."""
    tokens, segment = tokens_of(group, group.path(leaf), column), group.tree.segments[leaf]
    head = Text().append_text(mark(segment.reward)).append(f" {group.leaves.index(leaf) + 1}  ", "bold")
    head.append(_facts(group, leaf, tokens, shading), "dim")
    lines: list[RenderableType] = [head, Padding(shaded(tokens, shading, limit=limit), (0, 0, 0, 4))]
    means = steps_line(tokens, shading)
    return [*lines, *([Padding(means, (0, 0, 0, 4))] if means else []), Text()]


def _facts(group: "Group", leaf: int, tokens: Tokens, shading: Shading) -> str:
    segment, value = group.tree.segments[leaf], mean(tokens.values)
    return " · ".join(
        fact
        for fact in (
            "unjudged" if segment.reward is None else f"reward {segment.reward:.2f}",
            f"{len(tokens.texts)} tokens",
            "" if value is None else _average(tokens, value, shading),
            "truncated" if segment.finish == "length" else "",
            "masked" if segment.masked else "",
            "pruned" if group.pruned[leaf] else "",
        )
        if fact
    )


def _average(tokens: Tokens, value: float, shading: Shading) -> str:
    return f"{'mean ' if tokens.varies(shading.scale) else ''}{shading.name} {signed(value, shading.scale)}"


def tree_view(group: "Group", column: str, shading: Shading, leaves: Sequence[int]) -> Tree:
    """The segments above these leaves, each on a line that is cut to the width."""
    shown = {segment for leaf in leaves for segment in group.path(leaf)}
    rewards = group.rewards
    label = f"mean reward {sum(rewards) / len(rewards):.2f} of {len(rewards)} leaves" if rewards else "unjudged"
    nodes = {-1: Tree(Text(label, "dim"), guide_style="dim")}
    ends = set(group.leaves)
    for number_, segment in enumerate(group.tree.segments):
        if number_ in shown:
            label_ = _node(group, number_, column, shading, number_ in ends)
            nodes[number_] = nodes[segment.parent].add(label_)
    return nodes[-1]


def _node(group: "Group", segment: int, column: str, shading: Shading, is_leaf: bool) -> Text:
    """Reward of a leaf or value, mean of the column, marks, text."""
    tokens, own = tokens_of(group, [segment], column), group.tree.segments[segment]
    label = Text(no_wrap=True, overflow="ellipsis")
    if is_leaf:
        label.append_text(mark(own.reward)).append("" if own.reward is None else f" {own.reward:.2f}")
    elif (value := _finite(group.values[segment])) is not None:
        label.append(f"value {value:.2f}")
    if (average := mean(tokens.values)) is not None:
        label.append("  ").append(signed(average, shading.scale), style_of(average, shading.scale))
    for name, holds in (("pruned", group.pruned[segment]), ("truncated", own.finish == "length")):
        label.append(f"  {name}" if holds else "", "italic")
    text = shaded(tokens, replace(shading, plain=False), flat=True)
    if group.pruned[segment]:
        text.stylize("dim strike")
    return label.append("  ").append_text(text)


def legend(group: "Group", column: str, shading: Shading) -> list[Text]:
    """What shades and marks mean, and what else tokens can be shaded by."""
    ends = spread(group.columns.get(column, []))
    scale = Text().append(shading.name if ends else "no numbers of tokens", "bold")
    for share in (-1.0, -0.5, 0.5, 1.0):
        if ends and (ends[0] < 0 if share < 0 else ends[1] > 0):
            value = share * shading.scale
            scale.append(" ").append(f" {signed(value, shading.scale)} ", style_of(value, shading.scale))
    if ends and ends[0] < 0 and not shading.plain:
        scale.append("  below zero: underlined", "dim")
    rewards = {mark(group.tree.segments[leaf].reward).plain for leaf in group.leaves}
    notes = [f"{sign} {name}" for sign, name in MARKS.items() if sign in rewards]
    notes += [f"{OPEN}…{CLOSE} first wrong line"] if any(group.wrong) else []
    if is_branching(group):
        notes.append(f"value, mean {shading.name}, text")
    elif any(tokens_of(group, group.path(leaf), column).means(shading.scale) for leaf in group.leaves):
        notes.append("[…] mean of a step" if shading.plain else "… │ … means of steps")
    others = ", ".join(name for name in group.columns if name != column)
    lines = [scale, Text("   ".join(notes), "dim")]
    return [*lines, *([Text(f"other columns: {others}", "dim")] if others else [])]


# ---------------------------------------------------------------------- tables


def telling(groups: Sequence["Group"]) -> int:
    """The group to look at first: right and wrong completions, and advantages far apart."""

    def key(place: int) -> tuple[bool, float]:
        ends = spread(groups[place].columns.get("advantages", [])) or (0.0, 0.0)
        right = {reward >= 1 for reward in groups[place].rewards}
        return len(right) == 2, ends[1] - ends[0]

    return max(range(len(groups)), key=key)


def problems(groups: Sequence["Group"], most: int = 24) -> Table:
    """A line for each group."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("", justify="right")
    table.add_column("problem", overflow="ellipsis", no_wrap=True, max_width=32)
    table.add_column("completions", overflow="ellipsis", no_wrap=True)
    table.add_column("reward", justify="right")
    table.add_column("advantages", no_wrap=True)
    for place, group in enumerate(groups[:most], 1):
        rewards, ends = group.rewards, spread(group.columns.get("advantages", []))
        size = max(map(abs, ends)) if ends else 0.0
        table.add_row(
            str(place),
            Text(one_line(group.tree.problem.id)),
            Text(f"{len(group.leaves):>2} ").append_text(marks(group)),
            f"{sum(rewards) / len(rewards):.2f}" if rewards else UNJUDGED,
            " … ".join(dict.fromkeys(signed(end, size) for end in ends or ())),
        )
    if len(groups) > most:
        table.add_row("", Text(f"{len(groups) - most} more"))
    return table


# ---------------------------------------------------------------------- while a run goes on


def glimpse(title: Text, question: str, tokens: Tokens, shading: Shading, console: Console) -> Stack:
    """One completion in at most six lines."""
    width, asked = console.width - 2, Text(one_line(question), "dim")
    asked.truncate(width, overflow="ellipsis")
    text, means = shaded(tokens, shading, flat=True, limit=3 * width - 40), steps_line(tokens, shading)
    lines = [asked, *clipped(text, console, width, 3), *(clipped(means, console, width, 1) if means else [])]
    return Stack(title, *(Text("  ").append_text(line) for line in lines))


def clipped(text: Text, console: Console, width: int, most: int) -> Iterator[Text]:
    """The first lines of a text."""
    lines = text.wrap(console, width)
    for place, line in enumerate(lines[:most]):
        line.rstrip()
        if place == most - 1 and len(lines) > most:
            line.truncate(width - 1)
            line.append("…", "dim")
        yield line


def is_plain(console: Console) -> bool:
    """Whether the output has no styles."""
    return console.color_system is None


def forgive(console: Console) -> None:
    """Let characters that the encoding of the output lacks become question marks instead of an error."""
    if isinstance(console.file, TextIOWrapper):
        console.file.reconfigure(errors="replace")


def names(found: Collection[int], most: int = 12) -> str:
    """Numbers in their order, the middle left out where there are many."""
    ordered = [str(each) for each in sorted(found)]
    if len(ordered) <= most:
        return ", ".join(ordered)
    return f"{', '.join(ordered[: most // 2])} … {', '.join(ordered[-most // 2 :])} ({len(ordered)})"
