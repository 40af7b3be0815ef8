"""`stepcredit score`, and the check of gold answers before a run."""

import json
from pathlib import Path

import pytest

from stepcredit.cli.main import main
from stepcredit.forest.records import read_trees

CHAIN = "Ivy = 14 . Mia = Ivy - 1 . Mia ?"
ROWS = [
    {"question": CHAIN, "answer": "13", "output": "Mia = 13 . #### 13", "id": "a"},
    {"question": CHAIN, "answer": "13", "output": "#### 14", "id": "b"},
    {"question": CHAIN, "answer": "13 apples", "output": "#### 13", "id": "c"},
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def scored(*words: str) -> tuple[int, dict]:
    code = main(["score", *words, "--json", "out.json"])
    return code, json.loads(Path("out.json").read_text())


def test_gold_answers(capsys) -> None:
    """The chain task's answers are whole numbers, so the third gold fails; it is listed."""
    code, found = scored("--data", "rows.jsonl", "--gold", "--verifier", "chain")
    assert code == 1 and (found["accepted"], found["total"]) == (2, 3)
    assert [row["id"] for row in found["failed"]] == ["c"] and "13 apples" in found["failed"][0]["reason"]
    assert scored("--data", "rows.jsonl", "--gold", "--verifier", "chain", "--reward.gold-threshold", "0.6")[0] == 0
    shown = capsys.readouterr().out
    assert "rows.jsonl: 2 of 3 accepted (66.7%)" in shown and "  c: " in shown


def test_a_column_of_completions() -> None:
    code, found = scored("--data", "rows.jsonl", "--completion-column", "output", "--verifier", "chain")
    assert code == 0 and (found["accepted"], found["total"]) == (1, 3)
    assert [(row["id"], row["reward"]) for row in found["failed"]] == [("b", 0.0), ("c", 0.0)]


def test_the_data_choose_the_verifier() -> None:
    """Without --verifier mathematics for answers; gold all right: exit code 0."""
    Path("rows.jsonl").write_text('{"question": "q", "answer": "\\\\frac{1}{2}", "id": "x"}\n')
    assert scored("--data", "rows.jsonl", "--gold") == (0, {"accepted": 1, "total": 1, "failed": []})


def test_user_functions_say_what_gold_is() -> None:
    Path("mine_gold.py").write_text(
        "def f(completions, answer, **columns):\n    return [float(a in t) for t, a in zip(completions, answer)]\n"
        "f.gold = lambda problem: 'it is ' + problem.answer\n"
        "def g(completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    assert scored("--data", "rows.jsonl", "--gold", "--verifier", "mine_gold.f")[1]["accepted"] == 3
    assert main(["score", "--data", "rows.jsonl", "--gold", "--verifier", "mine_gold.g"]) == 2


def test_saved_rollouts_are_graded_anew(capsys) -> None:
    """A run's own rollouts get the same rewards again; other answers in --data give others."""
    words = "--num-problems 3 --group-size 4 --max-new-tokens 60 --out saved.jsonl.zst"
    assert main(["sample", *words.split()]) == 0
    code, found = scored("--in", "saved.jsonl.zst", "--out", "again.jsonl")
    before, after = list(read_trees("saved.jsonl.zst")), list(read_trees("again.jsonl"))
    assert code == 0 and found["total"] == 12 and found["changed"] == []
    assert found["accepted"] == sum(s.reward == 1 for tree in before for s in tree.segments) > 0
    assert [s.reward for t in before for s in t.segments] == [s.reward for t in after for s in t.segments]
    assert [s.extra["text"] for t in before for s in t.segments] == [s.extra["text"] for t in after for s in t.segments]

    lines = [{"question": tree.problem.question, "answer": "-1", "id": tree.problem.id} for tree in before]
    Path("other.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, found = scored("--in", "saved.jsonl.zst", "--data", "other.jsonl", "--verifier", "chain")
    assert found["accepted"] == 0 and len(found["changed"]) == sum(s.reward == 1 for t in before for s in t.segments)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", ["--gold", "--completion-column", "--in"]),
        ("--gold", ["--data"]),
        ("--gold --data gone.jsonl", ["gone.jsonl", "no such file"]),
        ("--gold --data rows.jsonl --in x", ["one of --gold"]),
        ("--gold --data rows.jsonl --verifier chian", ["'chian'", "did you mean 'chain'"]),
        ("--data rows.jsonl --completion-column otuput", ["'otuput'", "did you mean 'output'"]),
        ("--data rows.jsonl --gold --json gone/x.json", ["--json", "gone"]),
        ("--data rows.jsonl --gold --out x.jsonl", ["--out", "--in"]),
        ("--data rows.jsonl --gold maybe", ["--gold", "'maybe'"]),
        ("--in gone.jsonl", ["gone.jsonl", "no such file"]),
        ("--data rows.jsonl --completion-column id --verifier chain --reward.options.chain.x 1", ["chain.x"]),
    ],
)
def test_bad_input(capsys, words: str, said: list[str]) -> None:
    assert main(["score", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and [word for word in said if word not in error] == []


# ---------------------------------------------------------------------- before a run

TINY = ["--iterations", "1", "--train.problems-per-iteration", "1", "--num-problems", "1", "--max-new-tokens", "4"]


def test_a_run_refuses_a_verifier_that_does_not_know_the_answers(capsys, caplog) -> None:
    """Half of the gold answers fail: an error that names one; under a lower threshold a warning; 0 rows: no check."""
    rows = [{"question": CHAIN, "answer": "13" if n % 2 else "thirteen", "id": str(n)} for n in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", "--data", "rows.jsonl", "--reward.functions", "chain", *TINY]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert [word for word in ("'chain' accepts", "of 18 gold answers", "90%", "thirteen") if word not in error] == []
    assert not Path("runs").exists()
    assert main([*words, "--reward.gold-threshold", "0.3"]) in (0, 1)
    assert "% of 18 gold answers" in caplog.text
    caplog.clear()
    assert main([*words, "--reward.gold-check", "0"]) in (0, 1)
    assert "gold answers" not in caplog.text
