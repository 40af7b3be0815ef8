"""Pairs and demonstrations from files: how rows are read, their tokens, and runs that learn from them."""

import json
import random
from pathlib import Path

import pytest
import torch
from ranks_of import run_on, same_metrics

from stepcredit.cli.main import main
from stepcredit.config import resolve
from stepcredit.demo.chain import LEVELS, final_answer, generate
from stepcredit.demo.demonstrations import Demonstrator
from stepcredit.errors import UserError
from stepcredit.forest.types import Problem
from stepcredit.growth.recorded import Recorded
from stepcredit.run.build import build_parts
from stepcredit.run.checkpoint import load_checkpoint, newest_checkpoint
from stepcredit.tasks.prompts import CompletionTooLong, PromptFormat
from stepcredit.tasks.recorded import load_recorded
from tests.test_dataset import TEMPLATE, refused, tokenizer

USER, SYSTEM = {"role": "user", "content": "two ?"}, {"role": "system", "content": "be kind"}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(path: Path, *rows: dict, **options) -> list[tuple]:
    problems = load_recorded("pairs", write(path, *rows), "train", **options)
    assert all(problem.columns["rewards"] == [1.0, 0.0] for problem in problems)
    return [(problem.question, *problem.columns["completions"]) for problem in problems]


# ---------------------------------------------------------------------- rows


FORMS = {
    "TRL": ({"prompt": "1 + 1", "chosen": " 2", "rejected": " 3"}, ("1 + 1", " 2", " 3")),
    "TRL, chat": (
        {"prompt": [USER], "chosen": [says("2")], "rejected": [says("3")]},
        ([USER], says("2"), says("3")),
    ),
    "text and chat": (
        {"prompt": "two ?", "chosen": [says("2")], "rejected": [says("3")]},
        ("two ?", says("2"), says("3")),
    ),
    "chat and text": ({"prompt": [USER], "chosen": "2", "rejected": "3"}, ([USER], "2", "3")),
    "UltraFeedback": (
        {
            "prompt": "two ?",
            "chosen": [USER, says("2")],
            "rejected": [USER, says("3")],
            "score_chosen": 8.0,
            "score_rejected": 3.0,
        },
        ("two ?", says("2"), says("3")),
    ),
    "with a system message": (
        {"prompt": "two ?", "chosen": [SYSTEM, USER, says("2")], "rejected": [SYSTEM, USER, says("3")]},
        ([SYSTEM, USER], says("2"), says("3")),
    ),
    "implicit chat": ({"chosen": [USER, says("2")], "rejected": [USER, says("3")]}, ([USER], says("2"), says("3"))),
    "implicit text": ({"chosen": "It is 12 .", "rejected": "It is 13 ."}, ("It is", " 12 .", " 13 .")),
    "HH": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: I will",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: I will not",
        },
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " I will", " I will not"),
    ),
    "as JSON": (
        {"chosen": json.dumps([USER, says("2")]), "rejected": json.dumps([USER, says("3")])},
        ([USER], says("2"), says("3")),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_pairs(form, tmp_path):
    row, expected = FORMS[form]
    assert pairs(tmp_path / "a.jsonl", row) == [expected]


@pytest.mark.parametrize(
    "row, pieces",
    [
        ({"prompt": "a", "chosen": "b", "rejected": None}, ["line 2", "'rejected' is empty", "two sides"]),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, ["line 2", "a side has no text"]),
        ({"prompt": "a", "chosen": "b", "rejected": "b "}, ["line 2", "the same"]),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, ["line 2", "'prompt' is empty"]),
        ({"prompt": "a", "chosen": 5, "rejected": "c"}, ["line 2", "'chosen' must be text or chat messages"]),
        ({"prompt": "a", "chosen": [says("b")], "rejected": "c"}, ["line 2", "one side is text"]),
        (
            {"prompt": "other", "chosen": [USER, says("b")], "rejected": [USER, says("c")]},
            ["line 2", "another prompt than the row's"],
        ),
        (
            {"prompt": "two ?", "chosen": [USER, says("b")], "rejected": [says("c")]},
            ["line 2", "part before the last answer"],
        ),
        ({"prompt": "a", "chosen": [USER], "rejected": [says("c")]}, ["line 2", "does not end with an answer"]),
    ],
    ids=str,
)
def test_rows_that_are_no_pairs_are_refused(row, pieces, tmp_path):
    path = tmp_path / "bad.jsonl"
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    refused(lambda: pairs(path, good, row), "bad.jsonl", *pieces)


