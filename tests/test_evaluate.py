"""Evaluation: the numbers on synthetic counts, intervals, resuming, and agreement with the trainer's own."""

import itertools
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stepcredit.cli.main import main
from stepcredit.run.evaluate import Sample, bootstrap, group_answers, majority, pass_at_k, summarise
from stepcredit.verifiers.math import same_answer
from stepcredit.verifiers.reward import reward_function


def sample(id: str, number: int, correct: bool, answer: str | None = None, **rest) -> Sample:
    given = {"completion": "", "length": 10, "truncated": False, "reward": float(correct)} | rest
    return Sample(id=id, number=number, correct=correct, answer=answer, **given)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_that_have_a_right_one(n: int) -> None:
    """Against counting every subset, for all counts and k."""
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_of_many_samples_and_of_nonsense() -> None:
    assert pass_at_k(1000, 10, 100) == pytest.approx(1 - math.comb(990, 100) / math.comb(1000, 100))
    for n, c, k in [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)]:
        with pytest.raises(ValueError, match="not defined"):
            pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([("5", True), ("5", True), ("6", False)], 1.0),
        ([("5", True), ("6", False), ("6", False)], 0.0),
        ([("5", True), ("6", False)], 0.5),  # a tie is shared
        ([("5", True), ("6", False), ("7", False)], 1 / 3),
        ([(None, False), (None, False), ("5", True)], 1.0),  # no answer is no vote
        ([(None, False)], 0.0),
        ([("5", True), ("5", False)], 0.5),  # one answer, judged differently
    ],
)
def test_majority(votes, expected: float) -> None:
    samples = [sample("a", number, right, answer) for number, (answer, right) in enumerate(votes)]
    assert majority(samples) == pytest.approx(expected)


def test_majority_of_answers_written_differently() -> None:
    """Two spellings of one right answer beat two votes for a wrong one, where the verifier says that they are one."""
    votes = [("2\\sqrt{2}", True), ("\\sqrt{8}", True), ("\\sqrt8", True), ("3", False), ("3", False)]
    samples = [sample("a", number, right, answer) for number, (answer, right) in enumerate(votes)]
    assert majority(samples) == 0.0
    assert majority(samples, same_answer) == 1.0
    assert majority(samples[::-1], same_answer) == 1.0
    assert summarise(samples, same_answer).metrics["eval/maj@5"] == 1.0
    assert reward_function("math").same_answer is same_answer
    assert reward_function("code").same_answer is None


@pytest.mark.parametrize("order", [list(range(6)), [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]])
def test_groups_of_answers_are_not_chained(order) -> None:
    """50% is 50 and is 0.5, which are not each other; the order of samples does not matter."""
    answers = ["50", "50", "0.5", "50%", "7", "7"]
    groups = group_answers([answers[place] for place in order], same_answer)
    assert groups == {"50": "50", "50%": "50", "0.5": "0.5", "7": "7"}


def test_comparisons_of_votes_have_an_end(monkeypatch, caplog) -> None:
    asked = []
    monkeypatch.setattr("stepcredit.run.evaluate.MAX_COMPARISONS", 10)

    def never(one: str, other: str) -> bool:
        asked.append((one, other))
        return False

    groups = group_answers([str(number) for number in range(50)], never)
    assert len(asked) == 10 and len(set(groups.values())) == 50
    assert "50 different final answers" in caplog.text


def test_numbers_of_synthetic_counts() -> None:
    """Two problems with 4 samples: 1 and 4 right; everything by hand."""
    samples = [sample("a", number, number == 2, "5" if number == 2 else "6", length=20) for number in range(4)]
    samples += [sample("b", number, True, "7", truncated=True) for number in range(3)]
    samples += [sample("b", 3, True, "7", failure="timeout", reward=None)]
    samples += [sample("a", -1, False), sample("b", -1, True)]
    found = summarise(samples)
    assert found.metrics == pytest.approx(
        {
            "eval/accuracy": (1 / 4 + 1) / 2,
            "eval/pass@2": (1 / 2 + 1) / 2,
            "eval/pass@4": 1.0,
            "eval/maj@4": 0.5,
            "eval/accuracy_greedy": 0.5,
            "eval/reward": 4 / 7,
            "eval/length": 15.0,
            "eval/truncated": 3 / 8,
            "eval/timeout": 1 / 8,
            "eval/error": 0.0,
            "eval/unjudged": 1 / 8,
        }
    )
    assert found.intervals["eval/accuracy"] == (0.25, 1.0) and found.intervals["eval/pass@4"] == (1.0, 1.0)


def test_order_of_samples_does_not_matter() -> None:
    samples = [
        sample(id_, number, (number + len(id_)) % 3 == 0, str(number % 2)) for id_ in "abc" for number in range(6)
    ]
    one, two = summarise(samples), summarise(sorted(samples, key=lambda s: (s.number, s.id)))
    assert one.metrics == two.metrics and one.intervals == two.intervals


