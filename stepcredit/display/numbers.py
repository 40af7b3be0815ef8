"""Numbers as people read them, and the mean, least and largest of columns that lack some."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

MINUS = "\N{MINUS SIGN}"


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
    sign = "+" if value > 0 else MINUS if value < 0 else ""
    power = math.floor(math.log10(scale)) if scale > 0 else 0
    if power < -6 or power > 6:
        return f"{sign}{abs(value):.1e}"
    decimals = max(2, 1 - power)
    text = f"{abs(value):,.{decimals}f}"
    return sign + (text.partition(".")[0] if power > 1 else text)


def finite(value: Any) -> float | None:
    """A finite number as it is, anything else as None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def finite_numbers(values: Sequence[Any] | None, length: int) -> list[float | None]:
    """One finite number or None for each token, whatever a file holds; all None where it holds nothing."""
    return [finite(value) for value in values] if values else [None] * length


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the numbers among the values; None where there are none."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def least_and_largest(rows: Iterable[Sequence[Any] | None]) -> tuple[float, float] | None:
    """Of all finite numbers in these rows; None where there are none."""
    present = [value for row in rows for value in finite_numbers(row, 0) if value is not None]
    return (min(present), max(present)) if present else None


def abbreviated(values: Collection[int], most: int = 12) -> str:
    """Whole numbers in rising order, the middle left out where there are more than `most`."""
    ordered = [str(value) for value in sorted(values)]
    if len(ordered) <= most:
        return ", ".join(ordered)
    half = most // 2
    return f"{', '.join(ordered[:half])} … {', '.join(ordered[-half:])} ({len(ordered)})"
