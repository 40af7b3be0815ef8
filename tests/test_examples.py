"""Real input, end to end: chat template, byte-level BPE, recipes, on a random model that the example makes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stepcredit.cli.main import main
from stepcredit.verifiers.bubblewrap import refusal
from stepcredit.verifiers.math import verify

ROOT = Path(__file__).parents[1]
MATH500 = ROOT.parent / "shared" / "data" / "math500.jsonl"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """A data set with columns `problem`, `answer` as real ones have; the real one when it is beside the project."""
    if MATH500.is_file():
        return MATH500
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    lines = [json.dumps({"problem": f"What is ${a} + {a}$?", "answer": str(2 * a)}) for a in range(40)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(rows, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "tiny"
    command = [sys.executable, str(ROOT / "examples" / "make_tiny_model.py"), str(out), "--data", str(rows)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def test_training_on_real_problems(model, rows, tmp_path) -> None:
    """Two iterations run through; noise earns nothing, which is said by exit code 1, not hidden."""
    words = ["train", "--model", str(model), "--data", str(rows), "--run-dir", str(tmp_path / "run")]
    words += ["--iterations", "2", "--train.problems-per-iteration", "2", "--group-size", "2", "--num-problems", "2"]
    assert main([*words, "--max-new-tokens", "8"]) == 1
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in metrics] == [0, 1, 2]


def test_recipe_for_mathematics(model, rows, tmp_path) -> None:
    """Its three rewards are logged one by one; the worker processes judge."""
    words = ["train", str(ROOT / "recipes" / "math.yaml"), "--model", str(model), "--data", str(rows)]
    words += ["--run-dir", str(tmp_path / "run"), "--iterations", "1", "--train.problems-per-iteration", "2"]
    assert main([*words, "--num-problems", "2", "--max-new-tokens", "8"]) in (0, 1)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"reward/math", "reward/format_boxed", "reward/overlong", "reward/timeout"} <= last.keys()
    assert last["reward/overlong"] < 0 and last["reward/error"] == 0


@pytest.mark.skipif(refusal() is not None, reason=f"no sandbox for programs: {refusal()}")
def test_recipe_for_code(model, tmp_path) -> None:
    """Rows with asserts; the tests stand in the prompt; programs are run."""
    row = {"prompt": "Double x.", "code": "def f(x):\n    return 2 * x", "test_list": ["assert f(2) == 4"]}
    data = tmp_path / "code.jsonl"
    data.write_text("".join(json.dumps(row | {"task_id": n}) + "\n" for n in range(8)))
    words = ["train", str(ROOT / "recipes" / "code.yaml"), "--model", str(model), "--data", str(data)]
    words += ["--run-dir", str(tmp_path / "run"), "--iterations", "1", "--train.problems-per-iteration", "2"]
    assert main([*words, "--group-size", "2", "--num-problems", "1", "--max-new-tokens", "8"]) == 1
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["reward/mean"] == 0 and last["reward/judged"] == 1


@pytest.mark.skipif(refusal() is not None, reason=f"no sandbox for programs: {refusal()}")
def test_prime_on_programs(model, tmp_path) -> None:
    """Shares of tests passed are outcomes for the process reward model too."""
    row = {"prompt": "Double x.", "code": "def f(x):\n    return 2 * x", "test_list": ["assert f(2) == 4"]}
    data = tmp_path / "code.jsonl"
    data.write_text("".join(json.dumps(row | {"task_id": n}) + "\n" for n in range(8)))
    words = ["train", str(ROOT / "recipes" / "code.yaml"), "--model", str(model), "--data", str(data)]
    words += ["--algorithm", "prime", "--run-dir", str(tmp_path / "run"), "--iterations", "1", "--filter.low", "0"]
    words += ["--train.problems-per-iteration", "2", "--group-size", "2", "--num-problems", "1"]
    assert main([*words, "--max-new-tokens", "8"]) == 1
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["prm/loss"] == pytest.approx(0.693, abs=1e-3) and last["filter/passed"] == 1


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("treerpo", "--growth.num-branches 2 --growth.step.tokens 4"),
        ("prime", "--group-size 2 --filter.max-draws 1"),
    ],
)
def test_recipes_of_the_papers(recipe, options, model, rows, tmp_path) -> None:
    """They run as they are, smaller. Noise earns nothing: nothing is kept, the update is skipped, exit code 1."""
    words = ["train", str(ROOT / "recipes" / f"{recipe}.yaml"), "--model", str(model), "--data", str(rows)]
    words += ["--run-dir", str(tmp_path / "run"), "--iterations", "1", "--train.problems-per-iteration", "2"]
    assert main([*words, "--num-problems", "2", "--max-new-tokens", "12", *options.split()]) == 1
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["optim/skipped"] == 1 and last["reward/mean"] == 0
    assert last["group/kept"] == 0 if recipe == "treerpo" else last["filter/truncated"] == 1


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("So $x = \\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}", 1.0),
        ("So $x = \\boxed{0.5}$.", "\\frac{1}{2}", 1.0),
        ("The answer is \\boxed{3}.", "\\frac{1}{2}", 0.0),
        ("I do not know.", "7", 0.0),
        ("Thus \\boxed{7}", "The sum is \\boxed{7}", 1.0),
    ],
)
def test_math_reward(completion: str, answer: str, score: float) -> None:
    """A right final expression scores 1, a wrong or missing one 0."""
    assert verify([""], [completion], [answer]) == [score]
