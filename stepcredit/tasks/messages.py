"""The question of a row: text, or chat messages in the forms that data sets have them."""

import json
import re
from typing import Any

from stepcredit.errors import UserError
from stepcredit.forest.types import Message

SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PYTHON = re.compile(r"\s*\[\{'(role|content|from)': ")
TEXT_PARTS = {"text", "input_text"}


def question_of(where: str, column: str | None, question: Any) -> str | list[Message]:
    """A question as text, or as messages whose content is text; an assistant's last message, the solution, is left out.

    Contents in parts (`[{"type": "text", "text": ...}]`) are joined, ShareGPT's `from` and `value` become role and
    content, messages written as JSON text are read.

    Raises:
        UserError: it is neither, or has parts that are no text.
    """
    at = f"{where}: column '{column}'"
    messages = messages_of(at, question)
    if messages is None and isinstance(question, str) and question.strip():
        _check_text(at, question)
        return question
    if messages:
        last = messages[-1]
        asked = messages[:-1] if last["role"] == "assistant" and not last.get("tool_calls") else messages
        if any(message["role"] != "system" and message["content"] for message in asked):
            return asked
        raise UserError(f"{at} has no message that asks anything; found {question!r:.60}")
    raise UserError(f"{at} must be text, or chat messages with role and content; found {question!r:.60}")


def messages_of(at: str, value: Any) -> list[Message] | None:
    """Chat messages whose content is text; None where a value is none of their forms.

    Raises:
        UserError: a message has no role, or parts that are no text.
    """
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = _from_json(value)
        if isinstance(value, str) and PYTHON.match(value):
            raise UserError(f"{at} has chat messages as Python prints them; write them as JSON; found {value!r:.60}")
    if not (isinstance(value, list) and value and all(isinstance(message, dict) for message in value)):
        return None
    return [_message(f"{at}, message {number}", message) for number, message in enumerate(value, 1)]


def _from_json(text: str) -> Any:
    """Messages that stand as JSON in a text; any other text as it is."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    is_chat = all(isinstance(each, dict) and ({"role", "content"} <= set(each) or "from" in each) for each in found)
    return found if is_chat else text


def _message(at: str, message: dict[str, Any]) -> Message:
    given = {name: value for name, value in message.items() if value is not None}  # tables fill in what is absent
    if isinstance(given.get("from"), str) and "role" not in given and isinstance(given.get("value"), str):
        if given["from"] not in SHAREGPT:
            raise UserError(f"{at}: from '{given['from']}' is not known; there are {', '.join(SHAREGPT)}")
        given = {"role": SHAREGPT[given["from"]], "content": given["value"]}
    if not isinstance(given.get("role"), str):
        raise UserError(f"{at} must have role and content; found {message!r:.60}")
    content = given.get("content")
    if isinstance(content, list):
        content = "".join(_part(at, part) for part in content)
    if content is None and given.get("tool_calls"):
        return given | {"content": None}
    if not isinstance(content, str):
        raise UserError(f"{at} must be text with role and content; found {message!r:.60}")
    if not content and given["role"] not in ("system", "developer") and not given.get("tool_calls"):
        raise UserError(f"{at}: content of role {given['role']} is empty; role and content are needed")
    _check_text(at, content)
    return given | {"content": content}


def _part(at: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    what = f"a part of type '{kind}'" if kind else f"the part {part!r:.40}"
    raise UserError(f"{at} has {what}; only text can be asked, leave such rows out")


def _check_text(at: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{at} has half a surrogate pair at character {error.start}") from error
