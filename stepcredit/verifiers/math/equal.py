"""Whether an answer says the same as the gold answer. The gold goes first: it decides what a form means."""

import re
from fractions import Fraction
from functools import lru_cache

from stepcredit.verifiers.math import dates, library
from stepcredit.verifiers.math.parse import MAX_DIGITS, Node, parse
from stepcredit.verifiers.math.text import EAST_ASIAN, TEXT, clean, key, tidy
from stepcredit.verifiers.math.trees import decide
from stepcredit.verifiers.math.value import FAILURES

PLAIN_NUMBER = re.compile(r"([-+]?)\s?(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)")
PLAIN_FRACTION = re.compile(r"([-+]?)\s?(?:\\frac\s?\{(-?\d+)\}\s?\{(\d+)\}|\\frac(\d)(\d)|(\d+)\s?/\s?(\d+))")
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
SOME_WORD = re.compile(rf"(?<![\\a-z])[a-z]{{2}}|[{EAST_ASIAN}]")
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
    **dict.fromkeys(["无解", "無解", "没有解", "无实数解", "空集"], r"\emptyset"), "不存在": "undefined",
    **dict.fromkeys(["是", "是的", "对", "正确"], "yes"), **dict.fromkeys(["否", "不是", "错", "错误"], "no"),
}  # fmt: skip


def equal(gold: str, answer: str, trusted_gold: bool = True) -> bool:
    """Whether the answer says the same as the gold one, both as LaTeX or plain text without `\\boxed`.

    Not symmetric, and not transitive: 50% is 50 and is 0.5. An empty text equals nothing.

    Args:
        gold: decides what a form means: where it is `3-5`, no difference of numbers is accepted.
        trusted_gold: sums, integrals and limits in the gold answer may be left to math-verify, which has no limits.

    >>> equal("\\\\frac{1}{2}", "0.5"), equal("5 cm", "5 m")
    (True, False)
    """
    gold, answer = _without_lead(gold), _without_lead(answer)
    no_arithmetic = dates.decide(gold, answer)
    gold, answer = _phrase(clean(gold)), _phrase(clean(answer))
    if not gold or not answer:
        return False
    if key(gold) == key(answer):
        return True
    if no_arithmetic is not None:
        return no_arithmetic
    for way in (_numbers, _choices, _words):
        if (decision := way(gold, answer)) is not None:
            return decision
    if _trees(gold, answer):
        return True
    return trusted_gold and _parsed(gold) is None and bool(COMPUTED.search(gold)) and library.equal(gold, answer)


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


def _without_lead(text: str) -> str:
    """The tidy text without "the answer is"."""
    text = tidy(text)
    lead = LEAD.match(text)
    if not lead:
        return text
    return ("\\text{" if lead[1] and not lead[2] else "") + text[lead.end() :]


def _phrase(text: str) -> str:
    """Words that stand for mathematics, `no solution`, `two`, `5 to 2`, `1.5 million`, as such; `3^{rd}` is 3."""
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
        if trees[0] and trees[1] and decide(trees[0], trees[1]):
            return True
    apart = re.search(r"\d,\d{3}", gold) and re.search(r",\s", answer)
    if apart and (tree := _parsed(gold, False)) and (other := _parsed(answer)):
        return tree.kind == other.kind == "list" and decide(tree, other)
    return False


def _readings(gold: str, answer: str) -> list[tuple[str, str]]:
    readings = [(gold, answer)]
    left, right = _with_unit(gold), _with_unit(answer)
    if (left or _may_have_unit(gold)) and (right or _may_have_unit(answer)):
        readings.append((left or gold, right or answer))
    return readings


def _may_have_unit(text: str) -> bool:
    """A plain number, or an expression with a word."""
    return constant(text) is not None or bool(TEXT.search(text) or SOME_WORD.search(text))


def _with_unit(text: str) -> str | None:
    match = LONE_UNIT.fullmatch(text)
    return f"{match[1]} \\text{{{match[2]}}}{match[3] or ''}" if match else None
