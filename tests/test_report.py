"""The page of a report: what is read from run folders, what the page holds, and what a browser makes of it."""

import gzip
import json
import math
import os
import re
import shutil
import sys
from base64 import b64decode
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from builders import SAMPLING
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from stepcredit.cli.main import main
from stepcredit.config.algorithms import ALGORITHMS
from stepcredit.display.rollouts import find_group, read_groups
from stepcredit.display.runs import Run, method_options, methods, read_runs
from stepcredit.display.token_texts import TokenTexts, token_texts_of, visible
from stepcredit.forest import Forest
from stepcredit.forest.records import read_records
from stepcredit.report.credits import compare_credits, unfold
from stepcredit.report.page import _spread, chunk_of, write_page

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from screenshots import CHROMIUM, chromium, empty_page, show

needs_browser = pytest.mark.skipif(
    not any(os.path.exists(place) for place in CHROMIUM), reason="no Chromium (apt-get install chromium)"
)
WIDE, PHONE = (1300, 900), (390, 800)
SMALL = ["--iterations", "2", "--train.problems-per-iteration", "4", "--num-problems", "4", "--device", "cpu"]
HOSTILE = [
    "<script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "\u202eright",
    "\x1b[31m",
    "a&b\n",
]


GATED = {
    "--reward.functions": "chain,format_think",
    "--reward.weights": "1,0",
    "--shapers": "[{name: outcome_gate, outcome: chain, think: format_think}]",
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with a short real run of every algorithm, and a second seed of one."""
    root = tmp_path_factory.mktemp("trained")
    for name in SAMPLING:
        size = [] if ALGORITHMS[name].growth else ["--group-size", "4"]
        size += [word for pair in GATED.items() for word in pair] if name == "posterior_grpo" else []
        assert main(["train", "--algorithm", name, *SMALL, *size, "--run-dir", str(root / name)]) in (0, 1)
    again = ["train", "--algorithm", "grpo", *SMALL, "--group-size", "4", "--seed", "1"]
    assert main([*again, "--run-dir", str(root / "grpo-again")]) in (0, 1)
    return root


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a run that may be damaged."""
    shutil.copytree(trained / "spro", tmp_path / "spro")
    return tmp_path / "spro"


def only(path: Path) -> Run:
    (found,) = read_runs([str(path)])
    return found


def packed(page: str, name: str) -> bytes:
    """What an element of the page holds."""
    text = re.search(f'id="{name}">([^<]*)<', page)
    assert text
    return gzip.decompress(b64decode(text[1]))


def index_of(path: Path) -> dict:
    return json.loads(packed(path.read_text(), "index"))


# ---------------------------------------------------------------------- run folders


def test_runs_that_differ_by_their_seed_alone_are_a_method(trained):
    runs = read_runs([str(trained)])
    assert len(runs) == len(SAMPLING) + 1
    found = {method.label: [each.name for each in method.runs] for method in methods(runs)}
    assert found["grpo"] == ["grpo", "grpo-again"] and found["spro"] == ["spro"]
    assert len(found) == len(SAMPLING)


def test_methods_of_one_algorithm_are_told_apart_by_what_differs(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["credit"]["beta"] = 0.5
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    assert {method.label for method in methods(read_runs([str(run), str(other)]))} == {
        "spro · credit.beta 0.003",
        "spro · credit.beta 0.5",
    }
    assert "train.seed" not in method_options(only(other)) and "run_dir" not in method_options(only(other))


def test_a_killed_run_is_told_and_read(run):
    text = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*text[:2], text[2][:40]]))
    shutil.rmtree(run / "checkpoints")
    found = only(run)
    assert [row["iteration"] for row in found.rows] == [0, 1]
    assert any("1 of 3 lines" in remark for remark in found.remarks)
    assert any("after iteration 1 of 2" in remark for remark in found.remarks)
    assert token_texts_of(found).tokenizer is not None  # of the model that it started from


def test_a_column_leaves_out_what_has_no_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"iteration": 0, "eval/accuracy": 0.25}\n{"iteration": 1, "eval/accuracy": null, "time/iteration": 2}\n'
        '{"iteration": 2, "eval/accuracy": 0.5, "time/iteration": 3, "tokens/total": 70}\n'
    )
    found = only(tmp_path)
    assert found.column("eval/accuracy") == ([0, 2], [0.25, 0.5])
    assert found.column("eval/accuracy", "seconds") == ([0.0, 5.0], [0.25, 0.5])
    assert found.column("eval/accuracy", "tokens/total") == ([70], [0.5])


