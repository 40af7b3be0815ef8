"""Data files as people have them: what is read, with which types, what is refused, and who judges which row."""

import bz2
import datetime
import decimal
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow
import pytest
import zstandard
from pyarrow import parquet
from tokenizers.processors import TemplateProcessing

from stepcredit.cli.main import main
from stepcredit.config import read_yaml, resolve
from stepcredit.demo.task import EmbeddedTask
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.records import read_trees
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.policy.loading import load_policy
from stepcredit.run.metrics import forest_metrics
from stepcredit.tasks.dataset import DatasetTask, load_problems
from stepcredit.tasks.prompts import PromptFormat
from stepcredit.tasks.rewards import build_rewards, load_rows
from stepcredit.tasks.sources import read_rows
from stepcredit.verifiers.answers import texts_of, unfit
from stepcredit.verifiers.code import has_tests
from stepcredit.verifiers.formats import think
from stepcredit.verifiers.judging import Judge
from stepcredit.verifiers.reward import reward_function
from tests.test_dataset import TEMPLATE, refused, tokenizer

LINES = '{"question": "1 + 1 ?", "answer": "2"}\n{"question": "1 + 2 ?", "answer": 3}\n'
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(name: str, *rows) -> str:
    """Lines of JSON."""
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def answers(source: str, **options) -> list:
    return [problem.answer for problem in load_problems(source, **options)]


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["d.jsonl", "d.ndjson", "d.JSONL", "d.json", "D.NDJSON"])
@pytest.mark.parametrize("packed", ["", *PACK])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
def test_json_lines_by_every_name(name, packed, mark):
    raw = mark + LINES.encode()
    Path(name + packed).write_bytes(PACK[packed](raw) if packed else raw)
    assert answers(name + packed) == ["2", 3]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.csv", "question,answer\na?,007\n"),
        ("d.CSV", "question, answer\n'a?', 007\n"),
        ("d.tsv", "question\tanswer\na, b?\t007\n"),
        ("d.csv", 'question,answer\r\n"a\n?",007\r\n\r\n'),
    ],
)
def test_tables_of_text(name, text, mark):
    Path(name).write_bytes(mark + text.encode())
    assert answers(name) == ["007"]


@pytest.mark.parametrize(
    "content",
    [
        [{"question": "q", "answer": "2021-05-01"}],
        {"data": [{"question": "q", "answer": "2021-05-01"}], "version": 1},
        {"question": ["q"], "answer": ["2021-05-01"]},
    ],
)
def test_json_keeps_dates_as_they_are(content):
    Path("d.json").write_text(json.dumps(content))
    assert answers("d.json") == ["2021-05-01"]


def test_large_numbers_and_empty_values_of_json():
    Path("d.json").write_text(
        '[{"question": "a", "answer": 1180591620717411303424}, {"question": "b", "answer": false}]'
    )
    assert answers("d.json") == [2**70, 0.0]


@pytest.mark.parametrize(
    ("kind", "values", "read"),
    [
        (pyarrow.float32(), [0.1, 1e-5], [0.1, 1e-5]),
        (pyarrow.float16(), [0.5, 0.1], [0.5, 0.1]),
        (pyarrow.float64(), [0.1, 2.0], [0.1, 2.0]),
        (pyarrow.int64(), [2**53 + 1, 0], [2**53 + 1, 0]),
        (pyarrow.binary(), [b"7", "ü".encode()], ["7", "ü"]),
        (pyarrow.date32(), [datetime.date(2021, 5, 1)] * 2, ["2021-05-01"] * 2),
        (pyarrow.decimal128(5, 2), [decimal.Decimal("1.50")] * 2, ["1.50"] * 2),
        (pyarrow.list_(pyarrow.float32()), [[0.1], []], [[0.1], []]),
        (pyarrow.struct([("a", pyarrow.float32()), ("b", pyarrow.string())]), [{"a": 0.1, "b": "c"}] * 2, None),
        (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), ["x", "y"], ["x", "y"]),
    ],
    ids=str,
)
def test_types_of_tables(kind, values, read):
    """As a person reads them; saved data sets as parquet."""
    table = pyarrow.table({"question": ["a?", "b?"], "answer": pyarrow.array(values, type=kind)})
    parquet.write_table(table, "d.parquet")
    assert answers("d.parquet") == (values if read is None else read)
    datasets.Dataset(table).save_to_disk("saved")
    assert answers("saved") == (values if read is None else read)


