"""The text of single tokens, made harmless: nothing in it can change how a page or a terminal behaves."""

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stepcredit.display.runs import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what a tokenizer decodes a part of a character to
LONGEST_CHARACTER = 4  # bytes of UTF-8, and so tokens that may make up one character


def visible(text: str) -> str:
    """Text whose control, direction and other format characters are spelt out; line ends and tabs stay.

    >>> visible("a\\u202eb\\x1b[31m")
    'a\\\\u202eb\\\\x1b[31m'
    """
    return "".join(char if _is_plain(char) else ascii(char)[1:-1] for char in text)


def _is_plain(char: str) -> bool:
    return char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


class TokenTexts:
    """The texts of tokens as they stand within a text: joined, those of a completion give its text.

    Args:
        tokenizer: None where a run's own cannot be loaded; a token is then shown as its id.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        self.tokenizer = tokenizer
        self.special = set(tokenizer.all_special_ids) if tokenizer else set()
        self._cache: dict[int, str] = {}
        self._anchor: tuple[int, str] | None = None

    def load(self, ids: Iterable[int]) -> None:
        """Decode these tokens in one call of the tokenizer, so that `of` finds them in the cache."""
        new = sorted({token for token in ids if token not in self._cache})
        if not new:
            return
        size = 0 if self.tokenizer is None else len(self.tokenizer)
        known = [token for token in new if token < size]
        self._cache |= {token: f"⟨{token}⟩" for token in new if token >= size}
        if self.tokenizer is not None and known:
            anchor, anchor_text = self._choose_anchor(known)
            texts = self.tokenizer.batch_decode([[anchor, token] for token in known])
            self._cache |= {token: str(text)[len(anchor_text) :] for token, text in zip(known, texts, strict=True)}

    def _choose_anchor(self, ids: Sequence[int]) -> tuple[int, str]:
        """A token to decode the others behind, and its text: many tokenizers drop the space before the first token."""
        assert self.tokenizer is not None
        if self._anchor is None:
            candidates = ((token, str(self.tokenizer.decode([token]))) for token in ids if token not in self.special)
            words = (token for token, text in candidates if text.strip().isalnum())
            token = next(words, ids[0])
            twice = str(self.tokenizer.decode([token, token]))
            once = str(self.tokenizer.decode([token]))
            self._anchor = token, once if twice.startswith(once) else ""
        return self._anchor

    def of(self, ids: Sequence[int]) -> list[str]:
        """The texts of these tokens; where several make up one character, the first has it and the others are empty."""
        self.load(ids)
        texts = [self._cache[token] for token in ids]
        if self.tokenizer is None:
            return texts
        for start in range(len(texts)):
            if REPLACEMENT in texts[start]:
                self._join_character(ids, texts, start)
        return [visible(text) for text in texts]

    def _join_character(self, ids: Sequence[int], texts: list[str], start: int) -> None:
        """Write the character that begins with token `start` in its place, and nothing in those of its other tokens."""
        assert self.tokenizer is not None
        for end in range(start + 2, min(start + LONGEST_CHARACTER, len(ids)) + 1):
            character = str(self.tokenizer.decode(list(ids[start:end])))
            if REPLACEMENT not in character:
                texts[start:end] = [character, *[""] * (end - start - 1)]
                return


def token_texts_of(run: Run) -> TokenTexts:
    """The texts of a run's tokens, by the tokenizer of its newest checkpoint, else of the model it started from.

    Nothing is fetched from a network: a model from a hub is taken from the local cache.
    """
    from transformers import AutoTokenizer

    from stepcredit.policy.loading import EMBEDDED_MODEL

    model = str(run.config.get("model", ""))
    source = str(EMBEDDED_MODEL) if model == "embedded" else model
    sources = [*map(str, sorted(run.path.glob("checkpoints/[0-9]*"), reverse=True)), source]
    for source in sources:
        if not source or (not Path(source).is_dir() and "/" not in source):
            continue
        try:
            return TokenTexts(AutoTokenizer.from_pretrained(source, local_files_only=True))
        except (OSError, ValueError, RuntimeError):
            continue
    return TokenTexts(None)
