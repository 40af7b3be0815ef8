"""Programs judged by their tests, in a sandbox (docs/judging.md).

A row's tests stand in the first of these columns that it has:

- `test_list`: asserts, after the lines of `test_imports` and `test_setup_code` (MBPP);
- `test`: a program with `check(candidate)`, and `entry_point`, the function's name (HumanEval);
- `tests`, `input_output`, `answer` or `ground_truth`: `{"inputs": [...], "outputs": [...]}`, or a list of
  `{"input": ..., "output": ...}`, or JSON of one of them: what a program reads and prints. With `fn_name`, the
  arguments of that function (or method of `Solution`) and what it returns (APPS, TACO, CodeContests, PRIME).

Tests run outside of the program's process and cannot be seen by it. A program's object that is no plain value (a
number, text, list ...) equals none, whatever its `__eq__` says. A program may still know the tests' names for things,
and give them meaning that the tests do not check.
"""

import ast
import json
import math
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from stepcredit.errors import UserError
from stepcredit.forest.types import Problem
from stepcredit.verifiers.sandbox import STARVED, Limits, run_each, run_tests

FENCE = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
FENCED = {"", "python", "python3", "py"}
ANSWERS = ("answer", "ground_truth")
PAIRS = ("tests", "input_output", *ANSWERS)
PROGRAMS = ("code", "canonical_solution", "solution", "solutions", "reference", "reference_solution")
TEST_COLUMNS = ("test_list", "tests", "input_output", "entry_point")
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Calls:
    """Tests that call what a program defines; see `sandbox.run_tests`."""

    tests: Sequence[Any]
    setup: str = ""


@dataclass(frozen=True)
class Pairs:
    """What a program reads, and what it must print."""

    inputs: Sequence[str]
    outputs: Sequence[str] = field(default_factory=list)


def verify(
    prompts: Sequence[Any],
    completions: Sequence[str],
    answer: Sequence[Any] | None = None,
    *,
    score: Literal["all", "fraction"] = "all",
    seconds: float = 6.0,
    memory_mb: int = 512,
    allow_unsafe: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1 where the completion's program passes all tests of its row, else 0; or the share of tests that it passes.

    Args:
        seconds: for all tests of a program together; those that it does not come to are failed.
        memory_mb: of a program.
        allow_unsafe: without bubblewrap, run programs all the same; they can do what you can do.

    Raises:
        UserError: a row has no tests, or this machine no sandbox.
    """
    if score not in ("all", "fraction"):
        raise UserError(f"reward.options.code.score: '{score}' is not one of all, fraction")
    limits = Limits(seconds=seconds, memory_mb=memory_mb)
    columns = {**columns, **({} if answer is None else {"answer": answer})}
    scores: list[float | None] = []
    for number, completion in enumerate(completions):
        row = {name: column[number] for name, column in columns.items() if column is not None}
        tests = tests_of(row)
        program = with_prompt(extract(completion), row)
        scores.append(_score(program, tests, score, limits, allow_unsafe))
    return scores


def gold(problem: Problem) -> str | None:
    """The row's own program as a completion; None where it has none."""
    for name in PROGRAMS:
        found = _from_json(problem.columns.get(name))
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, str) and found.strip():
            body = name == "canonical_solution" and isinstance(problem.columns.get("prompt"), str)
            program = problem.columns["prompt"] + found if body else extract(found)
            return f"```python\n{program}\n```"
    return None


def ends_within(options: Mapping[str, Any]) -> float:
    """Seconds in which `verify` is sure to end, sandboxes made and removed."""
    return 5.0 + STARVED * float(options.get("seconds", Limits.seconds))


# ---------------------------------------------------------------------- the program


def extract(completion: str) -> str:
    """The last fenced Python program after the thinking; without a fence, all of it."""
    text = completion.rpartition("</think>")[2]
    blocks = [block for kind, block in FENCE.findall(text) if kind.strip().lower() in FENCED]
    return blocks[-1] if blocks else text


def with_prompt(program: str, row: Mapping[str, Any]) -> str:
    """The program as it is, or after a HumanEval prompt: the imports and helpers, and the head of a bare body."""
    prompt, name = row.get("prompt"), row.get("entry_point")
    if not isinstance(prompt, str) or not name or _names(prompt) is None:
        return program
    whole = name in (_names(program) or ())
    return f"{prompt}\n\n{program}" if whole else prompt + program


def _names(program: str) -> set[str] | None:
    """What a program defines at its top; None when it is no Python."""
    try:
        body = ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}


# ---------------------------------------------------------------------- the tests