def test_several_files(caplog):
    """With commas or a pattern; each by its own columns, rows named by their files."""
    Path("a.jsonl").write_text(LINES)
    Path("b.csv").write_text("problem,solution\nx?,9\n")
    Path("with, comma.jsonl").write_text(LINES)
    assert answers("a.jsonl,b.csv") == answers("[ab].*") == ["2", 3, "9"]
    assert answers("with, comma.jsonl") == ["2", 3]
    assert [problem.id for problem in load_problems("a.jsonl, b.csv")] == [
        "a.jsonl line 1",
        "a.jsonl line 2",
        "b.csv line 2",
    ]
    assert resolve({"task": {"data": ["a.jsonl", "b.csv"]}}).task.data == "a.jsonl,b.csv"
    refused(lambda: load_problems("c*.jsonl"), "c*.jsonl", "no file fits")
    refused(lambda: load_problems("a.jsonl,a.jsonl"), "a.jsonl is named twice")
    refused(lambda: load_problems("a.jsonl,gone.jsonl"), "gone.jsonl", "no such file")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.jsonl.gz", b"no", ["d.jsonl.gz", "cannot be unpacked"]),
        ("d.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], ["d.jsonl.gz", "cannot be unpacked"]),
        ("d.jsonl.zst", b"no", ["d.jsonl.zst", "cannot be unpacked"]),
        ("d.jsonl", LINES.encode("utf-16"), ["d.jsonl", "UTF-16"]),
        ("d.csv", b"question;answer\na;1\n", ["d.csv", "';'", "commas"]),
        ("d.csv", b"question,answer,answer\na,1,2\n", ["d.csv", "'answer' twice"]),
        ("d.csv", b'question,answer\n"a,1\nb,2\n', ["d.csv, line", "quotes"]),
        ("d.csv", b"question,answer\na,1\nb\n", ["d.csv, line 3", "1 values for 2 columns"]),
        ("d.json", b'{"a": {"b": 1}}', ["d.json", "list of objects"]),
        (
            "d.json",
            b'{"train": [{"question": "a"}], "test": [{"question": "a"}]}',
            ["d.json", "several", "train, test"],
        ),
        ("d.jsonl", b'{"question": "a", "answer": "1", "answer": "2"}', ["d.jsonl, line 1", "'answer' stands twice"]),
        ("d.jsonl", gzip.compress(LINES.encode(), mtime=0), ["d.jsonl", "gzip", ".gz"]),
        ("d.csv", "question,answer\né,1\n".encode("cp1252"), ["d.csv", "not UTF-8", "save it as UTF-8"]),
        ("d.csv", b"prompt,answer\n\"[{'role': 'user', 'content': 'a'}]\",7\n", ["d.csv, line 2", "Python", "JSON"]),
        ("d.json", b'[{"question": "a"}, 5]', ["d.json, row 2", "object", "int"]),
        ("d.parquet.gz", b"", ["d.parquet.gz", "unknown kind"]),
        ("d.xlsx", b"", ["'.xlsx'", ".tsv"]),
    ],
)
def test_files_that_are_refused(name, content, words):
    Path(name).write_bytes(content)
    refused(lambda: load_problems(name), *words)


# ---------------------------------------------------------------------- chat messages

ASKED = [{"role": "user", "content": "one"}]


