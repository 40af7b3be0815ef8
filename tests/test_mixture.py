"""Mixtures of files with weights, and metrics for each source of mixed data."""

import json
from pathlib import Path

import pytest
import torch

from stepcredit.cli.main import main
from stepcredit.config import resolve
from stepcredit.display.runs import read_runs
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.records import read_trees, write_trees
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.report.compare import compare
from stepcredit.report.page import _source_panels
from stepcredit.run.by_source import NO_SOURCES, reported_sources
from stepcredit.run.evaluate import Sample, summarise
from stepcredit.run.metrics import forest_metrics
from stepcredit.tasks.dataset import load_problems
from stepcredit.tasks.mixture import build_data, sources_of

SMALL = ["--train.problems-per-iteration", "4", "--group-size", "4", "--max-new-tokens", "16", "--num-problems", "8"]


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """Of eight and of four rows, all with places for names."""
    paths = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for path, count in zip(paths, (8, 4), strict=True):
        lines = [{"question": f"Ivy = {n} . Mia = Ivy + 1 . Mia ?", "answer": str(n + 1)} for n in range(1, count + 1)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


def built(data: str, **options):
    return build_data(resolve({"task": {"data": data, "held_out": 0.25, **options}}))


# ---------------------------------------------------------------------- what is drawn


def test_names_of_sources(tmp_path, monkeypatch):
    assert sources_of("a.jsonl,gym:chain_sum,gcd, b.csv") == ["a.jsonl", "gym:chain_sum", "gym:gcd", "b.csv"]
    assert sources_of("gym:gcd,owner/name") == ["gym:gcd", "owner/name"] and sources_of("a,b") == ["a", "b"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gcd").mkdir()
    assert sources_of("gym:chain_sum,gcd") == ["gym:chain_sum", "gcd"]  # it is there
    with pytest.raises(UserError, match="gym:gcd is named twice"):
        sources_of("gym:gcd,gym:gcd")


def test_every_stretch_has_its_share_of_each(files):
    task = built(",".join(map(str, files)), weights=[3, 1])
    drawn = task.draw(0, 400)
    for start in range(0, 400, 16):
        assert abs([p.source for p in drawn[start : start + 16]].count("two.jsonl") - 4) <= 1
    assert [p.source for p in drawn].count("two.jsonl") == 100
    assert task.draw(37, 5) == drawn[37:42]  # whatever was asked for before
    assert built(",".join(map(str, files)), weights=[3, 1]).draw(37, 5) == drawn[37:42]
    assert task.name_of(37) == drawn[37].id
    first = [problem.id for problem in drawn if problem.source == "one.jsonl"][:6]
    assert len(set(first)) == 6  # every row once a pass, two of eight are held out


def test_rows_of_several_files_have_ids_and_labels_of_their_own(files):
    task = built(",".join(map(str, files)), weights=[1, 1])
    ids = {problem.id for problem in task.rows()}
    assert len(ids) == 9 and {id_.split()[0] for id_ in ids} == {"one.jsonl", "two.jsonl"}
    assert [problem.source for problem in task.held_out(4)] == ["one.jsonl", "one.jsonl", "two.jsonl"]
    assert len(task.held_out(2)) == 2 and not ids & {problem.id for problem in task.held_out(9)}
    assert task.reward_functions == ("math",) and task.sources() == ["one.jsonl", "two.jsonl"]


def test_files_without_weights_are_one_data_set_as_before(files):
    task = built(",".join(map(str, files)))
    assert type(task).__name__ == "DatasetTask" and len(task.rows()) == 9
    assert task.sources() == ["one.jsonl", "two.jsonl"]
    assert built(str(files[0])).sources() == [""]


def test_a_changed_part_changes_the_fingerprint(files):
    data = ",".join(map(str, files))
    before = built(data, weights=[1, 2]).fingerprint()
    assert built(data, weights=[1, 2]).fingerprint() == before
    files[1].write_text(files[1].read_text().replace('"answer": "', '"answer": "1'))
    assert built(data, weights=[1, 2]).fingerprint() != before


@pytest.mark.parametrize(
    ("weights", "words"), [([1], "1 weights for 2 sources"), ([1, 0], "above 0"), ([1, -1], "above 0")]
)
def test_weights_that_do_not_fit(files, weights, words):
    with pytest.raises(UserError, match=words):
        built(",".join(map(str, files)), weights=weights)


# ---------------------------------------------------------------------- sources


def test_the_column_of_sources(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"question": "?", "answer": "1", "id": n, "source": ["a", "b  b", None, 7, "x" * 99][n]} for n in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [p.source for p in load_problems(str(file))] == ["a", "b b", "", "", "x" * 60]
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"question": "?", "answer": "1", "kind": "k", "id": "o"}) + "\n")
    made = load_problems(f"{file},{other}")
    assert [p.source for p in made] == ["a", "b b", "rows.jsonl", "rows.jsonl", "x" * 60, "other.jsonl"]
    assert load_problems(str(other), columns={"source": "kind"})[0].source == "k"


