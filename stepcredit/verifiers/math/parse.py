"""A reader of mathematical answers, LaTeX and plain: text to a tree of `Node`. It reads and never computes."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from stepcredit.verifiers.math import units
from stepcredit.verifiers.math.tokens import (
    ACCENTS,
    ALIASES,
    FUNCTIONS,
    GREEK,
    RELATIONS,
    SET_OPERATORS,
    Token,
    Unreadable,
    tokens,
)

CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yuan"}
MAX_DEPTH = 40
MAX_DIGITS = 1000  # of one number; Python itself refuses beyond 4300


@dataclass(frozen=True)
class Node:
    """A piece of mathematics: its kind, its parts, and what else it holds (a name, delimiters, operators)."""

    kind: str
    args: tuple["Node", ...] = ()
    value: Any = None


def parse(text: str, thousands: bool = True) -> Node:
    """The tree of a cleaned text.

    Raises:
        Unreadable: it is not mathematics.
    """
    reader = _Reader(tokens(text, thousands))
    node = reader.items((), "list")
    if reader.at < len(reader.tokens):
        raise Unreadable(f"left over: {reader.peek()}")
    return node


def number(text: str) -> Node:
    """A literal: `1,234`, `.5`, `6.02e23`, `0.1\\overline{6}`."""
    text = text.replace(",", "")
    if len(text) > MAX_DIGITS:
        raise Unreadable("too many digits")
    if repeat := re.fullmatch(r"(\d*)\.(\d*)(?![eE][-+]?\d)\D+(\d+)\D?", text):
        whole, head, period = repeat.groups()
        digits = Fraction(int(period), 10 ** len(period) - 1) + int(head or 0)
        return Node("number", value=int(whole or 0) + digits / 10 ** len(head))
    return Node("decimal" if "." in text else "number", value=Fraction(text))


class _Reader:
    """Recursive descent over tokens; every loop takes a token or ends."""

    def __init__(self, found: list[Token]) -> None:
        self.tokens = found
        self.at = 0
        self.depth = 0
        self.bars = 0

    def peek(self, ahead: int = 0) -> Token:
        place = self.at + ahead
        return self.tokens[place] if place < len(self.tokens) else Token("nothing", "")

    def take(self) -> Token:
        token = self.peek()
        if token.kind == "nothing":
            raise Unreadable("ends too early")
        self.at += 1
        return token

    def accept(self, *texts: str, kinds: tuple[str, ...] = ("op", "command", "escaped", "text")) -> Token | None:
        if self.peek().text in texts and self.peek().kind in kinds:
            return self.take()
        return None

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise Unreadable(f"no {text}")

    def items(self, closers: tuple[str, ...], kind: str) -> Node:
        """`a, b and c` up to a closer, which is left standing."""
        parts, joints = [], []
        while self.peek().text not in closers and self.peek().kind != "nothing":
            parts.append(self.relation())
            joint = self.accept(",", ";", "and", "or", "land", "lor")
            if not joint:
                break
            while more := self.accept("and", "or"):
                joint = more
            joints.append(joint.text)
        if not parts:
            if kind == "list":
                raise Unreadable("empty")
            return Node(kind)
        if len(parts) == 1 and kind == "list" and not joints:
            return parts[0]
        return Node(kind, tuple(parts), "and" if "and" in joints or "land" in joints else "or")

    def relation(self) -> Node:
        if self.accept("approx"):
            return self.relation()
        sides, operators = [self.union()], []
        while True:
            token = self.peek()
            name = RELATIONS.get(token.text) if token.kind in ("op", "command", "text") else None
            if token.kind == "text" and token.text.lower() in ("is", "equals"):
                name = "="
            if name is None or (token.kind == "text" and token.text == "to"):
                break
            self.take()
            operators.append(name)
            sides.append(self.union())
        return Node("relation", tuple(sides), tuple(operators)) if operators else sides[0]

    def union(self) -> Node:
        node = self.sum()
        while self.peek().text in SET_OPERATORS and self.peek().kind == "command":
            node = Node(SET_OPERATORS[self.take().text], (node, self.sum()))
        return node

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        node: Node | None = None
        while True:
            sign = self.accept("+", "-", "pm", "mp")
            if node is not None and not sign:
                break
            term = self.product()
            name = sign.text if sign else "+"
            term = Node({"-": "neg", "pm": "pm", "mp": "mp"}[name], (term,)) if name != "+" else term
            node = term if node is None else Node("add", (node, term))
        self.depth -= 1
        return self.quantity(node)

    def quantity(self, node: Node) -> Node:
        """Words after an expression are its unit: `5 cm^2`, `60 \\text{ km}/\\text{h}`."""
        unit: list[str] = []
        while self.peek().kind == "text" and self.peek().text.lower() not in ("and", "or", "is", "equals", "if", "for"):
            word = self.take().text
            if self.accept("^"):
                power = self.power_argument()
                word += f"^-{power.args[0].value}" if power.kind == "neg" else f"^{power.value}"
            unit.append(word)
            if self.peek().text == "/" and self.peek(1).kind in ("text", "symbol"):
                unit.append(self.take().text)
                if self.peek().kind == "symbol":
                    unit.append(self.take().text)
        return self.counted(node, " ".join(unit).strip())

    def counted(self, node: Node, words: str) -> Node:
        """`5` and "厘米", or `3` and "万元", which is 30000 元."""
        if not units.is_unit(words):
            raise Unreadable(f"'{words}' says more than a unit")
        factor, words = units.number_word(words)
        if factor > 1:
            if node.kind not in ("number", "decimal", "mixed"):
                raise Unreadable("a number word behind an expression")
            node = Node("mul", (node, Node("number", value=Fraction(factor))))
        return Node("quantity", (node,), words) if words else node

    def product(self) -> Node:
        node = self.factor()
        while True:
            if self.accept("*", "cdot", "times"):
                node = Node("mul", (node, self.signed()))
            elif (self.peek().text == "/" and self.peek(1).kind != "text" and self.accept("/")) or self.accept("div"):
                node = Node("div", (node, self.signed()))
            elif self.peek().text == ":" and self.accept(":"):
                node = Node("ratio", (node, self.signed()))
            elif self.starts_factor():
                if self.peek().kind in ("number", "grouped", "repeat"):
                    raise Unreadable("a number behind a factor, without a sign")
                node = Node("mul", (node, self.factor()))
            else:
                return node

    def signed(self) -> Node:
        if self.accept("-"):
            return Node("neg", (self.signed(),))
        self.accept("+")
        return self.factor()

    def starts_factor(self) -> bool:
        token = self.peek()
        if token.kind in ("number", "symbol", "repeat", "grouped", "begin", "field"):
            return True
        if token.kind == "op":
            return token.text in ("(", "{", "[") or (token.text == "|" and not self.bars)
        if token.kind == "escaped":
            return token.text == "{"
        closing = {"rfloor", "rceil", "rangle", "mid", "rvert", "over", "choose", "cdot", "times", "div", "pm", "mp"}
        known = {*RELATIONS, *SET_OPERATORS, *closing, "degree", "land", "lor", "notin", "neg"}
        return token.kind == "command" and token.text not in known and not (token.text == "vert" and self.bars)

    def factor(self) -> Node:
        node = self.atom()
        while True:
            if self.accept("^"):
                if self.accept("'"):
                    continue
                node = Node("pow", (node, self.power_argument()))
            elif self.accept("!"):
                node = Node("call", (node,), "factorial")
            elif self.accept("%", kinds=("op", "escaped")):
                node = Node("quantity", (node,), "%")
            elif self.accept("degree"):
                after = self.peek()
                scale = after.text if after.kind == "symbol" and after.text in "CF" else ""
                if scale:
                    self.take()
                node = Node("quantity", (node,), f"degree{scale}")
            elif self.accept("'"):
                node = Node("call", (node,), "prime")
            elif sign := self.accept(*CURRENCIES, kinds=("op", "escaped")):
                node = Node("quantity", (node,), CURRENCIES[sign.text])
            else:
                return node

    def power_argument(self) -> Node:
        """`^2`, `^{2n}`, `^-1`, and of `x^23` all digits, as people mean it."""
        if self.accept("-"):
            return Node("neg", (self.power_argument(),))
        node = self.atom()
        if self.accept("^"):
            node = Node("pow", (node, self.power_argument()))
        return node

    def atom(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        node = self._atom(self.take())
        self.depth -= 1
        return node

    def _atom(self, token: Token) -> Node:
        if token.kind in ("number", "grouped", "repeat"):
            return self.literal(token)
        if token.kind == "symbol":
            return self.subscripted(token.text)
        if token.kind == "text":
            if len(token.text.strip()) == 1 and token.text.isalpha():
                return self.subscripted(token.text)
            return Node("text", value=token.text)
        if token.kind == "field":
            return Node("field", value=token.text)
        if token.kind == "begin":
            return self.environment(token.text)
        if token.kind in ("op", "escaped"):
            return self.bracket(token)
        if token.kind == "command":
            return self.command(token.text)
        raise Unreadable(f"unexpected {token.text}")

    def literal(self, token: Token) -> Node:
        """A number; `3\\frac12` and `3 1/2` are mixed, `101_2` has a base."""
        node = number(token.text)
        if self.peek().text == "_" and token.text.isdigit():
            self.take()
            base = self.subscript()
            if base.isdigit() and len(base) < 3:
                return Node("base", value=(token.text, int(base)))
            raise Unreadable("subscript")
        if self.peek().text == "frac" and token.text.isdigit():
            start = self.at
            part = self.atom()
            if part.kind == "div" and all(side.kind == "number" for side in part.args):
                return Node("mixed", (node, part))
            self.at = start
        first, slash, second = (self.peek(i) for i in range(3))
        plain = first.kind == second.kind == "number" and slash.text == "/" and first.spaced
        if plain and token.text.isdigit() and not (slash.spaced or second.spaced):
            self.at += 3
            return Node("mixed", (node, Node("div", (number(first.text), number(second.text)))))
        return node

    def subscripted(self, name: str) -> Node:
        if self.accept("_"):
            name += "_" + self.subscript()
        return Node("symbol", value=name)

    def subscript(self) -> str:
        if not self.accept("{"):
            return self.take().text
        parts = []
        while not self.accept("}"):
            parts.append(self.take().text)
        return "".join(parts)

    def bracket(self, token: Token) -> Node:
        if token.kind == "escaped" and token.text == "{":
            return self.braced_set()
        if (token.kind == "escaped" and token.text == "|") or token.text == "|":
            return self.bar("|")
        if token.text in CURRENCIES:
            return Node("quantity", (self.factor(),), CURRENCIES[token.text])
        if token.text == "{":
            inner = self.items(("}", "over", "choose"), "list")
            if operator := self.accept("over", "choose"):
                below = self.items(("}",), "list")
                inner = (
                    Node("div", (inner, below)) if operator.text == "over" else Node("call", (inner, below), "binom")
                )
            self.expect("}")
            return inner
        if token.text in ("(", "[") or token.text == "]":
            closers = ("[", "]") if token.text == "]" else (")", "]")
            inner = self.items(closers, "items")
            closer = self.take().text
            if closer not in closers:
                raise Unreadable("brackets")
            if len(inner.args) == 1:
                return inner.args[0]
            opened = "[" if token.text == "[" else "("
            closed = ")" if closer == ")" or (token.text == "]" and closer == "[") else "]"
            return Node("group", inner.args, opened + closed)
        raise Unreadable(f"unexpected {token.text}")

    def braced_set(self) -> Node:
        """`\\{1, 2\\}`, and `\\{x \\mid x > 2\\}`, which is the condition."""
        self.bars += 1
        first = self.items(("}", "mid", "|", ":"), "items")
        self.bars -= 1
        if self.accept("mid", "|", ":"):
            first = self.items(("}",), "list")
            self.expect("}")
            return first
        if len(first.args) == 1 and first.args[0].kind == "relation" and first.args[0].args[0].kind == "ratio":
            self.expect("}")
            (variable_and_side, *sides), operators = first.args[0].args, first.args[0].value
            return Node("relation", (variable_and_side.args[1], *sides), operators)
        self.expect("}")
        return Node("set", first.args)

    def bar(self, closer: str) -> Node:
        self.bars += 1
        inner = self.sum()
        self.bars -= 1
        self.expect(closer)
        return Node("call", (inner,), "abs")

    def environment(self, name: str) -> Node:
        rows: list[list[Node]] = [[]]
        while self.peek().kind != "end":
            if self.peek().kind == "row":
                self.take()
                rows.append([])
            elif self.accept("&") or self.accept(",", "if"):
                continue
            elif self.peek().kind == "text" and self.peek().text.strip(" ,").lower() in ("if", "for", "when", ""):
                self.take()
            else:
                rows[-1].append(self.relation())
        self.take()
        rows = [row for row in rows if row]
        if name == "cases":
            return Node("cases", tuple(Node("row", tuple(row)) for row in rows))
        if name not in ("pmatrix", "bmatrix", "vmatrix", "matrix", "Bmatrix", "array", "smallmatrix"):
            raise Unreadable(name)
        matrix = Node("matrix", tuple(Node("row", tuple(row)) for row in rows))
        return Node("call", (matrix,), "det") if name == "vmatrix" else matrix

    def command(self, name: str) -> Node:
        if name in ACCENTS:
            inner = self.atom()
            return Node("symbol", value=_letters(inner)) if name.startswith("over") else inner
        if name in ("infty", "pi"):
            return Node("constant", value=name)
        if name in ("emptyset", "varnothing"):
            return Node("set")
        if name in GREEK:
            return self.subscripted(name)
        if name in ("frac", "binom"):
            above, below = self.argument(), self.argument()
            return Node("div", (above, below)) if name == "frac" else Node("call", (above, below), "binom")
        if name == "sqrt":
            index = None
            if self.accept("["):
                index = self.sum()
                self.expect("]")
            inside = self.argument()
            return Node("root", (inside, index or Node("number", value=Fraction(2))))
        pairs = {"lfloor": ("rfloor", "floor"), "lceil": ("rceil", "ceil"), "lvert": ("rvert", "abs")}
        if name in pairs:
            inner = self.sum()
            self.expect(pairs[name][0])
            return Node("call", (inner,), pairs[name][1])
        if name in ("vert", "mid"):
            return self.bar(name)
        if name == "langle":
            inner = self.items(("rangle",), "items")
            self.expect("rangle")
            return Node("group", inner.args, "()")
        if name in FUNCTIONS or name in ALIASES:
            return self.call(ALIASES.get(name, name))
        raise Unreadable(f"\\{name}")

    def argument(self) -> Node:
        """`{...}`, or one token: of `\\frac12` the digits one by one."""
        token = self.peek()
        if token.kind == "number" and token.text.isdigit() and len(token.text) > 1:
            self.tokens[self.at] = Token("number", token.text[1:])
            return number(token.text[0])
        return self.atom()

    def call(self, name: str) -> Node:
        power = base = None
        for _ in range(2):
            if self.accept("_"):
                base = self.atom()
            elif self.accept("^"):
                power = self.power_argument()
        if self.peek().text == "(" or (self.peek().text == "{" and self.peek().kind == "op"):
            inner = self.atom()
        else:
            inner = self.factor()
            while self.starts_factor() and self.peek().text not in FUNCTIONS and self.peek().text != "(":
                inner = Node("mul", (inner, self.factor()))
        parts = inner.args if inner.kind == "group" else (inner,)
        if power is not None and power == Node("neg", (Node("number", value=Fraction(1)),)):
            return Node("call", parts, "arc" + name)
        node = Node("call", parts if base is None else (*parts, base), name)
        return Node("pow", (node, power)) if power is not None else node


def _letters(node: Node) -> str:
    """`\\overline{AB}` is one name."""
    if node.kind == "mul":
        return "".join(_letters(part) for part in node.args)
    if node.kind != "symbol":
        raise Unreadable("overline")
    return str(node.value)