def test_bootstrap_has_the_width_of_the_normal_interval() -> None:
    """For many problems: mean +- 1.96 std / sqrt(n); a column without spread has none."""
    values = (torch.rand(4000, generator=torch.Generator().manual_seed(1)) < 0.3).double()
    low, high = bootstrap({"x": values.tolist()})["x"]
    half = 1.96 * float(values.std()) / math.sqrt(len(values))
    assert low == pytest.approx(float(values.mean()) - half, abs=half / 10)
    assert high == pytest.approx(float(values.mean()) + half, abs=half / 10)
    assert bootstrap({"x": [0.5] * 10})["x"] == (0.5, 0.5)


# ---------------------------------------------------------------------- the command

QUICK = ["--max-new-tokens", "40", "--num-samples", "2"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluated(*words: str) -> dict:
    assert main(["eval", *QUICK, *words, "--json", "x.json"]) == 0
    return json.loads(Path("x.json").read_text())


def test_the_trainer_finds_the_same_numbers() -> None:
    """`eval` of the base model on the held-out problems, and iteration 0 of a run: the same to the last digit."""
    words = ["--iterations", "1", "--train.problems-per-iteration", "1", "--group-size", "2", "--run-dir", "run"]
    main(["train", *words, *QUICK, "--num-problems", "20"])
    first = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])
    numbers = evaluated("--num-problems", "20")
    assert numbers["eval/accuracy"] == first["eval/accuracy"] > 0
    shared = [name for name in first if name.startswith("eval/")]
    assert len(shared) > 5 and [name for name in shared if numbers[name] != first[name]] == []


def rows(name: str, *pairs: tuple[str, str]) -> None:
    text = "".join(json.dumps({"question": q, "answer": a, "id": f"r{n}"}) + "\n" for n, (q, a) in enumerate(pairs))
    Path(name).write_text(text)


def test_several_data_sets(capsys) -> None:
    """A column each on the screen, and means over the sets."""
    rows("one.jsonl", ("Ivy = 14 . Ivy ?", "14"), ("Ivy = 3 . Mia = Ivy + 1 . Mia ?", "4"))
    rows("two.jsonl", ("Ivy = 5 . Ivy ?", "6"))
    numbers = evaluated("--data", "one.jsonl,two.jsonl", "--reward.functions", "chain")
    shown = capsys.readouterr().out
    assert "one" in shown and "two" in shown and "pass@2" in shown
    each = numbers["data"]
    assert [each[name]["num_problems"] for name in ("one", "two")] == [2, 1]
    assert numbers["eval/accuracy"] == (each["one"]["eval/accuracy"] + each["two"]["eval/accuracy"]) / 2
    samples = [json.loads(line) for line in Path("x.samples.jsonl").read_text().splitlines()]
    assert [row["data"] for row in samples if "settings" in row] == ["one", "two"]
    assert len([row for row in samples if "completion" in row]) == 3 * 3


def test_two_sets_of_one_name_are_refused(capsys) -> None:
    assert main(["eval", "--data", "a/x.jsonl,b/x.jsonl"]) == 2
    assert "same name 'x'" in capsys.readouterr().err


def test_what_was_cut_off_is_done_again_and_nothing_else(monkeypatch) -> None:
    """Batches of 4 problems: of a file that ends inside the second, the first is kept as it is."""
    words = ["--num-problems", "12", "--sampler.max-rows", "2"]
    whole = evaluated(*words)
    path = Path("x.samples.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 12 * 3
    path.write_text("".join(lines[: 1 + 4 * 3 + 2]) + lines[-1][:20])
    import stepcredit.run.evaluate as module

    sampled = []
    flat = module.flat
    monkeypatch.setattr(
        module, "flat", lambda sampler, batch, *rest: sampled.append(len(batch)) or flat(sampler, batch, *rest)
    )
    assert evaluated(*words) == whole
    assert sampled == [4, 4, 4, 4]  # two batches, sampled and greedy
    assert evaluated(*words) == whole and len(sampled) == 4  # what stands twice now is still known


def test_records_of_other_settings_are_refused(capsys) -> None:
    evaluated("--num-problems", "2")
    assert main(["eval", *QUICK, "--num-problems", "2", "--seed", "1", "--json", "x.json"]) == 2
    assert "x.samples.jsonl has completions of 'embedded' with another seed (0, now 1)" in capsys.readouterr().err
    Path("x.samples.jsonl").write_text("something else\n")
    assert main(["eval", *QUICK, "--num-problems", "2", "--json", "x.json"]) == 2
    assert "not a file of an evaluation" in capsys.readouterr().err
    assert Path("x.samples.jsonl").read_text() == "something else\n"


@pytest.mark.slow
def test_a_killed_evaluation_goes_on() -> None:
    """SIGKILL in the middle; the same command ends with the numbers of one that was left alone."""
    words = ["--num-problems", "96", "--sampler.max-rows", "16", *QUICK]
    command = [sys.executable, "-m", "stepcredit", "eval", *words, "--json", "killed.json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = Path("killed.samples.jsonl")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not records.exists() or records.read_text().count("\n") < 20):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("killed.json").exists()
    kept = records.read_text().splitlines()[1:20]
    assert main(["eval", *words, "--json", "killed.json"]) == 0
    assert main(["eval", *words, "--json", "whole.json"]) == 0
    assert Path("killed.json").read_text() == Path("whole.json").read_text()
    assert records.read_text().splitlines()[1:20] == kept