@pytest.mark.parametrize(
    ("messages", "read"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}], "one two"),
        ([{"role": "user", "content": ["one"], "name": None}], "one"),
        ([{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}], "one"),
    ],
)
def test_contents_become_text(messages, read):
    (problem,) = load_problems(write("d.jsonl", {"prompt": messages, "answer": "9"}))
    assert problem.question == [{"role": "user", "content": read}]


def test_messages_in_a_text_and_messages_that_are_legal():
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    chat = [
        {"role": "system", "content": ""},
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    (problem,) = load_problems(write("d.jsonl", {"prompt": json.dumps(chat), "answer": "9"}))
    assert problem.question == chat
    (problem,) = load_problems(write("e.jsonl", {"prompt": "[{1, 2}] is a set?", "answer": "9"}))
    assert problem.question == "[{1, 2}] is a set?"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}, ["message 1", "'image'"]),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}, ["'image_url'", "only text"]),
        ({"role": "user", "content": ""}, ["message 1", "empty"]),
        ({"role": "user", "content": None}, ["message 1", "role and content"]),
        ({"role": "system", "content": "a"}, ["no message that asks"]),
        ({"from": "bot", "value": "a"}, ["'bot'", "human"]),
    ],
)
def test_messages_that_are_refused(message, words):
    path = write("d.jsonl", {"prompt": [message], "answer": "9"})
    refused(lambda: load_problems(path), "d.jsonl, line 1", "'prompt'", *words)


def test_a_system_message_of_the_data_wins(caplog):
    made = tokenizer(TEMPLATE)
    encode = PromptFormat(made, "be kind")
    own = [{"role": "system", "content": "be"}, *ASKED]
    for _ in range(2):
        assert made.convert_ids_to_tokens(encode(Problem(own))) == ["system", "be", "user", "one", "assistant"]
    assert caplog.text.count("task.system_prompt is for problems without one") == 1


def test_prompts_that_are_rendered_already(caplog):
    made = tokenizer(TEMPLATE)
    made.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    rendered = Problem("<|user|> one assistant")
    assert len(PromptFormat(made)(rendered)) == 5 and caplog.text.count("--task.chat-template off") == 1
    encode = PromptFormat(made, chat_template="off")
    assert made.convert_ids_to_tokens(encode(rendered)) == ["<|user|>", "one", "assistant"]
    assert caplog.text.count("--task.chat-template off") == 1
    refused(lambda: encode(Problem(ASKED, id="p3")), "'p3'", "task.chat_template is off")
    refused(
        lambda: PromptFormat(made, "be kind", chat_template="off"), "task.system_prompt", "task.chat_template is off"
    )
    assert [resolve({"task": {"chat_template": value}}).task.chat_template for value in (False, "auto")] == [
        "off",
        "auto",
    ]
    refused(lambda: resolve({"task": {"chat_template": "none"}}), "task.chat_template", "'none'")


def test_a_prompt_has_no_end_token_and_one_start_token(caplog):
    made = tokenizer(None)
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    start, end = made.convert_tokens_to_ids(["<s>", "</s>"])
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", start), ("</s>", end)]
    )
    encode = PromptFormat(made)
    assert made.convert_ids_to_tokens(encode(Problem("one two"))) == ["<s>", "one", "two"]
    assert made.convert_ids_to_tokens(encode(Problem("<s> one"))) == ["<s>", "one"]
    assert "puts </s> behind every text" in caplog.text
    encode(Problem("one </s>", id="p4"))
    assert "'p4' ends with the end token </s>: its text ends so" in caplog.text


def test_a_template_without_an_assistant_turn_is_said(caplog):
    made = tokenizer("{% for m in messages %}{{ m['content'] }} </s> {% endfor %}")
    made.add_special_tokens({"eos_token": "</s>"})
    PromptFormat(made)(Problem("one", id="p4"))
    assert "the chat template adds no assistant turn" in caplog.text


