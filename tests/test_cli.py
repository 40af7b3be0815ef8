"""The command line: help without heavy imports, one-line errors with a remedy, and credit of saved rollouts."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

import stepcredit
from stepcredit.cli.arguments import parse
from stepcredit.cli.main import COMMANDS, main
from stepcredit.config import Config, resolve
from stepcredit.config.algorithms import ALGORITHMS

EMBEDDED = Path(stepcredit.__file__).parent / "demo" / "model"
TINY = ["--iterations", "1", "--train.problems-per-iteration", "2", "--group-size", "2", "--num-problems", "2",
        "--max-new-tokens", "8", "--device", "cpu", "--run-dir", "run"]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Commands run in the test's own folder, which is also where a user's modules are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def lines(path: str, *rows) -> str:
    """A file of JSON lines; text stands as it is."""
    Path(path).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def module(name: str, code: str) -> None:
    Path(f"{name}.py").write_text(code)
    sys.modules.pop(name, None)


def ran(*words: str) -> int:
    return main([str(word) for word in words])


# ---------------------------------------------------------------------- help


@pytest.mark.parametrize("words", [["--help"], [], *([command, "--help"] for command in COMMANDS)], ids=str)
def test_help_is_short(capsys, words):
    """Under 100 lines that fit a terminal, with examples that the command would take."""
    assert main(words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) < 100 and max(map(len, shown)) <= 120
    lines("run.yaml", "")
    examples = [line.split()[1:] for line in shown if line.startswith("  stepcredit ") and "--" in line]
    assert examples
    for command, *rest in examples:
        rest = shlex.split(" ".join(rest).split("   ")[0])
        own: dict[str, str | None] = dict.fromkeys(("config", "resume", "in", "out", "prompt", "steps", "batch-size"))
        own |= dict.fromkeys(("json", "records", "verifier", "completion-column", "prm", "ref")) | dict.fromkeys(
            ("gpus", "gpu-memory-gib")
        )
        own |= dict.fromkeys(("credits", "iteration", "num-rollouts", "num-completions")) | {"gold": "false"}
        rest = rest[1:] if command == "audit" else rest  # what it looks at
        if command == "config":
            own |= dict.fromkeys(("from", "processes"))
            theirs = rest.index("--from") + 2
            rest = [word for word in rest[:theirs] + rest[theirs + 1 :] if "=" not in word]
        if command in ("algorithms", "report", "show", "compare"):
            assert not {word for word in rest if word.startswith("-")} - set(shown_options(shown)), rest
        elif "--prompt" not in rest:
            resolve(parse(rest, own, command)[0])


def shown_options(shown: list[str]) -> list[str]:
    """The options that a help text explains."""
    rows = [line.split() for line in shown if line.startswith("  -")]
    return [word.strip(",") for words in rows for word in words if word.startswith("-")]


def test_help_names_every_command(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    assert [command for command in COMMANDS if f"stepcredit {command}" not in shown] == []


def test_train_help_names_every_algorithm_and_option(capsys):
    """What the schema has, the help has, with its default; the help of credit has a line about each algorithm."""
    main(["credit", "--help"])
    shown = capsys.readouterr().out
    assert [name for name, row in ALGORITHMS.items() if f"  {name} " not in shown or row.summary not in shown] == []
    main(["train", "--help"])
    shown = capsys.readouterr().out
    assert [name for name, row in ALGORITHMS.items() if f" {name} ({row.paper})" not in shown] == []
    missing = []
    for name, value in Config():
        if not isinstance(value, BaseModel):
            missing += [name] * (f"--{name.replace('_', '-')} " not in shown)
            continue
        section = shown.partition(f"--{name}.")[2].partition("  --")[0]
        missing += [f"{name}.{option}" for option in leaves(value) if f" {option} " not in f" {section}"]
    assert missing == []


def leaves(section: BaseModel, prefix: str = ""):
    for name, value in section:
        yield from leaves(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [prefix + name]


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]], ids=str)
def test_help_imports_nothing_heavy(words):
    code = f"import sys; from stepcredit.cli.main import main; main({words}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "datasets", "numpy"} & set(done.stdout.splitlines()[-1].split()) == set()


def test_version_and_interrupt(capsys, monkeypatch):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "train", interrupted)
    assert main(["--version"]) == 0 and stepcredit.__version__ in capsys.readouterr().out
    assert main(["train"]) == 130 and "interrupted" in capsys.readouterr().err


# ---------------------------------------------------------------------- what is refused

GOOD = {"question": "Ivy = 14 . Mia = Ivy - 1 . Mia ?", "answer": "13"}
TREE = {"id": "a", "segments": [{"token_ids": [1, 2], "reward": 1.0}, {"token_ids": [3], "reward": 0.0}]}
FOLDER = ("config.json", "generation_config.json", "model.safetensors")


def tree(**changes) -> dict:
    return TREE | {"segments": [TREE["segments"][0], TREE["segments"][1] | changes]}


def files(folder: Path) -> None:
    """Everything that the bad inputs below name."""
    lines("good.jsonl", *[GOOD] * 12)
    lines("broken.jsonl", GOOD, '{"question": ')
    lines("empty.jsonl")
    lines("noanswer.jsonl", *[GOOD | {"answer": None}] * 3)
    lines("long.jsonl", *[GOOD] * 12, GOOD | {"question": "Ivy = 14 . " * 30, "id": "p13"})
    (folder / "latin.jsonl").write_bytes(b'{"question": "\xe9", "answer": "1"}\n')
    (folder / "latin.yaml").write_bytes(b"run_dir: \xe9\n")
    lines("trees.jsonl", TREE)
    lines("length.jsonl", TREE, tree(old_logprobs=[-1, -2], ref_logprobs=[-1]))
    lines("parent.jsonl", TREE, tree(parent=7))
    for name, kept in (("nomodel", ("tokenizer.json", "tokenizer_config.json")), ("notokenizer", FOLDER), ("full", ())):
        (folder / name).mkdir()
        for file in kept:
            shutil.copy(EMBEDDED / file, folder / name / file)
    lines("full/notes.txt", "mine")
    for name, value in (("nan", "float('nan')"), ("inf", "float('inf')"), ("word", "'1'")):
        module(f"reward_{name}", f"def f(completions, **columns):\n    return [{value}] * len(completions)\n")
    module("reward_few", "def f(completions, **columns):\n    return []\n")
    module("credit_few", "import torch\ndef f(forest):\n    return torch.zeros(2)\n")
    module("credit_list", "def f(forest):\n    return [0.0] * forest.num_tokens\n")
    module("credit_nan", "import torch\ndef f(forest):\n    return torch.full((forest.num_tokens,), float('nan'))\n")


CREDIT = "credit --out out.jsonl --in"
BAD = {
    "train --data gone.jsonl": ["gone.jsonl", "no such file"],
    "train --data broken.jsonl": ["broken.jsonl, line 2", "not JSON"],
    "train --data latin.jsonl": ["latin.jsonl"],
    "train latin.yaml": ["latin.yaml"],
    "train --data good.jsonl --task.columns.answer anser": ["good.jsonl", "'anser'", "did you mean 'answer'"],
    "train --data empty.jsonl": ["empty.jsonl", "empty"],
    "train --data noanswer.jsonl": ["noanswer.jsonl", "no row has an answer", "--task.columns.answer"],
    "train --data long.jsonl --task.max-prompt-tokens 50 --task.long-prompts raise": [
        "'p13'",
        "limit of 50",
        "--task.max-prompt-tokens",
    ],
    "train --task.max-prompt-tokens 3": ["limit of 3", "--task.max-prompt-tokens"],
    "train --task.system-prompt kind": ["task.system_prompt", "chat template"],
    "train --model nomodel": ["'nomodel'", "no model", "config.json"],
    "train --model notokenizer": ["'notokenizer'", "no tokenizer", "tokenizer.json"],
    "train --model ./gone": ["'./gone'"],
    "train --iteration 3": ["--iteration", "unknown option", "did you mean --iterations?"],
    "train --train.sed 3": ["train.sed", "unknown option", "did you mean 'seed'"],
    "train --algorithm grop": ["'grop'", "did you mean 'grpo'"],
    "train --credit.name grop": ["credit.name", "'grop'", "did you mean 'grpo'", "dotted path"],
    "train --credit.name no_such_module.f": ["credit.name", "'no_such_module.f'"],
    "train --credit.beta 3": ["'grpo'", "no option 'beta'"],
    "train --algorithm spro --credit.beta big": ["credit.beta", "'big'", "float"],
    "train --algorithm spro --credit.uniform never": ["credit.uniform", "'never'", "keep, drop"],
    "train --reward.functions chian": ["reward.functions", "'chian'", "did you mean 'chain'"],
    "train --reward.weights [1,2]": ["reward.weights", "2 weights for 1 functions"],
    "train --shapers drop": ["shapers", "'drop'", "drop_uniform"],
    "train --group-size -4": ["growth.group_size", "-4", "1"],
    "train --group-size": ["--group-size", "needs a value"],
    "train --temperature 0": ["sampler.temperature", "above 0"],
    "train --run-dir full": ["run_dir", "'full'", "not empty", "--run-dir", "--resume auto"],
    "train --run-dir good.jsonl": ["run_dir", "'good.jsonl' is a file"],
    "train --resume gone": ["--resume", "'gone'"],
    "train --resume full": ["--resume", "'full'", "no checkpoint"],
    "train --device gpu": ["train.device", "'gpu'", "auto or cpu"],
    "train --loss.dual-clip 0.5": ["loss.dual_clip", "0.5"],
    "train --reward.functions reward_nan.f": ["'reward_nan.f'", "NaN", "'held_out-0-0'", "or None"],
    "train --reward.functions reward_inf.f": ["'reward_inf.f'", "inf"],
    "train --reward.functions reward_word.f": ["'reward_word.f'", "'1'", "number or None"],
    "train --reward.functions reward_few.f": ["'reward_few.f'", "0 values for 1 completions", "all "],
    "trian": ["'trian'", "did you mean 'train'"],
    "eval --task chain": ["task", "section"],
    "eval --num-problems 0": ["num_problems"],
    "eval --num-problems 1 --max-new-tokens 2 --json gone/x.json": ["--json", "gone"],
    "sample --num-problems 0": ["num_problems"],
    "sample --num-problems 1 --max-new-tokens 2 --out gone/x.jsonl": ["--out", "gone"],
    "warmstart": ["--out", "missing"],
    "warmstart --out x --steps 0": ["--steps", "at least 1", "'0'"],
    "warmstart --out full": ["--out", "'full'", "not an empty folder"],
    "credit --in trees.jsonl": ["--out", "missing"],
    f"{CREDIT} gone.jsonl": ["gone.jsonl", "no such file"],
    f"{CREDIT} empty.jsonl": ["empty.jsonl", "no rollouts"],
    f"{CREDIT} length.jsonl --credit.name spro": ["length.jsonl, line 2, segment 1", "old_logprobs", "2 values for 1"],
    f"{CREDIT} parent.jsonl": ["parent.jsonl, line 2", "segment 1", "parent 7 does not exist"],
    f"{CREDIT} trees.jsonl --credit.name spro": ["trees.jsonl", "'old_logprobs'"],
    f"{CREDIT} trees.jsonl --credit spro": ["credit", "section"],
    f"{CREDIT} trees.jsonl --credit.name opo --credit.leave-one-ut true": ["'opo'", "did you mean 'leave_one_out'"],
    f"{CREDIT} trees.jsonl --credit.name credit_few.f": ["'credit_few.f'", "(2,)", "3 tokens"],
    f"{CREDIT} trees.jsonl --credit.name credit_list.f": ["'credit_list.f'", "list"],
    f"{CREDIT} trees.jsonl --credit.name credit_nan.f": ["'credit_nan.f'", "not finite", "'a'"],
    "credit --in trees.jsonl --out gone/out.jsonl": ["--out", "'gone'", "does not exist"],
    "credit --in trees.jsonl --out .": ["--out", "."],
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input(here, capsys, command):
    """Exit code 2, one line that names the thing and a remedy, and no run folder unless rewards are at fault."""
    files(here)
    words = command.split()
    if words[0] == "train":
        words[1:1] = TINY
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("stepcredit: error: ")
    assert [word for word in BAD[command] if word not in error[0]] == []
    assert not Path("out.jsonl").exists() and Path("run").exists() == ("reward_" in command)


def test_bad_input_of_the_installed_command(here):
    """The same through a process of its own: nothing else on stderr, no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "stepcredit", "train", "--data", "gone.jsonl"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("stepcredit: error: gone.jsonl: no such file") and done.stderr.count("\n") == 1
    assert list(here.iterdir()) == []


