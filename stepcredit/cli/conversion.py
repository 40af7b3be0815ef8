"""What `stepcredit config` knows of a config of another library while it makes ours of it."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from stepcredit.cli.arguments import SHORT
from stepcredit.cli.others import Option
from stepcredit.errors import UserError


class Remark(NamedTuple):
    """A line of the report: what it is about, and what is to be said."""

    about: str
    text: str

    def __str__(self) -> str:
        return f"{self.about}: {self.text}"


class Conversion:
    """Options of another library, read one by one, and ours, written one by one.

    Args:
        library: "TRL" or "verl".
        given: options that the user's file has, by their full names.
        defaults: of the library, for options that the file does not have.

    Attributes:
        ours: by path, such as "optim.learning_rate".
        implied: paths whose value is the library's default, not the user's.
        differing: options whose meaning is not quite the same here.
        left_out: options of the file that have no counterpart.
        to_give: what a run needs and the file does not say.
    """

    def __init__(self, library: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.library, self.given, self.defaults = library, dict(given), dict(defaults)
        self.unread = set(self.given)
        self.ours: dict[str, Any] = {}
        self.implied: set[str] = set()
        self.differing: list[Remark] = []
        self.left_out: list[Remark] = []
        self.to_give: list[Remark] = []

    def has(self, *names: str) -> bool:
        """Whether the file has one of these options."""
        return any(name in self.given for name in names)

    def get(self, *names: str) -> Any:
        """The value of the first of these options that the file has, else the library's default of the first."""
        self.unread -= set(names)
        for name in names:
            if self.given.get(name) is not None:
                return self.given[name]
        return next((self.defaults[name] for name in names if name in self.defaults), None)

    def number(self, *names: str) -> float | None:
        """`get` for a number.

        Raises:
            UserError: it is none.
        """
        value: float | None = self.get(*names)
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            return value
        raise UserError(f"{self.library}'s {names[0]}: '{value}' is not a number")

    def words(self, name: str) -> list[str]:
        """`get` for a word or a list of words; empty where there is none.

        Raises:
            UserError: it is neither.
        """
        value = self.get(name)
        words: list[str] = [value] if isinstance(value, str) else value or []
        if isinstance(words, list) and all(isinstance(word, str) for word in words):
            return words
        raise UserError(f"{self.library}'s {name}: {value!r} is no list of words")

    def put(self, path: str, value: Any, *names: str) -> None:
        """Write an option of ours that these options of theirs say; from their defaults where the file has none."""
        self.ours[path] = value
        if not self.has(*names):
            self.implied.add(path)

    def take_back(self, path: str) -> bool:
        """Undo `put`; whether there was something to undo."""
        self.implied.discard(path)
        return self.ours.pop(path, None) is not None

    def differs(self, about: str, text: str) -> None:
        self.differing.append(Remark(about, text))

    def leave_out(self, name: str, why: str = "no counterpart") -> None:
        """Name an option of the file that is not converted; nothing where the file does not have it."""
        self.unread.discard(name)
        if name in self.given:
            self.left_out.append(Remark(name, f"{_short(self.given[name])}; {why}"))

    def leave_out_rest(self, known: Mapping[str, str]) -> None:
        """Name all options of the file that were not read.

        Args:
            known: what is to be said of an option, by its name or the sections in front of it.
        """
        for name in sorted(self.unread, key=list(self.given).index):
            sections = [name.rsplit(".", count)[0] for count in range(name.count(".") + 1)]
            self.leave_out(name, next((known[each] for each in sections if each in known), "no counterpart"))

    def take_table(self, options: Collection[Option]) -> None:
        """Convert what takes a single option of theirs."""
        for option in options:
            names = option.trl if self.library == "TRL" else option.verl
            if option.convert is None or not names:
                continue
            value = self.get(*names)
            if value is not None:
                self.put(path_of(option.here), option.convert(value), *names)


def path_of(here: str) -> str:
    """The path of one of our options in the config, from its name on the command line.

    >>> path_of("--group-size"), path_of("--optim.num-epochs")
    ('growth.group_size', 'optim.num_epochs')
    """
    name = here.removeprefix("--")
    return SHORT.get(name, name.replace("-", "_"))


def _short(value: Any) -> str:
    text = str(value).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."


def whole(value: float) -> int:
    """The nearest whole number, at least 1."""
    return max(1, round(value))
