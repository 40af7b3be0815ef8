"""Values of prompts: by their formulas, sampled once, after a kill the same bytes, refused where they do not fit."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks_of import launch, run_on, same_metrics
from safetensors.torch import load_file

import stepcredit.estimators.prepared as prepared
from stepcredit.cli.main import main
from stepcredit.config import resolve
from stepcredit.demo.chain import problems as chain_problems
from stepcredit.errors import UserError
from stepcredit.estimators.options import PrepareOptions
from stepcredit.estimators.prepared import Sampled, read_prepared
from stepcredit.estimators.prompt_value import all_wrong, problems_of_run, value_of
from stepcredit.forest.types import Problem
from stepcredit.run.build import build_parts, build_task
from stepcredit.run.interrupt import Interrupted
from stepcredit.tasks.dataset import DatasetTask
from stepcredit.tasks.mixture import Mixture

SMALL = "--device cpu --sampler.max-new-tokens 32"  # several batches of problems
TRAIN = f"train --algorithm astar_po {SMALL} --iterations 2 --train.problems-per-iteration 6 --num-problems 4"
PREPARE = f"prepare {SMALL} --num-samples 2 --sampler.max-rows 8 --num-problems 38"  # batches of 16, 16 and 6


def go(words: str, *more: object) -> int:
    return main([*words.split(), *map(str, more)])


def sampled(*rewards: float | None) -> Sampled:
    return Sampled("a", "", list(rewards), 1)


def soft(beta: float, *rewards: float | None) -> float:
    return value_of(sampled(*rewards), PrepareOptions(beta=beta))


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(run: Path, iteration: int = 2) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{iteration:06d}" / "model.safetensors")


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("right", range(9))
def test_soft_value_of_right_and_wrong_is_the_closed_form(beta, right):
    """beta log(1 + p (exp(1 / beta) - 1)), p the share of right samples."""
    expected = beta * math.log1p(right / 8 * math.expm1(1 / beta))
    assert soft(beta, *[1.0] * right, *[0.0] * (8 - right)) == pytest.approx(expected, abs=1e-12)


def test_soft_value_and_its_limits():
    rewards = (0.25, 1.0, -0.5, 0.25)
    assert soft(1e6, *rewards) == pytest.approx(0.25, abs=1e-6)
    assert soft(1e-4, *rewards) == pytest.approx(1.0, abs=1e-3)
    assert soft(1e-4, 0.0, 1000.0) == pytest.approx(1000.0, abs=1e-3)  # exp(1e7) would overflow
    between = [soft(beta, *rewards) for beta in (0.1, 0.5, 2.0)]
    assert 1.0 > between[0] > between[1] > between[2] > 0.25
    assert soft(0.5, *(reward + 3 for reward in rewards)) == pytest.approx(soft(0.5, *rewards) + 3)
    for name, value in (("mean", 0.25), ("max", 1.0), ("zero", 0.0)):
        assert value_of(sampled(*rewards), PrepareOptions(value=name)) == value


def test_what_was_not_judged_is_in_no_value():
    assert soft(0.5, 1.0, None, 0.0, None) == soft(0.5, 1.0, 0.0)
    assert all_wrong(sampled(0.0, None)) and all_wrong(sampled(-1.0, 0.0))
    assert not all_wrong(sampled(0.0, 0.1)) and not all_wrong(sampled(None, None))


@pytest.mark.parametrize("beta", ["0", "-1"])
def test_numbers_that_mean_something_else_in_the_papers_code(tmp_path, capsys, beta):
    """There 0 is the mean and a negative one no value at all; here these have names."""
    assert go(f"{TRAIN} --prepare.beta {beta} --run-dir", tmp_path / "run") == 2
    assert "--prepare.value mean" in (said := capsys.readouterr().err) and "--prepare.value zero" in said
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- which problems


def rows(count: int) -> list[Problem]:
    return [Problem(f"q{number}", str(number), f"p{number}") for number in range(count)]


def test_problems_of_a_run_are_those_that_it_can_draw():
    task = DatasetTask("rows", rows(10), [], seed=0)
    config = {"train": {"iterations": 3, "problems_per_iteration": 2}}
    assert problems_of_run(resolve(config), task) == task.draw(0, 6)
    config["filter"] = {"enabled": True, "max_draws": 1.5}
    assert problems_of_run(resolve(config), task) == task.draw(0, 9)
    config["train"]["iterations"] = 50  # of several passes each problem once
    assert sorted(problem.id for problem in problems_of_run(resolve(config), task)) == sorted(p.id for p in rows(10))
    config["prepare"] = {"all_wrong": "skip"}
    assert problems_of_run(resolve(config), task) == rows(10)


def test_rows_that_are_left_out_never_come():
    tasks = [DatasetTask(name, rows(6), [], seed=0) for name in "ab"]
    mixture = Mixture("both", tasks, [1.0, 1.0])
    mixture.draw(0, 4)
    mixture.leave_out({"p0", "p5"})
    assert {problem.id for problem in mixture.draw(0, 40)} == {"p1", "p2", "p3", "p4"}
    assert [problem.id for problem in tasks[0].rows()] == ["p1", "p2", "p3", "p4"]
    with pytest.raises(UserError, match="all 4 rows"):
        mixture.leave_out({f"p{number}" for number in range(6)})
    with pytest.raises(UserError, match="without end"):
        build_task(resolve({})).leave_out({"a"})


def test_a_star_takes_one_completion_and_its_columns():
    config = resolve({"algorithm": "astar_po"})
    assert config.growth.group_size == 1 and config.loss.options["scale"] == 1e-3
    assert list(build_parts(config).observers.providers) == ["prompt_value", "ref_logprobs"]
    assert resolve({"algorithm": "astar_po", "growth": {"group_size": 4}}).growth.group_size == 4


# ---------------------------------------------------------------------- the file


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prepared") / "values.jsonl"
    assert go(PREPARE, "--out", path) == 0
    return path


def test_the_file(whole):
    made = read_prepared(whole)
    assert [row.id for row in made.rows] == [problem.id for problem in chain_problems("train", 0, 38)]
    assert all(len(row.rewards) == 2 and row.tokens >= 2 for row in made.rows) and not made.cut
    assert {reward for row in made.rows for reward in row.rewards} == {0.0, 1.0}
    assert made.header["stamp"]["prepare"] == {"num_samples": 2}


def test_a_second_time_nothing_is_sampled(whole, tmp_path, monkeypatch):
    copy = tmp_path / "values.jsonl"
    copy.write_bytes(whole.read_bytes())
    monkeypatch.setattr("stepcredit.samplers.transformers.TransformersSampler.sample", None)
    assert go(PREPARE, "--out", copy) == 0
    assert copy.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "kept", ["header", "part of the header", "lines", "part of a line", "a batch", "all but an end"]
)
def test_from_any_end_the_same_bytes(whole, tmp_path, kept):
    """Cut in the header, within a batch, behind one, within a line; the whole file but its last line end."""
    lines = whole.read_bytes().splitlines(keepends=True)
    there = {
        "header": lines[:1],
        "part of the header": [lines[0][:40]],
        "lines": lines[:22],
        "part of a line": [*lines[:20], lines[20][:30]],
        "a batch": lines[:33],
        "all but an end": [*lines[:-1], lines[-1].rstrip()],
    }[kept]
    path = tmp_path / "values.jsonl"
    path.write_bytes(b"".join(there))
    assert go(PREPARE, "--out", path) == 0
    assert path.read_bytes() == whole.read_bytes()


def test_a_killed_preparation_goes_on(whole, tmp_path):
    path = tmp_path / "values.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "stepcredit", *PREPARE.split(), "--out", str(path)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while not (path.is_file() and path.read_bytes().count(b"\n") > 1) and time.monotonic() < deadline:
            assert process.poll() in (None, 0), (tmp_path / "log").read_text()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert go(PREPARE, "--out", path) == 0
    assert path.read_bytes() == whole.read_bytes()


def test_several_processes_write_the_same(whole, tmp_path):
    path = tmp_path / "values.jsonl"
    job = {"words": [*PREPARE.split(), "--out", str(path)], "size": 2, "log": str(tmp_path / "log")}
    assert launch([job]) == [[0, 0]], (tmp_path / "log.0").read_text()
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "more, words",
    [
        ("--temperature 0.5", ["sampler.temperature 1.0, not 0.5", "remove it"]),
        ("--num-samples 3", ["prepare.num_samples 2, not 3"]),
        ("--reward.weights 2", ["reward.weights [1.0], not [2.0]"]),
        ("--seed 1", ["line 2", "'train-0-0'", "'train-1-0'"]),
        ("--num-problems 60 --sampler.max-rows 16", ["max_rows 8, not 16", "begun"]),
    ],
)
def test_a_file_of_other_options_is_not_gone_on_with(whole, capsys, more, words):
    before = whole.read_bytes()
    given = dict(zip(*[iter(f"{PREPARE} {more}".split()[1:])] * 2, strict=True))  # the later one counts
    assert main(["prepare", *(word for pair in given.items() for word in pair), "--out", str(whole)]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert whole.read_bytes() == before


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda lines: lines[1:], ["line 1", "not a file of"]),
        (lambda lines: [lines[0].replace('"version": 1', '"version": 7'), *lines[1:]], ["version 7"]),
        (lambda lines: [*lines[:3], lines[3][:20] + "\n", *lines[4:]], ["line 4", "cannot be read"]),
        (lambda lines: [*lines[:3], lines[3].replace('"tokens": ', '"tokens": "'), *lines[4:]], ["line 4"]),
        (lambda lines: [*lines[:3], lines[1], *lines[4:]], ["line 4", "'train-0-0'", "line 2"]),
    ],
)
def test_a_damaged_file_is_named_with_its_line(whole, tmp_path, change, words):
    path = tmp_path / "values.jsonl"
    path.write_text("".join(change(whole.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError) as error:
        read_prepared(path)
    assert all(word in str(error.value) for word in words), error.value


def test_somebody_elses_file_is_left_as_it_is(tmp_path, capsys):
    """One line without an end, as `json.dump` writes it, is not a header that was cut short."""
    path = tmp_path / "values.jsonl"
    path.write_text('[{"question": "1 + 1", "answer": "2"}]')
    assert go(f"prepare {SMALL} --num-problems 4 --out {path}") == 2
    assert "line 1: this is not a file of 'stepcredit prepare'" in capsys.readouterr().err
    assert path.read_text().startswith('[{"question"')


@pytest.mark.parametrize(
    "more, words",
    [
        ("", ["--out FILE is missing"]),
        ("--out values.jsonl --num-problems 4 --prepare.file v.jsonl", ["prepare.file: nothing would be sampled"]),
        ("--out values.jsonl --num-problems 4 --prepare.value zero", ["prepare.value zero: nothing would be sampled"]),
        ("--out values.jsonl --what vaule", ["--what", "did you mean 'value'"]),
        ("--out values.jsonl --num-samples 0", ["--num-samples", "at least 1"]),
        ("--out values.jsonl", ["without end", "--num-problems"]),
        ("--out values.jsonl --num-problems 4 --temperature 0", ["temperature above 0"]),
        ("--out values.jsonl --num-problems 4 --distributed.strategy fsdp", ["distributed.strategy"]),
    ],
)
def test_what_prepare_refuses(tmp_path, monkeypatch, capsys, more, words):
    monkeypatch.chdir(tmp_path)
    assert go(f"prepare {SMALL} {more}") == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- training with it


def test_a_run_makes_what_the_command_makes_and_counts_its_tokens(tmp_path):
    """Without a file the run samples at its start; from the file of the command it learns the same to the last bit."""
    assert go(f"prepare {SMALL} --num-problems 12 --out", tmp_path / "values.jsonl") == 0
    assert go(f"{TRAIN} --run-dir", tmp_path / "own") == 0
    assert (tmp_path / "own" / "prepared.jsonl").read_bytes() == (tmp_path / "values.jsonl").read_bytes()
    given = ["--run-dir", tmp_path / "given", "--prepare.file", tmp_path / "values.jsonl"]
    assert go(TRAIN, *given) == 0
    assert not (tmp_path / "given" / "prepared.jsonl").exists()
    found = same_metrics(tmp_path / "own", tmp_path / "given")
    own, other = weights_of(tmp_path / "own"), weights_of(tmp_path / "given")
    assert all(tensor.equal(other[name]) for name, tensor in own.items())
    made = read_prepared(tmp_path / "values.jsonl")
    assert found[0]["tokens/prepared"] == found[0]["tokens/total"] == made.tokens > 0
    assert "tokens/prepared" not in found[1]
    assert found[2]["tokens/total"] == made.tokens + found[1]["tokens/sampled"] + found[2]["tokens/sampled"]
    values = [value_of(row, PrepareOptions()) for row in made.rows[:6]]
    assert found[1]["value/prompt"] == pytest.approx(sum(values) / 6, abs=1e-6)
    assert found[1]["group/singleton"] == 1 and found[1]["optim/grad_norm"] > 0


def test_a_run_that_is_stopped_while_it_prepares_goes_on_there(tmp_path, monkeypatch):
    more = "--sampler.max-rows 8 --prepare.num-samples 8"  # batches of four problems
    assert go(f"{TRAIN} {more} --run-dir", tmp_path / "whole") == 0
    append, batches = prepared._append, []

    def stop(path, rows):
        append(path, rows)
        batches.append(len(rows))
        if len(batches) == 2:
            raise Interrupted

    monkeypatch.setattr(prepared, "_append", stop)
    assert go(f"{TRAIN} {more} --run-dir", tmp_path / "run") == 130
    assert batches == [4, 4] and len(read_prepared(tmp_path / "run" / "prepared.jsonl").rows) == 8
    assert go("train --resume", tmp_path / "run") == 0
    assert batches == [4, 4, 4]
    same_metrics(tmp_path / "whole", tmp_path / "run")
    first, second = weights_of(tmp_path / "whole"), weights_of(tmp_path / "run")
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    assert (tmp_path / "run/prepared.jsonl").read_bytes() == (tmp_path / "whole/prepared.jsonl").read_bytes()
    assert rows_of(tmp_path / "whole")[0]["time/prepare"] > 0


def test_a_stopped_preparation_that_leaves_rows_out_goes_on(tmp_path, monkeypatch, capsys):
    """The rows are those that the run began with, though some of them are not drawn."""
    data = tmp_path / "rows.jsonl"
    lines = [{"id": row.id, "question": row.question, "answer": row.answer} for row in chain_problems("train", 0, 6)]
    data.write_text("".join(json.dumps(line) + "\n" for line in (*lines, lines[0] | {"id": "x", "answer": "none"})))
    more = f"--data {data} --reward.functions stepcredit.demo.chain:verify --sampler.max-rows 2 --prepare.num-samples 8"
    more += f" --prepare.all-wrong skip --reward.gold-check 0 --task.eval-data {data}"
    append = prepared._append

    def stop(path, rows):
        append(path, rows)
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(prepared, "_append", stop)
        assert go(f"{TRAIN} {more} --run-dir", tmp_path / "run") == 130
    assert go("train --resume", tmp_path / "run") == 0
    assert go("train --prepare.all-wrong keep --resume", tmp_path / "run") == 2
    assert "the run has prepare.all_wrong skip, not keep" in capsys.readouterr().err


def test_a_longer_run_samples_the_reference_for_the_rest(tmp_path):
    """The sampler still has the weights of the start, and the tokens are counted when they are sampled."""
    longer = "--iterations 3 --optim.schedule constant"
    assert go(f"{TRAIN} --optim.schedule constant --run-dir", tmp_path / "run") == 0
    before = read_prepared(tmp_path / "run/prepared.jsonl")
    assert go(f"train {longer} --resume", tmp_path / "run") == 0
    assert go(f"{TRAIN} {longer} --run-dir".replace("--iterations 2 ", ""), tmp_path / "whole") == 0
    after = read_prepared(tmp_path / "run/prepared.jsonl")
    assert after == read_prepared(tmp_path / "whole/prepared.jsonl") and len(after.rows) == 18
    last, straight = rows_of(tmp_path / "run")[-1], rows_of(tmp_path / "whole")[-1]
    assert last["tokens/prepared"] == after.tokens - before.tokens
    assert last["tokens/total"] == straight["tokens/total"]
    first, second = weights_of(tmp_path / "run", 3), weights_of(tmp_path / "whole", 3)
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows of the embedded task, the last two with answers that nobody gives."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    given = [{"id": p.id, "question": p.question, "answer": p.answer} for p in chain_problems("train", 3, 12)]
    for row in given[-2:]:
        row["answer"] = "-99999"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


ROWS = "--reward.functions chain --reward.gold-check 0 --task.held-out 0"


def prepare_rows(data: Path, out: Path, *more: object) -> None:
    assert go(f"prepare {SMALL} {ROWS} --data", data, "--out", out, *more) == 0


def test_prompts_that_the_reference_never_solves_are_kept_or_skipped(data, tmp_path):
    """As the paper's scripts do, or as TRL does."""
    prepare_rows(data, tmp_path / "values.jsonl")
    made = read_prepared(tmp_path / "values.jsonl")
    wrong = {row.id for row in made.rows if all_wrong(row)}
    assert {"train-3-10", "train-3-11"} <= wrong and len(made.rows) == 12 and len(wrong) < 12
    for choice in ("keep", "skip"):
        run = tmp_path / choice
        more = ["--data", data, "--prepare.file", tmp_path / "values.jsonl", "--prepare.all-wrong", choice]
        assert go(f"{TRAIN} {ROWS} --rollouts.every 1 --run-dir", run, *more) == 0
        files = [prepared_ids(path) for path in sorted((run / "rollouts").iterdir())]
        seen = set().union(*files)
        assert (seen & wrong == set()) == (choice == "skip") and seen
    assert go(f"{TRAIN} --prepare.all-wrong skip --run-dir", tmp_path / "endless") == 2


