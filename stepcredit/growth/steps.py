"""Where a step of a completion ends: after a number of tokens, or after a token that holds a delimiter.

Whether a step ends with a token depends on nothing that comes after it. Otherwise what follows a cut would not be drawn
from the policy: a full stop before a space, say, would have children that all begin with a space.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepcredit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTENCE_MARKS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")  # and the full-width ones
CLOSING = " \t\"')]}*_\u201d\u2019"  # may follow the mark in the same token


@dataclass(frozen=True)
class StepRule:
    """
    Attributes:
        tokens: a step ends after this many tokens; None: its length is not limited.
        delimiters: token ids that end the step that they are in.

    >>> StepRule(tokens=3).ends([5, 6, 7, 8, 9, 5, 6], most=9)
    [3, 6]
    >>> StepRule(delimiters=frozenset([9])).ends([5, 9, 9, 8, 9], most=9)
    [2, 3]
    """

    tokens: int | None = None
    delimiters: frozenset[int] = frozenset()

    def ends(self, token_ids: Sequence[int], most: int) -> list[int]:
        """The number of tokens up to the end of each step, at most `most` of them, without that of the last step."""
        if not self.delimiters and self.tokens is not None:
            return list(range(self.tokens, len(token_ids), self.tokens))[:most]
        ends: list[int] = []
        start = 0
        for end, token in enumerate(token_ids[:-1], 1):
            if len(ends) >= most:
                break
            if token in self.delimiters or end - start == self.tokens:
                ends.append(end)
                start = end
        return ends


def step_rule(
    tokens: int | None,
    delimiters: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    task_delimiters: Sequence[str] = ("newline",),
    option: str = "growth.step",
) -> StepRule:
    """The rule of a config.

    Args:
        delimiters: "newline", "sentence", "task" (those of the task, `task_delimiters`), or any text; a token that
            contains one ends a step.
        option: the section of the config that they are from, for messages.

    Raises:
        UserError: neither is given, or no token of the tokenizer contains a delimiter.
    """
    if tokens is None and not delimiters:
        raise UserError(f"{option}: give tokens (a number), delimiters (such as newline), or both")
    names = [name for given in delimiters for name in (task_delimiters if given == "task" else (given,))]
    if not names:
        return StepRule(tokens)
    ids = list(range(len(tokenizer)))
    texts = tokenizer.batch_decode([[token] for token in ids], skip_special_tokens=False)
    ending: set[int] = set()
    for name in names:
        matching = {token for token, text in zip(ids, texts, strict=True) if _ends_step(str(text), name)}
        if not matching:
            raise UserError(
                f"{option}.delimiters: no token of this tokenizer holds {name!r} as a whole; take newline, "
                f"sentence, a shorter text, or {option}.tokens"
            )
        ending |= matching
    return StepRule(tokens, frozenset(ending))


def _ends_step(text: str, delimiter: str) -> bool:
    if delimiter == "newline":
        return "\n" in text
    if delimiter == "sentence":
        return "\n" in text or text.rstrip(CLOSING).endswith(SENTENCE_MARKS)
    return delimiter in text
