"""A run in the terminal: curves, shaded tokens, trees, runs in any state, and completions shown by training."""

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from rich.text import Text
from test_train import train

import stepcredit.display.token_texts
from stepcredit.cli.main import main as command
from stepcredit.cli.show import HELP, main
from stepcredit.config import resolve
from stepcredit.display.curves import blocks, curves, sparkline
from stepcredit.display.example import example_group, short_view
from stepcredit.display.groups import group_view, select_leaves
from stepcredit.display.numbers import MINUS
from stepcredit.display.rollouts import read_groups_of_file
from stepcredit.display.shading import Shading, Tokens, shaded, step_means_line, style_of
from stepcredit.display.token_texts import TokenTexts
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.processes.ranks import Ranks
from stepcredit.run.tracking import Tracker, open_tracker

VOCABULARY = ["Ann", " =", " 3", " .", " Bob", "\n", " [red]x[/red]", " \x1b[31mred", "\u202eabc", "<end>", " 4"]
ESCAPE = "\x1b"


class Words:
    """A tokenizer of a few texts."""

    all_special_ids = (9,)

    def __len__(self) -> int:
        return len(VOCABULARY)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(VOCABULARY[token] for token in ids)

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row) for row in rows]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Texts of the tokens above, on a terminal of 100 columns."""
    monkeypatch.setattr(stepcredit.display.token_texts, "token_texts_of", lambda run: TokenTexts(Words()))
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORFGBG"):
        monkeypatch.delenv(name, raising=False)


def segment(ids: list[int], advantages: float | list[float], reward: float | None = None, **more) -> dict:
    """A segment of a record; one number stands for all tokens."""
    values = advantages if isinstance(advantages, list) else [advantages] * len(ids)
    return {"token_ids": ids, "advantages": values, "reward": reward, **more}


RIGHT = segment([0, 1, 2, 3, 4, 1, 10, 9], [0.5, 0.5, 0.5, 0.5, -0.25, -0.25, -0.25, -0.25], 1.0, entropy=[0.5] * 8)
FALSE = segment([0, 1, 10, 3], -1.0, 0.0, finish="length", entropy=[0.1] * 4)
RECORD = {"id": "p1", "prompt": "Ann ?", "answer": "3", "segments": [RIGHT, FALSE]}
EQUAL = {"id": "p2", "prompt": "Bob ?", "segments": [segment([0, 3], 0.0, 0.0), segment([4, 3], 0.0, None)]}
TREE = {
    "id": "t1",
    "prompt": "Ann ?",
    "segments": [
        segment([0, 1], 0.125, value=0.5),
        segment([2, 3], 0.75, 1.0, parent=0),
        {"token_ids": [10, 3], "reward": 0.0, "parent": 0, "pruned": True},
        segment([4, 1, 2], -0.5, 0.0, value=0.0),
    ],
}
ROW = {"reward/mean": 0.5, "credit/outcome_rms": 1.0, "policy/entropy": 1.0, "tokens/total": 100, "time/iteration": 2.0}
ROW |= dict.fromkeys(("group/unjudged", "group/singleton", "completion/masked"), 0.0)


def run_of(folder: Path, rows: Sequence[dict | str] = (), files: dict[int, Sequence[dict | str]] | None = None) -> str:
    """A run folder by hand; text stands as it is."""

    def lines(rows: Sequence[dict | str]) -> str:
        return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)

    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.yaml").write_text("algorithm: grpo\ntask: {data: mine.jsonl}\ntrain: {iterations: 9}\n")
    (folder / "metrics.jsonl").write_text(lines([{"iteration": n, **row} if isinstance(row, dict) else row
                                                 for n, row in enumerate(rows)]))  # fmt: skip
    for iteration, records in (files or {}).items():
        (folder / "rollouts" / f"{iteration:06d}.jsonl").write_text(lines(records))
    return str(folder)


def told(capsys, *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out.replace(MINUS, "-")


def groups(folder: Path, *records: dict):
    (folder / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_groups_of_file(folder / "r.jsonl", TokenTexts(Words()))


def printed(renderable, width: int = 100, **options) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(renderable)
    return console.file.getvalue().replace(MINUS, "-")


# ---------------------------------------------------------------------- curves


def test_blocks_of_known_numbers():
    """Least and largest are the lowest and highest block; a curve that is flat stays in the middle."""
    assert blocks([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert blocks([-3.0, None, 4.0]) == "▁ █"
    assert blocks([5.0, 5.0]) == "▄▄" and blocks([]) == ""


def test_sparkline_is_resampled():
    """Means where values share a block, the value before where there is none, nothing before the first."""
    assert sparkline([0, 1, 2, 3], [0, 7, 0, 7], (0, 3), 4) == "▁█▁█"
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 2, 4, 6, 8, 14, 14], (1, 8), 4) == "▁▃▅█"
    assert sparkline([2, 4], [1, 2], (0, 4), 5) == "  ▁▁█"
    assert sparkline([7], [1.5], (7, 7), 3) == "▄▄▄"


@pytest.mark.parametrize("width", [60, 100, 160])
def test_curves_fit_the_width(width):
    names = ("reward/mean", "eval/accuracy_greedy", "credit/process_ratio")
    found = {name: (list(range(300)), [0.00123 * n for n in range(300)]) for name in names}
    lines = printed(curves(found, width), width).splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= width
    assert lines[1].split()[0] == "reward/mean" and lines[1].split()[2:] == ["0", "0.368", "0", "0.368"]


# ---------------------------------------------------------------------- shading

SHADES = Shading("advantage", 1.0)


def styles(text: Text) -> dict[str, list[str]]:
    return {text.plain[start:end]: str(style).split() for start, end, style in text.spans}


def test_signs_have_their_styles():
    """Blue above zero; orange and underlined below; a hundredth of the scale is nothing."""
    found = styles(shaded(Tokens(["aa", "bb", "cc", "dd", "ee"], [1.0, -1.0, 0.2, 0.009, None]), SHADES))
    assert "#3a95f0" in found["aa"] and "underline" not in found["aa"]
    assert "#ef8a17" in found["bb"] and "underline" in found["bb"]
    assert "#12283d" in found["cc"]
    assert {"dd", "ee"} & {text for text, style in found.items() if style not in (["none"], [""])} == set()


def test_strength_rises_with_size():
    """Five shades a sign; without a scale there are none."""
    shades = [style_of(size / 10, 1.0).bgcolor.name for size in range(1, 11)]
    assert len(dict.fromkeys(shades)) == 5 and shades[::2] == shades[1::2]
    assert style_of(0.5, 0.0).bgcolor is None and style_of(0.0, 1.0).bgcolor is None


def test_a_light_background_has_light_shades(monkeypatch):
    from stepcredit.display.shading import _style

    monkeypatch.setenv("COLORFGBG", "0;15")
    _style.cache_clear()
    assert style_of(0.1, 1.0).bgcolor.name == "#e3eefb" and style_of(0.1, 1.0).color.name == "#101010"
    _style.cache_clear()


def test_signs_are_seen_without_colour():
    """NO_COLOR leaves the underlines; where there are no styles at all, means of steps stand in the text."""
    tokens = Tokens(["Ann", " .", " Bob", " ."], [0.71, 0.71, -0.2, -0.2], starts=[0, 2])
    shown = printed(shaded(tokens, SHADES), force_terminal=True, no_color=True, color_system="truecolor")
    assert f"Ann .{ESCAPE}[4m Bob .{ESCAPE}[0m" in shown
    assert printed(shaded(tokens, Shading("advantage", 1.0, plain=True))) == "[+0.71] Ann . [-0.20] Bob .\n"
    assert printed(step_means_line(tokens, SHADES)) == "+0.71 │ -0.20\n"
    even = Tokens(["Ann", " .", " Bob"], [0.5, 0.5, 0.5], starts=[0, 2])
    assert step_means_line(even, SHADES) is None and "[" not in shaded(even, Shading("advantage", 1.0, True)).plain


def test_the_first_wrong_line_is_enclosed():
    tokens = Tokens(["a", " b", " c", " d"], [0.0] * 4, starts=[0, 1, 3], wrong=(1, 3))
    assert shaded(tokens, SHADES).plain == "a «✗ b c» d"


def test_the_middle_of_a_long_completion_is_left_out():
    """Its beginning, its end and how much lies between."""
    texts = [f" {n:03d}" for n in range(100)]
    text = shaded(Tokens(texts, [1.0] * 100), SHADES, limit=60).plain
    assert text == "".join(texts[:10]).strip() + " … 85 tokens …  095 096 097 098 099"


def test_a_short_view_has_at_most_six_lines():
    tokens = Tokens([f" word{n}" for n in range(500)], [n / 500 - 0.5 for n in range(500)], range(0, 500, 5))
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system="truecolor")
    console.print(short_view(Text("title"), "why " * 99, tokens, SHADES, console))
    assert console.file.getvalue().count("\n") == 6


# ---------------------------------------------------------------------- groups and trees


def test_a_group(tmp_path, capsys):
    """Question, answer, marks, numbers, truncation and the legend."""
    run = run_of(tmp_path / "run", [ROW] * 3, {2: [EQUAL, RECORD]})
    out = told(capsys, run, "--problem", "p1")
    assert "iteration 2 · problem 2 of 2 · p1" in out and "Ann ?" in out and "answer 3" in out
    assert "✓ 1  reward 1.00 · 8 tokens · mean advantage +0.12" in out
    assert "✗ 2  reward 0.00 · 4 tokens · advantage -1.00 · truncated" in out
    assert "advantage  -1.00   -0.50   +0.50   +1.00" in out and "✓ right   ✗ wrong" in out
    assert "other columns: entropy" in out and "reward/mean" not in out and ESCAPE not in out
    assert "? 2  unjudged · 2 tokens · advantage 0.00" in told(capsys, run, "--problem", "1")


def test_steps_are_told(tmp_path):
    """Here a step ends with a line; the means stand below, or in the text where there are no styles."""
    record = {"segments": [segment([0, 5, 4, 3], [1.0, 0.5, -0.25, -0.25], 1.0)]}
    (group,) = groups(tmp_path, record)
    plain = printed(group_view(group, "advantages", Shading("advantage", 1.0, plain=True), 4, 100, None))
    assert "    [+0.75] Ann↵" in plain and "    [-0.25] Bob ." in plain and "│" not in plain
    shown = printed(group_view(group, "advantages", SHADES, 4, 100, None))
    assert "    +0.75 │ -0.25" in shown and "means of steps" in shown


def test_another_column(tmp_path, capsys):
    run = run_of(tmp_path / "run", [ROW], {2: [RECORD]})
    out = told(capsys, run, "--problem", "1", "--column", "entropy")
    assert "entropy +0.50" in out and "entropy +0.10" in out and "other columns: advantages" in out


def test_few_completions_are_right_and_wrong_ones(tmp_path, capsys):
    rewards = [0, 0, 0, 1, 0, 1]
    record = {"segments": [segment([0, 3], 0.5 - reward, float(reward)) for reward in rewards]}
    (group,) = groups(tmp_path, record)
    assert (
        select_leaves(group, 2) == [0, 3]
        and select_leaves(group, 3) == [0, 3, 5]
        and select_leaves(group, 9) == [0, 1, 2, 3, 4, 5]
    )
    out = told(capsys, run_of(tmp_path / "run", [], {1: [record]}), "--problem", "1", "--completions", "2")
    assert "✗ 1 " in out and "✓ 4 " in out and "✗ 2 " not in out and "4 more (--completions 6)" in out


def test_a_tree(tmp_path, capsys):
    """Values, means, pruned segments and rewards of leaves, each on its line, cut to the width."""
    run = run_of(tmp_path / "run", [ROW], {2: [TREE]})
    shown = [line.rstrip() for line in told(capsys, run, "--problem", "1").splitlines()]
    start = shown.index("mean reward 0.33 of 3 leaves")
    assert shown[start + 1 : start + 5] == [
        "├── value 0.50  +0.12  Ann =",
        "│   ├── ✓ 1.00  +0.75  3 .",
        "│   └── ✗ 0.00  pruned  4 .",
        "└── ✗ 0.00  -0.50  Bob = 3",
    ]
    (group,) = groups(tmp_path, TREE)
    view = group_view(group, "advantages", SHADES, 9, 100, None)
    strong = printed(view, force_terminal=True, color_system="truecolor")
    assert f"{ESCAPE}[2;9m4 .{ESCAPE}[0m" in strong
    narrow = printed(view, width=24)
    assert max(map(len, narrow.splitlines())) <= 24 and "…" in narrow


def test_the_example_group():
    """Right and wrong completions come before advantages that lie far apart."""

    def group(rewards: list[float], *advantages: float):
        return SimpleNamespace(rewards=rewards, columns={"advantages": [list(advantages)]})

    assert example_group([group([0.0, 0.0], -9, 9), group([0.0, 1.0], -1, 1), group([1.0, 0.0], -2, 1)]) == 2
    assert example_group([group([0.0]), group([0.0], -1, 1)]) == 1


def test_nothing_in_a_run_acts_on_the_terminal(tmp_path, capsys, monkeypatch):
    """Markup stands as it is, control characters are spelt out: in tokens, questions, answers, ids and names."""
    evil = f"[red]x[/red]{ESCAPE}[31m{ESCAPE}]0;title\x07\u202e"
    record = {"id": evil, "prompt": evil, "answer": evil, "segments": [segment([0, 6, 7, 8], 1.0, 1.0)]}
    tree = TREE | {"id": f"tree {evil}", "segments": [segment([6, 7, 8], 0.5, value=0.5),
                                                       *[segment([6, 7, 8], 0.5, 1.0, parent=0)] * 2]}  # fmt: skip
    run = run_of(tmp_path / "[red]run", [ROW], {2: [record, tree]})
    assert "\n1  [red]x[/red]\\x1b" in told(capsys, run) and "\n2  tree [red]x[/red]\\x1b" in told(capsys, run)
    for words in ([run], [run, "--problem", "1"], [run, "--problem", "2"]):
        plain = told(capsys, *words)
        assert not {ESCAPE, "\x07", "\u202e"} & set(plain)
        assert "[red]x[/red]" in plain and "\\x1b[31m" in plain and "\\u202eabc" in plain and "[red]run" in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    for number in "12":
        coloured = told(capsys, run, "--problem", number)
        assert ESCAPE in coloured and not {"\x07", "\u202e"} & set(coloured)
        assert f"{ESCAPE}]" not in coloured and f"{ESCAPE}[31m" not in coloured


# ---------------------------------------------------------------------- runs in any state


def test_a_whole_run(tmp_path, capsys):
    """Heading, curves, health, saved iterations, problems, and the example."""
    rows = [{"eval/accuracy": 0.25}, *[ROW | {"reward/mean": 0.125 * n} for n in range(1, 9)], ROW | {"reward/mean": 1}]
    out = told(capsys, run_of(tmp_path / "run", rows, {1: [EQUAL], 9: [EQUAL, RECORD]}))
    assert "run  grpo · mine.jsonl · iteration 9 of 9 · 100 tokens · 0:18 min of training" in out
    curve = next(line.split() for line in out.splitlines() if line.startswith("reward/mean"))
    assert curve[1:] == ["▁▂▃▄▅▆▇██", "0.125", "1", "0.125", "1"]
    assert "health: nothing to remark" in out and "remark:" not in out
    assert "saved rollouts: iterations 1, 9" in out and "2 ✓✗" in out and "2 ✗?" in out
    assert "iteration 9 · problem 2 of 2 · p1" in out


def test_health_is_replayed(tmp_path, capsys):
    """With the iterations at which an alarm was due; a run that learnt nothing says why."""
    rows = [{}, ROW, *[ROW | {"policy/entropy": 0.01}] * 6]
    assert "health: entropy collapsed (iteration 6)" in told(capsys, run_of(tmp_path / "one", rows))
    idle = [{}, *[ROW | {"credit/outcome_rms": 0.0, "group/unjudged": 1.0}] * 3]
    out = told(capsys, run_of(tmp_path / "two", idle))
    assert "warning: nothing was learnt: in all 3 iterations no completion was judged" in " ".join(out.split())


def test_rows_of_older_versions(tmp_path, capsys):
    """Metrics that are absent, null or no numbers."""
    rows = [{}, {"reward/mean": None}, {"reward/mean": 0.5}, {"reward/mean": "much", "policy/entropy": [1]}]
    out = told(capsys, run_of(tmp_path / "run", rows))
    assert "health: nothing to remark" in out and "reward/mean" in out


def test_a_killed_run(tmp_path, capsys):
    """The last line of the metrics is cut, the last rollouts too: told, and the ones before are shown."""
    run = run_of(tmp_path / "run", [ROW, ROW, ROW], {1: [RECORD], 2: [RECORD]})
    metrics, rollouts = Path(run) / "metrics.jsonl", Path(run) / "rollouts" / "000002.jsonl"
    metrics.write_text(metrics.read_text()[:-40])
    rollouts.write_text(rollouts.read_text()[:-40])
    out = " ".join(told(capsys, run).split())
    assert "remark: metrics.jsonl: 1 of 3 lines cannot be read" in out
    assert "remark: ended, or is still running, after iteration 1 of 9" in out
    assert "000002.jsonl, line 1: not JSON" in out and "iteration 1 · problem 1 of 1 · p1" in out
    assert "iteration 1 · problem 1 of 1" in told(capsys, run, "--problem", "p1")
    with pytest.raises(UserError, match=r"^\S*000002\.jsonl, line 1: not JSON"):
        main([run, "--iteration", "2"])


def test_a_run_without_rollouts(tmp_path, capsys):
    """The curves are there; a look into rollouts says why not."""
    run = run_of(tmp_path / "run", [ROW, ROW])
    out = told(capsys, run)
    assert "remark: no saved rollouts" in out and "policy/entropy" in out and "saved rollouts:" not in out
    with pytest.raises(UserError, match="no saved rollouts"):
        main([run, "--problem", "1"])
    with pytest.raises(UserError, match="none are"):
        main([run, "--iteration", "1"])


@pytest.mark.parametrize("advantages", [["a"], [None], [float("nan")], [1e300]], ids=str)
def test_numbers_that_are_none(tmp_path, capsys, advantages):
    """Whatever stands in a file as the advantage of a token, the text is shown."""
    run = run_of(tmp_path / "run", [], {1: [{"segments": [segment([0], advantages, 1.0, value="high")]}, RECORD]})
    assert "Ann" in told(capsys, run, "--problem", "1") and "p1" in told(capsys, run)


def test_a_run_that_is_a_start(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    assert "config.yaml is missing or damaged" in told(capsys, str(folder))


BAD = {
    "": ["folder of a run is missing"],
    "RUN RUN": ["one run at a time"],
    "gone": ["'gone'", "no such run folder"],
    "RUN --iteration 4": ["rollouts of 4 are not saved", "saved are 3, 1, 8"],
    "RUN --iteration two": ["--iteration", "'two'", "whole number"],
    "RUN --problem p9": ["no problem 'p9'", "p1, p2"],
    "RUN --problem 3": ["no problem '3'"],
    "RUN --column advantage": ["--column", "did you mean 'advantages'?", "(choices: advantages, entropy)"],
    "RUN --column process --iteration 8": ["no 'process'", "000008.jsonl", "advantages, entropy"],
    "RUN --completions 0": ["--completions"],
    "RUN --metrics reward/maen": ["--metrics", "did you mean 'reward/mean'?"],
    "RUN --problm 3": ["--problm", "did you mean 'problem'"],
    "RUN --problem": ["--problem needs a value", "--problem 1"],
    "TWO": ["holds 2 runs", "one of them"],
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input(tmp_path, words):
    """One line that names what is wrong and what there is."""
    run = run_of(tmp_path / "two" / "run", [ROW], {1: [RECORD], 3: [RECORD], 8: [RECORD, EQUAL]})
    shutil.copytree(run, tmp_path / "two" / "other")
    given = {"RUN": run, "TWO": str(tmp_path / "two")}
    with pytest.raises(UserError) as error:
        main([given.get(word, word) for word in words.split()])
    assert "\n" not in str(error.value)
    assert [part for part in BAD[words] if part not in str(error.value)] == []


def test_help(capsys):
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == HELP + "\n" and max(map(len, HELP.splitlines())) <= 120


def test_other_metrics(tmp_path, capsys):
    run = run_of(tmp_path / "run", [ROW | {"optim/grad_norm": 2.0}], {1: [RECORD]})
    out = told(capsys, run, "--metrics", "optim/grad_norm")
    assert "optim/grad_norm" in out and "reward/mean" not in out


# ---------------------------------------------------------------------- while a run goes on


def shown(capsys) -> list[int]:
    """Iterations of which a completion was printed."""
    lines = capsys.readouterr().out.splitlines()
    return [int(line.split()[1]) for line in lines if line.startswith("iteration ") and "· advantages " in line]


def test_training_shows_a_completion(tmp_path, capsys):
    """At the first iteration and from then on where rollouts are saved, the same when it is resumed; or never."""
    often = {"rollouts__every": 1, "rollouts__show": 3}
    assert train(tmp_path / "run", iterations=4, checkpoint__every=4, **often) == 0
    assert shown(capsys) == [1, 3]
    assert command(["train", "--resume", str(tmp_path / "run"), "--iterations", "6"]) == 0
    assert shown(capsys) == [6]
    assert train(tmp_path / "none", **often | {"rollouts__show": 0}) == 0
    assert shown(capsys) == []


FOREST = [
    Tree(Problem("Bob ?", id="p2"), [1], [Segment([0, 3], reward=0.0), Segment([4, 3], reward=0.0)]),
    Tree(
        Problem([{"role": "user", "content": "[red]why"}], id=f"[b]p1{ESCAPE}"),
        [1],
        [Segment([0, 5], finish="cut"), Segment([6, 7], 0, reward=1.0), Segment([8], 0, reward=0.0)],
    ),
    Tree(Problem("Ann ?", id="p3"), [1], [Segment([10, 3], reward=1.0)]),
]
ADVANTAGES = [0.5, 0.5, -0.5, -0.5, 0.25, 0.25, 1.5, 1.5, -1.0, 9.0, -9.0]


def tracker(folder: Path, console: Console, **options) -> Tracker:
    config = resolve({"task": {"data": "mine.jsonl"}, "rollouts": {"max_trees": 2, **options}})
    return Tracker(folder, console, config, None, Words())


def test_what_training_shows(tmp_path):
    """Of the saved trees the one whose advantages lie furthest apart, of it the completion with the largest."""
    forest = Forest.from_trees(FOREST).with_token(advantages=torch.tensor(ADVANTAGES))
    console = Console(file=io.StringIO(), width=100)
    with tracker(tmp_path, console) as records:
        records._show_completion(7, forest)
    assert console.file.getvalue().replace(MINUS, "-").splitlines() == [
        "iteration 7 ✓ reward 1.00 · [b]p1\\x1b · 4 tokens · advantages -1.00 … +1.50",
        "  [red]why",
        "  [+0.25] Ann↵  [+1.50] [red]x[/red] \\x1b[31mred",
    ]


def test_a_completion_above_the_progress_bar(tmp_path):
    """The bar is drawn again below it."""
    forest = Forest.from_trees(FOREST).with_token(advantages=torch.tensor(ADVANTAGES))
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor")
    with tracker(tmp_path, console) as records:
        records._show_completion(7, forest)
    out = console.file.getvalue()
    assert "reward 1.00" in out and "+0.25" in out and "train" in out.partition("reward 1.00")[2]


def test_advantages_that_are_not_finite_count_for_nothing(tmp_path):
    values = torch.tensor([float("nan"), float("inf"), *ADVANTAGES[2:]])
    console = Console(file=io.StringIO(), width=100)
    with tracker(tmp_path, console) as records:
        records._show_completion(1, Forest.from_trees(FOREST).with_token(advantages=values))
        records._show_completion(2, Forest.from_trees(FOREST[:1]).with_token(advantages=values[:4]))
    out = console.file.getvalue().splitlines()
    assert "[b]p1" in out[0] and any(line.startswith("iteration 2 ✗ reward 0.00 · p2") for line in out)


def test_an_output_that_cannot_encode_marks(tmp_path):
    """They become question marks; a run does not stop for them."""
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=100)
    with tracker(tmp_path, console) as records:
        records._show_completion(7, Forest.from_trees(FOREST).with_token(advantages=torch.tensor(ADVANTAGES)))
    assert b"iteration 7 ? reward 1.00" in raw.getvalue()


def test_a_tokenizer_that_fails_stops_no_run(tmp_path, caplog, monkeypatch):
    """What cannot be shown is left out with a warning."""
    forest = Forest.from_trees(FOREST).with_token(advantages=torch.tensor(ADVANTAGES))
    with tracker(tmp_path, Console(file=io.StringIO()), every=0) as records:
        monkeypatch.setattr(records, "_take_example_turn", lambda iteration: True)
        monkeypatch.setattr(records.token_texts, "of", lambda ids: [][0])
        records.report(1, ROW, forest)
    assert "iteration 1: no completion can be shown (IndexError" in caplog.text


def test_only_the_first_process_shows(tmp_path):
    """The others have a tracker that is silent."""

    class Second(Ranks):
        def on_main(self, make):
            return 0

    console = Console(file=io.StringIO(), width=100)
    ranks = Second.__new__(Second)
    with open_tracker(ranks, tmp_path, console, resolve({}), None, Words()) as records:
        forest = Forest.from_trees(FOREST).with_token(advantages=torch.tensor(ADVANTAGES))
        records.report(1, {"reward/mean": 0.5}, forest)
    assert console.file.getvalue() == "" and list(tmp_path.iterdir()) == []
