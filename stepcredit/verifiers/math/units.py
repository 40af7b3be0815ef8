"""Units of answers: what they measure and how they convert, `100 cm` = `1 m`; unknown words are units of their own.

Chinese words stand without blanks: 平方厘米, 千米每小时, 3万元.
"""

import re
from fractions import Fraction

Unit = tuple[Fraction, tuple[tuple[str, int], ...]]  # factor to the base unit, and powers of the dimensions

SCALES: dict[str, dict[str, Fraction | int]] = {
    "length": {"mm": Fraction(1, 1000), "cm": Fraction(1, 100), "dm": Fraction(1, 10), "m": 1, "km": 1000,
               "in": Fraction(254, 10000), "ft": Fraction(3048, 10000), "yd": Fraction(9144, 10000),
               "mi": Fraction(1609344, 1000)},
    "mass": {"mg": Fraction(1, 10**6), "g": Fraction(1, 1000), "kg": 1, "lb": Fraction(45359237, 10**8),
             "oz": Fraction(45359237, 16 * 10**8)},
    "time": {"s": 1, "min": 60, "h": 3600, "day": 86400, "week": 604800},
    "volume": {"mL": Fraction(1, 1000), "L": 1},
    "money": {"cent": Fraction(1, 100), "dollar": 1},
    "yuan": {"jiao": Fraction(1, 10), "yuan": 1},
    "angle": {"degree": 1},
    "%": {"%": 1},
}  # fmt: skip
BASE = {name: (Fraction(factor), kind) for kind, names in SCALES.items() for name, factor in names.items()}
NAMES = {
    "millimeter": "mm", "centimeter": "cm", "decimeter": "dm", "meter": "m", "kilometer": "km", "inch": "in",
    "inches": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi", "milligram": "mg", "gram": "g",
    "kilogram": "kg", "pound": "lb", "lbs": "lb", "ounce": "oz", "second": "s", "sec": "s", "minute": "min",
    "mins": "min", "hour": "h", "hr": "h", "hrs": "h", "milliliter": "mL", "ml": "mL", "liter": "L", "litre": "L",
    "l": "L", "metre": "m", "centimetre": "cm", "kilometre": "km", "usd": "dollar", "percent": "%", "deg": "degree",
}  # fmt: skip
IGNORED = {"unit", "square", "sq", "cubic", "cu", "per", "of", "a", "an", "the", "about", "approximately"}
POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
CHINESE = {
    "mm": "毫米", "cm": "厘米 公分", "dm": "分米", "m": "米 公尺", "km": "千米 公里",
    "in": "英寸", "ft": "英尺", "mi": "英里",
    "mg": "毫克", "g": "克", "kg": "千克 公斤", "lb": "磅", "mL": "毫升", "L": "升",
    "s": "秒 秒钟 秒鐘", "min": "分钟 分鐘", "h": "小时 小時 时 時 个小时", "day": "天 日",
    "week": "周 星期 个星期", "month": "月 个月 個月", "year": "年",
    "yuan": "元 块钱 人民币", "jiao": "角", "dollar": "美元", "euro": "欧元",
    "degree": "度", "square": "平方", "cubic": "立方", "/": "每",
    "unit": "个 個 只 隻 条 條 张 張 件 本 支 枝 根 块 塊 颗 顆 粒 名 位 头 頭 匹 辆 輛 座 朵 棵 单位 單位",
}  # fmt: skip
CHINESE_WORDS = {word: f" {name} " for name, words in CHINESE.items() for word in words.split()}
CHINESE_WORD = re.compile("|".join(sorted(CHINESE_WORDS, key=len, reverse=True)))
NUMBER_WORDS = {
    "百万": 10**6, "千万": 10**7, "十万": 10**5, "十亿": 10**9, "百亿": 10**10,
    "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8, "千": 10**3, "百": 100, "만": 10**4, "억": 10**8,
}  # fmt: skip
NUMBER_WORD = re.compile(rf"({'|'.join(NUMBER_WORDS)})(?!分|(?<=千)[米克卡瓦赫帕伏焦])\s*")
MORE_THAN_A_UNIT = re.compile(
    r"[半不非无無未或和与與及几幾折成又零〇一二三四五六七八九十两多余餘]|以[上下内內外]|左右|至少|至多|大于|小于|超过|分之|이상|이하"
)  # "5 or more", "and a half", further digits

UNIT_WORD = re.compile(r"([^\W\d_%]+|/|%)\.?(?:\s*\^\s*\{?(-?\d)\}?)?")


def number_word(words: str) -> tuple[int, str]:
    """The number word that the unit begins with, and the rest.

    >>> number_word("万元"), number_word("千米")
    ((10000, '元'), (1, '千米'))
    """
    match = NUMBER_WORD.match(words)
    return (NUMBER_WORDS[match[1]], words[match.end() :]) if match else (1, words)


def is_unit(words: str) -> bool:
    """Whether these words can stand behind a number without changing it; "以上", or more, cannot."""
    rest = number_word(words)[1]
    return not NUMBER_WORD.match(rest) and not MORE_THAN_A_UNIT.search(CHINESE_WORD.sub(" ", rest))


def read(text: str) -> Unit | None:
    """The unit of these words, None for none: "units" measures nothing.

    >>> read("km/h") == read("kilometers per hour")
    True
    """
    text = text.replace("mph", "mi/h").replace("$", "dollar")
    text = CHINESE_WORD.sub(lambda match: CHINESE_WORDS[match[0]], text)
    factor, sign, power = Fraction(1), 1, 1
    powers: dict[str, int] = {}
    for word, exponent in UNIT_WORD.findall(text):
        name = _singular(word)
        if name in ("/", "per"):
            sign = -1
        elif name in POWERS and name not in ("squared", "cubed"):
            power = POWERS[name]
        elif name not in IGNORED and name not in POWERS:
            scale, kind = BASE.get(name, (Fraction(1), name))
            times = sign * int(exponent or power)
            factor *= scale**times
            powers[kind] = powers.get(kind, 0) + times
            power = 1
    if "volume" in powers:  # a litre is a cubic decimetre
        litres = powers.pop("volume")
        factor *= Fraction(1, 1000) ** litres
        powers["length"] = powers.get("length", 0) + 3 * litres
    found = tuple(sorted((kind, times) for kind, times in powers.items() if times))
    return (factor, found) if found else None


def _singular(word: str) -> str:
    if word in BASE:
        return word
    lower = word.lower()
    for name in (lower, lower.removesuffix("s")):
        if name in NAMES or name in BASE:
            return NAMES.get(name, name)
    return lower.removesuffix("es") if lower.endswith(("xes", "ches")) else lower.removesuffix("s")
