"""Units of answers: what they measure and how they convert, `100 cm` = `1 m`; unknown words are units of their own."""

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


UNIT_WORD = re.compile(r"([^\W\d_%]+|/|%)\.?(?:\s*\^\s*\{?(-?\d)\}?)?")


def read(text: str) -> Unit | None:
    """The unit of these words, None for none: "units" measures nothing.

    >>> read("km/h") == read("kilometers per hour")
    True
    """
    text = text.replace("mph", "mi/h").replace("$", "dollar")
    factor, sign, power = Fraction(1), 1, 1
    powers: dict[str, int] = {}
    for word, exponent in re.findall(
        r"([^\W\d_%]+|/|%)\.?(?:\s*\^\s*\{?(-?\d)\}?|(?<=m)([23]))?".replace("|(?<=m)([23])", ""), text
    ):
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