def test_files_that_have_such_rows_leave_them_out_and_count_them(tmp_path, caplog):
    """Without a column of prompts, and with scores of the sides."""
    human, ends = "\n\nHuman: a\n\nAssistant:", [" b", " c"]
    good = {"chosen": human + ends[0], "rejected": human + ends[1]}
    rows = [
        good,
        {"chosen": human + " b", "rejected": human + " b"},
        {"chosen": human + " b", "rejected": human},
        {"chosen": human + " b", "rejected": "\n\nHuman: z\n\nAssistant: b"},
        {"chosen": human + " x\n\nHuman: y\n\nAssistant: b", "rejected": human + " c"},
        {"chosen": "alone", "rejected": "apart"},
        good | {"chosen": human + " B"},
    ]
    assert len(pairs(tmp_path / "hh.jsonl", *rows)) == 2
    for words in (
        "1 rows were left out: the two sides are the same (first: " + str(tmp_path / "hh.jsonl") + ", line 2)",
        "1 rows were left out: a side has no text",
        "2 rows were left out: the two sides part before the last answer",
        "1 rows were left out: the two sides have no beginning in common",
    ):
        assert words in caplog.text, words
    scored = {"prompt": "a", "score_chosen": 1.0, "score_rejected": 1.0}
    kept = pairs(
        tmp_path / "uf.jsonl",
        scored | {"chosen": "b", "rejected": "b"},
        scored | {"chosen": "b", "rejected": "c"},
        scored | {"prompt": "two ?", "chosen": [USER, says("2")], "rejected": [USER, says("")]},
    )
    assert kept == [("a", "b", "c")] and "1 rows were left out: the two sides are the same" in caplog.text
    refused(lambda: pairs(tmp_path / "none.jsonl", rows[1]), "no row is left", "the same")


def test_columns_are_named_and_missing_ones_said(tmp_path):
    row = {"q": "a", "better": "b", "worse": "c"}
    named = {"question": "q", "chosen": "better", "rejected": "worse"}
    assert pairs(tmp_path / "a.jsonl", row, columns=named) == [("a", "b", "c")]
    refused(lambda: pairs(tmp_path / "a.jsonl", row), "no column 'chosen'", "--task.columns.chosen")
    refused(lambda: pairs(tmp_path / "a.jsonl", row, columns={"answer": "q"}), "task.columns.answer", "pairs")
    refused(lambda: pairs(tmp_path / "a.jsonl", row, columns={"chosen": "bettr"}), "'bettr'", "'better'")


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "a", "completion": "b"}, ("a", ["b"])),
        ({"instruction": "a", "response": "b"}, ("a", ["b"])),
        ({"prompt": [USER], "completion": [says("2")]}, ([USER], [says("2")])),
        ({"messages": [SYSTEM, USER, says("1"), USER, says("2")]}, ([SYSTEM, USER, says("1"), USER], [says("2")])),
        ({"prompt": "a", "completions": ["b", "c"]}, ("a", ["b", "c"])),
        ({"prompt": "two ?", "messages": [USER, says("2")]}, ([USER], [says("2")])),
    ],
    ids=str,
)
def test_forms_of_demonstrations(row, expected, tmp_path):
    (problem,) = load_recorded("demonstrations", write(tmp_path / "a.jsonl", row), "train")
    assert (problem.question, problem.columns["completions"]) == expected
    assert problem.columns["rewards"] == [1.0] * len(expected[1])


