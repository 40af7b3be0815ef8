"""`stepcredit compare`: numbers that a pencil gives, all resamples of few seeds, and what is said of odd runs."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy
import pytest
import yaml

from stepcredit.cli import compare as command
from stepcredit.cli.main import COMMANDS, main
from stepcredit.display.runs import read_runs
from stepcredit.errors import UserError
from stepcredit.report.bootstrap import Estimate, all_means, difference, interval, over_seeds
from stepcredit.report.compare import compare
from stepcredit.report.curves import first_reach, start_and_end

A = [(0, 0.2), (100, 0.3), (200, 0.6)]
B = [(0, 0.2), (80, 0.6), (240, 0.4)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """Runs are made in the test's own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(COMMANDS, "compare", command.main)
    return tmp_path


def made(name: str, points, algorithm: str = "grpo", seed: int = 0, metric: str = "eval/accuracy", **options) -> str:
    """A run folder with these (tokens, value); `options` are of the config, __ for the point."""
    config = {"algorithm": algorithm, "model": "embedded", "train": {"seed": seed, "iterations": 2}}
    config |= {"task": {"data": "embedded"}, "eval": {"num_problems": 100, "num_samples": 1}}
    for option, value in options.items():
        section, _, key = option.rpartition("__")
        (config.setdefault(section, {}) if section else config)[key] = value
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [
        {"iteration": number, "tokens/total": tokens, "time/iteration": 1.0, "reward/mean": 0.5} | {metric: value}
        for number, (tokens, value) in enumerate(points)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def compared(*folders: str, **options):
    return compare(read_runs(list(folders)), **options)


def ran(*words: object) -> int:
    return main(["compare", *map(str, words)])


# ---------------------------------------------------------------------- by pencil


def test_two_runs_by_pencil() -> None:
    """At 200 tokens, where the first one ends."""
    found = compared(made("a", A), made("b", B, "spro"))
    assert (found.start, found.budget, found.ends, found.most) == (0, 200, "a", 240)
    a, b = found.rows
    assert (a.label, b.label) == ("grpo", "spro")
    assert a.final.value == 0.6 and b.final.value == pytest.approx(0.6 - 0.2 * 120 / 160)  # 0.45
    assert a.area and a.area.value == pytest.approx((0.25 * 100 + 0.45 * 100) / 200)  # 0.35
    assert b.area and b.area.value == pytest.approx((0.4 * 80 + 0.525 * 120) / 200)  # 0.475
    assert a.final_difference is None and b.final_difference and b.area_difference
    assert b.final_difference.value == pytest.approx(-0.15) and b.area_difference.value == pytest.approx(0.125)
    assert found.target == 0.6 and (a.to_target, b.to_target) == (pytest.approx(200), pytest.approx(80))
    assert a.efficiency == pytest.approx(1) and b.efficiency == pytest.approx(2.5)


def test_other_budget_and_target_by_pencil() -> None:
    a, b = compared(made("a", A), made("b", B, "spro"), at=150, target=0.4).rows
    assert a.final.value == pytest.approx(0.45) and b.final.value == pytest.approx(0.6 - 0.2 * 70 / 160)
    assert a.area and a.area.value == pytest.approx((25 + (0.3 + 0.45) / 2 * 50) / 150)
    assert a.to_target == pytest.approx(100 + 100 / 3) and b.to_target == pytest.approx(40)
    assert b.efficiency == pytest.approx((400 / 3) / 40)


def test_the_target_is_of_the_mean_curve() -> None:
    """Places of both seeds count: at 80 the mean is (0.28 + 0.6) / 2 = 0.44, at 100 (0.3 + 0.575) / 2 = 0.4375."""
    found = compared(made("a", A), made("b", B, seed=1), target=0.44)
    (row,) = found.rows
    assert row.to_target == pytest.approx(80) and row.best == pytest.approx((0.6 + 0.45) / 2)
    assert compared("runs", target=0.5).rows[0].to_target == pytest.approx(100 + 100 * (0.5 - 0.4375) / 0.0875)
    assert compared("runs", target=0.53).rows[0].to_target is None


@pytest.mark.parametrize(
    ("target", "expected"), [(0.1, 10), (0.2, 10), (0.3, 15), (0.4, 20), (0.45, 40 - 10 / 3), (0.6, 40), (0.61, None)]
)
def test_first_reach(target, expected) -> None:
    """Also of a curve that falls in between; at the first value it is there already."""
    tokens, values = numpy.array([10.0, 20, 30, 40]), numpy.array([0.2, 0.4, 0.15, 0.6])
    expected = 30 + 10 * 0.3 / 0.45 if target == 0.45 else expected
    if expected is not None:  # one that rounding has put above the value
        assert first_reach(tokens, values, target + 1e-12) == pytest.approx(expected)
    assert first_reach(tokens, values, target) == (None if expected is None else pytest.approx(expected))


def test_the_baseline_reaches_its_own_mean() -> None:
    """Whatever rounding does to the mean of three."""
    for seed, end in enumerate((0.1, 0.2, 0.7)):
        made(f"{seed}", [(0, 0.05), (100 + seed, end)], seed=seed)
    (row,) = compared("runs", at=100).rows
    assert row.to_target == pytest.approx(100) and row.efficiency == 1


def test_length_and_entropy() -> None:
    """Five iterations at each end; fewer where they would overlap; none beyond the budget."""
    folder = made("a", [(10 * number, float(number)) for number in range(1, 13)], metric="completion/length")
    (run,) = read_runs([folder])
    assert start_and_end(run, "completion/length", 120) == (3.0, 10.0)
    assert start_and_end(run, "completion/length", 45) == (1.5, 3.5)
    assert start_and_end(run, "completion/length", 10) is None and start_and_end(run, "policy/entropy", 120) is None
    assert compared(folder, metric="completion/length").rows[0].length == (3.0, 10.0)


def test_a_metric_of_every_iteration_begins_where_all_have_it() -> None:
    a = made("a", [(10, 1.0), (20, 3.0), (40, 3.0)], metric="reward/x")
    b = made("b", [(15, 0.0), (40, 5.0)], "spro", metric="reward/x")
    found = compared(a, b, metric="reward/x")
    assert found.start == 15
    assert found.rows[0].area and found.rows[0].area.value == pytest.approx((2.5 * 5 + 3 * 20) / 25)
    assert found.rows[1].area and found.rows[1].area.value == pytest.approx(2.5)


# ---------------------------------------------------------------------- intervals


def test_resamples_of_two() -> None:
    """1 1, 1 3, 3 1, 3 3."""
    means, counts = all_means([1.0, 3.0])
    assert means.tolist() == [1, 2, 3] and counts.tolist() == [1, 2, 1]
    assert over_seeds([3.0, 1.0]) == Estimate(2.0, 1.0, 3.0)


def test_resamples_by_hand_of_four() -> None:
    """The mean of 0 0 0 1 is k/4 in 81, 108, 54, 12, 1 of 256: 94.9% are not above 2/4, 99.6% not above 3/4."""
    found = over_seeds([0.0, 0.0, 1.0, 0.0])
    assert (found.value, found.low, found.high) == (0.25, 0.0, 0.75)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_resamples_are_all_there_are(size) -> None:
    values = [0.31, 0.35, 0.36, 0.44, 0.52, 0.9][:size]
    every = sorted(sum(drawn) / size for drawn in product(values, repeat=size))
    means, counts = all_means(values)
    assert sorted(numpy.repeat(means, counts)) == pytest.approx(every)
    expected = numpy.quantile(every, [0.025, 0.975], method="inverted_cdf")
    found = over_seeds(values)
    assert interval(means, counts) == (found.low, found.high) == pytest.approx(tuple(expected))


def test_many_seeds_are_drawn() -> None:
    """Nearly normal: the mean of 0 to 11 has standard deviation sqrt(143 / 12 / 12), the same every time."""
    values = [float(number) for number in range(12)]
    found, spread = over_seeds(values), 1.96 * (143 / 12 / 12) ** 0.5
    assert found == over_seeds(values) and found.low and found.high
    assert (found.low, found.high) == (pytest.approx(5.5 - spread, abs=0.12), pytest.approx(5.5 + spread, abs=0.12))
    apart = difference(values, values, paired=False)
    assert apart.high == pytest.approx(2**0.5 * spread, abs=0.15) and apart.low == pytest.approx(-apart.high, abs=0.15)


def test_differences_paired_and_not() -> None:
    """All 16 pairs of resamples against the 4 of the pairs' differences."""
    assert difference([0.0, 2.0], [0.0, 1.0], paired=False) == Estimate(0.5, -1.0, 2.0)
    assert difference([0.0, 2.0], [0.0, 1.0], paired=True) == Estimate(0.5, 0.0, 1.0)
    assert difference([5.0], [0.0, 1.0], paired=False) == Estimate(4.5)
    values, others = [0.1, 0.5, 0.2], [0.0, 0.9, 0.4, 0.3]
    every = [sum(one) / 3 - sum(other) / 4 for one in product(values, repeat=3) for other in product(others, repeat=4)]
    found = difference(values, others, paired=False)
    assert (found.low, found.high) == pytest.approx(numpy.quantile(every, [0.025, 0.975], method="inverted_cdf"))


@pytest.mark.parametrize(("seeds", "paired"), [((0, 1), True), ((0, 2), False), ((0, 1, 2), False), ((1, 1), False)])
def test_the_same_seeds_are_paired(seeds, paired) -> None:
    """Whatever the folders are called; a seed that is there twice is not."""
    made("z", [(0, 0.2), (100, 0.3)], "grpo", 0)
    made("y", [(0, 0.2), (100, 0.5)], "grpo", 1)
    for number, seed in enumerate(seeds):
        made(f"spro-{number}", [(0, 0.2), (100, 0.4 + 0.2 * seed)], "spro", seed)
    row = compared("runs/z", "runs/y", "runs").rows[1]
    assert row.paired == paired and row.final_difference
    swapped = compared(*[f"runs/spro-{number}" for number in range(len(seeds))], "runs/z", "runs/y").rows[1]
    assert swapped.paired == paired
    if paired:  # 0.4 - 0.3 and 0.6 - 0.5: the same
        assert (row.final_difference.low, row.final_difference.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_pairs_need_each_seed_once_and_whole_curves() -> None:
    """The final values of 0 and 1 are paired, the areas are not, as one of them is missing."""
    for name, seeds in (("a", (0, 1)), ("b", (2, 2))):
        for number, seed in enumerate(seeds):
            made(f"{name}-grpo-{number}", [(0, 0.2), (100, 0.3)], "grpo", seed)
            made(f"{name}-spro-{number}", [(0, 0.2), (100, 0.4)][number if name == "a" else 0 :], "spro", seed)
    row = compared("runs/a-grpo-0", "runs/a-grpo-1", "runs/a-spro-0", "runs/a-spro-1").rows[1]
    assert row.paired and row.area_difference and row.area_difference.value == pytest.approx(0.3 - 0.25)
    assert row.area_difference.low is None and row.final_difference and row.final_difference.low is not None
    assert not compared("runs/b-grpo-0", "runs/b-grpo-1", "runs/b-spro-0", "runs/b-spro-1").rows[1].paired


def test_order_of_runs() -> None:
    """Numbers do not move by a bit, with enumerated and with drawn resamples."""
    for seed in range(7):
        made(f"g{seed}", [(0, 0.1), (90 + seed, 0.3 + 0.07 * seed**1.5)], "grpo", seed)
        made(f"s{seed}", [(0, 0.1), (99 - seed, 0.4 + 0.03 * seed)], "spro", (seed * 3) % 7)
    for count in (3, 7):
        names = [f"runs/{kind}{seed}" for kind in "gs" for seed in range(count)]
        expected = compared(*names)
        for order in ([*names[:count][::-1], *names[count:][::-1]], ["runs/g1", *names[count:], *names[:count]]):
            assert replace(compared(*order), notes=()) == replace(expected, notes=())
        assert [row.label for row in expected.rows] == ["grpo", "spro"]
        swapped = compared(*names[count:], *names[:count])
        assert [row.final for row in swapped.rows] == [row.final for row in expected.rows][::-1]


# ---------------------------------------------------------------------- odd runs


def test_one_seed_has_no_interval(capsys) -> None:
    words = made("a", A), made("b", B, "spro"), made("c", A, "spro", 1)
    a, b = compared(*words).rows
    assert a.final.low is None and b.final.low is not None and b.final_difference and b.final_difference.low is None
    assert ran(*words) == 0
    shown = capsys.readouterr().out
    assert "60.0 -" in shown and "one seed has no spread, so there is no interval: grpo\n" in shown


def test_a_killed_run(capsys) -> None:
    """The line that was cut is dropped; the budget is what is left of it."""
    killed, other = made("a", A), made("b", B, "spro")
    path = Path(killed) / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    found = compared(killed, other)
    assert found.budget == 100 and found.ends == "a" and found.rows[0].final.value == pytest.approx(0.3)
    assert ran(killed, other) == 0
    shown = capsys.readouterr().out
    assert "1 of 3 lines cannot be read" in shown and "after iteration 1 of 2" in shown
    assert "100 sampled tokens in each run, where a has its last value; the longest goes on to 240" in shown


def test_runs_without_the_metric_are_left_out() -> None:
    made("a", A), made("b", B, "spro"), made("d", [(0, 0.9)], "spro", 2)
    made("c", [(0, 0.9), (50, 0.9)], "spro", 1, metric="eval/other")
    made("e", [(0, 0.9), (50, 0.9)], "opo", metric="eval/other")
    found = compared("runs")
    assert [row.label for row in found.rows] == ["grpo", "spro"] and len(found.rows[1].runs) == 1
    assert found.budget == 200
    assert "without eval/accuracy, left out: c, e" in found.notes
    assert "eval/accuracy from before training alone, left out: d" in found.notes
    with pytest.raises(UserError, match=r"the baseline opo \(e\) has no eval/accuracy"):
        compared("runs/e", "runs")


def test_one_evaluation_is_a_final_value(capsys) -> None:
    made("a", [(250, 0.5)]), made("b", [(0, 0.1), (240, 0.4)], "spro"), made("c", [(240, 0.5)], "spro", 1)
    found = compared("runs")
    a, b = found.rows
    assert found.budget == 240 and a.final.value == 0.5 and a.area is None and a.to_target is None and a.best is None
    assert b.final.value == pytest.approx(0.45) and b.area == Estimate(0.25)  # of the run that has a curve
    assert b.area_difference is None
    assert any("one evaluation only" in note and "a at 250 tokens, c at 240 tokens" in note for note in found.notes)
    assert ran("runs", "--json", "x.json") == 0
    assert json.loads(Path("x.json").read_text())["rows"][0]["area"] is None


def test_the_same_seed_twice_is_told() -> None:
    made("a", A), made("b", B)
    (note,) = [note for note in compared("runs").notes if "not independent" in note]
    assert "grpo" in note and "seed 0" in note


def test_the_target_is_not_reached(capsys) -> None:
    words = made("a", B), made("b", [(0, 0.2), (240, 0.3)], "spro")
    a, b = compared(*words).rows
    assert a.to_target == pytest.approx(40) and b.to_target is None and b.efficiency is None and b.best == 0.3
    assert ran(*words) == 0
    assert "not reached, best 30.0" in capsys.readouterr().out
    assert ran(*words, "--target", 0.7) == 0
    shown = capsys.readouterr().out
    assert "tokens to 70.0%" in shown and "grpo does not reach the target" in shown
    assert ran(*words, "--target", 0.2) == 0
    assert "grpo has reached the target before training" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"eval__num_problems": 50}, "eval.num_problems (100: grpo; 50: spro)"),
        ({"task__data": "x.jsonl"}, "task.data (embedded: grpo; x.jsonl: spro)"),
        ({"model": "other"}, "model (embedded: grpo; other: spro)"),
        ({"sampler__temperature": 0.5}, "sampler.temperature (null: grpo; 0.5: spro)"),
        ({"optim__learning_rate": 0.5}, None),
        ({"eval__every": 7}, None),
    ],
)
def test_what_cannot_be_compared_is_warned_of(options, named, capsys) -> None:
    words = made("a", A), made("b", B, "spro", **options)
    warnings = compared(*words).warnings
    assert warnings == ((f"not comparable, the methods differ in {named}",) if named else ())
    assert ran(*words) == 0
    shown = capsys.readouterr().out
    assert ("warning: not comparable" in shown) == bool(named) and ("the same problems" in shown) != bool(named)


