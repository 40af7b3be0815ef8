"""Whether two trees say the same. The gold one goes first: it decides what a form means."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import product

from stepcredit.verifiers.math import units
from stepcredit.verifiers.math.parse import Node
from stepcredit.verifiers.math.sets import ORDER, is_set, reals
from stepcredit.verifiers.math.text import key
from stepcredit.verifiers.math.value import FAILURES, evaluate, has, mp, point, real, same, symbols

MAX_MEMBERS = 60  # of sets compared without order


def decide(gold: Node, answer: Node) -> bool:
    """Whether two trees say the same; not where a part of one has no value."""
    try:
        return matches(gold, answer)
    except FAILURES:
        return False


def matches(gold: Node, answer: Node) -> bool:
    """Whether two trees say the same.

    Raises:
        one of FAILURES: a part has no value.
    """
    gold, answer = _spread(gold), _spread(answer)
    if gold == answer:
        return not (gold.kind == "relation" and gold.args[0] == gold.args[-1])
    if is_set(gold) or is_set(answer):
        return _sets(gold, answer)
    if gold.kind == answer.kind == "relation":
        return _relations(gold, answer)
    if gold.kind == "relation" or answer.kind == "relation":
        return any(matches(left, right) for left in _values(gold) for right in _values(answer))
    if "quantity" in (gold.kind, answer.kind):
        return _quantities(gold, answer)
    if "base" in (gold.kind, answer.kind):
        return _bases(gold, answer)
    if {gold.kind, answer.kind} & {"list", "set", "group", "matrix"}:
        return _collections(gold, answer)
    if gold.kind == answer.kind == "cases":
        return _unordered(gold.args, answer.args)
    if gold.kind == answer.kind == "row":
        return _ordered(gold.args, answer.args)
    if gold.kind == answer.kind == "ratio":
        return _ratios(_flat(gold), _flat(answer))
    return same_expression(gold, answer)


def _spread(node: Node) -> Node:
    """`1 \\pm 2` as the list of its values; `\\mp` has the sign that `\\pm` has not."""
    count = _count(node, "pm")
    if not 0 < count <= 3:
        return node
    linked = has(node, "mp") or node.kind == "relation"
    choices = [(s,) * count for s in (1, -1)] if linked else list(product((1, -1), repeat=count))
    if node.kind in ("list", "set"):
        parts = [part for arg in node.args for part in _members(_spread(arg))]
        return Node(node.kind, tuple(parts), node.value)
    return Node("list", tuple(_signed(node, list(signs)) for signs in choices), "or")


def _count(node: Node, kind: str) -> int:
    return (node.kind == kind) + sum(_count(part, kind) for part in node.args)


def _signed(node: Node, signs: list[int]) -> Node:
    first = signs[0] if signs else 1
    if node.kind == "pm":
        sign = signs.pop(0)
        inner = _signed(node.args[0], signs)
        return inner if sign > 0 else Node("neg", (inner,))
    args = tuple(_signed(part, signs) for part in node.args)
    if node.kind == "mp":
        return Node("neg", args) if first > 0 else args[0]
    return replace(node, args=args)


def _members(node: Node) -> tuple[Node, ...]:
    return node.args if node.kind in ("list", "set") else (node,)


def _sets(gold: Node, answer: Node) -> bool:
    """Sets of reals by what they contain, others piece by piece: `(-a,a) \\cup (b,\\infty)`."""
    try:
        return reals(gold).equals(reals(answer))
    except FAILURES:
        pass
    if gold.kind == answer.kind == "relation":
        return _relations(gold, answer)
    if gold.kind == answer.kind == "union":
        return _unordered(gold.args, answer.args)
    if gold.kind == "list" and answer.kind == "list":
        return _unordered(gold.args, answer.args)
    if "relation" in (gold.kind, answer.kind):
        return any(matches(left, right) for left in _values(gold) for right in _values(answer))
    return _collections(gold, answer)


def _values(node: Node) -> list[Node]:
    """What a relation gives a name: of `x = 6/2 = 3`, `f(x) = 3`, `m+n = 3` and `x \\in A` the last side.

    Of `x^2 = 4` nothing: 4 is not x. Of `\\sqrt 2 \\approx 1.41` either side.
    """
    if node.kind != "relation":
        return [node]
    if ORDER & set(node.value):
        return []
    if node.value[-1] == "~":
        sides = _values(Node("relation", node.args[:-1], node.value[:-1])) if len(node.args) > 2 else [node.args[0]]
        close = [side for side in sides if _close(side, node.args[-1])]
        return [*close, node.args[-1]] if close or _names(node.args[0]) else []
    sides = [side for side in node.args if not _names(side)]
    if not sides or (node.args[0] not in sides and len(sides) < len(node.args) - 1):
        sides = [node.args[-1]] if _names(node.args[0]) else []
    consistent = all(matches(sides[-1], side) for side in sides[:-1])
    return [sides[-1]] if sides and consistent else []


def _close(left: Node, right: Node) -> bool:
    one, other = (real(evaluate(side, {})) for side in (left, right))
    return bool(abs(one - other) <= 0.01 * abs(one))


def _names(node: Node) -> bool:
    """`x`, `f(2)`, `m+n`, `(x,y)`, `AB`: names of something, not a computation with numbers."""
    if node.kind == "symbol" or (node.kind == "text"):
        return True
    if (
        node.kind == "mul"
        and node.args[0].kind == "symbol"
        and node.args[0].value in ("f", "g", "h", "P", "Q", "p", "a")
    ):
        return True
    if node.kind in ("add", "mul", "neg", "group", "div") or (
        node.kind == "call" and node.value in ("abs", "prime", "det")
    ):
        return all(map(_names, node.args))
    if node.kind == "quantity":
        return _names(node.args[0])
    return node.kind == "call" and bool(symbols(node))


def _relations(gold: Node, answer: Node) -> bool:
    """Equations up to a factor and order of the sides; `x = 1` against `y = 1` is wrong."""
    if len(gold.args) > 2 or len(answer.args) > 2:
        return any(matches(left, right) for left in _values(gold) for right in _values(answer))
    if "in" in (gold.value[0], answer.value[0]) or any(not _is_expression(side) for side in (*gold.args, *answer.args)):
        return all(matches(left, right) for left, right in zip(gold.args, answer.args, strict=True))
    first, second = gold.value[0], answer.value[0]
    mirrored = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
    kinds = {(a, b) for a, b in ((first, 1), (mirrored.get(first, first), -1))}
    factor = _factor(gold, answer)
    if factor is None:
        return False
    if first in ("=", "!=", "~"):
        return first == second
    return (second, 1 if factor > 0 else -1) in kinds


def _is_expression(node: Node) -> bool:
    return node.kind not in ("list", "set", "group", "matrix", "text", "cases", "quantity", "relation")


def _factor(gold: Node, answer: Node) -> Fraction | float | None:
    """The constant ratio of left side minus right side, None where there is none."""
    sides = [Node("add", (node.args[0], Node("neg", (node.args[1],)))) for node in (gold, answer)]
    names = symbols(gold) | symbols(answer)
    if not names:
        return None
    ratios = []
    for trial in range(0, 8, 2):
        left, right = (real(evaluate(side, point(names, trial))) for side in sides)
        if abs(left) < 1e-30 or abs(right) < 1e-30:
            return None
        ratios.append(right / left)
    if not all(same(ratio, ratios[0]) for ratio in ratios) or mp.im(ratios[0]) != 0:
        return None
    return float(mp.re(ratios[0]))


def _quantities(gold: Node, answer: Node) -> bool:
    """Units are compared where both have one: 1 m = 100 cm, 5 cm is not 5 m; a unit that only one has is dropped."""
    if gold.kind != "quantity" and {gold.kind} & {"list", "set", "group"}:
        return matches(gold, answer.args[0])
    if answer.kind in ("list", "set", "group"):
        return matches(gold.args[0], answer) or _collections(gold, answer)
    left, right = (units.read(node.value) if node.kind == "quantity" else None for node in (gold, answer))
    inner = [node.args[0] if node.kind == "quantity" else node for node in (gold, answer)]
    if left and right:
        if left[1] != right[1]:
            return False
        scaled = [
            Node("mul", (Node("number", value=unit[0]), node)) for unit, node in zip((left, right), inner, strict=True)
        ]
        return matches(*inner) if left == right else same_expression(*scaled)
    if gold.value == "%" and gold.kind == "quantity":
        return matches(*inner) or same_expression(gold, answer)
    if answer.value == "%" and answer.kind == "quantity":
        return same_expression(gold, answer) or (matches(*inner) and abs(evaluate(gold, {})) >= 1)
    if "degree" in (gold.value, answer.value) and _radians(gold, answer):
        return True
    return matches(*inner)


def _radians(gold: Node, answer: Node) -> bool:
    """`90^\\circ` is \\pi/2 where the other side has \\pi in it."""
    if not (has(gold, "constant", "pi") or has(answer, "constant", "pi")):
        return False
    return same_expression(gold, answer)


def _bases(gold: Node, answer: Node) -> bool:
    """Digits and base; a base that only one side has is dropped."""
    if gold.kind == answer.kind == "base":
        return bool(gold.value == answer.value)
    based, plain = (gold, answer) if gold.kind == "base" else (answer, gold)
    return plain.kind == "number" and str(plain.value) == based.value[0].lstrip("0")


def _collections(gold: Node, answer: Node) -> bool:
    """Order counts in tuples and points, not in sets and bare lists; a column is a vector like a tuple."""
    left, right = _vector(gold), _vector(answer)
    if gold.kind == answer.kind == "matrix":
        return _ordered(gold.args, answer.args)
    if gold.kind == "group" and answer.kind == "group":
        interval = len(gold.args) == 2
        return (gold.value == answer.value or not interval) and _ordered(gold.args, answer.args)
    if "matrix" in (gold.kind, answer.kind):
        return left is not None and right is not None and _ordered(left, right)
    if gold.kind == "group" or answer.kind == "group":
        other = answer if gold.kind == "group" else gold
        if other.kind != "list" or "()" not in (gold.value, answer.value):
            return len(_members(other)) == 1 and other.kind == "set" and decide(other.args[0], answer)
        return _ordered([_bare(part) for part in left or ()], [_bare(part) for part in right or ()])
    return _unordered(_distinct(_members(gold)), _distinct(_members(answer)))


def _bare(node: Node) -> Node:
    """Of `x = 1` the 1, for `x = 1, y = 2` against `(1, 2)`."""
    values = _values(node)
    return values[0] if values else node


def _vector(node: Node) -> Sequence[Node] | None:
    if node.kind == "matrix":
        if all(len(row.args) == 1 for row in node.args):
            return [row.args[0] for row in node.args]
        return node.args[0].args if len(node.args) == 1 else None
    return node.args if node.kind in ("group", "list") else None


def _distinct(nodes: Sequence[Node]) -> list[Node]:
    found: list[Node] = []
    for node in nodes[:MAX_MEMBERS]:
        if not any(decide(node, other) for other in found):
            found.append(node)
    return found + list(nodes[MAX_MEMBERS:])


def _ordered(gold: Sequence[Node], answer: Sequence[Node]) -> bool:
    return len(gold) == len(answer) and all(map(decide, gold, answer))


def _unordered(gold: Sequence[Node], answer: Sequence[Node]) -> bool:
    if len(gold) != len(answer) or len(gold) > MAX_MEMBERS:
        return False
    left = list(answer)
    for wanted in gold:
        found = next((i for i, node in enumerate(left) if decide(wanted, node)), None)
        if found is None:
            return False
        del left[found]
    return True


def _flat(node: Node) -> list[Node]:
    """`3:4:5` as its three parts."""
    return [*_flat(node.args[0]), node.args[1]] if node.kind == "ratio" else [node]


def _ratios(gold: list[Node], answer: list[Node]) -> bool:
    if len(gold) != len(answer):
        return False
    return all(
        same_expression(Node("div", (part, gold[0])), Node("div", (other, answer[0])))
        for part, other in zip(gold[1:], answer[1:], strict=True)
    )


def same_expression(gold: Node, answer: Node) -> bool:
    """Equal values, at several points where there are variables. `\\log` may be either logarithm."""
    if gold.kind == answer.kind == "text":
        return key(gold.value) == key(answer.value)
    bases = (False, True) if has(gold, "call", "log") or has(answer, "call", "log") else (False,)
    return any(_same_at_points(gold, answer, log10) for log10 in bases)


def _same_at_points(gold: Node, answer: Node, log10: bool) -> bool:
    names = symbols(gold) | symbols(answer)
    if not names:
        return same(evaluate(gold, {}, log10), evaluate(answer, {}, log10))
    negative = has(gold, "call", "abs") or has(answer, "call", "abs")
    agreed = 0
    for trial in range(0, 8, 1 if negative else 2):
        try:
            values = [evaluate(node, point(names, trial), log10) for node in (gold, answer)]
        except (ZeroDivisionError, OverflowError):
            continue
        if not same(*values):
            return False
        agreed += 1
    return agreed >= 3