@pytest.mark.parametrize(
    "kind, words", [("missing", "no such run folder"), ("empty", "is empty"), ("file", "is a file")]
)
def test_what_is_no_run_is_said(tmp_path, capsys, kind, words):
    place = tmp_path / "grpo-1"
    if kind == "empty":
        place.mkdir()
    elif kind == "file":
        place.write_text("")
    for command in ("report", "show", "compare"):
        assert main([command, str(place)]) == 2
        assert words in capsys.readouterr().err


# ---------------------------------------------------------------------- texts of tokens


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=words[0])))


def test_texts_of_tokens_make_up_the_text(trained):
    found = only(trained / "grpo")
    token_texts = token_texts_of(found)
    for record, tree in read_records(str(found.files[2])):
        for saved, segment in zip(record["segments"], tree.segments, strict=True):
            text = "".join(token_texts.of(segment.token_ids)).replace("<eos>", "")
            assert text.strip() == saved["text"].strip()


def test_a_character_of_several_tokens_stands_with_the_first():
    class Bytes:
        """Every token is a byte."""

        all_special_ids: list[int] = []

        def __len__(self):
            return 256

        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

        def batch_decode(self, rows):
            return [self.decode(row) for row in rows]

    token_texts = TokenTexts(Bytes())  # type: ignore[arg-type]
    assert token_texts.of(list("aé€𝄞b".encode())) == ["a", "é", "", "€", "", "", "𝄞", "", "", "", "b"]


def test_without_a_tokenizer_tokens_are_numbers():
    assert TokenTexts(None).of([3, 14]) == ["⟨3⟩", "⟨14⟩"]


@pytest.mark.parametrize("char", ["\u202e", "\u200b", "\x1b", "\x00", "\u2066", "\ufeff", "\x85"])
def test_characters_that_act_are_spelt_out(char):
    assert char not in visible(f"a{char}b") and visible(f"a{char}b").startswith("a\\")
    assert visible("é\n\t漢") == "é\n\t漢"


# ---------------------------------------------------------------------- rollouts and credit


def test_the_first_wrong_line_is_found(trained):
    found = only(trained / "grpo")
    groups = read_groups(found, 2, token_texts_of(found))
    wrong = right = 0
    for group in groups:
        for leaf in group.leaves:
            segment, span = group.tree.segments[leaf], group.wrong[leaf]
            if segment.reward == 1 and span is None:
                right += 1
            if span is not None:
                wrong += 1
                line = "".join(group.texts[leaf][slice(*span)])
                assert line.strip().endswith(".") or "####" in line
                assert span[0] in group.steps[leaf]
    assert wrong and right


@pytest.mark.parametrize("name", ["grpo", "spro", "prime", "treerpo", "spo_tree", "opo", "reinforce_pp"])
def test_the_runs_own_credit_comes_out_again(trained, name):
    """Scored anew, the saved rollouts get what the run gave them (whitening is over the saved groups: all, here)."""
    found = only(trained / name)
    groups = read_groups(found, 2, token_texts_of(found))
    score = compare_credits(found, groups).scores[name]
    recorded = chunk_column(groups, "advantages")
    there = ~numpy.isnan(recorded)
    assert there.any()
    assert numpy.allclose(score.numpy()[there], recorded[there], atol=2e-5)


def chunk_column(groups, name):
    values = []
    for group in groups:
        rows = group.columns.get(name) or [None] * len(group.texts)
        for texts, row in zip(group.texts, rows, strict=True):
            values += row if row is not None else [math.nan] * len(texts)
    return numpy.array(values, dtype=numpy.float32)


def test_flat_credit_on_a_tree_is_the_mean_over_completions(trained):
    found = only(trained / "treerpo")
    groups = read_groups(found, 2, token_texts_of(found))
    score = compare_credits(found, groups, ["dr_grpo"]).scores["dr_grpo"]
    forest = Forest.from_trees([group.tree for group in groups])
    start = 0
    for group in groups:
        rewards = [group.tree.segments[leaf].reward for leaf in group.leaves]
        mean = sum(rewards) / len(rewards)
        for number, texts in enumerate(group.texts):
            below = [group.tree.segments[leaf].reward for leaf in group.leaves if number in group.path(leaf)]
            wanted = sum(below) / len(below) - mean
            assert score[start : start + len(texts)].tolist() == pytest.approx([wanted] * len(texts), abs=1e-5)
            start += len(texts)
    flat, source = unfold(forest)
    assert flat.is_flat and torch.equal(flat.token["token_ids"], forest.token["token_ids"][source])