# ---------------------------------------------------------------------- credit of saved rollouts


def scored(*words: str) -> list[dict]:
    assert ran("credit", "--in", "in.jsonl", "--out", "out.jsonl", *words) == 0
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


SPRO = {
    "log_ratios": [[0.2, -0.1, 0.4], [0, 0.3], [-0.2, 0.1, 0.1, 0.5]],
    "rewards": [1, 0, 1],
    "process": [[0.010, 0, 0.0125], [0, 0.010], [-0.010, -0.010, -0.0125, 0]],
    "advantages": [[0.58735, 0.57735, 0.58985], [-1.15470, -1.14470], [0.56735, 0.56735, 0.56485, 0.57735]],
}


@pytest.mark.parametrize("options", [[], ["--credit.beta", "0.05"]], ids=str)
def test_credit_spro_vector(options):
    """Three responses, beta 0.05, worked out by hand."""
    segments = [
        {"token_ids": [5] * len(row), "reward": reward, "ref_logprobs": [-1.0] * len(row), "note": "mine",
         "old_logprobs": [value - 1 for value in row]}
        for row, reward in zip(SPRO["log_ratios"], SPRO["rewards"], strict=True)
    ]  # fmt: skip
    lines("in.jsonl", {"id": "a", "segments": segments, "lab": 7})
    (tree,) = scored("--credit.name", "spro", *options)
    for number, segment in enumerate(tree["segments"]):
        assert segment["advantages"] == pytest.approx(SPRO["advantages"][number], abs=1e-5)
        assert segment["process"] == pytest.approx(SPRO["process"][number], abs=1e-6)
        assert segment["weights"] == pytest.approx([1 / 3 / len(segment["token_ids"])] * len(segment["token_ids"]))
        assert segment["note"] == "mine"
    assert tree["lab"] == 7


