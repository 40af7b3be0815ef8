"""The two sides of a preference pair: what is their prompt, and what of each is the completion."""

from stepcredit.forest.types import Message

Side = str | Message  # a completion as text, or as the assistant's message
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # turns of a dialogue that is one text (Anthropic's HH)


class LeftOut(Exception):
    """Why a row is no pair that can be learnt from."""


def sides_of(
    question: str | list[Message] | None, chosen: str | list[Message], rejected: str | list[Message]
) -> tuple[str | list[Message], Side, Side]:
    """The prompt of a pair and its two completions.

    Args:
        question: None: it is what both sides begin with. Of texts in turns (`\\n\\nHuman:`, `\\n\\nAssistant:`) all
            up to the last answer, of other texts up to the last space before they part, of messages all but the last.
        chosen, rejected: texts, or chat messages, the question's before the last or not.

    Raises:
        LeftOut: they do not continue one prompt with one answer each, one has no text, or they are the same.
    """
    one: Side
    other: Side
    if isinstance(chosen, str) and isinstance(rejected, str):
        question, one, other = (question, chosen, rejected) if question is not None else _split(chosen, rejected)
    elif isinstance(chosen, str) or isinstance(rejected, str):
        raise LeftOut("one side is text, the other chat messages")
    else:
        question, one, other = _prompt_of(question, chosen, rejected), chosen[-1], rejected[-1]
    texts = [each if isinstance(each, str) else each.get("content") or "" for each in (one, other)]
    if not all(text.strip() for text in texts):
        raise LeftOut("a side has no text")
    if texts[0].strip() == texts[1].strip():
        raise LeftOut("the two sides are the same")
    return question, one, other


def _prompt_of(
    question: str | list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> str | list[Message]:
    """What is before the last messages of two sides, or the question where there is nothing before them."""
    before = chosen[:-1]
    if any(side[-1]["role"] != "assistant" for side in (chosen, rejected)):
        raise LeftOut("a side does not end with an answer of the assistant")
    if not _same(before, rejected[:-1]):
        raise LeftOut("the two sides part before the last answer")
    if question is None:
        if all(message["role"] == "system" for message in before):
            raise LeftOut("the two sides have no message in common that asks anything")
        return before
    if not before:
        return question
    asked = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if _same(before, asked):
        return question
    if not _same([message for message in before if message["role"] != "system"], asked):
        raise LeftOut("the sides begin with another prompt than the row's")
    return before


def _same(one: list[Message], other: list[Message]) -> bool:
    """Whether messages say the same."""
    return [(each["role"], each.get("content")) for each in one] == [(e["role"], e.get("content")) for e in other]


def _split(chosen: str, rejected: str) -> tuple[str, str, str]:
    """What two texts begin with, and the rest of each."""
    if chosen == rejected:
        raise LeftOut("the two sides are the same")
    parted = (place for place, letters in enumerate(zip(chosen, rejected, strict=False)) if letters[0] != letters[1])
    common = chosen[: next(parted, min(len(chosen), len(rejected)))]
    if HUMAN in common or ASSISTANT in common:
        end = common.rfind(ASSISTANT) + len(ASSISTANT)
        rest = chosen[end:], rejected[end:]
        if ASSISTANT not in common or any(HUMAN in each or ASSISTANT in each for each in rest):
            raise LeftOut("the two sides part before the last answer")
        return common[:end], *rest
    end = len(common)
    if not all(text[end : end + 1].isspace() for text in (chosen, rejected)):
        end = max((place for place, letter in enumerate(common) if letter.isspace()), default=0)
    if not common[:end].strip():
        raise LeftOut("the two sides have no beginning in common")
    return common[:end], chosen[end:], rejected[end:]