@pytest.mark.parametrize(
    ("template", "options", "words"),
    [
        (
            "{{ raise_exception('no system') }}",
            {"system_prompt": "be"},
            ["no system", "(system, user)", "system_prompt"],
        ),
        ("{% for m in messages %}", {}, ["TemplateSyntaxError"]),
        ("{{ tools | length }}", {}, ["TypeError"]),
        (TEMPLATE, {"chat_template_kwargs": {"tokenize": True}}, ["task.chat_template_kwargs.tokenize"]),
        (TEMPLATE, {"chat_template_kwargs": {"max_length": 4}}, ["task.chat_template_kwargs.max_length"]),
        (None, {"chat_template_kwargs": {"thinking": True}}, ["chat_template_kwargs.thinking", "no chat template"]),
    ],
)
def test_chat_templates_that_fail(template, options, words):
    refused(lambda: PromptFormat(tokenizer(template), **options)(Problem("one", id="p4")), *words)


def test_an_argument_that_the_template_does_not_read_is_said(caplog):
    PromptFormat(tokenizer(TEMPLATE), chat_template_kwargs={"thinkng": True})
    assert "task.chat_template_kwargs.thinkng: the chat template of this tokenizer does not read it" in caplog.text


# ---------------------------------------------------------------------- answers

MATH, CODE = reward_function("math"), reward_function("code")


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        ("7", ["7"]),
        (7, ["7"]),
        (1e-7, ["0.0000001"]),
        (["2", -2], ["2", "-2", "2, -2"]),
        ('["7"]', ["7"]),
        ("[1, 2]", ["[1, 2]"]),
        (["\\frac{1}{2}"], ["\\frac{1}{2}"]),
    ],
)
def test_texts_of_answers(answer, texts):
    assert texts_of(answer) == texts and unfit(Problem("q", answer)) is None
    assert MATH.function(["q"], [f"\\boxed{{{texts[0]}}}"], [answer]) == [1.0]
    assert MATH.function(["q"], ["\\boxed{31}"], [answer]) == [0.0]


@pytest.mark.parametrize(
    "answer", [None, "", [], {"target": 24}, '{"inputs": ["3"]}', [["2"]], True, float("inf"), [" "]]
)
def test_answers_that_nobody_can_state(answer):
    problem = Problem("q", answer, "p")
    assert MATH.unfit(problem)
    judge = Judge({"math": MATH}, [1.0], None)
    assert [problem.id for problem, _ in judge.unfit([problem])] == ["p"]
    (outcome,) = judge.judge([problem], ["\\boxed{1}"])["math"]
    assert outcome.failure == "unfit" and outcome.value is None


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("7", True),
        (7, True),
        (["5/2", "2.5"], True),
        ("We add. #### 7", True),
        ("So \\boxed{7}.", True),
        ("\\text{Evelyn}", True),
        ("We first add three and four and then see that the sum of both is seven indeed", False),
        ("#### ", False),
        ("x" * 600, False),
    ],
)
def test_the_gold_check_can_fail(answer, accepted):
    """A completion is made of the answer; no text is compared with itself."""
    problem = Problem("q", answer, "p")
    check = Judge({"math": MATH}, [1.0], None).check_gold([problem])["math"]
    assert check.total == 1 and (check.failed == []) is accepted
    exact = reward_function("exact")
    assert exact.gold(problem) != answer


