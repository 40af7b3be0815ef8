"""The mathematics verifier: pairs, extraction, votes, hostile answers, threads, and real benchmark rows."""

import asyncio
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from math_pairs import COMPLETIONS, PAIRS

from stepcredit.forest.types import Problem
from stepcredit.verifiers.judging import Judge
from stepcredit.verifiers.math import equal, final_answer, gold, same_answer, verify
from stepcredit.verifiers.reward import reward_function

SHARED = Path(__file__).parents[2] / "shared" / "data"


def judge(right: str, completion: str) -> float:
    return verify([""], [completion], [right])[0]


@pytest.mark.parametrize(("right", "answer", "expected"), PAIRS)
def test_pair(right, answer, expected):
    assert judge(right, f"So it is $\\boxed{{{answer}}}$.") == float(expected)


@pytest.mark.parametrize(("right", "completion", "expected"), COMPLETIONS)
def test_completion(right, completion, expected):
    assert judge(right, completion) == float(expected)


def test_pairs_are_many_of_both_kinds():
    accepted = sum(expected for *_, expected in PAIRS)
    assert len(PAIRS) >= 260 and 0.4 < accepted / len(PAIRS) < 0.6
    assert len(set(PAIRS)) == len(PAIRS)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("so \\boxed{1}, no: \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "1/2"),
        ("\\boxed 5", "5"),
        ("\\fbox{7}", "7"),
        ("<think>\\boxed{1}</think> It is \\boxed{2}.", "2"),
        ("x is \\boxed{1} and \\boxed{2}", "2, 1"),
        ("The roots are $\\boxed{1}$, $\\boxed{2}$ and $\\boxed{3}$.", "1,2,3"),
        ("2 + 3 = 5\n#### 5", "5"),
        ("The final answer is $\\frac{1}{2}$. I hope it is correct.", "1/2"),
        ("**Answer:** 42", "42"),
        ("The answer is 5 because 2 + 3 = 5.", "5"),
        ("The answer is: (C)", "C"),
        ("We get \\[x = 3\\]", "3"),
        ("So \\(\\frac{3}{4}\\)", "0.75"),
        ("Therefore we get 12.", "12"),
        ("So the cost is $\\$1,250$.", "1250"),
        ("The sum equals 12 apples.", "12"),
    ],
)
def test_extraction(completion, answer):
    assert judge(answer, completion) == 1.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("\\boxed{5} and then \\boxed{6}. So \\boxed{6}", "5"),
        ("<think>The answer is 5.</think> I do not know.", "5"),
        ("def f(): return 5", "5"),
        ("```python\nprint(5)\n```", "5"),
        ("x = foo(5);", "5"),
        ("In 5 minutes nobody could do that", "5"),
        ("", "5"),
        ("\\boxed{}", "5"),
        ("\\boxed{5", "5"),
        ("I think $5$ or $6$", "5"),
        ("\\boxed{1} and \\boxed{2}", "2"),
    ],
)
def test_nothing_right_is_extracted(completion, answer):
    assert judge(answer, completion) == 0.0


@pytest.mark.parametrize(
    ("right", "answer"),
    [("3:30", "3:30 p.m."), ("50\\%", "0.5\\%"), ("(1,2)", "1,2"), ("y=-2x", "-2x"), ("12", "\\text{(C)}")],
)
def test_the_gold_side_decides(right, answer):
    swapped = {"3:30": (1.0, 0.0), "50\\%": (0.0, 0.0), "(1,2)": (1.0, 1.0), "y=-2x": (1.0, 1.0), "12": (0.0, 0.0)}
    there, back = swapped[right]
    assert judge(right, f"\\boxed{{{answer}}}") == there
    assert judge(answer, f"\\boxed{{{right}}}") == back


@pytest.mark.parametrize(
    "answers",
    [
        ("\\frac12", "\\frac{1}{2}", "0.5", "1/2", "2/4"),
        ("1,234", "1234", "1234."),
        ("x+1", "$x + 1$"),
        ("\\text{Even}", "even"),
    ],
)
def test_votes_for_one_answer_are_one(answers):
    assert len({final_answer(f"\\boxed{{{answer}}}") for answer in answers}) == 1


def test_votes_for_different_answers_differ():
    answers = ["1", "2", "\\frac12", "-1", "x", "x+1", "(1,2)", "(2,1)", "3 1/2", "31/2"]
    assert len({final_answer(f"\\boxed{{{answer}}}") for answer in answers}) == len(answers)
    assert final_answer("no idea") is None
    assert final_answer("\\boxed{}") is None


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("2\\sqrt{2}", "\\sqrt8", True),
        ("x=1 \\text{ or } x=2", "1, 2", True),
        ("(x+1)^2", "x^2 + 2x + 1", True),
        ("5厘米", "5 \\text{ cm}", True),
        ("2021年5月1日", "May 1, 2021", True),
        ("\\text{Tom and Bob}", "tom and bob", True),
        ("1-\\sqrt2", "\\sqrt2-1", False),
        ("3:30", "3:30 p.m.", False),  # accepted only where 3:30 is the gold one
        ("5 cm", "5 m", False),
        ("\\sum_{k=1}^{10} k", "55", False),  # math-verify is asked for trusted gold answers only
    ],
)
def test_same_answer_of_two_completions(one, other, expected):
    votes = [final_answer(f"So \\boxed{{{text}}}.") for text in (one, other)]
    assert same_answer(*votes) == same_answer(*reversed(votes)) == expected


