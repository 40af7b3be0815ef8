"""Mathematical text to tokens: commands, numbers, symbols, words and signs."""

import re
import unicodedata
from dataclasses import dataclass

from stepcredit.verifiers.math.text import EAST_ASIAN, MAX_LENGTH

MAX_TOKENS = 1200


class Unreadable(ValueError):
    """The text is no mathematics that this reader knows, or too much of it."""


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    spaced: bool = False


_FUNCTIONS = """sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh ln log lg exp gcd lcm max min det
    Re Im arg"""
_GREEK = """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau
    upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar angle triangle"""
_OTHER_COMMANDS = """cdot times div mp lfloor rfloor lceil rceil langle rangle mid vert degree varnothing over choose
    land lor begin end lvert rvert"""
FUNCTIONS = set(_FUNCTIONS.split())
ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "cosec": "csc"}
GREEK = set(_GREEK.split())
RELATIONS = {
    "=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "==": "=",
    "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "lt": "<", "gt": ">",
    "ne": "!=", "neq": "!=", "in": "in", "approx": "~", "sim": "~", "equiv": "=", "to": "=", "rightarrow": "=",
}  # fmt: skip
SET_OPERATORS = {"cup": "union", "cap": "intersection", "setminus": "minus", "backslash": "minus"}
ACCENTS = {"vec", "hat", "bar", "tilde", "overrightarrow", "boldsymbol", "bm", "mathcal", "overline", "widehat"}
CONSTANTS = {"pi", "infty", "emptyset"}
PLAIN = {
    "sqrt", "pi", "frac", "infty", "cup", "cap", "pm", "binom", *CONSTANTS, *FUNCTIONS, *ALIASES,
    "alpha", "beta", "gamma", "theta", "lambda", "sigma", "omega", "phi",
}  # fmt: skip
COMMANDS = sorted(
    {
        name
        for name in {*PLAIN, *GREEK, *RELATIONS, *SET_OPERATORS, *ACCENTS, *_OTHER_COMMANDS.split()}
        if name.isalpha()
    },
    key=len,
    reverse=True,
)
UNIT_LETTERS = {
    "cm",
    "mm",
    "km",
    "kg",
    "mg",
    "mL",
    "ml",
    "ft",
    "in",
    "mi",
    "lb",
    "oz",
    "hr",
    "min",
    "mph",
    "am",
    "pm",
    "dm",
    "kWh",
}

TOKEN = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mbox|textsf|mathsf|mathbf|mathit|operatorname\*?)\s*\{(?P<text>[^{}]*)\}"
    r"|(?P<row>\\\\)(?:\[[^\]]*\])?"
    r"|\\begin\s*\{(?P<begin>[a-zA-Z]+\*?)\}(?:\{[lcr|]*\})?|\\end\s*\{(?P<end>[a-zA-Z]+\*?)\}"
    r"|\\mathbb\s*\{?(?P<field>[A-Z])\}?"
    r"|\\(?P<command>[a-zA-Z]+)|\\(?P<escaped>[{}%$|#&])"
    r"|(?P<grouped>\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?)"
    r"|(?P<repeat>\d*\.\d*(?:\\overline\s*\{\d+\}|\\dot\s*\{?\d\}?|\(\d+\)))"
    r"|(?P<number>\d+(?:\.\d+)?|\.\d+)(?:[eE](?P<exponent>[+-]?\d{1,3})(?![\w.]))?"
    rf"|(?P<east>[{EAST_ASIAN}]+)"
    rf"|(?P<word>[^\W\d_{EAST_ASIAN}](?:[^\W\d_{EAST_ASIAN}]|(?<=[a-zA-Z])['-](?=[a-zA-Z]{{2}}))*)"
    r"|(?P<op><=|>=|!=|==|[-+*/^_!(){}\[\]|<>=,;:&%$'€£¥?])",
)


def tokens(text: str, thousands: bool = True) -> list[Token]:
    """The text's tokens; `thousands` reads 1,234 outside brackets as one number."""
    if len(text) > MAX_LENGTH:
        raise Unreadable("too long")
    found: list[Token] = []
    at = depth = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        match = TOKEN.match(text, at)
        if not match:
            raise Unreadable(f"'{text[at]}' is not known")
        spaced = at > 0 and text[at - 1].isspace()
        kind = match.lastgroup or ""
        end = match.end()
        if kind == "grouped" and (depth or not thousands):
            digits = re.compile(r"\d+").match(text, at)
            assert digits is not None
            kind, end = "number", digits.end()
            found.append(Token("number", digits[0], spaced))
        else:
            piece = match[kind]
            if kind == "exponent":
                kind, piece = "number", match["number"] + "e" + match["exponent"]
            found += _split(kind, piece, spaced)
            depth += (piece in "([{") - (piece in ")]}") if kind in ("op", "escaped") and piece else 0
        at = end
        if len(found) > MAX_TOKENS:
            raise Unreadable("too many tokens")
    return found


def _split(kind: str, piece: str, spaced: bool) -> list[Token]:
    """`\\cotx` is `\\cot x`, `2xy` has the symbols x and y, `apples` is a word."""
    if kind == "command":
        known = next((name for name in COMMANDS if piece.startswith(name)), None)
        if known is None:
            raise Unreadable(f"\\{piece}")
        rest = piece[len(known) :]
        return [Token("command", known, spaced), *(Token("symbol", letter) for letter in rest)]
    if kind == "word":
        if piece in PLAIN:
            return [Token("command", piece, spaced)]
        if len(piece) == 1:
            return [Token("symbol", piece, spaced)]
        if (
            len(piece) > 2
            or _foreign(piece)
            or piece in UNIT_LETTERS
            or piece.lower() in ("or", "no", "is", "to", "if", "by", "of")
        ):
            return [Token("text", piece, spaced)]
        return [Token("symbol", letter, spaced and not i) for i, letter in enumerate(piece)]
    if kind in ("op", "escaped"):
        return [Token("escaped" if kind == "escaped" else "op", piece, spaced)]
    return [Token("text" if kind == "east" else kind, piece.strip(), spaced)]


def _foreign(word: str) -> bool:
    """`см` is a word; `xy` and `λμ` are products."""
    return not all(letter.isascii() or "GREEK" in unicodedata.name(letter, "") for letter in word)
