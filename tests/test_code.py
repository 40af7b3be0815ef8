"""Judging programs: what is taken from a completion, every shape of tests, scores, and all of MBPP."""

import ast
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stepcredit.errors import UserError
from stepcredit.forest.types import Problem
from stepcredit.verifiers import bubblewrap, code
from stepcredit.verifiers.code import extract, gold, same_output, verify

SHARED = Path(__file__).parents[2] / "shared" / "data"
REASON = bubblewrap.refusal()
needs_sandbox = pytest.mark.skipif(REASON is not None, reason=f"{REASON} (bubblewrap)")
ADD = "a, b = map(int, input().split())\nprint(a + b)"


def fenced(program: str) -> str:
    return f"Here it is.\n```python\n{program}\n```\n"


def score(program: str, row: dict, **options) -> float | None:
    return verify([""], [fenced(program)], **{name: [value] for name, value in row.items()}, **options)[0]


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("x = 1", "x = 1"),
        ("```python\na\n```\nor\n```py\nb\n```", "b\n"),
        ("```\nc\n```", "c\n"),
        ("```text\nno\n```\n", "```text\nno\n```\n"),
        ("<think>```python\nno\n```</think>\n```Python\nyes\n```", "yes\n"),
        ("<think>```python\nno\n```</think>yes", "yes"),
        ("```python\ncut off", "cut off"),
    ],
)
def test_extract(completion, program):
    assert extract(completion) == program


@pytest.mark.parametrize(
    ("found", "right", "same"),
    [
        ("1 \n2\n\n", "1\n2", True),
        ("0.3333333", "0.33333333", True),
        ("1 2", "1\n2", True),
        ("12", "1 2", False),
        ("0.333", "0.334", False),
        ("", "1", False),
        ("yes", "YES", False),
    ],
)
def test_same_output(found, right, same):
    assert same_output(found, right) is same


SHAPES = {
    "asserts": ("def f(x): return x + 1", {"test_list": ["assert f(1) == 2", "assert isclose(f(0.5), 1.5)"]}),
    "check": (
        "def f(x): return helper(x)",
        {
            "prompt": 'def helper(x): return x + 1\n\ndef f(x):\n    """Add 1."""\n',
            "test": "def check(candidate):\n    assert candidate(1) == 2\n",
            "entry_point": "f",
        },
    ),
    "body": (
        "    return x + 1",
        {
            "prompt": 'def f(x):\n    """Add 1."""\n',
            "test": "def check(candidate):\n    assert candidate(1) == 2\n",
            "entry_point": "f",
        },
    ),
    "pairs": (ADD, {"tests": {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}}),
    "pairs as JSON": (ADD, {"answer": json.dumps({"inputs": ["1 2"], "outputs": ["3"]})}),
    "list of pairs": (ADD, {"input_output": [{"input": "1 2", "output": "3"}, {"input": "3 4", "output": "7"}]}),
    "ground truth": (ADD, {"answer": None, "ground_truth": '[{"input": "1 2", "output": "3"}]'}),
    "function": ("def f(x, y): return (x, y)", {"tests": {"fn_name": "f", "inputs": [[1, 2]], "outputs": [[1, 2]]}}),
    "method": (
        "class Solution:\n    def f(self, x, y): return x + y",
        {"answer": json.dumps({"fn_name": "f", "inputs": ["1\n2"], "outputs": ["3"]})},
    ),
    "wrapped value": ("def f(x): return [x]", {"tests": {"fn_name": "f", "inputs": [[1]], "outputs": [[[1]]]}}),
}


@needs_sandbox
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    program, row = SHAPES[shape]
    row = row | ({"test_imports": ["from math import isclose"]} if "test_list" in row else {})
    assert score(program, row) == 1
    assert score(
        program.replace(" + ", " - ").replace("return (x, y)", "return (y, x)").replace("[x]", "x + 1"), row
    ) == 0 or (
        shape == "check"  # the helper is the prompt's
    )
    assert score("nonsense(", row) == 0
    assert score("pass", row) == 0


@needs_sandbox
def test_wrong_program_after_a_prompt():
    assert score("def f(x): return x", SHAPES["check"][1]) == 0


@needs_sandbox
def test_fraction():
    row = {"test_list": ["assert f(1) == 1", "assert f(2) == 4", "assert f(3) == 3", "assert f(4) == 4"]}
    assert score("def f(x): return x", row, score="fraction") == 0.75
    assert score("def f(x): return x", row) == 0
    pairs = {"tests": {"inputs": ["1 2", "x", "1 1"], "outputs": ["3", "3", "2"]}}
    assert score(ADD, pairs, score="fraction") == pytest.approx(2 / 3)


@needs_sandbox
def test_a_time_out_fails_what_comes_after_it():
    row = {"tests": {"inputs": ["0", "9", "0"], "outputs": ["", "", ""]}}
    assert score("import time; time.sleep(int(input()))", row, score="fraction", seconds=1) == pytest.approx(1 / 3)


@needs_sandbox
def test_a_function_named_like_a_builtin():
    row = {"test_list": ["assert sum(1, 2) == 3"]}
    assert score("def sum(a, b): return a + b", row) == 1
    assert score("def abs(x): return 0\ndef f(x): return 1", {"test_list": ["assert abs(f(2) - 5) == 0"]}) == 0


def test_rows_without_tests_are_named():
    with pytest.raises(UserError, match=r"problem 'p7' has no tests.*test_list"):
        score("pass", {"id": "p7", "answer": "42"})
    with pytest.raises(UserError, match="score"):
        score("pass", {"test_list": ["assert 1"]}, score="some")


def test_gold():
    assert gold(Problem(columns={"code": "x = 1"})) == "```python\nx = 1\n```"
    body = {"prompt": "def f():\n", "canonical_solution": "    return 1\n"}
    assert extract(gold(Problem(columns=body)) or "") == "def f():\n    return 1\n\n"
    assert gold(Problem(columns={"solutions": '["y = 2", "z"]'})) == "```python\ny = 2\n```"
    assert gold(Problem(columns={"question": "?"})) is None


@needs_sandbox
def test_mbpp():
    """References pass, and without their functions' bodies fail: a spread sample."""
    path = SHARED / "mbpp.jsonl"
    if not path.exists():
        pytest.skip("no shared data")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][::4]
    with ThreadPoolExecutor(2) as pool:
        right = list(pool.map(lambda row: _mbpp(row, row["code"]), rows))
        wrong = list(pool.map(lambda row: _mbpp(row, _without_bodies(row["code"])), rows))
    assert [row["task_id"] for row, found in zip(rows, right, strict=True) if found != 1] == []
    assert [row["task_id"] for row, found in zip(rows, wrong, strict=True) if found != 0] == []


def _mbpp(row: dict, program: str) -> float | None:
    return score(extract(code.gold(Problem(columns={"code": program})) or ""), row)


def _without_bodies(program: str) -> str:
    tree = ast.parse(program)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = ast.parse("raise RuntimeError").body
    return ast.unparse(tree)