def test_functions_get_what_the_file_has():
    Path("typed.py").write_text(
        "def own(completions, answer, **columns): return [float(type(a) is int) for a in answer]\n"
        "def v(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):\n"
        "    return {'score': ground_truth['target'] + bonus, 'acc': True}\n"
        "def w(data_source, solution_str, ground_truth, extra_info=None, **rest): return rest.get('bonus', 0.0)\n"
    )
    problems = load_problems(write("d.jsonl", {"question": "q", "answer": 7}))
    judge = Judge({"own": reward_function("typed.own")}, [1.0], None)
    judge.workers.count = 0
    assert judge.judge(problems, ["7"])["own"][0].value == 1.0
    row = {"question": "q", "answer": "no", "bonus": 9.0, "reward_model": {"ground_truth": {"target": 24}}}
    problems = load_problems(write("v.jsonl", row))
    judge = Judge({"v": reward_function("verl:typed.v", {"bonus": 0.5})}, [1.0], None)
    judge.workers.count = 0
    assert judge.judge(problems, ["x"])["v"][0].value == 24.5
    judge = Judge({"w": reward_function("verl:typed.w")}, [1.0], None)
    judge.workers.count = 0
    assert judge.judge(problems, ["x"])["w"][0].value == 0.0, "a column of the data is no option"
    assert reward_function("verl:typed.w", {"bonus": 1}).options == {"bonus": 1}
    refused(lambda: reward_function("verl:typed.v", {"bonsu": 1}), "verl:typed.v.bonsu", "did you mean 'bonus'")


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "text", ["{given.f: {tolerance: 0.5}}", "{given: {f: {tolerance: 5e-1}}}", "{given.f: {tolerance: 5.0E-1}}"]
)
def test_options_of_dotted_functions(text):
    """Under the name as a file has it, or in sections as the command line makes them; `1e-6` is a number."""
    Path("given.py").write_text("def f(completions, tolerance=0.1, **columns): return [tolerance] * len(completions)\n")
    Path("run.yaml").write_text(f"reward:\n  functions: given.f\n  options: {text}\n")
    config = resolve(read_yaml("run.yaml"))
    rewards, _ = build_rewards(config, EmbeddedTask(0))
    assert rewards["given.f"].options == {"tolerance": 0.5}


def test_options_keep_their_types():
    """As YAML has them, but for `1e-6`; quoted text stays text."""
    Path("run.yaml").write_text(
        'reward: {options: {f: {a: 7, b: "7", c: 1e-6, d: [1, x], e: "2021-05-01", f: null, g: 1e}}}'
    )
    given = resolve(read_yaml("run.yaml")).reward.options["f"]
    assert given == {"a": 7, "b": "7", "c": 1e-6, "d": [1, "x"], "e": "2021-05-01", "f": None, "g": "1e"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mth": {"a": 1}}, ["reward.options.mth", "did you mean 'math'"]),
        ({"math": 3}, ["reward.options.math", "section", "3"]),
        ({"math": {"a": 1}}, ["reward.options.math.a", "unknown option"]),
    ],
)
def test_options_that_are_refused(options, words):
    config = resolve({"reward": {"functions": "math", "options": options}})
    refused(lambda: build_rewards(config, EmbeddedTask(0)), *words)


# ---------------------------------------------------------------------- mixed data

TESTS = {"inputs": ["3\n"], "outputs": ["4\n"]}
MIXED = [
    {"prompt": "3+4?", "data_source": "numina_olympiads", "reward_model": {"ground_truth": "7"}, "pred": "\\boxed{7}"},
    {"prompt": "n+1", "data_source": "taco", "reward_model": {"ground_truth": json.dumps(TESTS)}, "pred": "print(4)"},
    {"prompt": "n+1", "data_source": "mbpp", "test_list": ["assert f(3) == 4"], "pred": "f = lambda n: n + 1"},
]


def mixed(tmp: str = "m.jsonl", **reward):
    config = resolve({"task": {"data": write(tmp, *MIXED)}, "reward": {"workers": 0} | reward})
    problems = load_rows(config)
    rewards, weights = build_rewards(config, DatasetTask("m", problems, problems, 0))
    return problems, rewards, weights


def test_each_row_is_judged_by_its_kind(caplog):
    """Tests make a program, all else is mathematics."""
    problems, rewards, _ = mixed()
    assert list(rewards) == ["math", "code"] and len(problems) == 3
    assert [[name for name, reward in rewards.items() if not reward.unfit(p)] for p in problems] == [
        ["math"],
        ["code"],
        ["code"],
    ]
    assert "rows with tests are judged by 'code', the others by 'math'" in caplog.text
    assert [has_tests(p.columns | {"answer": p.answer}) for p in problems] == [False, True, True]


