"""Gold answers that our own reader cannot read, sums and integrals say, compared by math-verify.

math-verify runs sympy, which computes without limits, so this is for short answers without towers only, and its
deadline is the worker's.
"""

import logging
import re
from functools import lru_cache
from typing import Any

MAX_LENGTH = 200
SAFE = re.compile(
    r"(?!.*\d{7})(?!.*\^[^^]*\^[^^]*\^)(?!.*!)(?!.*\^\{?\s*\d{3}).*", re.DOTALL
)  # nothing large comes of it


def equal(gold: str, answer: str) -> bool:
    """Whether math-verify takes the answer for the gold one. Both must come to something: not 0 = 0 or True alone."""
    if max(len(gold), len(answer)) > MAX_LENGTH or not (SAFE.fullmatch(gold) and SAFE.fullmatch(answer)):
        return False
    from math_verify import verify

    left, right = _read(gold), _read(answer)
    if not left or not right or _degenerate(left[0]) or _degenerate(right[0]):
        return False
    return bool(verify(list(left), list(right), timeout_seconds=None))


@lru_cache(1024)
def _read(text: str) -> tuple[Any, ...]:
    from math_verify import LatexExtractionConfig, parse

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)  # it says at every call that its time limit is off
    return tuple(parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None))


def _degenerate(value: Any) -> bool:
    """Truth values and texts: many different answers are read as one of them."""
    from sympy import Basic
    from sympy.logic.boolalg import BooleanAtom

    return isinstance(value, BooleanAtom) or not isinstance(value, Basic | list | tuple)