def test_the_cap_on_sources_is_said(caplog):
    sources = reported_sources(["a", "b", ""], [Problem(source="z"), Problem(source="a")], most=2)
    assert sources.labels == ("a", "b", "other") and "the first 2 of 4 sources" in caplog.text
    assert [sources.label(source) for source in ("a", "b", "", "z", "new")] == ["a", "b", "other", "other", "other"]
    assert reported_sources(["a", ""], [], most=9).labels == ("a", "unnamed")
    assert reported_sources(["a"], [Problem(source="a")], 9) == NO_SOURCES == reported_sources(["a", "b"], [], 0)


def test_numbers_of_each_source_by_hand():
    trees = [
        Tree(Problem(id="0", source="a"), [1], [Segment([3], reward=1.0), Segment([3, 4, 5], reward=0.0)]),
        Tree(Problem(id="1", source="b"), [1], [Segment([3, 4], reward=0.25), Segment([3, 4])]),
        Tree(Problem(id="2", source="a"), [1], [Segment([3, 4], reward=1.0), Segment([3, 4], reward=1.0)]),
    ]
    forest = Forest.from_trees(trees)
    forest = forest.with_token(advantages=torch.zeros(forest.num_tokens))
    made = forest_metrics(forest, None, reported_sources(["a", "b", "c"], [], 9))
    expected = {"reward/mean/a": 0.75, "completion/length/a": 2.0, "group/count/a": 2.0}
    expected |= {"reward/mean/b": 0.25, "completion/length/b": 2.0, "group/count/b": 1.0}
    assert {name: value for name, value in made.items() if name.count("/") == 2} == expected
    plain = forest_metrics(forest)
    assert plain == {name: value for name, value in made.items() if name.count("/") == 1}


def test_evaluations_by_source():
    """Two problems of one source, one of another, two samples each and a greedy one."""
    right = {"a1": (True, True, False), "a2": (False, True, True), "b1": (False, False, False)}
    samples = [
        Sample(id_, number, "", 10, False, float(correct), correct, source=id_[0])
        for id_, each in right.items()
        for number, correct in zip((0, 1, -1), each, strict=True)
    ]
    made = summarise(samples, None, reported_sources(["a", "b"], [], 9))
    assert made.metrics["eval/accuracy"] == 0.5 and made.metrics["eval/accuracy/a"] == 0.75
    assert made.metrics["eval/pass@2/a"] == 1 and made.metrics["eval/pass@2/b"] == 0
    assert made.metrics["eval/accuracy_greedy/a"] == 0.5 and made.metrics["eval/reward/a"] == 0.75
    assert made.intervals["eval/accuracy/a"] == (0.5, 1.0)
    assert summarise(samples).metrics.items() < made.metrics.items()


def test_records_keep_the_source(tmp_path):
    forest = Forest.from_trees([Tree(Problem(id="0", source="a"), [1], [Segment([3], reward=1.0)])])
    write_trees(tmp_path / "r.jsonl", forest)
    (tree,) = read_trees(str(tmp_path / "r.jsonl"))
    assert tree.problem.source == "a" and Forest.from_state(forest.state_dict()).problems[0].source == "a"


def test_a_run_its_comparison_and_its_report(files, tmp_path, capsys):
    words = [*SMALL, "--data", ",".join(map(str, files)), "--task.weights", "1,3", "--eval-every", "1"]
    for seed in ("0", "1"):
        run = str(tmp_path / "runs" / seed)
        assert main(["train", *words, "--iterations", "2", "--seed", seed, "--run-dir", run]) in (0, 1)
    runs = read_runs([str(tmp_path / "runs")])
    last = runs[0].rows[-1]
    assert last["group/count/two.jsonl"] == 3 and "eval/accuracy/one.jsonl" in last
    comparison = compare(runs)
    assert [each.source for each in comparison.by_source] == ["two.jsonl", "one.jsonl"]  # by weight
    ends = [run.rows[-1]["eval/accuracy/two.jsonl"] for run in runs]
    assert comparison.by_source[0].finals[0].value == pytest.approx(sum(ends) / 2)
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "runs"), "--markdown", "-"]) == 0
    assert "| final by source, %" in capsys.readouterr().out
    panels = _source_panels(runs)
    assert {panel["section"] for panel in panels} == {"By source"} and len(panels) == 6
    assert panels[0]["title"] == "two.jsonl: held-out accuracy, sampled"
    assert main(["compare", str(tmp_path / "runs"), "--metric", "reward/mean/two.jsonl"]) == 0
