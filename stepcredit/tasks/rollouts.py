"""Saved rollouts as trees: this project's records, TRL's logs of completions, verl's dumps of rollouts.

- TRL (`log_completions`): parquet with `step`, `prompt`, `completion`, a column for each reward function, `advantage`.
- verl (`trainer.rollout_data_dir`): JSONL with `input`, `output`, `gts`, `score`, `step`.

Neither has token ids: texts are encoded anew. Completions of one prompt in one step are a group.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepcredit.errors import UserError, did_you_mean
from stepcredit.forest.records import read_trees
from stepcredit.forest.types import Problem, Segment, Tree, look
from stepcredit.tasks.dataset import USUAL_COLUMNS
from stepcredit.tasks.sources import Row, find_sources, form_of, read_rows

log = logging.getLogger("stepcredit")

NO_REWARDS = {"step", "prompt", "completion", "advantage", "input", "output", "gts"}


def read_rollouts(
    source: str,
    encode: Callable[[str], list[int]] | None,
    columns: Mapping[str, str] | None = None,
    functions: Sequence[str] = (),
    weights: Sequence[float] = (),
) -> tuple[list[Tree], str]:
    """The trees of one or several files, and whose they are: "stepcredit", "TRL" or "verl".

    Args:
        encode: text to token ids; None takes the bytes of the text for tokens.
        columns: the column that has the "answer" of TRL's problems, where it is not a usual one.
        functions: TRL's columns of rewards; none: all columns of numbers.
        weights: of the functions in the reward; none: all 1.

    Raises:
        UserError: naming the file, the line and the field at fault.
    """
    files = find_sources(source)
    forms = {file: _form(file) for file in files}
    if len(set(forms.values())) > 1:
        raise UserError(f"{source}: {files[0]} is of {forms[files[0]]}, others are not; give files of one kind")
    form = forms[files[0]]
    if form == "stepcredit":
        trees = [tree for file in files for tree in read_trees(file)]
    else:
        rows = [row for file in files for row in read_rows(file, "train", several=len(files) > 1)]
        trees = _Rollouts(form, encode, columns or {}, functions, weights).trees(source, rows)
    if not trees:
        raise UserError(f"{source}: there are no rollouts")
    return trees, form


def _form(file: str) -> str:
    """Whose rollouts a file has, by its first row; what is wrong with it is said when it is read."""
    lines = form_of(Path(file))[0] in (None, ".jsonl")
    if Path(file).is_dir():
        raise UserError(f"{file} is a folder; name its files, such as '{file}/*.jsonl'")
    if not Path(file).is_file():
        return "stepcredit"
    try:
        first = next(iter(read_rows(file, "train")), None)
    except UserError:
        if lines:
            return "stepcredit"
        raise
    names = set(first.values) if first else set()
    if "segments" not in names and {"prompt", "completion"} <= names:
        return "TRL"
    if "segments" not in names and {"input", "output"} <= names:
        return "verl"
    if not lines:
        there = ", ".join(sorted(names))
        raise UserError(f"{file}: has neither prompt and completion (TRL) nor input and output (verl), but {there}")
    return "stepcredit"


class _Rollouts:
    """Rows of completions to trees."""

    def __init__(
        self,
        form: str,
        encode: Callable[[str], list[int]] | None,
        columns: Mapping[str, str],
        functions: Sequence[str],
        weights: Sequence[float],
    ) -> None:
        self.form, self.encode, self.columns = form, encode, columns
        self.functions, self.weights = list(functions), list(weights)
        self.asked, self.said = ("prompt", "completion") if form == "TRL" else ("input", "output")

    def trees(self, source: str, rows: Sequence[Row]) -> list[Tree]:
        names = self._reward_names(source, rows)
        weights = self.weights or [1.0] * len(names)
        if len(weights) != len(names):
            raise UserError(f"reward.weights: {len(weights)} weights for {len(names)} functions ({', '.join(names)})")
        found: dict[str, Tree] = {}
        numbers: dict[Any, int] = {}  # prompts of each step
        for row in rows:
            step, prompt = row.values.get("step"), row.values.get(self.asked)
            key = json.dumps([step, prompt], default=str)
            if key not in found:
                numbers[step] = numbers.get(step, 0) + 1
                found[key] = self._tree(row, prompt, f"step {step}, prompt {numbers[step]}")
            found[key].segments.append(self._segment(row, dict(zip(names, weights, strict=True))))
        tokens = "the tokenizer's" if self.encode else "the bytes of the text (--model names a tokenizer)"
        reward = " + ".join(f"{weight:g} {name}" for name, weight in zip(names, weights, strict=True)) or "none"
        log.warning("%s: written by %s; reward: %s; tokens: %s", source, self.form, reward, tokens)
        return list(found.values())

    def _reward_names(self, source: str, rows: Sequence[Row]) -> list[str]:
        present = list(dict.fromkeys(name for row in rows for name in row.values))
        if self.form == "verl":
            return ["score"] if "score" in present else []
        numeric = [name for name in present if name not in NO_REWARDS and _numeric(rows, name)]
        for name in self.functions:
            if name not in numeric:
                raise UserError(f"{source}: no column of rewards '{name}'; {did_you_mean(name, numeric)}")
        return self.functions or numeric

    def _tree(self, row: Row, prompt: Any, name: str) -> Tree:
        values = row.values
        text = _text(row, self.asked, prompt)
        usual = ("gts",) if self.form == "verl" else USUAL_COLUMNS["answer"]
        column = self.columns.get("answer") or next((each for each in usual if look(values, each) is not None), None)
        problem = Problem(prompt, look(values, column), name, {k: v for k, v in values.items() if k != self.said})
        extra = {"step": values.get("step"), "prompt_end": text[-200:], "without": ["id", "token_ids"]}
        return Tree(problem, self._encoded(text), [], extra)

    def _segment(self, row: Row, weights: Mapping[str, float]) -> Segment:
        text = _text(row, self.said, row.values.get(self.said))
        parts = {name: _number(row, name) for name in weights}
        judged = [weights[name] * part for name, part in parts.items() if part is not None]
        extra = {"text": text}
        if row.values.get("advantage") is not None:
            extra["advantage"] = row.values["advantage"]
        return Segment(self._encoded(text) or [0], reward=sum(judged) if judged else None, rewards=parts, extra=extra)

    def _encoded(self, text: str) -> list[int]:
        return self.encode(text) if self.encode else list(text.encode("utf-8", "replace"))


def _text(row: Row, name: str, value: Any) -> str:
    """A prompt or completion as text; of chat messages their contents."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(each, dict) and isinstance(each.get("content"), str) for each in value
    ):
        return "\n".join(each["content"] for each in value)
    raise UserError(f"{row.where}: column '{name}' must be text or chat messages, found {value!r:.40}")


def _numeric(rows: Sequence[Row], name: str) -> bool:
    values = [row.values.get(name) for row in rows]
    known = [value for value in values if value is not None]
    return bool(known) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)


def _number(row: Row, name: str) -> float | None:
    """A reward; None where the function left the completion out."""
    value = row.values.get(name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{row.where}: column '{name}' must be a finite number or null, found {value!r:.40}")
    return float(value)