def test_kinds_of_the_config(caplog):
    functions = "def f(completions, **c): return [1.0] * len(completions)\ndef g(completions, **c): return [2.0]\n"
    Path("kind.py").write_text(functions)
    kinds = {"numina*": "math", "taco": "kind.f,kind.g", "apps": "code"}
    problems, rewards, weights = mixed(kinds=kinds, functions="format_boxed")
    assert list(rewards) == ["format_boxed", "math", "kind.f", "kind.g", "code"] and len(weights) == 5
    judge = Judge(rewards, [0.5, 1.0, 1.0, 10.0, 1.0], None)
    judge.workers.count = 0
    found = judge.judge(problems, [row["pred"] for row in MIXED])
    verdicts = [judge.combine({name: column[row] for name, column in found.items()}) for row in range(3)]
    assert [verdict.reward for verdict in verdicts] == [1.5, 21.0, 0.0]
    assert [list(verdict.parts) for verdict in verdicts] == [
        ["format_boxed", "math"],
        ["format_boxed", "kind.f", "kind.g"],
        ["format_boxed"],
    ]
    assert "no row is of kind 'apps'" in caplog.text
    refused(lambda: mixed(kinds=kinds, kind_column="source"), "reward.kind_column", "'source'", "data_source")


def test_rows_for_no_function_are_counted(caplog):
    """They have no reward and do not end the run; a run without any row to judge does not start."""
    tokens = load_policy("embedded", "cpu").tokenizer
    good, bad = Problem("q", "7", "good"), Problem("q", {"target": 3}, "bad")
    trees = [Tree(problem, [1], [Segment([5, 2]), Segment([6, 2])]) for problem in (good, bad)]
    judge = Judge({"math": MATH}, [1.0], tokens, on_failure="raise")
    judge.workers.count = 0
    forest = judge(Forest.from_trees(trees))
    assert forest.segment["has_reward"].tolist() == [True, True, False, False]
    metrics = forest_metrics(forest.with_token(advantages=forest.token["token_ids"] * 0.0))
    assert metrics["reward/unfit"] == 0.5 and metrics["reward/error"] == 0.0
    assert caplog.text.count("is for no reward function") == 1
    write("u.jsonl", {"question": "q", "answer": {"target": 3}}, {"question": "q", "answer": "3"})
    assert main(["score", "--data", "u.jsonl", "--gold"]) == 1
    assert "1 of 2 rows are for no reward function" in caplog.text
    write("u.jsonl", {"question": "q", "answer": {"target": 3}})
    assert main(["score", "--data", "u.jsonl", "--gold"]) == 2


# ---------------------------------------------------------------------- how the prompt ended


@pytest.mark.parametrize(
    ("end", "text", "reward"),
    [
        ("assistant\n<think>\n", "a</think> 5", 1.0),
        ("assistant\n<think>\n", "<think>a</think> 5", 0.0),
        ("assistant\n<think>\n\n</think>\n\n", "5", 1.0),
        ("assistant\n", "<think>a</think> 5", 1.0),
        ("assistant\n", "a</think> 5", 0.0),
    ],
)
def test_format_think_sees_how_the_prompt_ended(end, text, reward):
    assert think([""], [text], prompt_end=[end]) == [reward]


