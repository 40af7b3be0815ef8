"""The final answer of a completion, as it stands there: in a box, in a tag, behind words of many languages, or last."""

# ruff: noqa: RUF001 - signs of Chinese sentences

import re
from collections import deque

from stepcredit.verifiers.math.text import EAST_ASIAN, WIDE

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>-?\d+(?:\.\d+)?|[a-zA-Z]))")
BOXES_TOGETHER = re.compile(r"[\s$.,;]*(?:and|or|,|;)?[\s$\\()\[\]]*(?:[a-zA-Z]\w?\s*=\s*)?")
NAMES = r"(?:final[ _-]?)?answer"
TAG = re.compile(  # the closing tag may be missing: it was the stop string, or is cut
    rf"<\|begin_of_box\|>(?P<box>.*?)(?:<\|end_of_box\|>|\Z)"
    rf"|<{NAMES}(?:\s[^<>]{{0,100}})?>(?P<angle>.*?)(?:</|\Z)"
    rf"|\[{NAMES}\](?P<square>.*?)(?:\[/{NAMES}\]|\Z)",
    re.IGNORECASE | re.DOTALL,
)
HASHES = re.compile(r"####[ \t]*([^\n]+)")
MARKS = r"[*_ \t]{0,6}"  # of bold print
SAYS = {  # what an answer is called, then what stands between the name and the answer
    r"(?:final\s+answer|answer)\b[^\n:=.]{0,40}?": r"(?:\bis\b|\bare\b|:|=)",  # English
    r"(?:correct|right|best)\s+(?:option|choice)\b": r"(?:\s+is\b|\s+are\b|:|=)",
    r"(?:答案|答复|解答)(?:应该?|應該?|就|便|即|选项|選項)?": r"(?:[是为為选選]|等于|等於|:|=)",  # Chinese
    r"(?:正确|正確|最佳)(?:选项|選項)": r"(?:[是为為]|:|=)",
    r"(?:【答案】|【解答】)": "",
    r"(?:故|应|應|应该|答案)?[选選](?:择|擇)?(?:项|項)?(?=[: \t*(]{0,6}(?-i:[A-J])[)* \t]{0,6}(?:[。.,;\n]|\Z))": "",
    r"(?:答え|解答)": r"(?:は|:|=)",  # Japanese
    r"(?:정답|답)": r"(?:은|는|:|=)",  # Korean
    r"\b(?:respuesta|resposta)\b[^\n:=.]{0,40}?": r"(?:\bes\b|\bson\b|\bé\b|\bsão\b|:|=)",  # Spanish, Portuguese
    r"\bréponse\b[^\n:=.]{0,40}?": r"(?:\best\b|\bsont\b|:|=)",
    r"\b(?:antwort|lösung|ergebnis)\b[^\n:=.]{0,40}?": r"(?:\bist\b|\blautet\b|:|=)",
    r"\brisposta\b[^\n:=.]{0,40}?": r"(?:\bè\b|\bsono\b|:|=)",
    r"\bответ\b[^\n:=.—-]{0,40}?": r"(?::|=|—|\s-\s)",
    r"\bđáp (?:án|số)\b[^\n:=.]{0,40}?": r"(?:\blà\b|:|=)",
    r"\bjawaban(?:nya)?\b[^\n:=.]{0,40}?": r"(?:\badalah\b|:|=)",
    r"\b(?:cevap|odpowiedź|odpověď|antwoord|उत्तर)\b[^\n:=.]{0,40}?": r"(?:\bto\b|\bje\b|\bis\b|है|:|=)",
    r"(?:الجواب|الإجابة)[^\n:=.]{0,40}?": r"(?:هو|هي|:|=)",
}
STATED = re.compile(
    "(?:" + "|".join(f"{name}{MARKS}{link}" for name, link in SAYS.items()) + rf")(?:{MARKS}:)?{MARKS}(?P<rest>[^\n]*)",
    re.IGNORECASE,
)
HEADING = re.compile(
    rf"^[#*_ \t]{{0,8}}(?:(?:the\s+)?{NAMES}|(?:最终|最終)?答案|respuesta(?: final)?|réponse(?: finale)?)"
    r"[:*_ \t]{0,8}$",
    re.IGNORECASE | re.MULTILINE,
)
ADVERB = re.compile(
    r"(?:therefore|thus|then|simply|just|indeed|hence|equal to|选项|選項|option|choice)[\s,]+(?=\S)", re.I
)
ENDINGS = re.compile(r"\s?(?:です|でした|である|となります|になります|입니다|이다|예요|이에요|है)[。.!]?$")
SENTENCE_END = re.compile(
    r"(?<=[\w})$%])[.!](?:\s|$)|[。!;]|,?\s(?:because|since|as|which)\s|\n"
    r"|(?<=[\w})$%])\s?[,，]\s?(?=因为|因為|经|經|符合|所以|因此|即|也就是|其中|而|故|由于|由於|这|這|此|なぜ|왜냐)"
)
MATH = re.compile(
    r"\$\$([^$]{1,2000})\$\$|(?<!\\)\$((?:[^$\\]|\\.){1,2000})\$|\\\[(.{1,2000}?)\\\]|\\\((.{1,2000}?)\\\)", re.DOTALL
)
LAST_NUMBER = re.compile(
    r"(?:(?:\b(?:is|are|equals|gives|get|be|has|have)|[=:→]|[是为為有得共剩需要用了到于於])\s*|^|.*\s)"
    r"(-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?)"
    rf"(?:\s[a-z]{{2,12}}|\s?[{EAST_ASIAN}]{{1,6}})?[.!*。]*$"
)
NO_VALUE = re.compile(  # before a number: it bounds or denies the answer, or is one of several
    r"(?:\b(?:(?:more|less|greater|fewer|larger|smaller) than|at least|at most|not|or)"
    r"|大于|小于|不是|不等于|超过|至少|至多|不到|或|或者)\s*$"
)
BOLD = re.compile(r"(?<![0-9A-Za-z_)\]}])\*\*([^*\n]+?)\*\*")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
PROSE = re.compile(rf"[^\W\d_]{{2,}}\s+[^\W\d_]{{2,}}.*\d|[{EAST_ASIAN}]{{2,}}.*\d", re.DOTALL)
CODE_FENCE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
CODE = re.compile(r"\b(?:def|return|print|import|lambda|const|function|for|while)\b|[{};`]|\w\(|==|\+=|=>|->")
MAX_SENTENCE = 500  # characters; longer ones have no answer in them
MAX_BOXES = 30  # the last ones
TAIL = 20_000  # characters of a completion that are searched


