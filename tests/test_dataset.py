"""Problems from files: columns, what is left out, what is refused, the order of drawing, and prompts."""

import csv
import json
import logging
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stepcredit.errors import UserError
from stepcredit.forest.types import Problem
from stepcredit.tasks.dataset import DatasetTask, load_problems, split_held_out
from stepcredit.tasks.prompts import PromptFormat, PromptTooLong
from stepcredit.verifiers.math import verify

ROWS = [{"question": f"{n} + 1 ?", "answer": str(n + 1), "level": n % 3} for n in range(6)]
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Data sets are cached in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows) -> str:
    """Rows as a file of the kind that the name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


def place(kind: str, number: int) -> str:
    """How row `number` (from 1 on) of a file is named: by line where a file has lines, below the header of a CSV."""
    return f"line {number + (kind == 'csv')}" if kind in ("jsonl", "csv") else f"row {number}"


def refused(call, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_reads_alike(tmp_path, kind):
    """Question and answer are text, ids say where a row stands, and all columns come along."""
    problems = load_problems(write(tmp_path / f"d.{kind}", ROWS))
    assert [(p.question, p.answer, p.id) for p in problems] == [
        (row["question"], row["answer"], place(kind, number)) for number, row in enumerate(ROWS, 1)
    ]
    assert [int(p.columns["level"]) for p in problems] == [row["level"] for row in ROWS]


@pytest.mark.parametrize(
    "names",
    [("problem", "solution"), ("prompt", "ground_truth"), ("query", "target"), ("instruction", "final_answer")],
)
def test_usual_column_names(tmp_path, names):
    row = dict(zip(names, ("1 + 1 ?", "2"), strict=True))
    (problem,) = load_problems(write(tmp_path / "d.jsonl", [row]))
    assert (problem.question, problem.answer) == ("1 + 1 ?", "2")


def test_columns_can_be_named(tmp_path):
    """A named column wins over the usual one; the id column, too."""
    row = {"question": "no", "answer": "no", "text": "1 + 1 ?", "gold": 2, "key": "k7"}
    path = write(tmp_path / "d.jsonl", [row])
    (problem,) = load_problems(path, columns={"question": "text", "answer": "gold", "id": "key"})
    assert (problem.question, problem.answer, problem.id) == ("1 + 1 ?", 2, "k7")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("missing", [1, 0], ids=["later row", "first row"])
def test_rows_without_answer_are_left_out_and_counted(tmp_path, caplog, kind, missing):
    rows = [row | {"answer": None if number in (missing, 4) else row["answer"]} for number, row in enumerate(ROWS)]
    if kind == "jsonl":
        del rows[missing]["answer"]  # a key that is not there means the same
    with caplog.at_level(logging.WARNING, "stepcredit"):
        problems = load_problems(write(tmp_path / f"d.{kind}", rows))
    kept = [row for number, row in enumerate(ROWS) if number not in (missing, 4)]
    assert [(p.question, p.answer) for p in problems] == [(row["question"], row["answer"]) for row in kept]
    assert "2 rows without an answer were left out" in caplog.text
    assert place(kind, missing + 1) in caplog.text


@pytest.mark.parametrize("answers", [["007", "4"], ["1.50", "2"], ["12", "x^2"], ["4", ""], ["None", "1e3"]], ids=str)
def test_csv_answers_stay_as_written(tmp_path, answers):
    """Text of a CSV file is not turned into numbers and back."""
    rows = [{"question": f"q{number}", "answer": answer} for number, answer in enumerate(answers)]
    assert [p.answer for p in load_problems(write(tmp_path / "d.csv", rows))] == [a for a in answers if a]


def test_chat_messages(tmp_path):
    chat = [{"role": "user", "content": "1 + 1 ?"}]
    for kind in ("jsonl", "parquet"):
        (problem,) = load_problems(write(tmp_path / f"d.{kind}", [{"prompt": chat, "answer": "2"}]))
        assert problem.question == chat


def test_number_answer_is_a_number(tmp_path):
    (problem,) = load_problems(write(tmp_path / "d.jsonl", [{"question": "q", "answer": 0}]))
    assert problem.answer == 0 and type(problem.answer) is int


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("d.jsonl", b'{"question": "a", "answer": "1"}\n{"question"\n', ["d.jsonl, line 2", "not JSON"]),
        ("d.jsonl", b'\n["a"]\n', ["d.jsonl, line 2", "object", "list"]),
        ("d.jsonl", b"", ["d.jsonl", "empty"]),
        ("d.jsonl", b'\xff\xfe{"question": "a"}\n', ["d.jsonl"]),
        ("d.json", b"{", ["d.json"]),
        ("d.json", b"[]", ["d.json"]),
        ("d.csv", b"question,answer\n", ["d.csv", "empty"]),
        ("d.csv", b"", ["d.csv"]),
        ("d.parquet", b"PAR?", ["d.parquet"]),
        ("d.txt", b"a", ["d.txt", "'.txt'", ".jsonl", ".parquet"]),
        ("d.jsonl", b'{"question": "a", "answer": null}\n', ["d.jsonl", "no row has an answer", "'answer'", "--task."]),
        ("d.jsonl", b'{"question": 5, "answer": "1"}\n', ["d.jsonl, line 1", "'question'", "text", "5"]),
        ("d.jsonl", b'{"question": " ", "answer": "1"}\n', ["d.jsonl, line 1", "'question'", "text"]),
        ("d.jsonl", b'{"question": [], "answer": "1"}\n', ["d.jsonl, line 1", "role and content"]),
        ("d.jsonl", b'{"question": [{"role": "user"}], "answer": "1"}\n', ["d.jsonl, line 1", "role and content"]),
        ("d.jsonl", b'{"q": "a", "answer": "1"}\n', ["no question column", "q, answer", "--task.columns.question"]),
        ("d.jsonl", b'{"question": "a", "a": "1"}\n', ["no answer column", "question, a", "--task.columns.answer"]),
    ],
)  # fmt: skip
def test_bad_file(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    refused(lambda: load_problems(str(tmp_path / name)), *words)


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.csv", "./gone", "/nowhere/gone"])
def test_missing_file(tmp_path, monkeypatch, name):
    """What looks like a file is not looked for on the hub."""
    monkeypatch.chdir(tmp_path)
    refused(lambda: load_problems(name), name, "no such file")


def test_folder(tmp_path):
    refused(lambda: load_problems(str(tmp_path)), "is a folder", ".jsonl")


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"answer": "anwser"}, ["'anwser'", "task.columns.answer", "did you mean 'answer'", "question"]),
        ({"question": "zzz"}, ["'zzz'", "task.columns.question", "choices: answer, level, question"]),
        ({"id": "key"}, ["'key'", "task.columns.id"]),
        ({"anwser": "answer"}, ["task.columns.anwser", "did you mean 'answer'"]),
    ],
)
def test_unknown_column(tmp_path, columns, words):
    path = write(tmp_path / "d.jsonl", ROWS)
    refused(lambda: load_problems(path, columns=columns), *words)


# ---------------------------------------------------------------------- drawing


def task(count: int = 10, share: float = 0.2, seed: int = 0) -> DatasetTask:
    train, held_out = split_held_out([Problem(f"q{n}", "1", str(n)) for n in range(count)], share, seed=0)
    return DatasetTask("d", train, held_out, seed)


def ids(problems) -> list[str]:
    return [problem.id for problem in problems]


def test_every_row_once_a_pass_in_a_new_order():
    passes = [ids(task().draw(8 * number, 8)) for number in range(3)]
    assert len({tuple(drawn) for drawn in passes}) == 3
    assert len({tuple(sorted(drawn)) for drawn in passes}) == 1 and len(set(passes[0])) == 8


def test_draw_depends_on_the_place_alone():
    """Drawing 3 and then 9 is drawing 12, over the end of a pass too."""
    one = task()
    assert ids(one.draw(0, 3)) + ids(one.draw(3, 9)) == ids(task().draw(0, 12))


def test_seed_changes_the_order_and_not_the_split():
    one, two = task(40, seed=1), task(40, seed=2)
    assert ids(one.draw(0, 32)) != ids(two.draw(0, 32))
    assert sorted(ids(one.draw(0, 32))) == sorted(ids(two.draw(0, 32)))
    assert ids(one.held_out(99)) == ids(two.held_out(99))


@pytest.mark.parametrize("count, share", [(10, 0.2), (10, 0.9), (2, 0.5), (100, 0.1)])
def test_held_out_rows_are_never_drawn(count, share):
    one = task(count, share)
    held_out, drawn = set(ids(one.held_out(count))), set(ids(one.draw(0, 3 * count)))
    assert len(held_out) == int(count * share)
    assert held_out | drawn == {str(n) for n in range(count)} and not held_out & drawn
    assert ids(one.held_out(1)) == ids(one.held_out(count))[:1]


def test_too_few_rows_to_hold_out_is_said(caplog):
    with caplog.at_level(logging.WARNING, "stepcredit"):
        one = task(3, 0.1)
    assert ids(one.held_out(9)) == sorted(ids(one.draw(0, 3)))
    assert "too few rows" in caplog.text


# ---------------------------------------------------------------------- prompts

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if thinking %}think{% endif %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Words to ids; unknown words are 0."""
    words = ["?", "system", "user", "assistant", "think", "be", "kind", "one", "two"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core)
    made.chat_template = template
    return made


CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "one"}]


@pytest.mark.parametrize(
    "template, question, options, wanted",
    [
        (None, "one two", {}, "one two"),
        (TEMPLATE, "one two", {}, "user one two assistant"),
        (TEMPLATE, "one", {"system_prompt": "be kind"}, "system be kind user one assistant"),
        (TEMPLATE, "one", {"chat_template_kwargs": {"thinking": True}}, "user one think assistant"),
        (TEMPLATE, CHAT, {}, "user one assistant two user one assistant"),
        (TEMPLATE, CHAT[:1], {"system_prompt": "be kind"}, "system be kind user one assistant"),
    ],
)
def test_prompt(template, question, options, wanted):
    """The chat template where there is one, with the system prompt before; plain text otherwise."""
    made = tokenizer(template)
    encoded = PromptFormat(made, **options)(Problem(question))
    assert made.convert_ids_to_tokens(encoded) == wanted.split()


def test_prompt_errors():
    refused(lambda: PromptFormat(tokenizer(None), "be kind"), "task.system_prompt", "chat template")
    refused(lambda: PromptFormat(tokenizer(None))(Problem(CHAT, id="p3")), "'p3'", "chat messages", "no chat template")
    refused(lambda: PromptFormat(tokenizer(None))(Problem("", id="p3")), "'p3'", "no tokens")
    words = "'p3'", "4 tokens", "limit of 3", "--task.max-prompt-tokens"
    refused(lambda: PromptFormat(tokenizer(TEMPLATE), max_tokens=3)(Problem("one two", id="p3")), *words)
    assert len(PromptFormat(tokenizer(TEMPLATE), max_tokens=4)(Problem("one two"))) == 4


