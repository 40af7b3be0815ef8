"""The text of single tokens, made harmless: nothing in it can change how a page or a terminal behaves."""

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stepcredit.display.runs import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # a token that is a part of a character
LINE = "\n"


def visible(text: str) -> str:
    """Text whose control, direction and other format characters are spelt out; line ends and tabs stay.

    >>> visible("a\\u202eb\\x1b[31m")
    'a\\\\u202eb\\\\x1b[31m'
    """
    return "".join(char if _is_plain(char) else ascii(char)[1:-1] for char in text)


def _is_plain(char: str) -> bool:
    return char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


class Pieces:
    """Texts of tokens as they stand in a text, so that those of a completion, one after the other, make it up.

    Args:
        tokenizer: None where a run's own cannot be found; a token is then shown as its number.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        self.tokenizer = tokenizer
        self.special = set(tokenizer.all_special_ids) if tokenizer else set()
        self._known: dict[int, str] = {}
        self._before: tuple[int, str] | None = None

    def learn(self, ids: Iterable[int]) -> None:
        """Look these tokens up, all at once."""
        new = sorted({token for token in ids if token not in self._known})
        if not new:
            return
        if self.tokenizer is None:
            self._known |= {token: f"⟨{token}⟩" for token in new}
            return
        anchor, start = self._anchor(new)
        size = len(self.tokenizer)
        texts = self.tokenizer.batch_decode([[anchor, token] for token in new if token < size])
        inside = iter(texts)
        for token in new:
            self._known[token] = str(next(inside))[len(start) :] if token < size else f"⟨{token}⟩"

    def _anchor(self, ids: Sequence[int]) -> tuple[int, str]:
        """A token that the others stand behind: many tokenizers drop the space before the first token of a text."""
        assert self.tokenizer is not None
        if self._before is None:
            plain = (token for token in ids if token not in self.special and token < len(self.tokenizer))
            candidates = ((token, str(self.tokenizer.decode([token]))) for token in plain)
            whole = ((token, text) for token, text in candidates if text.strip().isalnum())
            token = next(whole, (ids[0], ""))[0]
            twice = str(self.tokenizer.decode([token, token]))
            once = str(self.tokenizer.decode([token]))
            self._before = token, once if twice.startswith(once) else ""
        return self._before

    def of(self, ids: Sequence[int]) -> list[str]:
        """The texts of these tokens; where several make up one character, the first has it and the others are empty."""
        self.learn(ids)
        texts = [self._known[token] for token in ids]
        if self.tokenizer is None:
            return texts
        place = 0
        while place < len(texts):
            if BROKEN in texts[place]:
                for end in range(place + 2, min(place + 5, len(ids) + 1)):
                    whole = str(self.tokenizer.decode(list(ids[place:end])))
                    if BROKEN not in whole:
                        texts[place:end] = [whole, *[""] * (end - place - 1)]
                        break
            place += 1
        return [visible(text) for text in texts]


def pieces_of(run: Run) -> Pieces:
    """The texts of a run's tokens, by the tokenizer of its newest checkpoint, else of the model it started from.

    Nothing is fetched from a network: a model from a hub is taken from the local cache.
    """
    from transformers import AutoTokenizer

    from stepcredit.policy.loading import EMBEDDED_MODEL

    model = str(run.config.get("model", ""))
    source = str(EMBEDDED_MODEL) if model == "embedded" else model
    places = [*map(str, sorted(run.path.glob("checkpoints/[0-9]*"), reverse=True)), source]
    for place in places:
        if not place or (not Path(place).is_dir() and "/" not in place):
            continue
        try:
            return Pieces(AutoTokenizer.from_pretrained(place, local_files_only=True))
        except (OSError, ValueError, RuntimeError):
            continue
    return Pieces(None)