def prepared_ids(path: Path) -> set[str]:
    from stepcredit.forest.records import read_trees

    return {tree.problem.id for tree in read_trees(str(path))}


def test_no_value_at_all(tmp_path):
    """V* = 0: nothing is sampled before, and the advantage is the reward."""
    assert go(f"{TRAIN} --prepare.value zero --run-dir", tmp_path / "run") in (0, 1)
    found = rows_of(tmp_path / "run")
    assert "tokens/prepared" not in found[0] and not (tmp_path / "run" / "prepared.jsonl").exists()
    assert found[1]["value/prompt"] == 0


@pytest.mark.parametrize(
    "change, more, words",
    [
        (None, "--temperature 0.5", ["prepare.file", "sampler.temperature 1.0, not 0.5"]),
        (None, "--prepare.num-samples 4", ["prepare.num_samples 8, not 4"]),
        (None, "--task.prompt-template '{question}'", ["task.prompt_template None, not"]),
        (None, "--reward.weights 0.5", ["reward.weights [1.0], not [0.5]"]),
        (None, "--prepare.value zero", ["prepare.file", "--prepare.value zero"]),
        (lambda text: text.replace('"weights": "', '"weights": "1'), "", ["the weights of 'embedded', not those of"]),
        (lambda text: "".join(text.splitlines(keepends=True)[:-1]), "", ["1 of 12 problems", "'train-3-11'"]),
        (lambda text: text.replace('"problem": "', '"problem": "1'), "", ["problem 'train-3-", "have changed"]),
        (lambda text: text.replace("0.0", "null").replace("1.0,", "null,").replace("1.0]}", "null]}"), "", ["judged"]),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_sampled(data, tmp_path, capsys, change, more, words):
    path = data.with_name("values.jsonl")
    if not path.is_file():
        prepare_rows(data, path)
    if change is not None:
        header, _, rest = path.read_text().partition("\n")
        own = tmp_path / "values.jsonl"
        changes_header = '"weights": "1' in change('"weights": "')
        own.write_text(f"{change(header)}\n{rest}" if changes_header else f"{header}\n{change(rest)}")
        path = own
    capsys.readouterr()
    given = ["--data", data, "--prepare.file", path, "--run-dir", tmp_path / "run", *more.replace("'", "").split()]
    assert go(f"{TRAIN} --iterations 9 {ROWS}", *given) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


def test_the_file_of_one_run_serves_other_seeds(data, tmp_path):
    """The seed of a preparation is not that of the runs."""
    prepare_rows(data, tmp_path / "values.jsonl", "--seed", 5)
    for seed in (0, 1):
        more = ["--data", data, "--prepare.file", tmp_path / "values.jsonl", "--seed", seed]
        assert go(f"{TRAIN} {ROWS} --run-dir", tmp_path / f"run{seed}", *more) in (0, 1)


# ---------------------------------------------------------------------- several processes


@pytest.mark.parametrize("algorithm", ["rebel", "astar_po"])
def test_several_processes_give_what_one_gives(algorithm, tmp_path):
    """Whole groups where these are compared, and a preparation that all share."""
    size = ["--group-size", "4", "--optim.num-epochs", "2"] if algorithm == "rebel" else []
    size += ["--sampler.max-new-tokens", "64"]  # long enough for two rewards in each iteration
    words = [*TRAIN.split()[1:], "--algorithm", algorithm, *size, "--optim.max-tokens-per-micro-batch", "300"]
    words += ["--learning-rate", "1e-6", "--optim.schedule", "constant"]  # AdamW's first step makes rounding large
    run_on({1: tmp_path / "one", 2: tmp_path / "two"}, words)
    same_metrics(tmp_path / "one", tmp_path / "two", 3e-5)  # sampler/logprob_diff is rounding itself
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    far = sum(float((one[name] - two[name]).square().sum()) for name in one) ** 0.5
    assert far < 1e-5 * sum(float(tensor.square().sum()) for tensor in one.values()) ** 0.5