# ---------------------------------------------------------------------- real rows


@pytest.mark.parametrize("name", ["math500", "aime", "amc"])
def test_real_rows_score_their_gold_answer(name):
    """The verifier gives every boxed gold answer 1 and another answer 0."""
    if not (SHARED / f"{name}.jsonl").is_file():
        pytest.skip(f"{name}.jsonl is not on this machine")
    problems = load_problems(str(SHARED / f"{name}.jsonl"))
    problems = problems[:: max(1, len(problems) // 30)][:30]
    prompts, answers = [p.question for p in problems], [p.answer for p in problems]
    right = verify(prompts, [f"So it is \\boxed{{{answer}}}." for answer in answers], answers)
    assert [answer for answer, score in zip(answers, right, strict=True) if score != 1] == []
    wrong = verify(prompts, ["So it is \\boxed{-98765.4321}."] * len(answers), answers)
    assert wrong == [0.0] * len(answers)


# ---------------------------------------------------------------------- other sources


def test_verl_parquet_is_read_directly(tmp_path):
    """Its five columns: the prompt is chat messages, the answer stands inside reward_model."""
    rows = [
        {
            "data_source": "d",
            "prompt": [{"role": "user", "content": f"{n} + 1 ?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(n + 1)},
            "extra_info": {"index": n, "split": "train"},
        }
        for n in range(3)
    ]
    problems = load_problems(write(tmp_path / "d.parquet", rows))
    assert [(p.question[0]["content"], p.answer) for p in problems] == [(f"{n} + 1 ?", str(n + 1)) for n in range(3)]
    assert problems[2].columns["extra_info"] == {"index": 2, "split": "train"}
    assert problems[2].columns["data_source"] == "d"


def test_saved_data_set(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    both = datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS[:n]) for name, n in (("train", 4), ("test", 2))})
    both.save_to_disk(str(tmp_path / "two"))
    assert len(load_problems(str(tmp_path / "one"))) == 6
    assert len(load_problems(str(tmp_path / "two"), "test")) == 2
    refused(lambda: load_problems(str(tmp_path / "two"), "dev"), "cannot be read", "dev")


def test_messages_end_before_the_solution(tmp_path):
    """An assistant's last message is the solution, not part of the prompt."""
    chat = [{"role": "user", "content": "1 + 1 ?"}, {"role": "assistant", "content": "2"}]
    (problem,) = load_problems(write(tmp_path / "d.jsonl", [{"messages": chat, "answer": "2"}]))
    assert problem.question == chat[:1]
    refused(lambda: load_problems(write(tmp_path / "e.jsonl", [{"messages": chat[1:], "answer": "2"}])), "line 1")


def test_rows_with_tests_need_no_answer(tmp_path):
    """They are programs, judged by running their tests; other rows are mathematics."""
    row = {"task_id": 7, "prompt": "Double it.", "code": "...", "test_list": ["assert f(1) == 2"]}
    (problem,) = load_problems(write(tmp_path / "d.jsonl", [row]))
    assert (problem.id, problem.answer, problem.columns["test_list"]) == ("7", None, row["test_list"])
    assert DatasetTask("d", [problem], [problem], 0).reward_functions == ("code",)
    assert task().reward_functions == ("math",)
    refused(lambda: load_problems(write(tmp_path / "e.jsonl", [row]), needs_answer=True), "no answer column")


@pytest.mark.parametrize(
    "answer", [{"inputs": [1], "outputs": [2]}, ["a"], 2.5, 2**70, True, "2021-05-01", [["a"], {"b": None}]], ids=str
)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_answers_keep_their_types(tmp_path, kind, answer):
    (problem,) = load_problems(write(tmp_path / f"d.{kind}", [{"question": "q", "answer": answer}]))
    assert problem.answer == answer and type(problem.answer) is type(answer)


def test_ids_that_stand_twice(tmp_path, caplog):
    """Places take over, and it is said; ids from a column that was named are an error."""
    rows = [row | {"id": "a" if number in (1, 3) else str(number)} for number, row in enumerate(ROWS)]
    path = write(tmp_path / "d.jsonl", rows)
    with caplog.at_level(logging.WARNING, "stepcredit"):
        assert ids(load_problems(path)) == [f"line {number}" for number in range(1, 7)]
    assert "id 'a' of line 4 stands in line 2 already" in caplog.text
    refused(lambda: load_problems(path, columns={"id": "id"}), "'a'", "line 4", "line 2", "--task.columns.id")


# ---------------------------------------------------------------------- hostile files


def test_a_line_of_ten_megabytes(tmp_path):
    """It is read; its prompt is too long, which is found out without encoding it."""
    rows = [{"question": "one " * 2_500_000, "answer": "1"}, {"question": "one two", "answer": "2"}]
    problems = load_problems(write(tmp_path / "d.jsonl", rows))
    encode = PromptFormat(tokenizer(None), max_tokens=4)
    with pytest.raises(PromptTooLong, match="10000000 characters"):
        encode(problems[0])
    one = DatasetTask("d", problems, problems[1:], 0)
    one.fit(encode)
    assert ids(one.draw(0, 2)) == ["line 2", "line 2"]


def test_long_prompts_are_left_out_and_counted(caplog):
    problems = [Problem("one " * (1 + n % 3), "1", str(n)) for n in range(9)]
    encode = PromptFormat(tokenizer(None), max_tokens=2)
    one = DatasetTask("d", problems[:6], problems[6:], 0)
    with caplog.at_level(logging.WARNING, "stepcredit"):
        one.fit(encode)
    assert sorted(ids(one.draw(0, 4))) == ["0", "1", "3", "4"] and ids(one.held_out(9)) == ["6", "7"]
    assert "2 of 6 rows left out" in caplog.text and "1 of 3 rows left out" in caplog.text
    assert "'2': the prompt has 3 tokens" in caplog.text
    refused(lambda: DatasetTask("d", problems, problems, 0).fit(encode, "raise"), "'2'", "--task.max-prompt-tokens")
    refused(lambda: DatasetTask("d", problems[2:3], problems[2:3], 0).fit(encode), "every prompt is too long")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("d.jsonl", b"[" * 200_000 + b"\n", ["d.jsonl, line 1"]),
        ("d.jsonl", b'{"question": "a", "answer": ' + b"9" * 5000 + b"}\n", ["d.jsonl, line 1", "cannot be read"]),
        ("d.jsonl", b'{"question": "\\ud800", "answer": "1"}\n', ["d.jsonl, line 1", "surrogate"]),
        ("d.csv", b"question,answer\na,1,2\n", ["d.csv, line 2", "more values"]),
        ("d.csv", b'question,answer\n"a\xff",1\n', ["d.csv", "UTF-8"]),
        ("d.jsonl", b'{"question": "a", "answer": NaN}\n', ["no row has an answer"]),
    ],
)  # fmt: skip
def test_hostile_file(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    refused(lambda: load_problems(str(tmp_path / name)), *words)


def test_a_large_csv_field(tmp_path):
    (tmp_path / "d.csv").write_text('question,answer\n"' + "a" * 1_000_000 + '",1\n')
    (problem,) = load_problems(str(tmp_path / "d.csv"))
    assert len(problem.question) == 1_000_000


# ---------------------------------------------------------------------- prompt templates


def test_prompt_template():
    """Columns are filled in, lists line by line."""
    encode = PromptFormat(tokenizer(None), template="be {level} {question} {tests}")
    made = encode(Problem("one", "1", "p", {"level": "kind", "tests": ["two", "user"]}))
    assert tokenizer(None).convert_ids_to_tokens(made) == ["be", "kind", "one", "two", "user"]


@pytest.mark.parametrize(
    "template, words",
    [
        ("be kind", ["task.prompt_template", "{question}"]),
        ("{question} {", ["task.prompt_template", "braces"]),
        ("{question} {colour}", ["task.prompt_template", "'colour'", "question"]),
        ("{question} \\boxed{}", ["task.prompt_template"]),
    ],
)
def test_bad_prompt_template(template, words):
    refused(lambda: PromptFormat(tokenizer(None), template=template)(Problem("one", "1", "p")), *words)


def test_prompt_template_of_chat_messages_is_around_the_last_question():
    made = tokenizer(TEMPLATE)
    encode = PromptFormat(made, template="be {question} kind")
    tokens = made.convert_ids_to_tokens(encode(Problem(CHAT, id="p3")))
    assert tokens == ["user", "one", "assistant", "two", "user", "be", "one", "kind", "assistant"]
    refused(lambda: encode(Problem(CHAT[1:2], id="p3")), "'p3'", "task.prompt_template", "no user message")
