"""`stepcredit audit`: what agreement means, by hand; and the command on the embedded model."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_prefix_values import EACH, LOST, WON, drawn, given, group

from stepcredit.cli.main import main
from stepcredit.credit import CREDIT
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.growth.prefix_values import Steps, continue_from, plan, steps_of
from stepcredit.report.agreement import StepValues, agreement, noise_ceiling, sizes
from stepcredit.report.audit import Book, Measured, choose, measure_all

SURE, NEVER, EVEN = [1.0] * 50, [0.0] * 50, [1.0, 0.0, 0.0, 1.0] * 25


def completion(*returns, total: float, inside=None) -> StepValues:
    return StepValues(returns, inside or [0.0] * len(returns), total)


# ---------------------------------------------------------------------- by hand

WRONG = completion(EVEN, SURE, NEVER, total=0.0)  # + 1/2, - 1, 0
RIGHT = completion(EVEN, EVEN, SURE, total=1.0)  # 0, + 1/2, 0


def test_advantages_are_changes_of_value():
    advantage, error = WRONG.advantages()
    assert advantage.tolist() == [0.5, -1.0, 0.0]
    assert error[0] == pytest.approx(0.052, abs=2e-3) and error[2] == pytest.approx(0.0196, abs=1e-3)
    assert completion(EVEN, SURE, total=0.0, inside=[0.25, 0.5]).advantages()[0].tolist() == [0.75, -0.5]
    found = sizes([WRONG, RIGHT])
    assert (found.completions, found.steps, found.beyond_noise, found.losing) == (2, 6, 3, 1)


def test_credit_that_is_the_truth_agrees():
    found = agreement([WRONG, RIGHT], [each.advantages()[0] for each in (WRONG, RIGHT)])
    assert [found.rank.value, found.rank_within.value, found.sign.value, found.first_loss.value] == pytest.approx(
        [1] * 4
    )
    assert found.chance == pytest.approx(1 / 3) and found.sign.low == found.sign.high == 1


def test_credit_turned_around_disagrees():
    found = agreement([WRONG, RIGHT], [-each.advantages()[0] for each in (WRONG, RIGHT)])
    assert [found.rank.value, found.rank_within.value] == pytest.approx([-1, -1])
    assert found.sign.value == found.first_loss.value == 0


def test_outcome_credit_tells_completions_apart_and_no_steps():
    """Of three steps beyond noise (+, - of the wrong one, + of the right one) it has two; a third of a first loss."""
    found = agreement([WRONG, RIGHT], [np.full(3, -1.0), np.full(3, 1.0)])
    assert found.rank_within.value == 0 and found.sign.value == pytest.approx(2 / 3)
    assert found.first_loss.value == pytest.approx(1 / 3)
    # ranks of the credit 2, 2, 2, 5, 5, 5, of the advantages 5.5, 1, 3, 3, 5.5, 3
    assert found.rank.value == pytest.approx(np.corrcoef([2, 2, 2, 5, 5, 5], [5.5, 1, 3, 3, 5.5, 3])[0, 1])
    assert found.rank.low <= found.rank.value <= found.rank.high


def test_no_credit_at_all_is_no_agreement():
    found = agreement([WRONG], [np.zeros(3)])
    assert found.rank.value is None and found.sign.value == 0 and found.first_loss.value == pytest.approx(1 / 3)
    assert agreement([completion(SURE, SURE, total=1.0)], [np.ones(2)]).sign.value is None


def test_the_ceiling_is_one_half_of_the_rollouts_against_the_other():
    """Rollouts that do not vary know themselves; of one rollout there are no halves; noise alone is far from 1."""
    full = noise_ceiling([completion(NEVER, SURE, NEVER, total=0.0)])
    assert full is not None
    assert [full.rank.value, full.sign.value, full.first_loss.value] == pytest.approx([1, 1, 1])
    assert noise_ceiling([completion([1.0], [0.0], total=0.0)]) is None
    noise = np.random.default_rng(0).integers(2, size=(200, 4, 8)).astype(float)
    none = noise_ceiling([completion(*rows.tolist(), total=0.5) for rows in noise])
    assert none is not None and none.rank.value is not None and abs(none.rank.value) < 0.15


# ---------------------------------------------------------------------- which completions, and a kill


def test_right_and_wrong_completions_of_many_problems_are_taken():
    forest = Forest.join([group(WON, WON, LOST, prompt=(number,)) for number in (1, 2)])
    steps = steps_of(forest, EACH)
    assert [(each.tree, each.total) for each in choose(steps, 4)] == [(0, 1.0), (0, 0.0), (1, 1.0), (1, 0.0)]
    assert [each.leaf for each in choose(steps, 5)] == [0, 1, 2, 3, 5]
    assert choose(steps, 99) == steps
    one = Steps(0, 0, steps[0].rows, steps[0].token_ids, (0,), 1.0)
    assert choose([one, *steps[1:]], 99) == steps[1:]


def test_an_audit_that_was_killed_goes_on(tmp_path):
    """Whole lines are kept, the last one that was cut is measured again, and all is as if nothing had happened."""
    forest = Forest.join([group(WON, LOST, prompt=(number,)) for number in range(1, 6)])
    made, out, options = plan(steps_of(forest, EACH), 4), tmp_path / "out.jsonl", given(num_rollouts=4)

    def measured(path: Path, seed: int = 0):
        rollouts = drawn(0.6)
        rollouts.sampler.max_rows = 1
        done: list[int] = []
        found = measure_all(rollouts, forest, made, options, Book(path, {"seed": seed}), done.append)
        return found, rollouts.count.drawn, done

    whole, drawn_at_all, done = measured(out)
    assert done == [0, 2, 2, 2, 2, 2] and drawn_at_all == 4 * len(whole)
    text = out.read_text()
    out.write_text(text[: int(len(text) * 0.7)])
    again, drawn_again, done = measured(out)
    assert again == whole and 0 < drawn_again < drawn_at_all and sum(done) == 10
    assert sorted(out.read_text().splitlines()) == sorted(text.splitlines())
    with pytest.raises(UserError, match=r"out\.jsonl was measured with another seed \(0, now 1\)"):
        measured(out, seed=1)
    (tmp_path / "other.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(UserError, match=r"other\.jsonl is not a file of an audit"):
        measured(tmp_path / "other.jsonl")


def test_measured_steps_are_those_with_values():
    """The credit of a step is the mean over its tokens."""
    forest, steps, _, returns = continue_from(drawn(0.6), group(WON, LOST), EACH, given(num_rollouts=4))
    kept = {prefix: row for prefix, row in returns.items() if len(prefix[1]) in (0, 2)}
    found = Measured.of(forest, steps, kept)
    assert [each.starts for each in found.steps] == [(0, 2), (0, 2)]
    credit = found.by_step(forest.token["position"].float())
    assert [row.tolist() for row in credit] == [[0.5, 3.5], [0.5, 3.5]]


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "grpo"
    words = ["--train.problems-per-iteration", "6", "--group-size", "4", "--num-problems", "0", "--device", "cpu"]
    assert main(["train", "--iterations", "1", *words, "--run-dir", str(folder)]) in (0, 1)
    return folder


def audit(source: Path, *words: str) -> int:
    return main(["audit", str(source), "--model", "embedded", "--num-rollouts", "4", *words])


def test_the_embedded_model(run, tmp_path, capsys):
    """Table, numbers, rollouts with values; a second call samples nothing and finds the same."""
    numbers = tmp_path / "a.json"
    assert audit(run, "--num-completions", "10", "--json", str(numbers)) == 0
    shown = capsys.readouterr().out
    assert "grpo" in shown and "noise ceiling" in shown and "prime: needs prm_logprobs" in shown
    found = json.loads(numbers.read_text())
    assert found["sizes"]["completions"] == 10 and 3 <= found["sizes"]["right"] <= 7
    lacking = {"prime", "remax", "prompt_baseline", "gae"}  # columns that these rollouts do not have
    assert found["credits"].keys() == CREDIT.keys() - {"vine"} - lacking and found["refused"].keys() == lacking
    assert found["credits"]["grpo"]["rank_within"]["value"] == 0
    assert found["gradients"].keys() == found["credits"].keys() | {"noise ceiling"}
    assert all(-1.05 < each["cosine"]["value"] < 1.05 and each["noise"] > 0 for each in found["gradients"].values())
    assert found["sampled_now"]["sampled"] > 0
    kept = tmp_path / "a.rollouts.jsonl"
    assert audit(run, "--num-completions", "10", "--json", str(numbers)) == 0
    again = json.loads(numbers.read_text())
    assert again.pop("sampled_now")["sampled"] == 0 and found.pop("sampled_now") and again == found
    assert "policy gradient by" in capsys.readouterr().out
    assert audit(run, "--num-completions", "10", "--json", str(numbers), "--gradients", "false") == 0
    assert json.loads(numbers.read_text())["gradients"] == {} and "gradient" not in capsys.readouterr().out
    out = tmp_path / "scored.jsonl"
    assert main(["credit", "--in", str(kept), "--out", str(out), "--credit.name", "vine"]) == 0
    by_leaf = {each["leaf"]: each for each in found["completions"]}
    trees = [json.loads(line) for line in out.read_text().splitlines()]
    seen = 0
    for tree in trees:
        for number, segment in enumerate(tree["segments"]):
            each = by_leaf.get(4 * tree["audit"]["tree"] + number)
            if each is not None:
                seen += 1
                firsts = [segment["advantages"][start] for start in each["starts"]]
                assert firsts == pytest.approx(each["advantages"], abs=1e-5)
    assert seen == 10


def test_trees_are_audited_by_their_paths(tmp_path, capsys):
    """Credit for trees on the trees; completions share their first steps."""
    words = ["--train.problems-per-iteration", "4", "--growth.num-branches", "2", "--num-problems", "0"]
    folder = tmp_path / "trees"
    assert main(["train", "--algorithm", "treerpo", "--iterations", "1", *words, "--run-dir", str(folder)]) in (0, 1)
    capsys.readouterr()
    assert audit(folder, "--credits", "treerpo,grpo,spro", "--num-completions", "8", "--iteration", "1") == 0
    shown = capsys.readouterr().out
    assert "treerpo" in shown and "spro" in shown and "needs" not in shown  # the reference is the run's own model


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--credits", "grop"], "did you mean 'grpo'?"),
        (["--credits", "vine"], "there is none to look at (vine: is what the others are compared with"),
        (["--credits", "prime"], "prime: needs prm_logprobs, which these rollouts do not have: name the process"),
        (["--gradients", "no"], "--gradients: 'no' is neither true nor false"),
        (["--num-completions", "0"], "--num-completions: '0' is not a whole number"),
        (["--iteration", "7"], "--iteration: 7 was not saved; there are 1"),
        (["--prefix-values.step.tokens", "500", "--prefix-values.step.delimiters", "[]"], "has two steps"),
        (["--prefix-values.model", "embedded"], "prefix_values.model: give the model that goes on as --model"),
        (["--ref", "nowhere", "--credits", "spro"], "--ref: 'nowhere'"),
        (["--max-new-tokens", "3"], "sampler.max_new_tokens is 3"),
        (["--resume", "auto"], "--resume: unknown option"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_said(run, capsys, words, message):
    assert audit(run, *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_model_and_rollouts_are_named(run, tmp_path, capsys):
    assert main(["audit", "--model", "embedded"]) == 2 and "name a run or a file" in capsys.readouterr().err
    assert main(["audit", str(run)]) == 2 and "--model" in capsys.readouterr().err
    assert audit(tmp_path / "gone.jsonl") == 2 and "no such file" in capsys.readouterr().err
    bare = {
        "id": "a",
        "answer": "1",
        "prompt_ids": [],
        "segments": [{"token_ids": [1, 2], "reward": 1, "rewards": {"chain": 1}}],
    }
    (tmp_path / "bare.jsonl").write_text(json.dumps(bare) + "\n")
    assert audit(tmp_path / "bare.jsonl") == 2 and "has no prompt_ids" in capsys.readouterr().err
