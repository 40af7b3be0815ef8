"""Problems that are skipped for what they were before: which, how often they are tried again, after a resume."""

import json
from pathlib import Path

import pytest
from ranks_of import run_on, same_metrics

from stepcredit.cli.main import main
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.run.checkpoint import load_checkpoint
from stepcredit.run.history import accuracy, choose, is_explored, settled, with_groups
from stepcredit.run.source import Position, collect
from stepcredit.shaping.options import FilterOptions

RIGHT, WRONG, MIXED, PARTIAL = (1.0, True), (0.0, True), (0.5, False), (0.0, False)


def tree(name: str, *values: float | None) -> Tree:
    segments = [Segment([3], reward=value, rewards={} if value is None else {"f": value}) for value in values]
    return Tree(Problem(id=name), [1], segments)


# ---------------------------------------------------------------------- what is known


@pytest.mark.parametrize(
    ("groups", "is_settled"),
    [
        ((), False),
        ((RIGHT,), False),
        ((RIGHT, RIGHT), True),
        ((WRONG, WRONG), True),
        ((RIGHT, WRONG), False),
        ((RIGHT, MIXED), False),
        ((PARTIAL, PARTIAL), False),  # always wrong, with partial credit that tells completions apart
    ],
)
def test_settled(groups, is_settled):
    assert settled(groups, 2) == is_settled


def test_groups_are_kept_by_name_and_only_the_last():
    forest = Forest.from_trees([tree("a", 1.0, 0.0), tree("b", 1.0, 1.0), tree("c", None, None), tree("d", 0.2, 0.4)])
    names = ["a", "b", "c", "d"]
    once = with_groups({}, forest, names, 2)
    assert once == {"a": (MIXED,), "b": (RIGHT,), "d": (PARTIAL,)}
    before = {"b": (WRONG, WRONG), "z": (RIGHT,)}
    after = with_groups(before, forest, ["a", "b", None, None], 2)
    assert after == {"a": (MIXED,), "b": (WRONG, RIGHT), "z": (RIGHT,)} and before["b"] == (WRONG, WRONG)
    assert accuracy(after["b"]) == 0.5


def test_the_first_function_decides():
    """A penalty that differs is no reason to keep a problem that is always right."""
    segments = [Segment([3], reward=1 - n / 2, rewards={"f": 1.0, "length": -n / 2}) for n in range(2)]
    forest = Forest.from_trees([Tree(Problem(id="a"), [1], segments)])
    assert with_groups({}, forest, ["a"], 1) == {"a": (RIGHT,)}


# ---------------------------------------------------------------------- what is skipped


def test_settled_problems_are_skipped_and_counted():
    history = {"0": (RIGHT,), "1": (WRONG,), "2": (MIXED,), "5": (WRONG,)}
    chosen = choose(history, 1, 0, 4, str, lambda number: number == 1)
    assert chosen.numbers == [1, 2, 3, 4] and (chosen.drawn, chosen.right, chosen.wrong, chosen.explored) == (
        5,
        1,
        0,
        1,
    )
    assert choose(history, 0, 0, 2, str, lambda number: False).numbers == [0, 1]
    assert choose(history, 1, 0, 2, lambda number: None, lambda number: False).numbers == [0, 1]


def test_the_chance_to_be_looked_at_again():
    """The floor: a share of `explore` of all settled problems, another one for every seed, and none without end."""
    taken = [number for number in range(20_000) if is_explored(3, number, 0.1)]
    assert abs(len(taken) / 20_000 - 0.1) < 0.007  # more than three standard deviations
    assert taken == [number for number in range(20_000) if is_explored(3, number, 0.1)]
    assert taken != [number for number in range(20_000) if is_explored(4, number, 0.1)]
    everything = dict.fromkeys(map(str, range(10)), (RIGHT,))
    chosen = choose(everything, 1, 0, 50, lambda n: str(n % 10), lambda n: is_explored(0, n, 0.1))
    assert len(chosen.numbers) == chosen.explored == 50 and chosen.right == chosen.drawn - 50