def test_correlation_of_a_credit_with_itself_is_one_and_of_a_constant_is_none(trained):
    found = only(trained / "spro")
    groups = read_groups(found, 2, token_texts_of(found))
    comparison = compare_credits(found, groups, ["grpo", "dr_grpo"])
    assert comparison.correlation[0][0] == pytest.approx(1) and comparison.correlation[1][1] == pytest.approx(1)
    assert comparison.correlation[0][1] == pytest.approx(comparison.correlation[1][0])
    right = [group for group in groups if len(set(group.rewards)) == 1]
    if right:
        assert compare_credits(found, right, ["grpo"]).correlation == [[None]]


def test_credits_that_do_not_fit_are_named(trained, capsys, tmp_path):
    found = only(trained / "grpo")
    comparison = compare_credits(found, read_groups(found, 2, token_texts_of(found)))
    assert "ref_logprobs" in comparison.missing["spro"] or "old_logprobs" in comparison.missing["spro"]
    out = str(tmp_path / "r.html")
    assert main(["report", str(trained / "grpo"), "-o", out, "--credits", "spro"]) == 2
    assert "old_logprobs" in capsys.readouterr().err and not Path(out).exists()


def test_outcome_credit_says_nothing_about_lines(trained):
    found = only(trained / "grpo")
    detection = compare_credits(found, read_groups(found, 2, token_texts_of(found)), ["grpo"]).first_error["grpo"]
    assert detection.count > 0 and detection.uniform == 1.0 and detection.accuracy is None


# ---------------------------------------------------------------------- the page's data


def test_a_chunk_holds_the_numbers_of_the_record(trained):
    found = only(trained / "prime")
    groups = read_groups(found, 2, token_texts_of(found))
    data = chunk_of(groups, compare_credits(found, groups, ["prime"]))
    size = int.from_bytes(data[:4], "little")
    header, rest = json.loads(data[4 : 4 + size]), data[4 + size :]
    arrays = numpy.frombuffer(rest, numpy.uint8).reshape(1 + len(header["columns"]), 4, header["tokens"])
    whole = arrays.transpose(0, 2, 1).copy()
    texts = [header["texts"][number] for number in whole[0].view("<u4")[:, 0]]
    assert texts == [text for group in groups for segment in group.texts for text in segment]
    for place, name in enumerate(header["columns"], 1):
        if not name.startswith("credit:"):
            assert numpy.array_equal(whole[place].view("<f4")[:, 0], chunk_column(groups, name), equal_nan=True), name
    assert header["credits"] == ["prime"] and header["own"] == "prime"


def test_ends_come_first_then_the_middle():
    assert _spread([]) == [] and _spread([7]) == [7] and _spread([1, 9]) == [9, 1]
    assert _spread([1, 2, 3, 4, 5]) == [5, 1, 3, 2, 4]
    assert sorted(_spread(list(range(37)))) == list(range(37))


def test_what_has_no_room_is_left_out_and_said(trained, tmp_path):
    runs = read_runs([str(trained / "spro")])
    whole = write_page(runs, tmp_path / "a.html")
    assert whole.remarks == [] and len(index_of(tmp_path / "a.html")["runs"][0]["rollouts"]) == 2
    few = write_page(runs, tmp_path / "b.html", max_mib=0.012)
    (entry,) = index_of(tmp_path / "b.html")["runs"]
    kept = sum(saved["groups"] for saved in entry["rollouts"])
    assert few.size < whole.size and kept < sum(saved["of"] for saved in entry["rollouts"]) + 4 * entry["left_out"]
    assert entry["left_out"] == 0 or few.remarks


def test_an_older_record_version_is_said_and_the_rest_shown(run, tmp_path, capsys):
    file = run / "rollouts" / "000002.jsonl.zst"
    records = [record for record, _ in read_records(str(file))]
    file.unlink()
    lines = [json.dumps(record | {"version": 0}) for record in records]
    (run / "rollouts" / "000002.jsonl").write_text("\n".join(lines))
    out = tmp_path / "r.html"
    assert main(["report", str(run), "-o", str(out)]) == 0
    (entry,) = index_of(out)["runs"]
    assert any("version 0 is not known" in remark for remark in entry["remarks"])
    assert [saved["iteration"] for saved in entry["rollouts"]] == [1]


