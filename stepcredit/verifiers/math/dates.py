"""Dates, times of day, ranges and numbers in groups: digits and signs that look like arithmetic and are none.

`2021-05-01` is no subtraction, `5/1/2021` no fraction, `3-5` between other numbers a range, `1-800-555-1234` one name.
"""

# ruff: noqa: RUF001 - signs that look alike are part of what is read

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from stepcredit.verifiers.math import units
from stepcredit.verifiers.math.text import EAST_ASIAN, TEXT

_MONTHS = "january february march april may june july august september october november december"
MONTHS = _MONTHS.split()
MONTH = rf"(?P<name>{'|'.join(MONTHS)}|(?:{'|'.join(month[:3] for month in MONTHS)}|sept)\b\.?)"
DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
WEEKDAY = r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s+)?"
DATES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?P<year>\d{4})(?P<sign>[-/.])(?P<month>\d{1,2})(?P=sign)(?P<day>\d{1,2})",  # ISO and its relatives
        r"(?P<month>\d{1,2})(?P<sign>[-/])(?P<day>\d{1,2})(?P=sign)(?P<year>\d{4})",  # US: the month first
        r"(?P<day>\d{1,2})\.\s?(?P<month>\d{1,2})\.\s?(?P<year>\d{4})",
        r"(?P<year>\d{4})-(?P<month>0\d|1[0-2])",
        r"(?P<year>\d{4})\s?年\s?(?P<month>\d{1,2})\s?月(?:\s?(?P<day>\d{1,2})\s?[日号號])?",
        r"(?P<month>\d{1,2})\s?月\s?(?P<day>\d{1,2})\s?[日号號]",
        rf"{WEEKDAY}{MONTH}\s+{DAY}(?:\s*,\s*|\s+)(?P<year>\d{{4}})",
        rf"{WEEKDAY}{DAY}\s+(?:of\s+)?{MONTH}(?:,?\s+(?P<year>\d{{4}}))?",
        rf"{WEEKDAY}{MONTH}\s+(?P<year>\d{{4}})",
        rf"{WEEKDAY}{MONTH}\s+{DAY}",
    )
]
CLOCKS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?P<hours>\d{1,2}):(?P<minutes>\d\d)\s*(?:(?P<half>[ap])\.?\s?m\.??)?",
        r"(?P<hours>\d{1,2})\s*(?P<half>[ap])\.?\s?m\.??",
        r"(?P<part>上午|早上|凌晨|中午|下午|晚上)?\s?(?P<hours>\d{1,2})\s?[点點时時]\s?"
        r"(?:(?P<minutes>\d{1,2})\s?分|(?P<thirty>半))",
        r"(?P<part>上午|早上|凌晨|中午|下午|晚上)\s?(?P<hours>\d{1,2})\s?[点點时時][整钟鐘]?",
    )
]
AFTER_NOON = ("p", "P", "中午", "下午", "晚上")
RANGE = re.compile(
    r"(?P<low>\d+(?:\.\d+)?)\s*(?P<sign>--?|[–—]{1,2}|~|〜|∼|\\sim|至|到|to)\s*(?P<high>\d+(?:\.\d+)?)"
    rf"(?P<unit>\s+[a-zA-Z]{{2,}}|\s*[{EAST_ASIAN}]+)?"
)
MATHEMATICAL = {"pi", "sin", "cos", "tan", "log", "ln", "sqrt", "or", "and"}  # no units
GROUPS = re.compile(r"\+?\d+(?:[-.]\d+){2,}|0\d+-\d+|\d+-0\d+")
DIGIT = re.compile(r"\d")
MAX_LENGTH = 60  # characters of a date with its weekday, and more
SEPARATOR = re.compile(r"\s*;\s*|\s*,\s*(?!\d{4}\b)|,?\s+and\s+|\s*和\s*")


@dataclass(frozen=True)
class Date:
    """A day of a year, or less: May 2021, May 1."""

    year: int | None
    month: int
    day: int | None


@dataclass(frozen=True)
class Clock:
    """A time of day. `half` is "a" or "p" where it is said."""

    hours: int
    minutes: int
    half: str

    def of_day(self) -> int:
        """Minutes since midnight, those of a 24-hour clock where no half of the day is said."""
        hours = self.hours % 12 + 12 * (self.half == "p") if self.half else self.hours
        return 60 * hours + self.minutes


@dataclass(frozen=True)
class Range:
    """`3-5`, `3~5 days`. `sure` says that it cannot be a difference; `words` that it may be a ratio."""

    low: Fraction
    high: Fraction
    unit: units.Unit | None
    sure: bool
    words: bool