def extract(completion: str) -> str | None:
    """The answer that the completion comes to, None where there is none.

    It stands in the last box or answer tag, whichever is later; else behind `####`; else behind "the answer is" in one
    of the languages of `SAYS`; else in the last formula; else it is the number that ends the text.
    """
    text = completion.rpartition("</think>")[2][-TAIL:].translate(WIDE)
    boxes, start = _boxes(text)
    tag = next((tag for tag in reversed(list(TAG.finditer(text))) if _content(tag)), None)
    if tag and (boxes is None or start < tag.end()):
        inside, _ = _boxes(_content(tag))
        return inside or _alone(_content(tag))
    if boxes is not None:
        return boxes
    if found := HASHES.findall(text):
        return str(found[-1]).strip()
    return _stated(text) or _last(text)


def _content(tag: re.Match[str]) -> str:
    return (tag["box"] or tag["angle"] or tag["square"] or "").strip()


def _stated(text: str) -> str | None:
    """What stands behind the last "the answer is", or under a heading that says so."""
    matches = list(STATED.finditer(text))
    heading = deque(HEADING.finditer(text), maxlen=1)
    if matches and not (heading and heading[0].start() > matches[-1].start()):
        if rest := matches[-1]["rest"].strip(" *_"):
            return _statement(rest if not rest.startswith(("$$", "\\[")) else text[matches[-1].start("rest") :])
        return _alone(text[matches[-1].end() :]) or None
    return _alone(text[heading[0].end() :]) if heading else None


def _alone(text: str) -> str | None:
    """An answer that has a tag or the lines below a heading to itself: all of it, but for a sentence around it."""
    text = BOLD.sub(r"\1", text.strip())
    if hashes := HASHES.findall(text):
        return str(hashes[-1]).strip()
    stated = STATED.search(text)
    if stated and stated["rest"].strip():
        return _stated(text)
    if formula := MATH.fullmatch(text):
        return _inside(formula)
    if "\n" in text:
        return _last(text)
    if len(text) < MAX_SENTENCE and PROSE.search(text):
        formulas = list(MATH.finditer(text))
        if len(formulas) == 1:
            return _inside(formulas[0])
        if not formulas and len(NUMBER.findall(text)) == 1 and (number := _last(text)):
            return number
    return _statement(text) if text else None


def _last(text: str) -> str | None:
    """The last formula, else the number that ends the text."""
    text = CODE_FENCE.sub("", text)
    if formulas := deque(MATH.finditer(text), maxlen=1):
        return _inside(formulas[0])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or CODE.search(lines[-1]) or len(lines[-1]) > MAX_SENTENCE:
        return None
    line = BOLD.sub(r"\1", lines[-1])
    number = LAST_NUMBER.search(line)
    return number[1] if number and not NO_VALUE.search(line[: number.start(1)]) else None


def _inside(formula: re.Match[str]) -> str:
    return next(part for part in formula.groups() if part).strip()


def _statement(text: str) -> str:
    """Of "$5$ because ..." the formula; else the text up to the end of its sentence."""
    text = ADVERB.sub("", text.strip().strip("*").strip(), count=1) if ADVERB.match(text.strip(" *")) else text
    text = ENDINGS.sub("", text.strip().strip("*").strip())
    if text.startswith(("$", "\\(", "\\[")) and (formula := MATH.match(text)):
        unit = re.match(rf"\s*[a-zA-Z]+|\s*[{EAST_ASIAN}]+", text[formula.end() :])
        return _inside(formula) if not unit else text.rstrip(".")
    return SENTENCE_END.split(BOLD.sub(r"\1", text))[0].strip()


def _boxes(text: str) -> tuple[str | None, int]:
    """Contents of the last box, or of the several that stand together at the end, and where they begin.

    `\\boxed{1} and \\boxed{2}` is a list.
    """
    found: list[tuple[int, int, str]] = []
    for match in deque(BOX.finditer(text), maxlen=MAX_BOXES):
        if match["bare"]:
            found.append((match.start(), match.end(), match["bare"]))
        elif found and match.end() <= found[-1][1]:
            continue
        elif (end := _closing(text, match.end())) is not None:
            found.append((match.start(), end, text[match.end() : end - 1].strip()))
    if not found:
        return None, 0
    together = [found[-1]]
    for box in reversed(found[:-1]):
        between = text[box[1] : together[0][0]]
        if len(between) > 40 or not between.strip(" \n$") or not BOXES_TOGETHER.fullmatch(between):
            break
        if not re.search(r"and|or|,|;", between):
            break
        together.insert(0, box)
    contents = list(dict.fromkeys(box[2] for box in together))
    return ", ".join(contents), together[-1][0]


def _closing(text: str, start: int) -> int | None:
    """Where the brace that was opened before `start` has been closed."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start, start + 5000):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth:
            return match.end()
    return None
