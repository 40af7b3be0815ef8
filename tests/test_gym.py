"""Tasks of reasoning-gym: their problems, scorers, options, and runs on them."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")
from gym_tasks import look_at
from ranks_of import same_metrics
from rich.console import Console

from stepcredit.cli.main import main
from stepcredit.config import resolve
from stepcredit.errors import UserError
from stepcredit.policy.loading import load_policy
from stepcredit.run.build import build_parts, build_rollouts
from stepcredit.run.trainer import Trainer
from stepcredit.tasks.gym.maker import BUILT_ONCE, Maker, make_problem
from stepcredit.tasks.gym.names import REFUSED, attributes_of, check_task, names, options_of
from stepcredit.tasks.gym.task import GymTask, seed_of
from stepcredit.tasks.prompts import PromptFormat
from stepcredit.verifiers import gym
from stepcredit.verifiers.judging import Judge
from stepcredit.verifiers.reward import reward_function
from stepcredit.verifiers.workers import Workers

SMALL = ["--train.problems-per-iteration", "4", "--group-size", "4", "--max-new-tokens", "16", "--num-problems", "6"]
SMALL += ["--optim.schedule", "constant", "--task.gym-answer", "line", "--reward.gold-check", "8"]


@pytest.fixture
def rows(tmp_path) -> Path:
    """A data file that the embedded model knows what to do with."""
    file = tmp_path / "rows.jsonl"
    lines = [{"question": f"Ivy = {n} . Mia = Ivy + 1 . Mia ?", "answer": str(n + 1)} for n in range(1, 9)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def task(name: str = "chain_sum", form: str = "tags", seed: int = 0, **options) -> GymTask:
    return GymTask(name, options, form, seed)


def score(problem, *completions: str) -> list[float]:
    return gym.verify([None] * len(completions), completions, [problem.columns["gym"]] * len(completions))


# ---------------------------------------------------------------------- all tasks


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_every_task_is_sound_or_refused(part):
    """Own answers get 1, nonsense less than 0.1, a seed makes one problem everywhere; docs/gym_tasks.md has more."""
    for seen in look_at(names()[part::4], count=2):
        if seen.name not in REFUSED:
            assert not seen.faults, (seen.name, seen.faults)


def test_refused_tasks_have_the_faults_that_they_are_refused_for():
    seen = {each.name: each for each in look_at(sorted(REFUSED), count=8)}
    assert all(each.faults for each in seen.values()), {name: each.faults for name, each in seen.items()}
    assert seen["game_of_life_halting"].nonsense == 1 and seen["prime_factorization"].failures
    assert all(each.gold is None for name, each in seen.items() if "no answer" in REFUSED[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BUILT_ONCE))
def test_what_is_built_once_makes_the_same_problems(name):
    for seed in (7, 2**31 + 5):
        once = make_problem(name, {}, seed)
        assert once["entry"] == gym.encoded(gym.dataset(name, {}, seed)[0])


# ---------------------------------------------------------------------- problems


def test_problems_follow_from_the_seed_and_held_out_ones_from_others():
    one, again, other = task().draw(3, 5), task().draw(0, 8)[3:], task(seed=1).draw(3, 5)
    assert one == again and not {p.id for p in one} & {p.id for p in other}
    held_out = task().held_out(6)
    assert held_out == task(seed=9).held_out(6) and len({p.id for p in held_out}) == 6
    seeds = {seed_of(0, number, attempt, False) for number in range(3000) for attempt in range(2)}
    assert all(seed % 2 == 0 and 0 <= seed < 2**32 for seed in seeds) and len(seeds) > 5990
    assert all(seed_of(0, number, 0, True) % 2 == 1 for number in range(100))


def test_tasks_that_hang_on_the_order_of_sets_are_the_same_in_every_process(tmp_path):
    """In processes whose own hashes of texts differ."""
    code = "from stepcredit.tasks.gym.task import GymTask as T; print(*(T(n, {}, 'tags', 0).draw(0, 3) for n in %r))"
    code %= (["isomorphic_strings", "ransom_note", "list_functions", "polynomial_multiplication"],)
    outputs = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        outputs.add(done.stdout)
    assert len(outputs) == 1 and "isomorphic" in outputs.pop()


def test_the_question_asks_for_the_form_that_is_read():
    (tags,), (line,) = task().draw(0, 1), task(form="line").draw(0, 1)
    right = tags.answer
    assert "<answer>" in tags.question and "last line" in line.question and tags.source == "gym:chain_sum"
    completions = [f"<answer>{right}</answer>", f"No, <answer>0</answer> <answer> {right} </answer>", right, "", "x"]
    assert score(tags, *completions) == [1, 1, 0, 0, 0]
    assert score(line, f"It is\n{right}\n", "", f"{right}\nand more") == [1, 0, 0]
    (plain,) = task(form="plain").draw(0, 1)
    assert plain.question == line.question.partition("\n\n")[0] and gym.gold(plain) == right
    assert score(plain, f" {right}\n", "", " ") == [1, 0, 0] and 0 < score(plain, f"It is {right}")[0] < 1
    assert gym.final_answer(f"<answer>{right}</answer> so") == right and gym.final_answer("so\n5") == "5"


def test_partial_credit_is_kept():
    (problem,) = task("spell_backward").draw(0, 1)
    (value,) = score(problem, f"<answer>{problem.answer[:-1]}x</answer>")
    assert 0 < value < 1


def test_entries_come_back_as_they_are():
    entry = {"a": (1, [2.5, None]), "b": Fraction(1, 3), "c": {1: "x", (2, 3): True}, "!tuple": "text"}
    back = gym.decoded(gym.encoded(entry))
    assert back == entry and type(back["a"]) is tuple and type(back["b"]) is Fraction
    with pytest.raises(TypeError, match="a set"):
        gym.encoded({1, 2})


def test_levels_and_options_reach_the_problems():
    hard = task(level=10, max_digits=2, min_digits=2).draw(0, 20)
    terms = [len(problem.columns["gym"]["entry"].split('"expression":"')[1].split('"')[0].split()) for problem in hard]
    assert max(terms) > 13  # more than 7 numbers and their signs, which the defaults do not make
    one = gym.config_of("chain_sum", {"level": {"num_terms": 3}})
    assert (one.max_terms, one.max_digits) == (5, 1)
    assert [attribute.name for attribute in attributes_of("chain_sum")] == ["num_terms", "num_digits"]
    assert next(o for o in options_of("chain_sum") if o.name == "min_terms").conditions[0] == "min_terms > 0"


def test_long_prompts_are_replaced_and_said(caplog):
    policy = load_policy("embedded", "cpu")
    lengths = sorted(len(PromptFormat(policy.tokenizer)(problem)) for problem in task().draw(0, 12))
    config = resolve({"task": {"data": "gym:chain_sum", "max_prompt_tokens": lengths[5]}})
    rollouts = build_rollouts(config, build_parts(config), policy)
    drawn = rollouts.task.draw(0, 12)
    assert len(drawn) == 12 and all(len(rollouts.encode(problem)) <= lengths[5] < lengths[-1] for problem in drawn)
    assert rollouts.task.replaced > 0 and "another problem takes its place (1 so far)" in caplog.text
    assert [problem.id for problem in drawn] != [problem.id for problem in task().draw(0, 12)]
    rollouts.judge.close()
    impossible = resolve({"task": {"data": "gym:chain_sum", "max_prompt_tokens": 5}})
    with pytest.raises(
        UserError, match=r"over the limit of 5 tokens.*so did 19 more seeds: change .* task.gym.chain_sum"
    ):
        build_rollouts(impossible, build_parts(impossible), policy)


def test_what_a_task_cannot_make_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr(Maker, "make", lambda self, name, options, seeds: [{"error": "ValueError: none"}] * len(seeds))
    with pytest.raises(UserError, match=r"the task makes no problem of seed \d+ \(ValueError: none\); so did 19 more"):
        task().draw(0, 1)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("chain_sums", {}, ["gym:chain_sums", "did you mean chain_sum", "stepcredit tasks"]),
        ("composite", {}, ["is a mixture", "gym:chain_sum,gcd"]),
        ("rubiks_cube", {}, ["have no answer", "--task.gym.rubiks_cube.allow true"]),
        ("rubiks_cube", {"allow": "yes"}, ["allow: true or false"]),
        ("chain_sum", {"min_term": 1}, ["task.gym.chain_sum.min_term: unknown option", "'min_terms'"]),
        ("chain_sum", {"min_terms": "many"}, ["task.gym.chain_sum.min_terms", "valid integer", "'many'"]),
        ("chain_sum", {"min_terms": True}, ["task.gym.chain_sum.min_terms", "True"]),
        ("chain_sum", {"max_terms": 1}, ["task.gym.chain_sum.max_terms", "max_terms 1", "max_terms >= min_terms"]),
        ("gcd", {"min_numbers": 0}, ["task.gym.gcd.min_numbers", "min_numbers >= 2"]),
        ("chain_sum", {"level": 11}, ["task.gym.chain_sum.level", "from 0 to 10", "got 11"]),
        ("chain_sum", {"level": {"num_digits": -1}}, ["chain_sum.level.num_digits", "from 0 to 9"]),
        ("chain_sum", {"level": {"digits": 1}}, ["chain_sum.level.digits: no such attribute", "num_digits"]),
        ("gsm_symbolic", {"level": 1}, ["gsm_symbolic.level", "no curriculum"]),
        ("chain_sum", {"seed": 3}, ["chain_sum.seed", "--seed"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(name, options, words):
    with pytest.raises(UserError) as caught:
        check_task(name, options)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--data", "gym:gcd", "--task.gym.chain_sum.level", "1"], ["task.gym.chain_sum", "gcd"]),
        (["--data", "gym:gcd,chain_sum", "--task.weights", "1"], ["1 weights for 2 sources (gym:gcd, gym:chain_sum)"]),
        (["--data", "gym:gcd,gcd"], ["gym:gcd is named twice"]),
        (["--data", "gym:gcd,embedded.jsonl"], ["embedded.jsonl: no such file"]),
        (["--data", "embedded,gym:gcd"], ["embedded is a task of its own"]),
        (["--data", "gym:gcd", "--num-problems", "1000000"], ["without end", "--num-problems"]),
    ],
)
def test_data_that_do_not_go_together(given, words, capsys):
    assert main(["train", *given]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words) and message.count("\n") == 1


def test_a_scorer_that_fails_is_counted_and_the_remedy_named():
    problems = task("prime_factorization", allow=True).draw(0, 2)
    judge = Judge({"gym": reward_function("gym")}, [1.0], None, Workers())
    try:
        texts = [f"<answer>{problems[0].answer}</answer>", "<answer>many</answer>"]
        right, failed = judge.judge(problems, texts)["gym"]
        assert right.value == 1 and failed.failure == "error"
        assert "gym:prime_factorization: its scorer raises ValueError" in failed.message
        assert "--reward.on-failure zero" in failed.message
    finally:
        judge.close()


def test_without_the_library_it_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gym, "reasoning_gym", None)
    for words in (["train", "--data", "gym:gcd"], ["tasks"], ["tasks", "gcd"]):
        assert main(words) == 2
        assert "pip install 'stepcredit[gym]'" in capsys.readouterr().err


def test_help_does_not_load_the_library():
    code = (
        "import sys\nfrom stepcredit.cli.main import main\n"
        "for command in ('train', 'tasks', 'eval', 'score'):\n    main([command, '--help'])\n"
        "sys.exit('reasoning_gym' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gym:" in done.stdout


# ---------------------------------------------------------------------- commands


def test_the_list_of_tasks(capsys, monkeypatch):
    monkeypatch.setattr("stepcredit.tasks.gym.names.names", lambda: ["acre", "chain_sum", "rush_hour"])
    assert main(["tasks"]) == 0
    shown = capsys.readouterr().out
    assert "Apache-2.0" in shown and "-> " in shown and "GPL-3.0" in shown
    assert "rush_hour" in shown and "refused unless --task.gym.rush_hour.allow true" in shown


def test_one_task(capsys):
    assert main(["tasks", "chain_sum"]) == 0
    shown = capsys.readouterr().out
    for text in ("min_terms 2", "max_terms >= min_terms", "num_digits", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10", "answer: "):
        assert text in shown
    assert main(["tasks", "chain_summ"]) == 2 and "did you mean chain_sum" in capsys.readouterr().err
    assert main(["tasks", "chain_sum", "--seed", "x"]) == 2


def test_gold_answers_are_graded(rows, capsys):
    assert main(["score", "--data", f"{rows},gym:chain_sum,gcd", "--gold", "--num-problems", "6"]) == 0
    assert "14 of 14 accepted" in capsys.readouterr().out


def test_a_run_on_a_mixture_goes_on_where_it_was(rows, tmp_path, capsys):
    """Three iterations at once, and two and one; then its rollouts are graded anew and its model is evaluated."""
    data = [
        *SMALL,
        "--data",
        f"{rows},gym:chain_sum,gcd",
        "--task.weights",
        "2,1,1",
        "--save-every",
        "1",
        "--eval-every",
        "1",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *data, "--iterations", "3", "--checkpoint.keep", "9", "--run-dir", str(one)]) == 0
    assert main(["train", *data, "--iterations", "2", "--run-dir", str(two)]) in (0, 1)
    assert main(["train", "--resume", str(two), "--iterations", "3"]) in (0, 1)
    metrics = same_metrics(one, two)
    last = metrics[-1]
    assert [last[f"group/count/{source}"] for source in ("rows.jsonl", "gym:chain_sum", "gym:gcd")] == [2, 1, 1]
    assert last["eval/accuracy/rows.jsonl"] == 1 and last["eval/accuracy/gym:gcd"] < 1
    assert last["eval/accuracy"] == pytest.approx(
        (last["eval/accuracy/rows.jsonl"] + last["eval/accuracy/gym:chain_sum"] + last["eval/accuracy/gym:gcd"]) / 3
    )
    capsys.readouterr()
    saved, graded = one / "rollouts" / "000003.jsonl.zst", tmp_path / "graded.json"
    words = ["--data", f"{rows},gym:chain_sum,gcd", "--task.gym-answer", "line", "--json", str(graded)]
    assert main(["score", "--in", str(saved), *words]) == 0
    assert json.loads(graded.read_text())["changed"] == []
    words = ["--num-problems", "3", "--json", str(tmp_path / "eval.json"), "--task.gym.chain_sum.level", "1"]
    model = str(one / "checkpoints" / "000003")
    assert main(["eval", "--model", model, *words, "--data", f"{rows},gym:chain_sum", "--max-new-tokens", "8"]) == 0
    assert set(json.loads((tmp_path / "eval.json").read_text())["data"]) == {"rows", "gym:chain_sum"}


def test_two_processes_train_on_the_same_problems(tmp_path):
    from ranks_of import run_on

    words = [
        *SMALL,
        "--data",
        "gym:chain_sum,isomorphic_strings",
        "--iterations",
        "2",
        "--task.max-prompt-tokens",
        "999",
    ]
    run_on({1: tmp_path / "one", 2: tmp_path / "two"}, words)
    same_metrics(tmp_path / "one", tmp_path / "two", rounding=1e-4)


def test_held_out_problems_of_another_task(rows):
    given = {"task": {"data": str(rows), "eval_data": "gym:gcd"}, "eval": {"num_problems": 4}}
    config = resolve(given)
    trainer = Trainer(config, build_parts(config), load_policy("embedded", "cpu"), Console(quiet=True))
    assert [problem.source for problem in trainer.held_out] == ["gym:gcd"] * 4
    assert set(trainer.rollouts.judge.rewards) == {"math", "gym"}
    assert len(trainer.rollouts.task.rows()) == 8
    trainer.rollouts.judge.close()
