"""Tokens over shades of their numbers.

Text of a run is never read as markup. Signs are told by more than colour: numbers below zero are underlined, and where
the output has no styles (`plain`) the numbers stand in the text.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise

from rich.style import Style
from rich.text import Text

from stepcredit.display.numbers import mean, signed
from stepcredit.display.token_texts import visible

LEVELS = 5  # shades of a sign
NEGLIGIBLE = 0.01  # of the scale; smaller numbers are not shaded
POSITIVE_ON_DARK = ("#12283d", "#16406b", "#1a5b9c", "#1f77cc", "#3a95f0")  # blue, by rising size
NEGATIVE_ON_DARK = ("#38220d", "#5c360c", "#8a4f0c", "#bb6a08", "#ef8a17")  # orange
POSITIVE_ON_LIGHT = ("#e3eefb", "#bcd9f5", "#8bbdec", "#4f97dc", "#1c68b8")
NEGATIVE_ON_LIGHT = ("#fdeedd", "#fbd5a8", "#f7b569", "#ea8b22", "#b85c00")
WHITE, BLACK = "#ffffff", "#101010"  # of the text
OPEN, CLOSE = "«✗ ", "»"  # around the first wrong line


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text, to be shaded: each with its text and its number.

    Attributes:
        starts: tokens with which a step begins.
        wrong: first and last (exclusive) token of the first wrong line.
    """

    texts: Sequence[str]
    values: Sequence[float | None]
    starts: Sequence[int] = (0,)
    wrong: tuple[int, int] | None = None

    def varies(self, scale: float) -> bool:
        """Whether the numbers still differ as they are written."""
        present = [value for value in self.values if value is not None]
        return bool(present) and signed(max(present), scale) != signed(min(present), scale)

    def step_means(self, scale: float) -> dict[int, float | None]:
        """The mean of each step, by its first token; empty where they are all written the same."""
        bounds = [*sorted({0, *self.starts}), len(self.values)]
        means = {start: mean(self.values[start:end]) for start, end in pairwise(bounds)}
        return means if len({signed(value, scale) for value in means.values()}) > 1 else {}


@dataclass(frozen=True)
class Shading:
    """How numbers become shades.

    Attributes:
        name: what the numbers are.
        scale: the size of the strongest shade.
        plain: the output has no styles, so the means of steps are written into the text.
    """

    name: str
    scale: float
    plain: bool = False


def style_of(value: float | None, scale: float) -> Style:
    """Blue above zero; orange and underlined below; the larger, the stronger."""
    if value is None or not scale or abs(value) < NEGLIGIBLE * scale:
        return Style.null()
    level = min(LEVELS, max(1, math.ceil(LEVELS * abs(value) / scale)))
    return _style(value > 0, level)


@cache
def _style(positive: bool, level: int) -> Style:
    if _is_light(os.environ.get("COLORFGBG", "")):
        shades = POSITIVE_ON_LIGHT if positive else NEGATIVE_ON_LIGHT
        text = WHITE if level == LEVELS else BLACK
    else:
        shades = POSITIVE_ON_DARK if positive else NEGATIVE_ON_DARK
        text = BLACK if level == LEVELS else WHITE
    return Style(color=text, bgcolor=shades[level - 1], underline=None if positive else True)


def _is_light(colours: str) -> bool:
    """Whether the terminal says that its background is light (`COLORFGBG`, such as 0;15)."""
    background = colours.rpartition(";")[2]
    return background.isdigit() and int(background) in (7, *range(9, 16))


def one_line(text: str) -> str:
    """Text of a run on one line, without anything that acts on a terminal."""
    return visible(text).replace("\n", "↵ ").replace("\t", " ")


def shaded(tokens: Tokens, shading: Shading, flat: bool = False, limit: int | None = None) -> Text:
    """Tokens over shades of their numbers.

    Args:
        flat: on one line.
        limit: about how many characters; of a longer text tokens in the middle are left out.
    """
    parts: list[tuple[str, Style | str]] = []
    hidden = _hidden(tokens.texts, limit)
    means = tokens.step_means(shading.scale) if shading.plain else {}
    for place, (text, value) in enumerate(zip(tokens.texts, tokens.values, strict=True)):
        if hidden and place == hidden.start:
            parts.append((f" … {len(hidden)} tokens … ", "dim italic"))
        is_shown, style = place not in hidden, style_of(value, shading.scale)
        word = text.lstrip(" ")
        if is_shown and place:
            parts.append((text[: len(text) - len(word)], style))
        if is_shown and place in means:
            parts.append((f"[{signed(means[place], shading.scale)}] ", ""))
        if tokens.wrong and place == tokens.wrong[0]:
            parts.append((OPEN, "bold red"))
        if is_shown:
            parts.append((one_line(word) if flat else visible(word).replace("\n", "↵\n"), style))
        if tokens.wrong and place == tokens.wrong[1] - 1:
            parts.append((CLOSE, "bold red"))
    same_style = groupby(((text, style) for text, style in parts if text), key=lambda part: part[1])
    return Text.assemble(*(("".join(text for text, _ in neighbours), style) for style, neighbours in same_style))


def _hidden(texts: Sequence[str], limit: int | None) -> range:
    """The tokens in the middle that are left out; of the room two thirds go to those before them."""
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


def step_means_line(tokens: Tokens, shading: Shading) -> Text | None:
    """The mean of each step, where they differ; in plain text they stand before the steps instead."""
    means = {} if shading.plain else tokens.step_means(shading.scale)
    parts = [Text(signed(value, shading.scale), style_of(value, shading.scale)) for value in means.values()]
    return Text(" │ ").join(parts) if parts else None
