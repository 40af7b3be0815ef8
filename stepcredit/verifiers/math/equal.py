"""Whether an answer says the same as the gold answer. The gold goes first: it decides what a form means."""

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from itertools import product

from stepcredit.verifiers.math import library, units
from stepcredit.verifiers.math.parse import MAX_DIGITS, Node, parse
from stepcredit.verifiers.math.sets import ORDER, is_set, reals
from stepcredit.verifiers.math.text import TEXT, clean, key
from stepcredit.verifiers.math.value import FAILURES, evaluate, has, mp, point, real, same, symbols

MAX_MEMBERS = 60  # of sets compared without order
PLAIN_NUMBER = re.compile(r"([-+]?)\s?(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)")
PLAIN_FRACTION = re.compile(r"([-+]?)\s?(?:\\frac\s?\{(-?\d+)\}\s?\{(\d+)\}|\\frac(\d)(\d)|(\d+)\s?/\s?(\d+))")
CLOCK = re.compile(r"(\d{1,2}):(\d\d)\s*(?:([ap])\.?\s?m\.??)?", re.IGNORECASE)
CHOICE = re.compile(r"(?:[Oo]ption |[Cc]hoice )?(?:\(\s?([A-Ja-j])\s?\)\s?|([A-J])\s?[.):]\s?|([A-J])$)\s*(.*)")
ANOTHER = re.compile(
    r"\s*(?:[,;&/]|(?:and|or)\b)|\s*\(?[A-HJ]\s?(?:[.):]|$)|.*\s[A-HJ]\s?[.):]|.*\([A-HJ]\)", re.DOTALL
)
ORDINAL = re.compile(r"(\d+)\s?(?:\^\s?\{?)?\s?(?:st|nd|rd|th)\}?")
LONE_UNIT = re.compile(r"([-\d.,/ ]*\d|\\frac\{\d+\}\{\d+\})\s?([mgshLVWNJK](?:/[a-z]+)?)(\s?\^\s?\{?-?\d\}?)?")
COMPUTED = re.compile(r"\\(?:sum|prod|int|lim)(?![a-z])")  # what our reader leaves to the library
LEAD = re.compile(r"(\\text\s*\{)?\s*(?:the |my )?(?:final )?answer(?: is|:)\s*:?\s*(\}?)\s*(?=\S)", re.IGNORECASE)
RATIO = re.compile(r"(\d+)\s+to\s+(\d+)")
POWERS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
LARGE = re.compile(rf"(-?\d[\d,]*(?:\.\d+)?)\s*({'|'.join(POWERS)})")
WORD = re.compile(r"[A-Za-z][A-Za-z' ,-]*[A-Za-z]")
NUMBER_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty"""
PHRASES = {
    **{word: str(value) for value, word in enumerate(NUMBER_WORDS.split())},
    "infinity": r"\infty", "positive infinity": r"\infty", "negative infinity": r"-\infty", "one half": r"\frac12",
    **dict.fromkeys(["no solution", "no solutions", "no real solution", "no real solutions", "none", "empty set",
                     "the empty set", "there are no solutions", "there is no solution"], r"\emptyset"),
    **dict.fromkeys(["dne", "does not exist", "undefined", "not defined", "limit does not exist"], "undefined"),
    **dict.fromkeys(["all real numbers", "all reals", "reals", "all real x"], r"\mathbb{R}"),
    **dict.fromkeys(["infinitely many solutions", "infinite solutions"], "infinitely many"),
    "true": "yes", "false": "no",
}  # fmt: skip


def equal(gold: str, answer: str) -> bool:
    """Whether the answer is the gold one, both as text without `\\boxed`."""
    gold, answer = _phrase(clean(gold)), _phrase(clean(answer))
    if not gold or not answer:
        return False
    if key(gold) == key(answer):
        return True
    for decide in (_numbers, _clocks, _choices, _words):
        if (decision := decide(gold, answer)) is not None:
            return decision
    return _trees(gold, answer)


def constant(text: str) -> Fraction | None:
    """The value of a plain number or fraction, else None."""
    if len(text) > MAX_DIGITS:
        return None
    if match := PLAIN_NUMBER.fullmatch(text):
        value = Fraction(match[2].replace(",", "").rstrip(".") or "0")
    elif match := PLAIN_FRACTION.fullmatch(text):
        above, below = (int(group) for group in match.groups()[1:] if group is not None)
        if not below:
            return None
        value = Fraction(above, below)
    else:
        return None
    return -value if match[1] == "-" else value


def _phrase(text: str) -> str:
    """Words that stand for mathematics, `no solution`, `two`, `5 to 2`, `1.5 million`, as such; `3^{rd}` is 3."""
    if lead := LEAD.match(text):
        text = ("\\text{" if lead[1] and not lead[2] else "") + text[lead.end() :]
    words = re.sub(r"\s+", " ", TEXT.sub(r"\1", text).replace("$", "")).strip(" .").lower()
    if words in PHRASES:
        return PHRASES[words]
    if ordinal := ORDINAL.fullmatch(words):
        return ordinal[1]
    if ratio := RATIO.fullmatch(words):
        return f"{ratio[1]}:{ratio[2]}"
    if large := LARGE.fullmatch(words):
        return rf"{large[1]} \times 10^{{{POWERS[large[2]]}}}"
    return text


def _numbers(gold: str, answer: str) -> bool | None:
    left, right = constant(gold), constant(answer)
    return left == right if left is not None and right is not None else None


def _clocks(gold: str, answer: str) -> bool | None:
    """`3:30` is a time of day, no ratio, where the gold answer or a number with two digits of minutes says so."""
    left, right = (CLOCK.fullmatch(TEXT.sub(r"\1", text).strip()) for text in (gold, answer))
    if left and right:
        if left[3] and not right[3]:
            return _minutes(left) == _minutes(right) and int(right[1]) > 12
        return _minutes(left) == _minutes(right) or (not left[3] and (left[1], left[2]) == (right[1], right[2]))
    if left:
        return False
    return None if not right or ":" in gold else False


def _minutes(clock: re.Match[str]) -> int:
    hours = int(clock[1])
    if clock[3]:
        hours = hours % 12 + 12 * (clock[3].lower() == "p")
    return 60 * hours + int(clock[2])


def _choices(gold: str, answer: str) -> bool | None:
    """`(C)`, `C`, `C. 12` and `\\text{(C)}` are one choice; the gold answer must be one."""
    left, right = (CHOICE.fullmatch(re.sub(r"\\ ", " ", TEXT.sub(r"\1", text)).strip()) for text in (gold, answer))
    if not left:
        return None
    if right and ANOTHER.match(right[4]) and not ANOTHER.match(left[4]):
        return False
    letter = (left[1] or left[2] or left[3]).upper()
    if right:
        return letter == (right[1] or right[2] or right[3]).upper()
    if answer.strip() in (letter, letter.lower()):
        return True
    return equal(left[4], answer) if left[4] else None


def _words(gold: str, answer: str) -> bool | None:
    """Words are equal as text; without operators `abc` is a product and `east` is not."""
    left, right = (TEXT.sub(r" \1 ", text).strip() for text in (gold, answer))
    if not (WORD.fullmatch(left) and re.search(r"[a-zA-Z]{3}", left)):
        return None
    if not WORD.fullmatch(right):
        return None if _product(left) else False
    if _product(left):
        return sorted(left) == sorted(right)
    return _plain_words(left) == _plain_words(right)


def _product(word: str) -> bool:
    """`xyz`: neighbours in the alphabet."""
    return len(word) < 5 and "".join(sorted(word)) in "abcdefghijklmnopqrstuvwxyz"


def _plain_words(text: str) -> list[str]:
    words = re.findall(r"[a-z']+", text.lower())
    return [word for word in words if word not in ("the", "a", "an", "is", "it", "answer")]


@lru_cache(4096)
def _parsed(text: str, thousands: bool = True) -> Node | None:
    try:
        return parse(text, thousands)
    except FAILURES:
        return None


def _trees(gold: str, answer: str) -> bool:
    """Trees in the readings that the text allows: `5 m` is a product or a length, `100,200` a number or a list."""
    for left, right in _readings(gold, answer):
        trees = _parsed(left), _parsed(right)
        if trees[0] and trees[1] and _decide(trees[0], trees[1]):
            return True
    apart = re.search(r"\d,\d{3}", gold) and re.search(r",\s", answer)
    if apart and (tree := _parsed(gold, False)) and (other := _parsed(answer)):
        return tree.kind == other.kind == "list" and _decide(tree, other)
    return _parsed(gold) is None and bool(COMPUTED.search(gold)) and library.equal(gold, answer)


def _readings(gold: str, answer: str) -> list[tuple[str, str]]:
    readings = [(gold, answer)]
    left, right = _with_unit(gold), _with_unit(answer)
    if (left or _may_have_unit(gold)) and (right or _may_have_unit(answer)):
        readings.append((left or gold, right or answer))
    return readings


def _may_have_unit(text: str) -> bool:
    """A plain number, or an expression with a word."""
    return constant(text) is not None or bool(TEXT.search(text) or re.search(r"(?<![\\a-z])[a-z]{2}", text))


def _with_unit(text: str) -> str | None:
    match = LONE_UNIT.fullmatch(text)
    return f"{match[1]} \\text{{{match[2]}}}{match[3] or ''}" if match else None


def _decide(gold: Node, answer: Node) -> bool:
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
            return len(_members(other)) == 1 and other.kind == "set" and _decide(other.args[0], answer)
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
        if not any(_decide(node, other) for other in found):
            found.append(node)
    return found + list(nodes[MAX_MEMBERS:])


def _ordered(gold: Sequence[Node], answer: Sequence[Node]) -> bool:
    return len(gold) == len(answer) and all(map(_decide, gold, answer))


def _unordered(gold: Sequence[Node], answer: Sequence[Node]) -> bool:
    if len(gold) != len(answer) or len(gold) > MAX_MEMBERS:
        return False
    left = list(answer)
    for wanted in gold:
        found = next((i for i, node in enumerate(left) if _decide(wanted, node)), None)
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
