"""The right answers of a row as texts: data sets have text, numbers, lists of answers, and now and then others."""

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from stepcredit.forest.types import Problem

MAX_ANSWER = 500  # characters of an answer that a completion can be expected to state
MAX_WORDS = 12  # of an answer; more are a solution or a sentence, which no completion repeats


def texts_of(answer: Any) -> list[str]:
    """Texts of which each is right: of a list every entry, and all of them together.

    A list may also stand as JSON in a text, `["7"]`, as long as its entries are texts: `[1, 2]` is an interval.

    >>> texts_of(["2", -2]), texts_of(0.5), texts_of("[1, 2]")
    (['2', '-2', '2, -2'], ['0.5'], ['[1, 2]'])
    """
    entries = listed(answer)
    if entries is None:
        return [text_of(answer)]
    texts = [text_of(each) for each in entries if each is not None]
    return texts + ([", ".join(texts)] if len(texts) > 1 else [])


def listed(answer: Any) -> list[Any] | None:
    """The entries of a list of answers; None for a single answer."""
    if isinstance(answer, list | tuple):
        return list(answer)
    if isinstance(answer, str) and answer.strip()[:1] == "[":
        found = _from_json(answer)
        if isinstance(found, list) and found and all(isinstance(each, str) for each in found):
            return found
    return None


def text_of(value: Any) -> str:
    """A number as a person writes it, without an exponent; anything else as it prints."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{Decimal(repr(value)):f}"
    return str(value)


def unfit(problem: Problem) -> str | None:
    """Why the answer of a problem is nothing that a completion could state; None where it is."""
    entries = listed(problem.answer)
    for answer in [problem.answer] if entries is None else entries or [None]:
        if answer is None or not str(answer).strip():
            return "it has no answer"
        found = _from_json(answer) if isinstance(answer, str) and answer.lstrip()[:1] == "{" else answer
        if isinstance(found, Mapping):
            return f"its answer is a dictionary ({', '.join(map(str, found))})"[:80]
        if isinstance(answer, list | tuple):
            return "its answer is a list of lists"
        if isinstance(answer, bool | bytes) or (isinstance(answer, float) and not math.isfinite(answer)):
            return f"its answer is {answer!r:.40}"
    return None


def unlikely(text: str) -> str | None:
    """Why no completion can be expected to state this answer; None where one can."""
    if len(text) > MAX_ANSWER:
        return f"the answer has {len(text)} characters"
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)
    return f"the answer is a text of {len(words)} words" if len(words) > MAX_WORDS else None


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