def test_collecting_goes_by_what_it_has_seen():
    """Ten problems, always right, always wrong, or half: from the second pass on the half ones are sampled alone."""
    asked: list[list[int]] = []

    def sample(numbers, places) -> Forest:
        asked.append(list(numbers))
        values = {0: (1.0, 1.0), 1: (0.0, 0.0), 2: (1.0, 0.0)}
        return Forest.from_trees([tree(str(n % 9), *values[n % 3]) for n in numbers])

    def name_of(number: int) -> str:
        return str(number % 9)

    window = FilterOptions(enabled=True, history=1, explore=1e-9, max_draws=9)
    first = collect(Position(), 3, window, sample, name_of)
    assert sorted(n for numbers in asked for n in numbers) == list(range(9))
    assert first.metrics["filter/known"] == 9 and first.metrics["filter/accuracy"] == pytest.approx(0.5)
    assert first.metrics["filter/skipped_right"] == first.metrics["filter/skipped_wrong"] == 0
    asked.clear()
    second = collect(first.position, 3, window, sample, name_of)
    assert asked == [[11, 14, 17]] and second.metrics["filter/passed"] == 1
    assert second.metrics["filter/skipped_right"] == second.metrics["filter/skipped_wrong"] == 3
    back = Position.from_state(json.loads(json.dumps(vars(second.position))))
    assert back == second.position
    assert Position.from_state({"drawn": 1, "sampled": 2, "queue": []}) == Position(1, 2)  # of before


def test_without_a_filter_there_is_no_history():
    with pytest.raises(UserError, match=r"filter.history goes with --filter.enabled true"):
        FilterOptions(history=2).check()
    with pytest.raises(ValueError, match="greater than 0"):
        FilterOptions(enabled=True, explore=0.0)


# ---------------------------------------------------------------------- runs

SMALL = ["--train.problems-per-iteration", "4", "--group-size", "4", "--max-new-tokens", "32", "--num-problems", "0"]
SMALL += ["--filter.enabled", "true", "--filter.low", "0", "--filter.high", "1", "--filter.history", "1"]
SMALL += [
    "--filter.explore",
    "0.3",
    "--optim.schedule",
    "constant",
    "--learning-rate",
    "1e-5",
    "--task.held-out",
    "0.1",
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Ten rows that the embedded model always solves, some that it sometimes does."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [{"question": f"Ivy = {n} . Mia = Ivy + 1 . Mia ?", "answer": str(n + 1)} for n in range(1, 9)]
    lines += [{"question": f"Ivy = {n} . Mia = Ivy * 2 . Mia ?", "answer": str(2 * n)} for n in range(3, 9)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def six(rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "six"
    words = ["--data", str(rows), "--iterations", "8", "--save-every", "1", "--checkpoint.keep", "9"]
    assert main(["train", *SMALL, *words, "--run-dir", str(folder)]) in (0, 1)
    return folder


def test_a_run_skips_and_says_so(six):
    metrics = [json.loads(line) for line in (six / "metrics.jsonl").open()][1:]
    assert sum(row["filter/skipped_right"] for row in metrics) > 3
    assert sum(row["filter/explored"] for row in metrics) > 0
    state = load_checkpoint(six / "checkpoints" / "000008")["position"]
    skipped = sum(row["filter/skipped_right"] + row["filter/skipped_wrong"] for row in metrics)
    assert state["drawn"] == 8 * 4 + skipped and len(state["history"]) == metrics[-1]["filter/known"]


def test_a_resumed_run_skips_the_same_to_the_bit(six, rows, tmp_path):
    words = ["--data", str(rows), "--save-every", "1", "--run-dir", str(tmp_path / "again")]
    assert main(["train", *SMALL, *words, "--iterations", "4"]) in (0, 1)
    assert main(["train", "--resume", str(tmp_path / "again"), "--iterations", "8"]) in (0, 1)
    same_metrics(six, tmp_path / "again")
    states = [load_checkpoint(run / "checkpoints" / "000008")["position"] for run in (six, tmp_path / "again")]
    assert states[0] == states[1]


def test_several_processes_skip_the_same(rows, tmp_path):
    folders = {1: tmp_path / "one", 2: tmp_path / "two"}
    run_on(folders, [*SMALL, "--data", str(rows), "--iterations", "6"])
    same_metrics(folders[1], folders[2], rounding=1e-3)
    states = [load_checkpoint(run / "checkpoints" / "000006")["position"] for run in folders.values()]
    assert states[0] == states[1] and states[0]["drawn"] > 24


def test_data_without_end_have_nothing_to_skip(tmp_path, caplog):
    assert main(["train", *SMALL, "--iterations", "1", "--run-dir", str(tmp_path / "run")]) in (0, 1)
    assert "filter.history: embedded chain task makes every problem once" in caplog.text
