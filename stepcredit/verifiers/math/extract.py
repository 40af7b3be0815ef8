"""The final answer of a completion, as it stands there."""

import re
from collections import deque

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>-?\d+(?:\.\d+)?|[a-zA-Z]))")
BOXES_TOGETHER = re.compile(r"[\s$.,;]*(?:and|or|,|;)?[\s$\\()\[\]]*(?:[a-zA-Z]\w?\s*=\s*)?")
HASHES = re.compile(r"####[ \t]*([^\n]+)")
STATED = re.compile(
    r"(?:final\s+answer|answer)\b[^\n:=.]{0,40}?(?:\bis\b|\bare\b|:|=)(?:\*\*)?\s*:?\s*(?:\*\*)?[ \t]*([^\n]+)",
    re.IGNORECASE,
)
MATH = re.compile(
    r"\$\$([^$]{1,2000})\$\$|(?<!\\)\$((?:[^$\\]|\\.){1,2000})\$|\\\[(.{1,2000}?)\\\]|\\\((.{1,2000}?)\\\)", re.DOTALL
)
LAST_NUMBER = re.compile(
    r"(?:(?:\b(?:is|are|equals|gives|get|be|has|have)|[=:→])\s*|^|.*\s)(-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?)(?:\s[a-z]{2,12})?[.!*]*$"
)
CODE_FENCE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
CODE = re.compile(r"\b(?:def|return|print|import|lambda|const|function|for|while)\b|[{};`]|\w\(|==|\+=|=>|->")
MAX_BOXES = 30  # the last ones
TAIL = 20_000  # characters of a completion that are searched


def extract(completion: str) -> str | None:
    """The last box, `#### x`, "the answer is x", else the last formula or the number that ends the text."""
    text = completion.rpartition("</think>")[2][-TAIL:]
    if boxes := _boxes(text):
        return boxes
    if found := HASHES.findall(text):
        return str(found[-1]).strip()
    if found := STATED.findall(text):
        return _statement(str(found[-1]))
    text = CODE_FENCE.sub("", text)
    if formulas := MATH.findall(text):
        return next(part for part in formulas[-1] if part).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or CODE.search(lines[-1]) or len(lines[-1]) > 500:
        return None
    number = LAST_NUMBER.search(lines[-1])
    return number[1] if number else None


def _statement(text: str) -> str:
    """Of "$5$ because ..." the formula; else the text up to the end of its sentence."""
    text = text.strip().strip("*").strip()
    if text.startswith(("$", "\\(", "\\[")) and (formula := MATH.match(text)):
        unit = re.match(r"\s*[a-zA-Z]+", text[formula.end() :])
        return next(part for part in formula.groups() if part) if not unit else text.rstrip(".")
    return re.split(r"(?<=[\w})$%])[.!](?:\s|$)|,?\s(?:because|since|as|which)\s|\n", text)[0].strip()


def _boxes(text: str) -> str | None:
    """Contents of the last box, or of the several that stand together at the end: `\\boxed{1} and \\boxed{2}`."""
    found: list[tuple[int, int, str]] = []
    for match in deque(BOX.finditer(text), maxlen=MAX_BOXES):
        if match["bare"]:
            found.append((match.start(), match.end(), match["bare"]))
        elif found and match.end() <= found[-1][1]:
            continue
        elif (end := _closing(text, match.end())) is not None:
            found.append((match.start(), end, text[match.end() : end - 1].strip()))
    if not found:
        return None
    together = [found[-1]]
    for box in reversed(found[:-1]):
        between = text[box[1] : together[0][0]]
        if len(between) > 40 or not between.strip(" \n$") or not BOXES_TOGETHER.fullmatch(between):
            break
        if not re.search(r"and|or|,|;", between):
            break
        together.insert(0, box)
    contents = list(dict.fromkeys(box[2] for box in together))
    return ", ".join(contents) if len(contents) > 1 else contents[0]


def _closing(text: str, start: int) -> int | None:
    """Where the brace that was opened before `start` has been closed."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start, start + 5000):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth:
            return match.end()
    return None
