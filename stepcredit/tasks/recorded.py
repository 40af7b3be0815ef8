"""Rows that bring their completions: preference pairs, and demonstrations.

A row becomes a `Problem` whose columns `completions` and `rewards` have a text (or an assistant's message) and a number
for each: of a pair 1 for the chosen side and 0 for the rejected one, of a demonstration 1.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from stepcredit.errors import UserError, did_you_mean
from stepcredit.forest.types import Message, Problem, look
from stepcredit.tasks.dataset import check_ids, source_labels
from stepcredit.tasks.messages import messages_of, question_of
from stepcredit.tasks.sides import LeftOut, Side, sides_of
from stepcredit.tasks.sources import Row, find_sources, read_rows

log = logging.getLogger("stepcredit")

COMPLETIONS, REWARDS = "completions", "rewards"  # columns of the problems
PROMPTS = ("prompt", "question", "problem", "instruction", "query")
ROLES: dict[str, dict[str, tuple[str, ...]]] = {  # the first of them that the data have
    "pairs": {"question": PROMPTS, "chosen": ("chosen",), "rejected": ("rejected",)},
    "demonstrations": {
        "question": PROMPTS,
        "completion": ("completion", "completions", "response", "output"),
        "messages": ("messages", "conversations"),
    },
}
NAMES = {"id": ("id", "prompt_id"), "source": ("source", "data_source")}
PARTS_OF_PROMPTS = ("input", "context", "system", "system_prompt")  # of published instruction data
NEEDED = {"pairs": ("chosen", "rejected"), "demonstrations": ()}
SCORED = ("score_chosen", "score_rejected", "chosen-rating", "rejected-rating")  # columns of UltraFeedback's forms


def load_recorded(
    kind: str, source: str, split: str, columns: Mapping[str, str] | None = None, template: str | None = None
) -> list[Problem]:
    """Read rows of preferences or demonstrations and check each.

    Args:
        kind: "pairs" or "demonstrations".
        source, split: as of `load_problems`.
        columns: which column has a role of `ROLES`, "id" or "source", where it has another name than usual.
        template: `task.prompt_template`.

    Raises:
        UserError: naming the file and line of a row without a side, with two of the same, or whose sides are no
            continuations of one prompt. Files without a column of prompts, and those with scores of the sides, have
            such rows; there they are left out, counted and logged.
    """
    problems: list[Problem] = []
    places: list[str] = []
    left_out: dict[str, list[str]] = {}
    sources, labels = find_sources(source), source_labels(source)
    for each in sources:
        rows = list(read_rows(each, split, several=len(sources) > 1))
        if not rows:
            raise UserError(f"{each}: the data set is empty")
        chosen = _choose(each, kind, rows, columns or {})
        _warn_of_left_out(each, rows, chosen, template or "")
        read = _pair if kind == "pairs" else _demonstration
        tolerant = kind == "pairs" and (chosen["question"] is None or any(name in rows[0].values for name in SCORED))
        for row in rows:
            try:
                question, completions, rewards = read(row, chosen)
            except LeftOut as reason:
                if not tolerant:
                    raise UserError(f"{row.where}: {reason}") from reason
                left_out.setdefault(str(reason), []).append(row.where)
                continue
            problem = _problem(row, chosen, question, completions, rewards)
            problem.source = problem.source or labels.get(each, "")
            problems.append(problem)
            places.append(row.place)
    for why, where in left_out.items():
        log.warning("%s: %d rows were left out: %s (first: %s)", source, len(where), why, where[0])
    if not problems:
        raise UserError(f"{source}: no row is left ({', '.join(left_out)})")
    check_ids(source, problems, places, named="id" in (columns or {}))
    return problems


def _warn_of_left_out(source: str, rows: Sequence[Row], chosen: Mapping[str, str | None], template: str) -> None:
    """Say which columns that are usually a part of the prompt are in none."""
    for column in PARTS_OF_PROMPTS:
        if column in chosen.values() or "{" + column in template:
            continue
        filled = [row.where for row in rows if str(row.values.get(column) or "").strip()]
        if filled:
            log.warning(
                "%s: column '%s' has text in %d of %d rows (first: %s) and is not in the prompts; put it there with "
                "--task.prompt-template, such as '{question}\\n\\n{%s}', if it belongs to them",
                source,
                column,
                len(filled),
                len(rows),
                filled[0],
                column,
            )


def _choose(source: str, kind: str, rows: Sequence[Row], named: Mapping[str, str]) -> dict[str, str | None]:
    """The column of each role; None for one that there is not."""
    there = list(dict.fromkeys(name for row in rows for name in row.values))
    roles = ROLES[kind] | NAMES
    for role, column in named.items():
        if role not in roles:
            raise UserError(f"task.columns.{role}: {did_you_mean(role, roles)} (growth.name {kind})")
        if column not in there and column.partition(".")[0] not in there:
            raise UserError(f"{source}: no column '{column}' (task.columns.{role}); {did_you_mean(column, there)}")
    usual = {role: next((name for name in names if name in there), None) for role, names in roles.items()}
    chosen = {role: named.get(role) or usual[role] for role in roles}
    for role in NEEDED[kind]:
        if chosen[role] is None:
            raise UserError(
                f"{source}: no column '{role}' among {', '.join(there)}; preference pairs have prompt, chosen and "
                f"rejected, or chosen and rejected that begin alike; name one with --task.columns.{role} COLUMN"
            )
    if kind == "demonstrations" and chosen["completion"] is None and chosen["messages"] is None:
        raise UserError(
            f"{source}: neither completions nor messages among {', '.join(there)}; demonstrations have prompt and "
            "completion, or messages; name a column with --task.columns.completion COLUMN"
        )
    if kind == "demonstrations" and chosen["messages"] is None and chosen["question"] is None:
        raise UserError(f"{source}: no column of prompts among {', '.join(there)}; name one: --task.columns.question")
    return chosen


Read = tuple[str | list[Message], list[Side], list[float]]


def _pair(row: Row, chosen: Mapping[str, str | None]) -> Read:
    question = _prompt(row, chosen["question"])
    sides = []
    for role in ("chosen", "rejected"):
        value = look(row.values, chosen[role])
        if value is None:
            raise UserError(f"{row.where}: column '{chosen[role]}' is empty; a pair has two sides")
        if isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("content") == "":
            raise LeftOut("a side has no text")
        messages = messages_of(f"{row.where}: column '{chosen[role]}'", value)
        if messages is None and not isinstance(value, str):
            raise UserError(f"{row.where}: column '{chosen[role]}' must be text or chat messages, got {value!r:.60}")
        sides.append(value if messages is None else messages)
    question, one, other = sides_of(question, sides[0], sides[1])
    return question, [one, other], [1.0, 0.0]


def _prompt(row: Row, column: str | None) -> str | list[Message] | None:
    """The prompt of a row; None where the data have no column of it."""
    if column is None:
        return None
    value = look(row.values, column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{row.where}: column '{column}' is empty; every row has a prompt")
    _check_end(f"{row.where}: column '{column}'", messages_of(f"{row.where}: column '{column}'", value))
    return question_of(row.where, column, value)


def _check_end(at: str, prompt: Sequence[Message] | None) -> None:
    """A problem's solution is left out of its question; here nothing of a prompt may get lost."""
    if prompt and prompt[-1]["role"] == "assistant" and not prompt[-1].get("tool_calls"):
        raise UserError(
            f"{at}: the prompt ends with a message of the assistant, which would be left out; it belongs to the "
            "completion, or behind it comes a user's"
        )