# ---------------------------------------------------------------------- what is shown and written


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("\\|", "\0").strip().strip("|").split("|")]


def test_markdown_is_a_table(capsys) -> None:
    """Every line of a table has as many cells as its head, also where a name has a bar."""
    made("a", A), made("b", B, seed=1), made("c", B, "spro", credit__name="a|b"), made("d", A, "spro", credit__name="c")
    assert ran("runs", "--markdown", "-") == 0
    out, err = capsys.readouterr()
    assert err == ""
    tables = [block.split("\n") for block in out.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for head, rule, *rows in tables:
        assert len(rows) == 3 and all(len(cells(line)) == len(cells(head)) == 6 for line in (rule, *rows))
        assert all(line.startswith("| ") and line.endswith(" |") for line in (head, rule, *rows))
        assert set("".join(cells(rule))) == {"-", ":"} and cells(rule)[0] == "---"
        assert [cells(row)[0] for row in rows] == ["grpo", "spro · credit.name a\0b", "spro · credit.name c"]
    assert cells(tables[0][2])[1:4] == ["2", "52.5 [45.0, 60.0]", "-"]
    assert ran("runs", "--markdown", "-", "--json", "x.json") == 0
    assert capsys.readouterr() == (out, "written: x.json\n")
    assert ran("runs", "--markdown", "x.md") == 0
    shown = capsys.readouterr().out
    assert Path("x.md").read_text() == out and "written: x.md" in shown and "| grpo" not in shown


def test_screen_and_json(capsys) -> None:
    made("a", A), made("b", B, seed=1), made("c", A, "spro"), made("d", B, "spro", 1)
    assert ran("runs", "--at", "200", "--json", "x.json") == 0
    shown = capsys.readouterr().out
    assert "eval/accuracy of 2 methods at 200 sampled tokens" in shown and "52.5 [45.0, 60.0]" in shown
    assert "+0.0 [+0.0, +0.0]" in shown and "seeds drawn in pairs as they are the same: spro" in shown
    assert "100 problems" in shown and f"up to {100 * (0.525 * 0.475 / 100) ** 0.5:.1f} points" in shown
    numbers = json.loads(Path("x.json").read_text())
    assert numbers["budget"] == 200 and numbers["rows"][0]["runs"][1]["final"] == pytest.approx(0.45)
    assert ran("runs", "--metric", "reward/mean") == 0
    shown = capsys.readouterr().out
    assert "0.5 [0.5, 0.5]" in shown and "%," not in shown.split("[low, high]")[0] and "binomial" not in shown


def test_a_given_budget_is_named(capsys) -> None:
    assert ran(made("a", A), "--at=1.5e2") == 0
    shown = capsys.readouterr().out
    assert "1 method at 150 sampled tokens" in shown and "as given; the runs go on to 200" in shown


def test_a_label_like_markup_is_shown_as_it_is(capsys) -> None:
    made("a", A, reward__functions="[bold]x[/bold]"), made("b", B, reward__functions="y")
    assert ran("runs") == 0
    assert capsys.readouterr().out.count("\ngrpo · reward.functions [bold]x[/bold]  ") == 2  # one in each table


def test_help_and_imports_are_light(capsys) -> None:
    assert ran("--help") == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120
    made("a", A)
    code = "import sys; from stepcredit.cli.compare import main; main(['runs']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "datasets"} & set(done.stdout.splitlines()[-1].split()) == set()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "name run folders"),
        ("gone", "'gone': no such run folder"),
        ("runs/a runs/gon", "'runs/gon': no such run folder"),
        ("empty", "is empty"),
        ("runs/silent", "no metrics in silent; metrics.jsonl has no iteration yet"),
        ("runs --metric eval/acuracy", "no run has 'eval/acuracy'; did you mean 'eval/accuracy'?"),
        ("runs --at 201", "201 sampled tokens are beyond the end of a, whose last eval/accuracy is at 200"),
        ("runs --at 0", "above 0"),
        ("runs --at many", "--at: 'many' is not a number"),
        ("runs --target nan", "--target: expected a finite number"),
        ("runs --at", "--at needs a value"),
        ("runs --metric --at 3", "--metric needs a value"),
        ("runs --targte 3", "unknown option --targte; did you mean 'target'?"),
        ("runs -m x", "unknown option -m"),
        ("runs --markdown nowhere/x.md", "folder 'nowhere' does not exist"),
        ("runs --markdown empty", "'empty' is a folder"),
        ("runs --json nowhere/x.json", "folder 'nowhere' does not exist"),
        ("runs --json -", "--json: name a file"),
        ("runs --markdown /dev/full", "the disk is full"),
        ("runs/a late --at 100", "before the first eval/accuracy of late, at 150"),
        ("early late", "leave it out, or early"),
        ("before", "has no eval/accuracy after training began"),
    ],
)
def test_bad_input(words, said, capsys) -> None:
    made("a", A), made("b", B, "spro"), made("silent", [], "opo"), Path("empty").mkdir()
    for name, points in (("late", [(150, 0.1), (300, 0.2)]), ("early", [(0, 0.1), (60, 0.2)]), ("before", [(0, 0.1)])):
        shutil.move(made(name, points, "rloo"), name)
    assert ran(*words.split()) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and (out == "" or "full" in words)
