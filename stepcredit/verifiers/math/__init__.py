"""Mathematical answers: the final answer of a completion against the gold one, LaTeX or plain.

Outside of this folder only the five functions here are used: `verify` scores completions, `equal` compares two answers,
`final_answer` and `same_answer` serve majority votes, `gold` makes the completion that must be accepted.

Nothing is evaluated as code and nothing is computed that is large, so a hostile answer is wrong, quickly. No signals:
any thread may call. Needs neither torch nor transformers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stepcredit.errors import UserError
from stepcredit.verifiers.answers import texts_of, unfit, unlikely
from stepcredit.verifiers.math.equal import constant, equal
from stepcredit.verifiers.math.extract import extract
from stepcredit.verifiers.math.text import clean, short

if TYPE_CHECKING:
    from stepcredit.forest.types import Problem

__all__ = ["equal", "final_answer", "gold", "same_answer", "unfit", "verify"]

MARKS = ("\\boxed", "\\fbox", "####")  # what a whole solution has before its answer
MAX_VOTE_LENGTH = 200  # characters of answers that are compared by value for a vote; longer ones as text
MAX_VOTE_PARTS = 8  # of a list, likewise; a sign that doubles its values counts as several


def verify(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any], **columns: Any) -> list[float]:
    """1 where the completion's final answer says the same as the gold one, else 0.

    The answer may be a bare expression (`\\frac{1}{2}`), a whole solution that ends in `\\boxed{...}` or `#### x`, or a
    list of these, of which any is right.
    """
    return [
        max(_score(text, each) for each in texts_of(right)) for text, right in zip(completions, answer, strict=True)
    ]


def final_answer(completion: str) -> str | None:
    """What the completion comes to: `\\frac12` and 0.5 are one text, 1/2; None when there is no answer."""
    found = extract(completion)
    if found is None or not (text := clean(found)):
        return None
    value = constant(text)
    return str(value) if value is not None else short(text)


def same_answer(one: str, other: str) -> bool:
    """Whether two texts of `final_answer` say the same whichever is taken for the gold one.

    Neither is trusted: what is long, or a long list, is compared as text, and nothing is left to math-verify.
    """
    if one == other:
        return True
    if _too_large_for_a_vote(one) or _too_large_for_a_vote(other):
        return False
    return equal(one, other, trusted_gold=False) and equal(other, one, trusted_gold=False)


def _too_large_for_a_vote(text: str) -> bool:
    parts = text.count(",") + text.count(";") + 3 * (text.count("\\pm") + text.count("±"))
    return len(text) > MAX_VOTE_LENGTH or parts >= MAX_VOTE_PARTS


def gold(problem: "Problem") -> str | None:
    """The completion that must be accepted: the answer, or the first of several, in a box; None without an answer.

    Raises:
        UserError: the answer is nothing that a completion would state.
    """
    if problem.answer is None:
        return None
    answer: str | None = texts_of(problem.answer)[0]
    if answer and any(mark in answer for mark in MARKS):
        answer = extract(answer)
    if not answer or (why := unlikely(answer)):
        raise UserError(why if answer else "no final answer can be found in its solution")
    return f"\\boxed{{{answer}}}"


def _score(completion: str, answer: str) -> float:
    right = extract(answer) if any(mark in answer for mark in MARKS) else answer
    found = extract(completion)
    return float(right is not None and found is not None and equal(right, found))
