"""Speed of judging: answers and programs a second, and what completions that hang cost an iteration.

python benchmarks/judging.py [--json OUT]

"easy" are whole numbers and simple fractions in a box, half of them wrong; "expressions" need algebra. "hang" judges a
batch twice, with a user's function that sleeps on 1% of the completions and with one that does not.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from stepcredit.forest.types import Problem
from stepcredit.verifiers.judging import Judge
from stepcredit.verifiers.reward import reward_function
from stepcredit.verifiers.workers import Workers

HANGS = """
import time

def f(completions, **columns):
    return [time.sleep(600) if text == "hang" else 1.0 for text in completions]
"""


def easy(count: int) -> tuple[list[Problem], list[str]]:
    problems = [Problem("q", f"\\frac{{{n}}}{{7}}" if n % 4 == 0 else str(n), str(n)) for n in range(count)]
    return problems, [f"So the answer is \\boxed{{{int(p.id) + n % 2}}}." for n, p in enumerate(problems)]


def expressions(count: int) -> tuple[list[Problem], list[str]]:
    problems = [Problem("q", f"x^2 + {n}x + \\sqrt{{{n}}}", str(n)) for n in range(count)]
    return problems, [f"\\boxed{{\\sqrt{{{int(p.id) + n % 2}}} + x(x + {p.id})}}" for n, p in enumerate(problems)]


def programs(count: int) -> tuple[list[Problem], list[str]]:
    problems = [Problem("q", None, str(n), {"test_list": [f"assert f({n}) == {n + 1}"]}) for n in range(count)]
    return problems, [f"```python\ndef f(x):\n    return x + {1 + n % 2}\n```" for n in range(count)]


def rate(verifier: str, made: tuple[Sequence[Problem], Sequence[str]], workers: Workers) -> float:
    """Completions a second, the start of the workers left out."""
    judge = Judge({verifier: reward_function(verifier)}, [1.0], None, workers)
    problems, texts = made
    judge.judge(problems[:32], texts[:32])
    started = time.perf_counter()
    found = judge.judge(problems, texts)[verifier]
    seconds = time.perf_counter() - started
    right = sum(outcome.value == 1.0 for outcome in found)
    if right == 0 or any(outcome.failure for outcome in found):
        raise SystemExit(f"{verifier}: {right} right of {len(found)}, some failed: these numbers mean nothing")
    return len(problems) / seconds


def hang(count: int, timeout_s: float) -> dict[str, float]:
    """Seconds to judge `count` completions, without and with 1% that hang."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "hanging_reward.py").write_text(HANGS)
        sys.path.insert(0, folder)
        workers = Workers(timeout_s)
        judge = Judge({"f": reward_function("hanging_reward.f")}, [1.0], None, workers)
        problems = [Problem("q", "1", str(n)) for n in range(count)]
        judge.judge(problems[:32], ["fine"] * 32)
        seconds: dict[str, float] = {}
        cases: dict[str, Callable[[int], str]] = {
            "fine": lambda n: "fine",
            "hang": lambda n: "hang" if n % 100 == 50 else "fine",
        }
        for name, text in cases.items():
            started = time.perf_counter()
            judge.judge(problems, [text(n) for n in range(count)])
            seconds[name] = time.perf_counter() - started
        judge.close()
    return seconds | {"deadline": timeout_s, "extra": seconds["hang"] - seconds["fine"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the numbers here")
    given = parser.parse_args()
    workers = Workers()
    results: dict[str, object] = {
        "easy answers/s": rate("math", easy(4000), workers),
        "expressions/s": rate("math", expressions(400), workers),
        "programs/s": rate("code", programs(100), workers),
    }
    workers.close()
    for name, value in results.items():
        print(f"{name:16}{value:10,.0f}", flush=True)
    found = results["hang"] = hang(1000, 10.0)
    print(
        f"10 of 1000 completions hang: {found['hang']:.2f} s instead of {found['fine']:.2f} s, deadline "
        f"{found['deadline']:.0f} s"
    )
    if given.json:
        Path(given.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