def _demonstration(row: Row, chosen: Mapping[str, str | None]) -> Read:
    if chosen["completion"] is None or (
        chosen["messages"] is not None and look(row.values, chosen["completion"]) is None
    ):
        return _of_messages(row, chosen["messages"])
    column = chosen["completion"]
    question = _prompt(row, chosen["question"])
    if question is None:
        raise UserError(f"{row.where}: column '{column}' has a completion, and no column has a prompt")
    value = look(row.values, column)
    several = isinstance(value, list) and value and all(isinstance(each, str) for each in value)
    completions = [_completion(f"{row.where}: column '{column}'", each) for each in (value if several else [value])]
    return question, completions, [1.0] * len(completions)


def _completion(at: str, value: Any) -> Side:
    if isinstance(value, str) and value.strip():
        messages = messages_of(at, value)
        if messages is None:
            return value
        value = messages
    messages = messages_of(at, value) if isinstance(value, list) else None
    if messages is not None and len(messages) == 1 and messages[0]["role"] == "assistant":
        return messages[0]
    raise UserError(f"{at} must be text, or one message of the assistant, got {value!r:.60}")


def _of_messages(row: Row, column: str | None) -> Read:
    """The last message, which is the assistant's, and all before it as the prompt."""
    at = f"{row.where}: column '{column}'"
    messages = messages_of(at, look(row.values, column))
    if not messages or messages[-1]["role"] != "assistant" or not messages[-1].get("content"):
        raise UserError(f"{at} must be chat messages that end with one of the assistant")
    _check_end(at, messages[:-1])
    return question_of(row.where, column, messages[:-1]), [messages[-1]], [1.0]


def _problem(
    row: Row,
    chosen: Mapping[str, str | None],
    question: str | list[Message],
    completions: Sequence[Side],
    rewards: Sequence[float],
) -> Problem:
    taken = {chosen[role] for role in chosen if role not in NAMES}
    rest = {name: value for name, value in row.values.items() if name not in taken}
    id_, source = look(row.values, chosen["id"]), look(row.values, chosen["source"])
    columns = rest | {COMPLETIONS: list(completions), REWARDS: list(rewards)}
    label = " ".join(source.split()) if isinstance(source, str) else ""
    return Problem(question, None, row.place if id_ is None else str(id_), columns, label)