@pytest.mark.parametrize(
    "options, wanted",
    [([], [0.6, -0.4, 0.6, -0.4]), (["--credit.leave-one-out", "true"], [0.6667, -0.6667, 0.8571, -0.5])],
)
def test_credit_opo_vector(options, wanted):
    """Lengths 100, 400, 300, 200 and rewards 1, 0, 1, 0: baseline 0.4; and without the own completion."""
    pairs = zip([100, 400, 300, 200], [1, 0, 1, 0], strict=True)
    lines("in.jsonl", {"segments": [{"token_ids": [5] * length, "reward": reward} for length, reward in pairs]})
    (tree,) = scored("--credit.name", "opo", *options)
    assert [segment["advantages"][0] for segment in tree["segments"]] == pytest.approx(wanted, abs=5e-5)
    assert all(len(set(segment["advantages"])) == 1 for segment in tree["segments"])


def test_credit_of_ones_own(capsys):
    """A function by dotted path gets the forest and its options."""
    code = "def f(forest, scale=1.0):\n    return scale * forest.segment['reward'][forest.token['segment']]\n"
    module("credit_mine", code)
    lines("in.jsonl", TREE)
    (tree,) = scored("--credit.name", "credit_mine.f", "--credit.scale", "2.5")
    assert [segment["advantages"] for segment in tree["segments"]] == [[2.5, 2.5], [0.0]]
    assert "credit_mine.f: 1 trees, 2 segments, 3 tokens" in capsys.readouterr().out