@pytest.mark.parametrize(
    "row, pieces",
    [
        ({"prompt": "a", "completion": ""}, ["line 1", "'completion' must be text"]),
        ({"prompt": None, "completion": "b"}, ["line 1", "'prompt' is empty"]),
        ({"completion": "b"}, ["no column of prompts"]),
        ({"prompt": "a"}, ["neither completions nor messages"]),
        ({"messages": [USER]}, ["line 1", "end with one of the assistant"]),
        ({"prompt": "a", "completion": [USER, says("b")]}, ["line 1", "one message of the assistant"]),
    ],
    ids=str,
)
def test_rows_that_are_no_demonstrations_are_refused(row, pieces, tmp_path):
    path = write(tmp_path / "bad.jsonl", row)
    refused(lambda: load_recorded("demonstrations", path, "train"), "bad.jsonl", *pieces)


# ---------------------------------------------------------------------- tokens


def shown(encode: PromptFormat, question, *completions, stop: str = "</s>", most: int = 99) -> list[str]:
    made = encode.tokenizer
    columns = {"completions": list(completions), "rewards": [1.0] * len(completions)}
    grow = Recorded(encode, [made.convert_tokens_to_ids(stop)], most)
    tree = grow.tree(Problem(question, id="p1", columns=columns))
    assert tree.prompt_ids == encode(Problem(question))
    return [" ".join(made.convert_ids_to_tokens(segment.token_ids)) for segment in tree.segments]


def test_a_completion_ends_once(caplog):
    made = tokenizer(None)
    made.add_special_tokens({"eos_token": "</s>"})
    encode = PromptFormat(made)
    assert shown(encode, "one", " two", " two </s>", " two </s> one") == [
        "two </s>",
        "two </s>",
        "two </s> one </s>",
    ]
    assert "encoded each by itself" not in caplog.text
    assert shown(encode, "one", "two") == ["two </s>"]  # "onetwo" is another word
    assert "encoded each by itself" in caplog.text


def test_a_completion_of_a_chat_is_what_the_template_adds():
    turns = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% if m['role'] == 'assistant' %}</s> {% endif %}"
    )
    made = tokenizer(turns + "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}")
    made.add_special_tokens({"eos_token": "</s>"})
    encode = PromptFormat(made)
    asked = [{"role": "user", "content": "one"}]
    assert shown(encode, asked, says("two"), "one") == ["two </s>", "one </s>"]
    assert shown(PromptFormat(made, "be"), "one", "two") == ["two </s>"]


def test_a_template_that_writes_the_prompt_otherwise_is_refused():
    made = tokenizer(TEMPLATE.replace("assistant", "assistant think"))
    made.add_special_tokens({"eos_token": "</s>"})
    refused(lambda: shown(PromptFormat(made), [USER], says("two")), "'p1'", "writes the prompt otherwise")


def test_a_long_completion_is_never_cut(tmp_path, capsys):
    made = tokenizer(None)
    made.add_special_tokens({"eos_token": "</s>"})
    with pytest.raises(CompletionTooLong, match="'p1': a completion has 4 tokens"):
        shown(PromptFormat(made), "one", " two one two", most=3)
    rows = [{"prompt": "Amy = 1 . Amy ?", "chosen": " #### 1", "rejected": end} for end in (" #### 2", " #### 2" * 20)]
    words = ["--data", write(tmp_path / "a.jsonl", *rows), "--max-new-tokens", "9", "--iterations", "1"]
    assert main(["train", "--algorithm", "dpo", *words, "--run-dir", str(tmp_path / "run")]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()][1:]
    assert row["tokens/sampled"] == 16 * 6  # the other row again and again


def test_columns_beside_the_prompt_are_told(tmp_path, caplog):
    """Alpaca's input is in no prompt, unless a template names it."""
    file = write(tmp_path / "a.jsonl", *({"instruction": "Add.", "input": text, "output": "3"} for text in ("1 2", "")))
    with caplog.at_level("WARNING", "stepcredit"):
        (first, _) = load_recorded("demonstrations", file, "train", template="{question} {input}")
        assert not caplog.text and first.columns["input"] == "1 2"
        load_recorded("demonstrations", file, "train")
    assert "column 'input' has text in 1 of 2 rows" in caplog.text and "--task.prompt-template" in caplog.text


