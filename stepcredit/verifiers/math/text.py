"""Mathematical text: one spelling for what LaTeX, Unicode and plain text write in different ways."""

# ruff: noqa: RUF001 - signs that look alike are what this file is about

import re
import unicodedata

EAST_ASIAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3"  # letters, inside of a character class
WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " ", 0xFFE5: "¥"}  # full-width signs to ASCII
MAX_LENGTH = 3000  # characters of an answer that is still read; a longer one can only be equal as text

SIGNS = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑﹣－", "-"),
        **dict.fromkeys("×·⋅∙∗", "*"),
        **dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u202a\u202b\u202c\u202d\u202e\u00ad\x00", None),
        "÷": "/",
        "⁄": "/",
        "π": r"\pi ",
        "∞": r"\infty ",
        "√": r"\sqrt ",
        "°": r"^\circ ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "±": r"\pm ",
        "∓": r"\mp ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "ℝ": r"\mathbb{R} ",
        "θ": r"\theta ",
        "α": r"\alpha ",
        "β": r"\beta ",
        "⟨": r"\langle ",
        "⟩": r"\rangle ",
        "′": "'",
        "’": "'",
    }
)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
REWRITES = [
    (re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+"), lambda m: "^{" + m[0].translate(SUPERSCRIPTS) + "}"),
    (re.compile(r"[₀₁₂₃₄₅₆₇₈₉]+"), lambda m: "_{" + m[0].translate(SUBSCRIPTS) + "}"),
    (re.compile(r"[¼-¾⅐-⅞]"), lambda m: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄"))),
    (re.compile(r"\\[dtc]frac(?![a-z])"), lambda m: r"\frac"),
    (re.compile(r"\\[dt]binom(?![a-z])"), lambda m: r"\binom"),
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?"), lambda m: ""),
    (re.compile(r"\\(?:displaystyle|textstyle|limits|nolimits|mathstrut|rm|bf)(?![a-zA-Z])"), lambda m: " "),
    (re.compile(r"\\(?:hspace|vspace|phantom|label|tag)\*?\{[^{}]*\}"), lambda m: " "),
    (re.compile(r"\\(?:overline|overrightarrow|widehat)\s*\{\s*([A-Z]{2,3})\s*\}"), lambda m: m[1]),  # \overline{AB}
    (re.compile(r"\\angle(?![a-zA-Z])"), lambda m: ""),
    (re.compile(r"\\(?:boxed|fbox)\s*\{([^{}]*)\}"), lambda m: m[1]),  # inside of another
    (re.compile(r"^\s*=(?!=)"), lambda m: ""),
    (re.compile(r"^\\text\s*\{\s*([-+]?\d[^{}]*)\}$"), lambda m: m[1]),
    (re.compile(r"(?<=[\d)}])\s?(?:和|与|與|以及)\s?(?=[\d(\\-])"), lambda m: " and "),
    (re.compile(r"(?<=[\d)}])\s?(?:或者|或)\s?(?=[\d(\\-])"), lambda m: " or "),
    (re.compile(r"^百分之\s?(\d+(?:\.\d+)?)$"), lambda m: m[1] + r"\%"),
    (re.compile(r"^(\d{1,3}(?: \d{3})+)$"), lambda m: m[1].replace(" ", "")),
    (re.compile(r"(?<=[\])])\s*U\s*(?=[\[(])"), lambda m: r"\cup "),
    (re.compile(r"\{,\}"), lambda m: ","),
    (re.compile(r"(?<=\d)\\[!,;](?=\d{3})"), lambda m: ""),
    (re.compile(r"(?<=,)\\!\s*(?=\d{3})"), lambda m: ""),
    (re.compile(r"(?<!\\)\\[,!;:> ]|\\q?quad(?![a-zA-Z])|~"), lambda m: " "),
    (re.compile(r"(?<=[\w)}\]])\s?\*\*\s?(?=[\w({\\+-])"), lambda m: "^"),
    (re.compile(r"\*\*"), lambda m: " "),
    (re.compile(r"\^\{?\s*\\(?:circ|degree)(?![a-z])\s*\}?|\\(?:degree|textdegree)(?![a-z])"), lambda m: r"\degree "),
]
WRAPPERS = re.compile(r"^(?:\$\$?(?=.*\$$)|\\\[|\\\()\s*|\s*(?:(?<!\\)\$\$?|\\\]|\\\))$")
TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname\*?|mathit|textsf|mathsf)\s*\{([^{}]*)\}"
)
WORDS = re.compile(r"[A-Za-z' ,.-]{2,}")
BOLD_LINE = re.compile(r"^(\*\*|__|`)(.*)\1$", re.DOTALL)


def tidy(text: str) -> str:
    """The text without what stands around it, its wide characters as narrow ones: `**５。**` is 5."""
    text = text[: 4 * MAX_LENGTH].translate(WIDE).strip().removesuffix("\\\\").strip()
    if bold := BOLD_LINE.match(text):
        text = bold[2].strip()
    text = text.rstrip("。").replace("、", ",")
    return WRAPPERS.sub("", text.rstrip(".").strip() if not text.endswith("..") else text)


def clean(text: str) -> str:
    """The same mathematics with fewer spellings: `\\dfrac{1}{2}.` and ` \\frac{1}{2}` are one text."""
    text = tidy(text).translate(SIGNS)
    for pattern, write in REWRITES:
        text = pattern.sub(write, text)
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip()
    return re.sub(r"(?<=[^.])[.,;]$", "", text).strip()


def key(text: str) -> str:
    """Cleaned text for comparison as text: no blanks, no `\\text`, outer case of words kept out of it."""
    words = TEXT.sub(r"\1", text)
    bare = re.sub(r"(?<!\d)\s+|\s+(?!\d)|\$|\\(?=[%$#&])", "", words)
    return bare.lower() if WORDS.fullmatch(words.strip()) else bare


def short(text: str) -> str:
    """Cleaned text with few blanks and without `\\text`, which reads as the same answer."""
    words = re.sub(r"\s+", " ", TEXT.sub(r" \1 ", text)).strip()
    bare = re.sub(r"(?<!\w)\s+|\s+(?!\w)|\$", "", words)
    return bare.lower() if WORDS.fullmatch(words) else bare