@dataclass(frozen=True)
class Groups:
    """A telephone number, a version, an address: the digits of each group."""

    digits: tuple[str, ...]


Written = Date | Clock | Range | Groups


def decide(gold: str, answer: str) -> bool | None:
    """Whether the answer is the gold one, where one of them is a date, a time, a range or a name of digits; else None.

    An answer `5-3` may still be a difference; a gold answer never is one.
    """
    several, others = (SEPARATOR.split(text) for text in (gold, answer))
    if len(several) > 1 and all(_surely_no_arithmetic(read(part)) for part in several):
        return len(several) == len(others) and _each_has_its_own(several, others)
    left, right = read(gold), read(answer)
    if isinstance(left, Range) and left.words:  # "3 to 5" is a range where the other side has one, else a ratio
        return _ranges(left, right) if isinstance(right, Range) and right.sure and not right.words else None
    if isinstance(left, Clock):
        return isinstance(right, Clock) and _clocks(left, right)
    if isinstance(left, Range):
        return isinstance(right, Range) and _ranges(left, right)
    if left is not None:
        return left == right
    if isinstance(right, Clock):
        return None if ":" in gold else False
    return False if _surely_no_arithmetic(right) else None


@lru_cache(4096)
def read(text: str) -> Written | None:
    """What a tidy text is, None where it is none of these."""
    text = re.sub(r"\s+", " ", re.sub(r"\\[,!;: ]", " ", TEXT.sub(r" \1 ", text).replace("$", ""))).strip(" ")
    if len(text) > MAX_LENGTH or not DIGIT.search(text):
        return None
    for pattern in DATES:
        if (match := pattern.fullmatch(text)) and (date := _date(match.groupdict())):
            return date
    for pattern in CLOCKS:
        if match := pattern.fullmatch(text):
            return _clock(match.groupdict())
    if GROUPS.fullmatch(text):
        return Groups(tuple(re.findall(r"\d+", text)))
    match = RANGE.fullmatch(text)
    return _range(match) if match else None


def _date(found: dict[str, str | None]) -> Date | None:
    year, day = found.get("year"), found.get("day")
    name = found.get("name")
    month = 1 + [month[:3] for month in MONTHS].index(name[:3].lower()) if name else int(found["month"] or 0)
    date = Date(int(year) if year else None, month, int(day) if day else None)
    if found.get("sign") and date.month > 12 and date.day is not None:  # 25/12/2021
        date = Date(date.year, date.day, date.month)
    in_calendar = 1 <= date.month <= 12 and (date.day is None or 1 <= date.day <= 31)
    return date if in_calendar else None


def _clock(found: dict[str, str | None]) -> Clock:
    part = found.get("half") or found.get("part") or ""
    half = ("p" if part in AFTER_NOON else "a") if part else ""
    minutes = 30 if found.get("thirty") else int(found.get("minutes") or 0)
    return Clock(int(found["hours"] or 0), minutes, half)


def _range(match: re.Match[str]) -> Range | None:
    low, high, sign = Fraction(match["low"]), Fraction(match["high"]), match["sign"]
    unit = (match["unit"] or "").strip()
    if unit.lower() in MATHEMATICAL:
        return None
    return Range(low, high, units.read(unit), low < high or bool(unit) or sign not in "-–—", sign == "to")


def _surely_no_arithmetic(written: Written | None) -> bool:
    if isinstance(written, Range):
        return written.sure and not written.words
    if isinstance(written, Groups):
        return any(len(group) > 1 and group[0] == "0" for group in written.digits)
    return isinstance(written, Date)


def _each_has_its_own(gold: list[str], answer: list[str]) -> bool:
    left = list(answer)
    for part in gold:
        found = next((number for number, other in enumerate(left) if decide(part, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _clocks(gold: Clock, answer: Clock) -> bool:
    """The half of the day may be left out in the gold answer; in the other a 24-hour clock stands for it."""
    if gold.half and not answer.half:
        return gold.of_day() == answer.of_day() and answer.hours > 12
    as_written = not gold.half and (gold.hours, gold.minutes) == (answer.hours, answer.minutes)
    return as_written or gold.of_day() == answer.of_day()


def _ranges(gold: Range, answer: Range) -> bool:
    same_unit = gold.unit is None or answer.unit is None or gold.unit == answer.unit
    return same_unit and (gold.low, gold.high) == (answer.low, answer.high)