def test_nothing_is_fetched(trained, tmp_path):
    write_page(read_runs([str(trained / "grpo")]), tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert not re.search(r"""(src|href)=["']?http""", page) and "<link" not in page


@pytest.mark.parametrize(
    "words", [["--max-mb", "no"], ["-o", "x.txt"], ["--nope", "1"], ["-o"], ["-o", "no/such/x.html"]]
)
def test_wrong_options_are_one_line(trained, capsys, monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(trained / "grpo"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("stepcredit: error") and error.count("\n") == 1


# ---------------------------------------------------------------------- in the browser


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def watched(browser, tmp_path):
    """Opens a report of runs; the browser's console must stay without errors."""
    errors: list[str] = []
    pages = []

    def open_report(*runs: Path, view="rollouts", size=WIDE, theme="light"):
        write_page(read_runs([str(run) for run in runs]), tmp_path / "r.html")
        page = empty_page(browser, size, theme)
        pages.append(page)
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.set_default_timeout(20000)
        show(page, tmp_path / "r.html", view)
        return page

    yield open_report
    for page in pages:
        page.close()
    assert errors == []


def displayed(value: float, signed: bool) -> str:
    """A number as the page shows it."""
    text = f"{value:.5g}" if 1e-4 <= abs(value) < 1e6 else f"{value:.3e}".replace("e-0", "e-").replace("e+0", "e+")
    return (("+" if signed and value > 0 else "") + ("0" if value == 0 else text)).replace("-", "\u2212")


@needs_browser
@pytest.mark.parametrize("name", SAMPLING)
def test_every_view_of_every_algorithm_opens(trained, name, watched):
    page = watched(trained / name)
    for tab in ("rollouts", "trees", "credit", "setup", "curves"):
        page.click(f"#tab-{tab}")
        page.wait_for_selector(f"#view-{tab}:visible")
        for number in range(page.locator(f"#view-{tab} .pills button").count()):
            page.locator(f"#view-{tab} .pills button").nth(number).click()
            assert page.locator(f"#view-{tab} .pills button").nth(number).get_attribute("aria-checked") == "true"
    page.wait_for_selector("#view-curves .main-svg")
    for number in range(page.locator("#view-curves .chips button").count()):
        page.locator("#view-curves .chips button").nth(number).click()


@needs_browser
def test_hovering_a_token_shows_the_numbers_of_the_record(trained, watched):
    run = only(trained / "spro")
    groups = read_groups(run, 2, token_texts_of(run))
    page = watched(trained / "spro")
    group = find_group(groups, page.locator(".problems [aria-current=true]").get_attribute("data-problem"))
    for completion, place in ((0, 3), (1, 5)):
        leaf = group.leaves[completion]
        token = page.locator(".completion").nth(completion).locator("[data-token]").nth(place)
        token.hover()
        page.wait_for_selector("#tip:visible")
        shown = {
            row.get_attribute("data-column"): row.locator("td").nth(1).inner_text()
            for row in page.locator("#tip tr").all()
        }
        for column in ("advantages", "process", "logprobs", "entropy", "log_ratio"):
            value = float(numpy.float32(group.columns[column][leaf][place]))
            assert shown[column] == displayed(value, column in ("advantages", "process", "log_ratio")), column
        assert page.locator("#tip code").inner_text().strip() == group.texts[leaf][place].strip()


@needs_browser
def test_clicking_a_node_shows_its_path(trained, watched):
    run = only(trained / "treerpo")
    groups = read_groups(run, 2, token_texts_of(run))
    page = watched(trained / "treerpo", view="trees")
    group = find_group(groups, page.locator(".problems [aria-current=true]").get_attribute("data-problem"))
    deep = [leaf for leaf in group.leaves if len(group.path(leaf)) > 1]
    assert deep and page.locator("[data-node]").count() == len(group.texts)
    for leaf in (deep[0], deep[-1], group.path(deep[0])[0]):
        page.locator(f"[data-node='{leaf}']").click()
        shown = "".join(page.locator("#path [data-token]").all_inner_texts())
        wanted = "".join(text for number in group.path(leaf) for text in group.texts[number])
        assert shown.replace(" ", "") == wanted.replace(" ", "")
        marked = page.locator(f"[data-node='{leaf}']")
        assert marked.get_attribute("aria-selected") == "true"
        pruned = "pruned" in str(marked.get_attribute("class"))
        assert pruned == group.pruned[leaf]
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.node") in map(str, group.leaves)


@needs_browser
def test_what_a_completion_says_is_only_text(tmp_path, watched):
    folder = tmp_path / "evil"
    (folder / "rollouts").mkdir(parents=True)
    words = ["<unk>", "word", *HOSTILE]
    tokenizer_of(words).save_pretrained(folder / "checkpoints" / "000001")
    record = {
        "version": 1, "id": HOSTILE[0], "prompt": "".join(HOSTILE), "answer": HOSTILE[1], "prompt_ids": [1],
        "segments": [
            {"token_ids": [2, 3, 4, 5, 6], "reward": reward, "advantages": [x] * 5, "rollout_logprobs": [-1.0] * 5}
            for reward, x in ((1.0, 1.0), (0.0, -1.0))
        ],
    }  # fmt: skip
    (folder / "rollouts" / "000001.jsonl").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(yaml.safe_dump({"algorithm": HOSTILE[0], "model": HOSTILE[1]}))
    (folder / "metrics.jsonl").write_text(
        '{"iteration": 0, "<img src=x onerror=hacked=1>": 1}\n{"iteration": 1, "reward/mean": 0.5}'
    )
    page = watched(folder)
    shown = page.locator(".completion").first.inner_text()
    assert HOSTILE[0] in shown and HOSTILE[1] in shown and "\\u202eright" in shown and "\\x1b[31m" in shown
    assert "\u202e" not in page.content() and "\x1b" not in page.content()
    for tab in ("trees", "credit", "setup", "curves"):
        page.click(f"#tab-{tab}")
        page.wait_for_selector(f"#view-{tab}:visible")
    page.get_by_text("more metrics").click()
    page.wait_for_timeout(300)
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.locator("main img, main script").count() == 0


@needs_browser
@pytest.mark.parametrize("step", [40, 2000], ids=["many steps", "one step"])
def test_a_long_completion_is_folded(tmp_path, watched, step):
    """The middle opens by a click, in place and complete, and by a search that meets it."""
    folder, count = tmp_path / "long", 1000
    (folder / "rollouts").mkdir(parents=True)
    tokenizer_of(["<unk>", "word", " middle", "\n"]).save_pretrained(folder / "checkpoints" / "000001")
    ids = [3 if place % step == step - 1 else 2 if place == 500 else 1 for place in range(count)]
    segments = [
        {"token_ids": ids, "reward": reward, "advantages": [x] * count, "rollout_logprobs": [-1.0] * count}
        for reward, x in ((1.0, 1.0), (0.0, -1.0))
    ]
    record = {"version": 1, "id": "a", "prompt": "q", "prompt_ids": [1], "segments": segments}
    (folder / "rollouts" / "000001.jsonl").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(yaml.safe_dump({"algorithm": "grpo", "model": "x"}))
    (folder / "metrics.jsonl").write_text('{"iteration": 1, "reward/mean": 0.5}')
    page = watched(folder)
    first = page.locator(".completion").first
    tokens = first.locator("[data-token]")
    assert 300 <= tokens.count() <= 400 and "middle" not in first.inner_text()
    fold = first.locator("button.fold")
    assert fold.inner_text() == f"… {count - tokens.count()} tokens …"
    fold.click()
    positions = tokens.evaluate_all("all => all.map((one) => Number(one.dataset.position))")
    assert positions == list(range(count)) and "middle" in first.inner_text() and fold.count() == 0
    assert page.locator(".completion button.fold").count() == 1  # the other one's
    page.fill("input[aria-label=Search]", "middle")
    assert page.locator(".completion button.fold").count() == 0
    assert page.locator(".token.hit").count() == 2


@needs_browser
def test_keys_move_between_tokens_tabs_and_problems(trained, watched):
    page = watched(trained / "spro")
    page.locator(".completion [data-token]").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.position") == "1"
    assert page.locator("#tip").is_visible() and "token 2" in page.locator("#tip").inner_text()
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    page.locator("#tab-rollouts").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#view-trees:visible")
    assert page.evaluate("document.activeElement.id") == "tab-trees"
    page.locator(".problems button").nth(1).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".problems li:nth-child(2) [aria-current=true]")
    assert "problem=" in page.url and "view=trees" in page.url


@needs_browser
def test_search_sort_and_iterations(trained, watched):
    run = only(trained / "grpo")
    first = {iteration: read_groups(run, iteration, token_texts_of(run)) for iteration in (1, 2)}
    page = watched(trained / "grpo")
    wanted = first[2][0].question.split(" =")[0]
    page.fill("input[aria-label=Search]", wanted)
    count = page.locator(".problems button").count()
    matching = [g for g in first[2] if wanted in g.question or any(wanted in "".join(p) for p in g.texts)]
    assert count == len(matching)
    page.fill("input[aria-label=Search]", "nothing has this")
    assert page.locator(".problems button").count() == 0
    page.fill("input[aria-label=Search]", "")
    page.select_option("aside label:has-text('Order') select", "hard")
    ids = [button.get_attribute("data-problem") for button in page.locator(".problems button").all()]
    means = [sum(find_group(first[2], i).rewards) for i in ids]
    assert means == sorted(means)
    page.locator("input[type=range]").fill("0")
    page.wait_for_selector("aside label:has-text('Iteration 1 ')")
    assert page.locator(".problems button").first.get_attribute("data-problem") in [
        group.tree.problem.id for group in first[1]
    ]


@needs_browser
@pytest.mark.parametrize("view", ["curves", "rollouts", "trees", "credit", "setup"])
def test_a_phone_needs_no_sideways_scrolling(trained, view, watched):
    page = watched(trained, size=PHONE, theme="dark", view=view)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


@needs_browser
def test_seeds_become_a_mean_with_a_band(trained, watched):
    runs = [str(trained / "grpo"), str(trained / "grpo-again")]
    rows = [only(Path(path)).column("reward/mean")[1] for path in runs]
    page = watched(*runs, view="curves")
    page.wait_for_selector("[aria-label='Mean reward'] .main-svg")
    data = page.evaluate("document.querySelector(\"[aria-label='Mean reward']\").data.map((t) => [...t.y])")
    assert len(data) == 3
    means = [sum(values) / 2 for values in zip(*rows, strict=True)]
    halves = [abs(a - b) / math.sqrt(2) for a, b in zip(*rows, strict=True)]
    assert data[2] == pytest.approx(means, abs=1e-5)
    assert data[1] == pytest.approx([m + h for m, h in zip(means, halves, strict=True)], abs=1e-5)


@needs_browser
def test_methods_whose_names_begin_alike_have_a_bar_each(trained, watched, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, rate in zip(folders, ("1e-05", "2e-05"), strict=True):
        shutil.copytree(trained / "grpo", folder)
        config = (folder / "config.yaml").read_text()
        changed = re.sub(r"learning_rate: \S+", f"learning_rate: {rate}", config)
        (folder / "config.yaml").write_text(changed)
    page = watched(*map(str, folders), view="curves")
    place = "document.querySelector(\"[aria-label='Where the time goes']\")"
    page.locator("[aria-label='Where the time goes']").scroll_into_view_if_needed()
    page.wait_for_selector("[aria-label='Where the time goes'] .main-svg")
    bars = page.evaluate(f"{place}.data.map((t) => [[...t.x], [...t.y]])")
    assert all(places == [0, 1] for _, places in bars)
    assert [sum(shares[method] for shares, _ in bars) for method in (0, 1)] == pytest.approx([100, 100], abs=0.5)
    names = page.evaluate(f"{place}.layout.yaxis.ticktext")
    assert len(set(names)) == 2


@needs_browser
def test_what_all_questions_begin_with_is_cut_in_the_list(run, watched):
    for path in (run / "rollouts").iterdir():
        rows = [record for record, _ in read_records(str(path))]
        for number, row in enumerate(rows):
            row["prompt"] = f"State the final answer to problem {number}"
        path.unlink()
        path.with_suffix("").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = watched(run, view="rollouts")
    texts = [each.inner_text() for each in page.locator(".problems .question").all()]
    assert len(texts) > 1 and all(re.fullmatch(r"… \d+", text) for text in texts)
    assert page.locator(".question-card").inner_text().startswith("Question  State the final answer to problem")


@needs_browser
def test_a_run_without_rollouts_still_has_curves(run, watched):
    shutil.rmtree(run / "rollouts")
    page = watched(run, view="curves")
    page.wait_for_selector("#view-curves .main-svg")
    page.click("#tab-rollouts")
    assert "no saved rollouts" in page.locator("#view-rollouts").inner_text()
