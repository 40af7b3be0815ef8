"""Sets of real numbers: intervals, unions, inequalities. A set is where it may change, and what it contains."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from stepcredit.verifiers.math.parse import Node, Unreadable
from stepcredit.verifiers.math.value import evaluate, mp, real, same

SET_KINDS = ("union", "intersection", "minus", "field")
ORDER = {"<", ">", "<=", ">=", "!="}


@dataclass(frozen=True)
class Reals:
    """A set of reals that changes at `edges` only; `variable` is the one that an inequality names."""

    edges: tuple[Any, ...]
    contains: Callable[[Any], bool]
    variable: str | None = None

    def equals(self, other: "Reals") -> bool:
        if self.variable and other.variable and self.variable != other.variable:
            return False
        return all(self.contains(x) == other.contains(x) for x in _samples(self.edges + other.edges))

    def empty(self) -> bool:
        return not any(map(self.contains, _samples(self.edges)))


def is_set(node: Node) -> bool:
    """Whether it can only be a set of reals: `(1,2)` alone may as well be a point."""
    if node.kind in SET_KINDS:
        return True
    if node.kind == "relation":
        return bool(ORDER & set(node.value)) or (node.value == ("in",) and is_set(node.args[1]))
    if node.kind == "list":
        return all(part.kind == "relation" and is_set(part) for part in node.args)
    return node.kind == "group" and node.value != "()" and len(node.args) == 2


def reals(node: Node) -> Reals:
    """The set that is meant.

    Raises:
        Unreadable (or what `evaluate` raises): it is no set of numbers.
    """
    if node.kind == "group" and len(node.args) == 2:
        low, high = (_edge(part) for part in node.args)
        left, right = node.value
        return _both(_ray(low, ">" if left == "(" else ">="), _ray(high, "<" if right == ")" else "<="))
    if node.kind == "set":
        return _points([_edge(part) for part in node.args])
    if node.kind == "field" and node.value == "R":
        return Reals((), lambda x: True)
    if node.kind == "union":
        return _either(*map(reals, node.args))
    if node.kind == "intersection":
        return _both(*map(reals, node.args))
    if node.kind == "minus":
        return _without(*map(reals, node.args))
    if node.kind == "relation":
        return _relation(node)
    if node.kind == "list":
        sets = [reals(part) for part in node.args]
        joined = sets[0]
        for part in sets[1:]:
            common = _both(joined, part)
            joined = common if node.value == "and" and not common.empty() else _either(joined, part)
        return joined
    raise Unreadable("no set of numbers")


def _edge(node: Node) -> Any:
    value = real(evaluate(node, {}))
    if mp.im(value) != 0:
        raise Unreadable("not real")
    return mp.re(value)


def _samples(edges: tuple[Any, ...]) -> list[Any]:
    """Every edge, a number between each two, one beyond each end."""
    points = sorted(edge for edge in edges if not mp.isinf(edge))
    distinct = [x for i, x in enumerate(points) if i == 0 or not same(x, points[i - 1])]
    if not distinct:
        return [mp.mpf(0)]
    between = [(x + y) / 2 for x, y in pairwise(distinct)]
    return [distinct[0] - 1, *distinct, *between, distinct[-1] + 1]


def _ray(edge: Any, sign: str) -> Reals:
    def contains(x: Any) -> bool:
        if same(x, edge):
            return sign in ("<=", ">=", "=")
        return sign == "!=" or (sign in ("<", "<=") and x < edge) or (sign in (">", ">=") and x > edge)

    return Reals((edge,), contains)


def _points(values: list[Any]) -> Reals:
    return Reals(tuple(values), lambda x: any(same(x, value) for value in values))


def _either(left: Reals, right: Reals) -> Reals:
    return Reals(
        left.edges + right.edges, lambda x: left.contains(x) or right.contains(x), left.variable or right.variable
    )


def _both(left: Reals, right: Reals) -> Reals:
    return Reals(
        left.edges + right.edges, lambda x: left.contains(x) and right.contains(x), left.variable or right.variable
    )


def _without(left: Reals, right: Reals) -> Reals:
    return Reals(left.edges + right.edges, lambda x: left.contains(x) and not right.contains(x), left.variable)


def _relation(node: Node) -> Reals:
    """`1 < x \\le 2`, `x \\ne 3`, `x \\in (1, 2)`: a variable alone against numbers."""
    if node.value == ("in",):
        return reals(node.args[1])
    names = [part.value for part in node.args if part.kind == "symbol"]
    if len(names) != 1:
        raise Unreadable("no single variable")
    mirrored = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
    sets = []
    for left, sign, right in zip(node.args, node.value, node.args[1:], strict=False):
        if left.kind == "symbol":
            sets.append(_ray(_edge(right), sign))
        elif right.kind == "symbol":
            sets.append(_ray(_edge(left), mirrored[sign]))
        else:
            raise Unreadable("no variable between")
    joined = sets[0] if len(sets) == 1 else _both(sets[0], sets[1])
    return Reals(joined.edges, joined.contains, names[0])