def test_functions_see_the_prompts_end_and_special_tokens_where_they_ask():
    """But for the stop token; saved rollouts keep the prompt's end."""
    made = tokenizer(None)
    made.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": ["<think>", "</think>"]})
    ids = made.convert_tokens_to_ids
    seen = {}

    def plain(completions, prompt_end, **columns):
        seen["plain"] = completions, prompt_end
        return [0.0] * len(completions)

    def tags(completions, **columns):
        seen["tags"] = completions
        return [0.0] * len(completions)

    tags.skip_special_tokens = False
    segments = [Segment(ids(["one", "</think>", "two", "</s>"])), Segment(ids(["one", "</s>"]), finish="length")]
    forest = Forest.from_trees([Tree(Problem("q", "1", "p"), ids(["user", "<think>"]), segments)])
    rewards = {
        "plain": reward_function("format_boxed").__class__("plain", plain),
        "tags": reward_function("format_boxed").__class__("tags", tags, skip_special_tokens=False),
    }
    judged = Judge(rewards, [1.0, 1.0], made)(forest)
    assert [text.split() for text in seen["plain"][0]] == [["one", "two"], ["one"]]
    assert [end.split() for end in seen["plain"][1]] == [["user", "<think>"]] * 2
    assert [text.split() for text in seen["tags"]] == [["one", "</think>", "two"], ["one", "</s>"]]
    assert judged.to_trees()[0].extra["prompt_end"].split() == ["user", "<think>"]
    Judge(rewards, [1.0, 1.0], made, skip_special_tokens=False)(forest)
    assert [text.split() for text in seen["plain"][0]] == [["one", "</think>", "two"], ["one", "</s>"]]
    assert Judge({"format_think": reward_function("format_think")}, [1.0], made)(forest).segment["reward"].tolist() == [
        1,
        0,
    ]


# ---------------------------------------------------------------------- rollouts of others


def trl() -> str:
    rows = {
        "step": ["10"] * 4,
        "prompt": ["3+4?", "3+4?", "5+4?", "5+4?"],
        "completion": ["\\boxed{7}", "8", "\\boxed{9}", ""],
        "accuracy": [1.0, 0.0, 1.0, None],
        "form": [0.5, 0.0, 0.5, 0.0],
        "advantage": [0.7, -0.7, 0.7, -0.7],
    }
    parquet.write_table(pyarrow.table(rows), "completions.parquet")
    return "completions.parquet"


def rewards_of(path: str) -> list:
    return [[segment.reward for segment in tree.segments] for tree in read_trees(path)]


def test_rollouts_of_trl(capsys, caplog):
    words = ["credit", "--in", trl(), "--out", "o.jsonl", "--credit.name", "grpo"]
    assert main(words) == 0 and rewards_of("o.jsonl") == [[1.5, 0.0], [1.5, 0.0]]
    assert "written by TRL; reward: 1 accuracy + 1 form; tokens: the bytes" in caplog.text
    first, second = read_trees("o.jsonl")
    assert bytes(first.segments[0].token_ids).decode() == "\\boxed{7}" and second.segments[1].token_ids == [0]
    saved = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    assert [segment["advantages"][0] > 0 for segment in saved[0]["segments"]] == [True, False]
    assert saved[0]["segments"][0]["advantage"] == 0.7
    assert main([*words, "--reward.functions", "accuracy,form", "--reward.weights", "1,2"]) == 0
    assert rewards_of("o.jsonl") == [[2.0, 0.0], [2.0, 0.0]]
    assert main([*words, "--reward.functions", "acuracy"]) == 2
    assert "did you mean 'accuracy'" in capsys.readouterr().err
    write("d.jsonl", {"question": "3+4?", "answer": 7}, {"question": "5+4?", "answer": "9"})
    assert main(["score", "--in", trl(), "--data", "d.jsonl", "--verifier", "math"]) == 0
    assert "2 of 4 completions accepted; 2 rewards differ" in capsys.readouterr().out


def test_rollouts_of_verl(capsys, caplog):
    rows = [
        {"input": f"user\n{n}+4?\nassistant\n", "output": f"\\boxed{{{out}}}", "gts": str(n + 4), "score": s, "step": 5}
        for n, out, s in ((3, 7, 1.0), (3, 8, 0.0), (5, 9, 0.0), (5, 8, -1.0))
    ]
    path = write("5.jsonl", *rows)
    assert main(["score", "--in", path, "--verifier", "math", "--json", "s.json", "--out", "o.jsonl"]) == 0
    assert rewards_of("o.jsonl") == [[1.0, 0.0], [1.0, 0.0]]
    assert [row["before"] for row in json.loads(Path("s.json").read_text())["changed"]] == [0.0, -1.0]
    assert main(["credit", "--in", path, "--out", "c.jsonl", "--credit.name", "rloo", "--model", "embedded"]) == 0
    assert rewards_of("c.jsonl") == [[1.0, 0.0], [0.0, -1.0]]
    assert "written by verl; reward: 1 score; tokens: the tokenizer's" in caplog.text
    del rows[0]["score"], rows[1]["score"], rows[2]["score"], rows[3]["score"]
    assert main(["credit", "--in", write("6.jsonl", *rows), "--out", "c.jsonl", "--credit.name", "rloo"]) == 2
    assert "no column of rewards" in capsys.readouterr().err


