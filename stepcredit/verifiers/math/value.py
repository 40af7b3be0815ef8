"""Values of expressions: exact fractions where they stay exact, else 50 digits, under limits on size."""

import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from math import comb, factorial, gcd, isqrt, lcm
from typing import Any

from mpmath import MPContext

from stepcredit.verifiers.math.parse import Node, Unreadable

mp: Any = MPContext()  # one of our own: nobody else changes its precision
mp.dps = 50
TOLERANCE = mp.mpf(10) ** -25  # far below any decimal that somebody writes, far above rounding at 50 digits
MAX_BITS = 20_000  # an exact number beyond this is not computed
MAX_ARGUMENT = 10**6  # of factorials, and the decimal exponent of any power
# what arithmetic raises on answers without a value: division by zero, log 0, infinity minus infinity, deep trees
FAILURES = (Unreadable, ValueError, ZeroDivisionError, OverflowError, TypeError, RecursionError, ArithmeticError)

Value = Any  # Fraction, mpf or mpc
DEGREE = mp.pi / 180


def symbols(node: Node) -> set[str]:
    """Names of the variables; e and i are constants."""
    found: set[str] = set()
    stack = [node]
    while stack:
        part = stack.pop()
        if part.kind == "symbol" and part.value not in ("e", "i"):
            found.add(part.value)
        stack += part.args
    return found


def has(node: Node, kind: str, value: Any = None) -> bool:
    """Whether the tree has a part of this kind (and value)."""
    if node.kind == kind and (value is None or node.value == value):
        return True
    return any(has(part, kind, value) for part in node.args)


def point(names: set[str], trial: int) -> dict[str, Fraction]:
    """The same rational number for a name in every tree; odd trials have negative ones."""
    sign = -1 if trial % 2 else 1
    return {n: sign * Fraction(random.Random(f"{n} {trial}").randint(10**5, 3 * 10**6), 10**6) for n in names}


def evaluate(node: Node, at: Mapping[str, Fraction], log10: bool = False) -> Value:
    """The value at a point.

    Raises:
        one of FAILURES: it has none, or it is too large to be computed.
    """

    def walk(part: Node) -> Value:
        kind, args = part.kind, part.args
        if kind in ("number", "decimal"):
            return part.value
        if kind == "symbol":
            if part.value in ("e", "i"):
                return mp.e if part.value == "e" else mp.mpc(0, 1)
            if part.value not in at:
                raise Unreadable(f"{part.value} has no value")
            return at[part.value]
        if kind == "constant":
            return mp.pi if part.value == "pi" else mp.inf
        if kind == "quantity" and part.value in ("%", "degree"):
            return times(walk(args[0]), Fraction(1, 100) if part.value == "%" else DEGREE)
        if kind == "call":
            return _call(part.value, [walk(arg) for arg in args], log10)
        if kind in BINARY:
            return BINARY[kind](*map(walk, args))
        raise Unreadable(f"{kind} has no value")

    return walk(node)


def same(left: Value, right: Value) -> bool:
    """Exactly equal, or closer than any written decimal could be by chance."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    left, right = real(left), real(right)
    if mp.isinf(left) or mp.isinf(right):
        return bool(left == right)
    return bool(
        abs(left - right) <= TOLERANCE * max(1 if min(abs(left), abs(right)) == 0 else 0, abs(left), abs(right))
    )


def real(value: Value) -> Value:
    """A number of `mp`."""
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _exact(*values: Value) -> bool:
    return all(isinstance(value, Fraction) for value in values)


def plus(left: Value, right: Value) -> Value:
    return left + right if _exact(left, right) else real(left) + real(right)


def minus(value: Value) -> Value:
    return -value


def times(left: Value, right: Value) -> Value:
    if _exact(left, right) and _bits(left) + _bits(right) < MAX_BITS:
        return left * right
    return real(left) * real(right)


def over(left: Value, right: Value) -> Value:
    if right == 0:
        raise ZeroDivisionError
    return left / right if _exact(left, right) else real(left) / real(right)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def power(base: Value, exponent: Value) -> Value:
    """Exact where it is rational and not large."""
    if _exact(base, exponent):
        if exponent.denominator == 1 and abs(exponent.numerator) * _bits(base) < MAX_BITS:
            return base**exponent.numerator if base or exponent >= 0 else over(base, Fraction(0))
        if exponent.denominator == 2 and exponent.numerator in (1, -1) and base > 0:
            root = Fraction(isqrt(base.numerator), isqrt(base.denominator))
            if root * root == base:
                return root if exponent > 0 else 1 / root
    base, exponent = real(base), real(exponent)
    if base == 0:
        return over(base, Fraction(0)) if mp.re(exponent) < 0 else mp.mpf(0)
    if abs(exponent * mp.log(base)) > 3 * MAX_ARGUMENT:
        raise Unreadable("too large a power")
    return mp.exp(exponent * mp.log(base))


def root(inside: Value, index: Value) -> Value:
    """Odd roots of negative numbers are real."""
    if _exact(inside, index) and inside < 0 and index.denominator == 1 and index.numerator % 2:
        return -root(-inside, index)
    return power(inside, 1 / index if _exact(index) else 1 / real(index))


BINARY: dict[str, Callable[..., Value]] = {
    "add": plus,
    "neg": minus,
    "mul": times,
    "div": over,
    "ratio": over,
    "mixed": plus,
    "pow": power,
    "root": root,
}
_TRIGONOMETRY = """sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh arcsinh arccosh arctanh arcsec
    arccsc"""
TRIGONOMETRY = set(_TRIGONOMETRY.split())
INTEGER = {"gcd": gcd, "lcm": lcm}


def _call(name: str, values: list[Value], log10: bool) -> Value:
    if not values:
        raise Unreadable("a function of nothing")
    first = values[0]
    if name == "abs":
        return abs(first)
    if name in ("max", "min") and _exact(*values):
        return max(values) if name == "max" else min(values)
    if name in INTEGER and _exact(*values) and all(value.denominator == 1 for value in values):
        return Fraction(INTEGER[name](*(value.numerator for value in values)))
    if name in ("floor", "ceil"):
        whole = getattr(mp, name)(real(first))
        return Fraction(int(whole)) if abs(whole) < 10**40 and mp.im(whole) == 0 else whole
    if name == "factorial":
        return _factorial(first)
    if name == "binom":
        return _binomial(*values)
    if name in ("ln", "log", "lg"):
        if name == "log" and len(values) == 2:
            return mp.log(real(first)) / mp.log(real(values[1]))
        return mp.log(real(first)) / (mp.log(10) if name == "lg" or (name == "log" and log10) else 1)
    if name == "exp":
        return power(mp.e, first)
    if name in TRIGONOMETRY and len(values) == 1:
        if abs(first) > 10**15:
            raise Unreadable("too large an angle")
        return getattr(mp, name.replace("arc", "a"))(real(first))
    if name in ("Re", "Im", "arg"):
        return {"Re": mp.re, "Im": mp.im, "arg": mp.arg}[name](real(first))
    raise Unreadable(name)


def _factorial(value: Value) -> Value:
    if _exact(value) and value.denominator == 1 and 0 <= value <= 1500:
        return Fraction(factorial(value.numerator))
    if abs(value) > 1e4:
        raise Unreadable("too large a factorial")
    return mp.gamma(real(value) + 1)


def _binomial(above: Value, below: Value) -> Value:
    if _exact(above, below) and above.denominator == below.denominator == 1 and 0 <= below <= above <= 10_000:
        return Fraction(comb(above.numerator, below.numerator))
    return over(_factorial(above), times(_factorial(below), _factorial(plus(above, -below))))