def test_sums_in_trusted_gold_answers_are_computed():
    assert equal("\\sum_{k=1}^{10} k", "55")
    assert not equal("\\sum_{k=1}^{10} k", "55", trusted_gold=False)


def test_hostile_answers_are_compared_quickly_with_each_other():
    """What a majority vote does in the process of the evaluation, without a deadline."""
    texts = [text for answer in HOSTILE if (text := final_answer(f"\\boxed{{{answer}}}"))]
    sets = ",".join(f"\\sin(x^{{{number}}})" for number in range(8))
    texts += [f"\\{{{sets}\\}}", "((((x+1)^9+1)^9+1)^9+1)^9", "\\pm\\sqrt{1\\pm\\sqrt{2\\pm x}}", "x" * 10**6]
    assert len(texts) > 60
    begin = time.process_time()
    for one, other in itertools.combinations(texts, 2):
        before = time.process_time()
        same_answer(one, other)
        assert time.process_time() - before < 2.0, (one[:50], other[:50])
    assert time.process_time() - begin < 60


def test_needs_nothing_heavy():
    """A fresh interpreter uses the functions; of stepcredit only errors, types and names are loaded with them."""
    code = """
import sys
from stepcredit.verifiers.math import equal, final_answer, same_answer, verify
assert equal("1/2", "0.5") and verify([""], ["So \\\\boxed{2}"], ["2"]) == [1.0]
assert same_answer(final_answer("The answer is 5 cm."), "5")
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "transformers", "pydantic", "numpy", "yaml", "rich", "sympy", "math_verify"}
    own = {name for name in loaded if name.startswith("stepcredit.") and ".verifiers.math" not in name}
    light = {"errors", "forest", "forest.types", "imports", "verifiers", "verifiers.answers"}
    assert own <= {f"stepcredit.{name}" for name in light}


def test_nobody_outside_looks_inside():
    folder = Path(__file__).parents[1] / "stepcredit"
    inside = {path.stem for path in (folder / "verifiers" / "math").glob("*.py")} - {"__init__"}
    looks = re.compile(rf"verifiers\.math\.(?:{'|'.join(sorted(inside))})\b")
    others = [path for path in folder.rglob("*.py") if path.parent != folder / "verifiers" / "math"]
    assert len(others) > 50 and len(inside) > 8
    found = [path.name for path in others if looks.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_gold_completion_is_accepted():
    assert gold(Problem(answer=None)) is None
    assert gold(Problem(answer="5")) == "\\boxed{5}"
    for answer in ("5", "so \\boxed{5}", "2+3\n#### 5"):
        assert judge(answer, gold(Problem(answer=answer))) == 1.0


HOSTILE = [
    "9**9**9**9",
    "9^{9^{9^9}}",
    "10^{10^{10}}",
    "(10^9)!",
    "9!!!!!!!!",
    "((9!)!)!",
    "\\binom{10^9}{10^8}",
    "\\sum_{k=1}^{10^{12}} k",
    "\\prod_{k=1}^{10^{12}} k",
    "\\int_0^{10^9} e^{x^2} dx",
    "9" * 10**6,
    "0." + "3" * 10**6,
    "1/" + "7" * 5000,
    "9" * 5000,
    "{" * 5000 + "5" + "}" * 5000,
    "(" * 5000 + "5" + ")" * 5000,
    "\\frac{1}{" * 3000 + "5" + "}" * 3000,
    "\\sqrt{" * 4000 + "5" + "}" * 4000,
    "-" * 2500 + "6",
    "1+" * 1400 + "1",
    "x^" * 900 + "2",
    "5\x00\x006",
    "\ud800",
    "\udfff5\ud800",
    "a" * 3_000_000,
    "\\" * 100_000,
    "\u202e5\u202c6",
    "\u200b" * 10_000,
    "🎉" * 1000,
    "{{{{",
    "}}}}",
    "\\boxed{" * 3000,
    "\\boxed{1}" * 3000,
    "(x+1)^{100000}",
    "(x+y+z)^{99999}",
    "\\begin{pmatrix}" + "1&" * 10_000 + "1\\end{pmatrix}",
    "\\begin{a}" * 3000,
    "\\begin{pmatrix}" * 200,
    "\\end{x}",
    "__import__('os').system('x')",
    "().__class__.__bases__",
    "lambda: 5",
    "exec('5')",
    "\\sin(10^{10^5})",
    "\\tan(10^{400})",
    "e^{e^{e^{e^{e}}}}",
    "2^{2^{2^{2^{2^2}}}}",
    "\\ln(\\ln(\\ln(1)))",
    "0/0",
    "\\infty-\\infty",
    "\\frac{0}{0}",
    "1/(1-1)",
    "0^{-1}",
    "\\log_1 5",
    "\\lfloor 10^{100000} \\rfloor",
    "\\gcd(10^{5000},10^{4999})",
    "|" * 2000,
    "\\{" * 1500,
    ",".join(map(str, range(600))),
    "1\\pm" * 20 + "1",
    "\\pm" * 500 + "1",
    " " * 10**6 + "6",
    "\n" * 10**5 + "6",
    "$" * 5000,
    "*" * 5000,
    "1,234," * 500,
    "a_{" * 900 + "}" * 900,
    "\\text{" * 900 + "}" * 900,
    "\\overline{" * 900 + "A" + "}" * 900,
    "x=" * 700 + "6",
    "1<" * 700 + "2",
    "[0,1]\\cup" * 250 + "[0,2]",
    "\\left(" * 900,
    "1" + ":2" * 600,
    "1e999999999",
    "1e999",
    "١٢",
    "0x7f",
    "1_000",
    "5%" * 500,
    "6 cm^{999999}",
    "3^{\\circ}" * 300,
    "2^{-10^{9}}",
    "(-1)^{10^{30}+1/3}",
    "\\sqrt[10^9]{2}",
    "\\sqrt[0]{2}",
    "1.5!" * 100,
    "(-5)!",
    "\\binom{-5}{3}",
]


@pytest.mark.parametrize(
    "right", ["5", "\\frac{x+1}{2}", "(1,2)", "[0,1)", "\\text{Evelyn}", "5\\text{ cm}", "y=2x+1", "\\sqrt{2}"]
)
def test_hostile_answers_are_wrong(right):
    for answer in HOSTILE:
        begin = time.process_time()
        assert judge(right, f"\\boxed{{{answer}}}") == 0.0, answer[:50]
        assert judge(right, f"The answer is {answer}") == 0.0 or answer[:3] in ("\u202e5", "1.5"), answer[:50]
        assert time.process_time() - begin < 3.0, answer[:50]


def test_a_thousand_hostile_answers_through_the_workers():
    """None hangs, none is right, none breaks a worker."""
    gold = ["5", "\\frac{1}{2}", "x+1", "(1,2)"]
    pairs = [
        (right, form.format(answer)) for answer in HOSTILE for form in ("\\boxed{{{}}}", "#### {}") for right in gold
    ]
    pairs += [(right, f"\\boxed{{{answer} + {number}}}") for number, answer in enumerate(HOSTILE) for right in gold[:4]]
    problems = [Problem("q", right, str(number)) for number, (right, _) in enumerate(pairs)]
    assert len(pairs) >= 1000
    judge = Judge({"math": reward_function("math")}, [1.0], None)
    started = time.monotonic()
    try:
        found = judge.judge(problems, [text for _, text in pairs])["math"]
    finally:
        judge.close()
    assert time.monotonic() - started < 120
    assert [pair for pair, outcome in zip(pairs, found, strict=True) if outcome.failure] == []
    right = [text for (_, text), outcome in zip(pairs, found, strict=True) if outcome.value != 0]
    assert right == []


def test_hostile_gold_is_equal_to_itself():
    for answer in ("9^{9^{9^9}}", "\\sum_{k=1}^{10^{12}} k", "\\int_0^1 f(x)\\,dx", "(10^9)!", "9" * 2000, "x \\foo"):
        assert judge(answer, f"\\boxed{{ {answer} }}") == 1.0
        assert judge(answer, "\\boxed{17}") == 0.0


def test_other_threads_and_event_loops_may_call():
    scores = []
    thread = threading.Thread(target=lambda: scores.append(judge("\\sqrt{8}", "\\boxed{2\\sqrt{2}}")))
    thread.start()
    thread.join()

    async def call() -> float:
        return judge("\\sqrt{8}", "\\boxed{2\\sqrt{3}}")

    assert scores == [1.0]
    assert asyncio.run(call()) == 0.0


def rows(name: str) -> list[dict]:
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["math500", "aime", "amc"])
def test_real_gold_answers(name):
    answers = [row["answer"] for row in rows(name)]
    scores = verify(answers, [f"Hence $\\boxed{{{answer}}}$." for answer in answers], answers)
    assert sum(scores) >= 0.995 * len(scores)


@pytest.mark.parametrize("name", ["math500", "aime", "amc"])
def test_wrong_answers_to_real_questions(name):
    """An integer plus one; else the answers of the next rows that are another text."""
    answers = [row["answer"] for row in rows(name)]
    pairs = []
    for at, answer in enumerate(answers):
        try:
            pairs.append((answer, str(Fraction(answer) + 1)))
        except ValueError:
            pairs += [(answer, other) for other in answers[at + 1 : at + 20] if other != answer]
    scores = verify([""] * len(pairs), [f"\\boxed{{{wrong}}}" for _, wrong in pairs], [right for right, _ in pairs])
    assert sum(scores) <= 0.005 * len(scores)


def test_real_solutions():
    problems = rows("math500")
    scores = verify(problems, [row["solution"] for row in problems], [row["answer"] for row in problems])
    assert sum(scores) >= 0.995 * len(scores)