def test_rollouts_that_are_refused(capsys):
    rows = {"prompt": ["a"], "completion": [5], "r": [1.0]}
    parquet.write_table(pyarrow.table(rows), "a.parquet")
    parquet.write_table(pyarrow.table({"text": ["a"]}), "b.parquet")
    for path, word in (("a.parquet", "'completion' must be text"), ("b.parquet", "neither prompt and completion")):
        assert main(["credit", "--in", path, "--out", "o.jsonl", "--credit.name", "grpo"]) == 2
        assert word in capsys.readouterr().err


# ---------------------------------------------------------------------- recipes and fingerprints


def test_structures_as_json_text_and_unseen_images(caplog):
    """verl's columns in a table of text; pictures beside a question are not shown, which is said."""
    row = {
        "question": "a",
        "answer": "no",
        "reward_model": '{"style": "rule", "ground_truth": "7"}',
        "images": ["x.png"],
    }
    assert answers(write("d.jsonl", row)) == ["7"]
    assert "1 rows have something in column 'images', which no prompt shows" in caplog.text


def test_the_recipe_of_mathematics_takes_verls_messages():
    rows = [
        {"prompt": [{"role": "user", "content": f"{n} + 1 ?"}], "reward_model": {"ground_truth": str(n + 1)}}
        for n in range(2)
    ]
    recipe = Path(__file__).parents[1] / "recipes" / "math.yaml"
    assert main(["score", "--data", write("d.jsonl", *rows), "--gold"]) == 0
    from stepcredit.config import read_yaml

    config = resolve(read_yaml(str(recipe)))
    made = tokenizer(TEMPLATE)
    encode = PromptFormat(made, template=config.task.prompt_template, max_tokens=99)
    rendered = []
    made.apply_chat_template = lambda messages, **options: rendered.append(messages) or {"input_ids": [1]}
    encode(load_problems("d.jsonl")[0])
    assert rendered[0][0]["content"].startswith("0 + 1 ?\n\nReason step by step")


def test_fingerprints_are_of_the_rows():
    """Contents and order count; where a file lies, how it is packed and what rows are called do not."""

    def of(source: str) -> str:
        problems = load_problems(source)
        return DatasetTask(source, problems, problems, 0).fingerprint()

    rows = [{"question": "a", "answer": 1, "level": 2}, {"question": "b", "answer": "2"}]
    base = of(write("a.jsonl", *rows))
    Path("b.jsonl.gz").write_bytes(gzip.compress(b"\n" + Path("a.jsonl").read_bytes()))
    assert of("b.jsonl.gz") == base
    others = [
        rows[::-1],
        rows[:1],
        [rows[0] | {"answer": "1"}, rows[1]],
        [rows[0] | {"level": 3}, rows[1]],
        [rows[0] | {"question": "c"}, rows[1]],
    ]
    assert len({base, *(of(write("c.jsonl", *each)) for each in others)}) == 6
    assert EmbeddedTask(0).fingerprint() == EmbeddedTask(0).fingerprint() != EmbeddedTask(1).fingerprint()


def test_rows_say_where_they_stand():
    write("a.jsonl", {"a": 1})
    assert [(row.where, row.place) for row in read_rows("a.jsonl", "train")] == [("a.jsonl, line 1", "line 1")]
    with pytest.raises(UserError, match="no such file"):
        list(read_rows("gone.tsv", "train"))