def has_tests(row: Mapping[str, Any]) -> bool:
    """Whether a row asks for a program, by a quick look: a column of tests, or inputs and outputs as its answer."""
    if any(row.get(name) not in (None, "", [], {}) for name in TEST_COLUMNS):
        return True
    return any(_looks_like_pairs(row.get(name)) for name in ANSWERS)


def _looks_like_pairs(value: Any) -> bool:
    if isinstance(value, Mapping):
        return ("inputs" in value and "outputs" in value) or ("input" in value and "output" in value)
    quoted = isinstance(value, str) and value.lstrip()[:1] in ("{", "[")
    return quoted and '"input' in value and '"output' in value


def unfit(problem: Problem) -> str | None:
    """Why a problem cannot be judged by tests; None where it can."""
    try:
        tests_of(problem.columns | {"answer": problem.answer})
    except UserError:
        return "it has no tests for a program"
    return None


def tests_of(row: Mapping[str, Any]) -> Calls | Pairs:
    """The tests of a row.

    Raises:
        UserError: it has none.
    """
    asserts = _from_json(row.get("test_list"))
    if _texts(asserts):
        setup = [*(_from_json(row.get("test_imports")) or []), row.get("test_setup_code") or ""]
        return Calls(asserts, "\n".join(setup))
    if isinstance(row.get("test"), str) and row.get("entry_point"):
        return Calls([f"{row['test']}\n\ncheck({row['entry_point']})\n"])
    for name in PAIRS:
        found = _from_json(row.get(name))
        if _texts(found) and (name not in ANSWERS or any("assert" in text for text in found)):
            return Calls(found)
        if (tests := _pairs(found, row)) is not None:
            return tests
    raise UserError(
        f"problem '{row.get('id', '')}' has no tests for a program; looked for test_list, test with entry_point, and "
        f"inputs with outputs in {', '.join(PAIRS)}"
    )


def _pairs(found: Any, row: Mapping[str, Any]) -> Calls | Pairs | None:
    name = row.get("fn_name")
    if isinstance(found, Mapping):
        inputs, outputs = found.get("inputs", found.get("input")), found.get("outputs", found.get("output"))
        name = found.get("fn_name") or name
    elif isinstance(found, list) and all(isinstance(one, Mapping) and {"input", "output"} <= set(one) for one in found):
        inputs, outputs = [one["input"] for one in found], [one["output"] for one in found]
    else:
        return None
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        return None
    if not name:
        return Pairs([_text(value) for value in inputs], [_text(value) for value in outputs])
    return Calls([_call(name, given, right) for given, right in zip(inputs, outputs, strict=True)])


def _call(name: str, given: Any, right: Any) -> dict[str, Any]:
    """A call as `sandbox.run_tests` takes it. Texts hold JSON: an argument in each line, and the value."""
    arguments = [_from_json(line) for line in given.splitlines()] if isinstance(given, str) else given
    right = _from_json(right)
    right_too = right[:1] if isinstance(right, list) and len(right) == 1 else []  # some data wrap the value in a list
    expected = [json.dumps(value) for value in (right, *right_too)]
    return {"function": name, "arguments": json.dumps(arguments), "expected": expected}


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, str) for entry in value)


# ---------------------------------------------------------------------- the score


def _score(program: str, tests: Calls | Pairs, score: str, limits: Limits, allow_unsafe: bool) -> float:
    count = len(tests.inputs) if isinstance(tests, Pairs) else len(tests.tests)
    with closing(_passed(program, tests, limits, allow_unsafe)) as passed:
        if score == "all":
            return float(all(passed))  # ends with the first that fails
        return sum(islice(passed, count)) / count


def _passed(program: str, tests: Calls | Pairs, limits: Limits, allow_unsafe: bool) -> Generator[bool, None, None]:
    program = program.encode("utf-8", "replace").decode()
    if isinstance(tests, Calls):
        yield from run_tests(program, tests.setup, tests.tests, limits, allow_unsafe)
        return
    with closing(run_each(program, tests.inputs, limits, allow_unsafe)) as results:
        for result, right in zip(results, tests.outputs, strict=True):
            yield result.status == "ok" and same_output(result.stdout, right)


def same_output(found: str, right: str) -> bool:
    """Equality without blanks at the ends of lines and of the text; numbers may differ by 1e-6 of their size."""
    if _lines(found) == _lines(right):
        return True
    pieces, others = found.split(), right.split()
    return len(pieces) == len(others) and all(map(_same_piece, pieces, others))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _same_piece(found: str, right: str) -> bool:
    if found == right:
        return True
    try:
        return math.isclose(float(found), float(right), rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    except ValueError:
        return False