# ---------------------------------------------------------------------- looking


def test_eval_writes_its_numbers(capsys):
    assert ran("eval", "--num-problems", 3, "--num-samples", 2, "--max-new-tokens", 40, "--json", "x.json") == 0
    numbers = json.loads(Path("x.json").read_text())
    assert {"eval/accuracy", "eval/accuracy_greedy", "eval/pass@2", "eval/maj@2", "eval/length"} < numbers.keys()
    assert numbers["data"]["embedded"]["num_problems"] == 3
    assert numbers["eval/accuracy"] <= numbers["eval/pass@2"]
    assert f"{numbers['eval/accuracy']:.1%}" in capsys.readouterr().out


def test_sample_writes_records_that_credit_reads(capsys):
    words = "sample --num-problems 2 --group-size 3 --max-new-tokens 40 --out in.jsonl"
    assert ran(*words.split()) == 0
    assert capsys.readouterr().out.count("answer: ") == 2
    trees = scored("--credit.name", "rloo")
    assert [len(tree["segments"]) for tree in trees] == [3, 3]
    assert all(segment["text"] and segment["rewards"].keys() == {"chain"} for t in trees for segment in t["segments"])


def test_sample_a_prompt_of_ones_own(capsys):
    assert main(["sample", "--prompt", GOOD["question"], "--group-size", "2", "--temperature", "0"]) == 0
    shown = capsys.readouterr().out
    assert GOOD["question"] in shown and shown.count("####") == 2 and "answer:" not in shown


def test_an_unexpected_error_has_a_code_of_its_own(monkeypatch, capsys):
    """Not the one of a run that learnt nothing."""

    def fails(words):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setitem(COMMANDS, "credit", fails)
    assert main(["credit"]) == 70
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("stepcredit: error: division by zero\n")
    assert main(["--help"]) == 0 and "70 unexpected" in capsys.readouterr().out.replace("\n", " ")