def test_a_prompt_that_ends_with_the_assistant_is_an_error(tmp_path):
    """As a question it would lose that message."""
    chat = [{"role": "user", "content": "1 + 1 + 1?"}, {"role": "assistant", "content": "Step 1: 2."}]
    row = {"prompt": chat, "chosen": "Step 2: 3.", "rejected": "Step 2: 4."}
    with pytest.raises(UserError, match="line 1: column 'prompt': the prompt ends with a message of the assistant"):
        load_recorded("pairs", write(tmp_path / "a.jsonl", row), "train")
    messages = {"messages": [*chat, {"role": "assistant", "content": "Step 2: 3."}]}
    with pytest.raises(UserError, match="line 1: column 'messages': the prompt ends with"):
        load_recorded("demonstrations", write(tmp_path / "b.jsonl", messages), "train")


# ---------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    "words, pieces",
    [
        (["--algorithm", "dpo"], ["the embedded task has no pairs", "--data"]),
        (["--algorithm", "sft", "--data", "gym:gcd"], ["gym:gcd has no demonstrations"]),
        (["--algorithm", "dpo", "--reward.functions", "math"], ["reward:", "leave them out"]),
        (["--algorithm", "dpo", "--filter.enabled", "true"], ["filter.enabled"]),
        (["--algorithm", "dpo", "--sampler.name", "vllm"], ["sampler.name", "nothing to sample"]),
        (["--algorithm", "dpo", "--group-size", "4"], ["growth.group_size", "as many completions as the data have"]),
        (["--algorithm", "dpo", "--growth.depth", "4"], ["growth.depth is for trees"]),
        (["--algorithm", "ppo", "--growth.name", "pairs"], ["column value", "needs samples of the policy"]),
        (["--sampler.name", "none"], ["sampler.name", "growth.name flat samples"]),
        (["--algorithm", "sft", "--temperature", "0.6"], ["sampler.temperature 0.6", "at temperature 1"]),
        (["--algorithm", "dpo", "--shapers", "overlong"], ["shapers:", "'overlong' has no rewards to change"]),
    ],
    ids=str,
)
def test_what_needs_samples_is_refused(words, pieces, capsys):
    assert main(["train", "--run-dir", "/nonexistent/run", *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert [piece for piece in pieces if piece not in error] == [], error


def test_nothing_is_loaded_for_samples():
    config = resolve({"algorithm": "dpo", "model": "mine"})
    assert config.growth.recorded and config.growth.completions() == 2
    online = resolve({"algorithm": "dpo", "growth": {"name": "flat", "group_size": 2}})
    parts = build_parts(online)
    assert list(parts.rewards) == ["chain"] and list(parts.observers.providers) == ["ref_logprobs"]


# ---------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def preferences(tmp_path_factory) -> dict[str, str]:
    """The right solution of a chain against one with a fault; and the right ones alone."""
    chance, demonstrator, rows = random.Random(0), Demonstrator(), []
    while len(rows) < 60:
        chain = generate(chance, chance.choice(LEVELS), 0)
        wrong = demonstrator.solve(chain, chance)
        if final_answer(wrong) != str(chain.asked.value):
            rows.append({"prompt": chain.question(), "chosen": " " + chain.solution(), "rejected": " " + wrong})
    folder = tmp_path_factory.mktemp("data")
    right = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    return {"dpo": write(folder / "pairs.jsonl", *rows), "sft": write(folder / "right.jsonl", *right)}


def words(algorithm: str, data: dict[str, str], iterations: int, *more: str) -> list[str]:
    given = ["--algorithm", algorithm, "--data", data[algorithm], "--iterations", str(iterations)]
    given += ["--train.problems-per-iteration", "20", "--optim.schedule", "constant", "--save-every", "1"]
    return [*given, "--task.held-out", "0.3", *more]


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def test_dpo_puts_held_out_pairs_into_order(preferences, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *words("dpo", preferences, 3, "--eval-every", "1"), "--run-dir", str(run)]) == 0
    rows = rows_of(run)
    assert rows[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-5)  # policy and reference are the same
    assert rows[0]["eval/accuracy"] < 0.8 and rows[-1]["eval/accuracy"] > 0.85
    assert [row["eval/loss"] for row in rows] == sorted((row["eval/loss"] for row in rows), reverse=True)
    for row in rows[1:]:
        gap = 0.1 * (row["pair/chosen_log_ratio"] - row["pair/rejected_log_ratio"])
        assert row["pair/margin"] == pytest.approx(gap, abs=1e-5) and 0 <= row["pair/accuracy"] <= 1
    assert rows[-1]["eval/margin"] > 0 and rows[-1]["tokens/sharing"] > 1.1  # the prompt once for both sides
    assert "held-out pairs in the right order: " in capsys.readouterr().out
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None and load_checkpoint(checkpoint)["iteration"] == 3


def test_sft_lowers_the_held_out_loss(preferences, tmp_path):
    run = tmp_path / "run"
    assert main(["train", *words("sft", preferences, 3), "--run-dir", str(run)]) == 0
    rows = rows_of(run)
    assert rows[-1]["eval/loss"] < 0.9 * rows[0]["eval/loss"] and "eval/accuracy" not in rows[-1]


def test_the_loss_of_demonstrations_is_cross_entropy(preferences, tmp_path):
    """Of completion tokens alone, a mean over all of the batch, by the model's own logits."""
    from stepcredit.policy.loading import load_policy

    run, rows = tmp_path / "run", [json.loads(line) for line in Path(preferences["sft"]).read_text().splitlines()[:7]]
    data = write(tmp_path / "few.jsonl", *rows)
    given = ["--algorithm", "sft", "--data", data, "--iterations", "1", "--train.problems-per-iteration", "7"]
    assert main(["train", *given, "--task.held-out", "0", "--run-dir", str(run)]) == 0
    policy, total, count = load_policy("embedded", "cpu"), 0.0, 0
    for row in rows:
        prompt = policy.tokenizer(row["prompt"])["input_ids"]
        answer = [*policy.tokenizer(row["completion"], add_special_tokens=False)["input_ids"], policy.stop_token_ids[0]]
        with torch.no_grad():
            policy.scoring_form = "plain"
            logits = policy.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    assert rows_of(run)[1]["optim/loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("algorithm", ["dpo", "sft"])
def test_a_run_in_two_goes_is_the_run_in_one(algorithm, preferences, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--eval-every", "1", "--optim.num-minibatches", "2", "--lora.rank", "2"]
    assert main(["train", *words(algorithm, preferences, 3, *more), "--run-dir", str(one)]) == 0
    assert main(["train", *words(algorithm, preferences, 2, *more), "--run-dir", str(two)]) == 0
    assert main(["train", "--resume", str(two), "--iterations", "3"]) == 0
    same_metrics(one, two)
    first, second = (newest_checkpoint(run) for run in (one, two))
    assert first and second
    for file in first.glob("*.safetensors"):
        assert file.read_bytes() == (second / file.name).read_bytes()


@pytest.mark.slow
def test_several_processes_give_what_one_gives(preferences, tmp_path):
    folders = {size: tmp_path / str(size) for size in (1, 2, 3)}
    run_on(folders, words("dpo", preferences, 3, "--eval-every", "1", "--optim.num-minibatches", "2"))
    for size in (2, 3):
        assert same_metrics(folders[1], folders[size], rounding=2e-5)[-1]["eval/accuracy"] > 0.8


def test_pairs_of_ones_own_rollouts(tmp_path):
    """Online: the best of a group against its worst, groups that are all alike left out."""
    run = tmp_path / "run"
    given = ["--algorithm", "dpo", "--growth.name", "flat", "--group-size", "4", "--iterations", "2"]
    given += ["--train.problems-per-iteration", "8", "--num-problems", "4", "--max-new-tokens", "64"]
    assert main(["train", *given, "--run-dir", str(run)]) == 0
    rows = rows_of(run)[1:]
    assert all(row["optim/loss"] == pytest.approx(0.693, abs=0.2) and row["group/uniform"] < 1 for row in rows)
    assert rows[0]["optim/loss"] == pytest.approx(0.693147, abs=1e-4)
