"""Code that users name: by dotted path or file, found from anywhere, and what is said when it is not right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepcredit import imports
from stepcredit.cli.main import main
from stepcredit.config import read_yaml
from stepcredit.errors import UserError
from stepcredit.imports import by_name, located, search_in, used_folders
from stepcredit.verifiers.reward import reward_function
from stepcredit.verifiers.workers import RewardCall, Workers

FILES = {
    "own_rewards.py": """
from own_helper import ONE
CONSTANT = 3
def right(completions, **columns):
    return [ONE for _ in completions]
class Kept:
    @staticmethod
    def method(completions, **columns):
        return [ONE for _ in completions]
def decimals(completions, **columns):
    from decimal import Decimal
    return [Decimal("0.5") for _ in completions]
def fractions(completions, **columns):
    from fractions import Fraction
    return [Fraction(1, 2) for _ in completions]
def numpys(completions, **columns):
    import numpy
    return numpy.full(len(completions), 0.5, dtype=numpy.float32)
def torches(completions, **columns):
    import torch
    return torch.full((len(completions),), 0.5)
def compute_score(data_source, solution_str, ground_truth, extra_info):
    return 0.5
""",
    "own_helper.py": "ONE = 1.0\n",
    "own_syntax.py": "x = 1\ndef f(:\n    pass\n",
    "own_key.py": "def g():\n    raise RuntimeError('no api\\nkey')\n\ng()\n",
    "own_exit.py": "import sys\nsys.exit(0)\n",
    "own_lacks.py": "import there_is_no_such_module\n",
    "own_empty.py": "x = 1\n",
    "my-own.py": "def right(completions, **columns):\n    return [2.0 for _ in completions]\n",
}
HIDES_PYTHONS = "def right(completions, **columns):\n    return [3.0 for _ in completions]\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with code, as the current one; what is imported from it is forgotten afterwards."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(imports, "_folders", [])
    monkeypatch.setattr(imports, "_used", set())
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("own_", "my-own", "random_")):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("own_rewards.right", 1.0),
        ("own_rewards:right", 1.0),
        ("own_rewards.Kept.method", 1.0),
        ("own_rewards.py:right", 1.0),
        ("./own_rewards.py:right", 1.0),
        ("{}/own_rewards.py:right", 1.0),
        ("own_rewards.py:Kept.method", 1.0),
        ("my-own.py:right", 2.0),
        ("./random.py:right", 3.0),
    ],
)
def test_forms(folder, name, value):
    (folder / "random.py").write_text(HIDES_PYTHONS)
    assert by_name("reward.functions", name.format(folder), {})(["a"]) == [value]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./own_rewards.right", ["neither", "did you mean ./own_rewards.py:right?"]),
        ("own_rewards.wright", ["own_rewards.py", "no 'wright'", "did you mean 'right'?"]),
        ("own_rewards.py:wright", ["own_rewards.py", "no 'wright'", "did you mean 'right'?"]),
        ("own_rewards.py", ["does not name a function", "right"]),
        ("own_rewards.CONSTANT", ["int", "not a function"]),
        ("own_empty.f", ["no 'f'", "no function"]),
        ("own_syntax.f", ["own_syntax.py, line 2", "SyntaxError"]),
        ("./own_syntax.py:f", ["own_syntax.py, line 2", "SyntaxError"]),
        ("own_key.f", ["own_key.py, line 2", "RuntimeError: no api key"]),
        ("own_key.py:f", ["own_key.py, line 2", "RuntimeError: no api key"]),
        ("own_exit.f", ["own_exit.py, line 2", "SystemExit", "ends the program"]),
        ("own_lacks.f", ["own_lacks.py, line 1", "there_is_no_such_module"]),
        ("own_nothing.f", ["no module 'own_nothing'", "{}", "--code-folders"]),
        ("own_nothing.py:f", ["no file 'own_nothing.py'", "{}", "--code-folders"]),
        ("/own_nothing.py:f", ["no file '/own_nothing.py'"]),
        ("random.right", ["no 'right'", "./random.py:right"]),
        ("builtins.dict", ["what arguments"]),
        ("..f", ["neither"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, name, words):
    (folder / "random.py").write_text(HIDES_PYTHONS)
    with pytest.raises(UserError) as caught:
        by_name("loss.name", name, {})
    assert str(caught.value).startswith("loss.name: ") and "\n" not in str(caught.value)
    assert [word for word in words if word.format(folder) not in str(caught.value)] == []


def test_other_folders_are_searched_and_remembered(folder, tmp_path, monkeypatch):
    """Modules and files; those by their whole path need no folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError):
        located("x", "own_rewards.py:right")
    search_in(tmp_path)
    assert by_name("x", "own_rewards.right", {})(["a"]) == [1.0]
    assert used_folders() == [str(tmp_path)]
    assert located("x", "own_rewards.py:right") == f"{tmp_path}/own_rewards.py:right"


@pytest.mark.parametrize("name", ["decimals", "fractions", "numpys", "torches", "compute_score"])
@pytest.mark.parametrize("form", ["own_rewards.{}", "./own_rewards.py:{}"])
def test_worker_processes_find_it_too(folder, name, form):
    """Also files that are given from this folder; numbers of every kind are rewards."""
    reward = reward_function(("verl:" if name == "compute_score" else "") + form.format(name))
    workers = Workers(60, count=1, memory_mb=0)
    try:
        arguments = {"prompts": ["p", "p"], "completions": ["a", "b"], "answer": ["a", "b"]}
        outcomes = workers.run([RewardCall(reward, arguments, 2)])[0]
    finally:
        workers.close()
    assert [outcome.value for outcome in outcomes] == [0.5, 0.5], outcomes


def test_a_file_that_hides_a_module_of_pythons_from_the_workers(folder):
    """The current folder comes first for workers, whatever it is for the command."""
    (folder / "random.py").write_text(HIDES_PYTHONS)
    (folder / "scripts").mkdir()
    (folder / "scripts" / "run.py").write_text("""
from stepcredit.errors import UserError
from stepcredit.verifiers.reward import reward_function
from stepcredit.verifiers.workers import Workers
if __name__ == "__main__":
    try:
        Workers(60, count=1).start([reward_function("own_rewards.right")])
    except UserError as error:
        print(error)
""")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "scripts/run.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert "cannot start" in done.stdout and "random.py" in done.stdout, done.stderr


RUN = ["--iterations", "1", "--group-size", "2", "--train.problems-per-iteration", "2", "--max-new-tokens", "4"]
RUN += ["--eval.num-problems", "0"]


@pytest.mark.parametrize("name", ["own_rewards.right", "own_rewards.py:right"])
def test_a_run_finds_code_beside_its_config_and_goes_on_elsewhere(folder, tmp_path, name):
    """In processes of their own, from three folders."""
    (tmp_path / "run.yaml").write_text(f"reward: {{functions: '{name}'}}\nrun_dir: {tmp_path}/run\n")

    def command(place: str, *words: str) -> None:
        (tmp_path / place).mkdir()
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, "-m", "stepcredit", "train", *words],
            cwd=tmp_path / place, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 1 and "nothing was learnt" in done.stdout, done.stderr  # all rewards are alike

    command("first", "../run.yaml", *RUN)
    assert read_yaml(str(tmp_path / "run" / "config.yaml"))["code_folders"] == [str(tmp_path)]
    command("second", "--resume", str(tmp_path / "run"), "--iterations", "2")


def test_exit_code_of_bad_code(folder, capsys):
    assert main(["train", *RUN, "--reward.functions", "own_key.f", "--run-dir", "run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
