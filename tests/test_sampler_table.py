"""The table of samplers, and one of the user's own by dotted path."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import user_samplers

from stepcredit.cli.main import main
from stepcredit.config import resolve
from stepcredit.credit import CREDIT, credit
from stepcredit.errors import UserError
from stepcredit.learn.placement import UNSHARDED
from stepcredit.policy.loading import load_policy
from stepcredit.run.build import build_estimators, build_parts
from stepcredit.samplers.base import Traits
from stepcredit.samplers.table import SAMPLERS, build_sampler, check_training, sampler_traits
from stepcredit.samplers.transformers import TransformersSampler

TINY = ["--iterations", "2", "--train.problems-per-iteration", "2", "--group-size", "2", "--eval.num-problems", "2"]
TINY += ["--sampler.max-new-tokens", "8", "--device", "cpu"]


def train(name: str, run: Path, *more: str) -> int:
    return main(["train", *TINY, "--sampler.name", f"user_samplers.{name}", "--run-dir", str(run), *more])


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]


def sampling(name: str, **more):
    return resolve({"sampler": {"name": name, **more}})


def test_traits():
    assert sampler_traits(sampling("transformers")).columns == ("rollout_logprobs", "entropy")
    ours, vllm = sampler_traits(sampling("transformers")), sampler_traits(sampling("vllm"))
    assert (ours.elsewhere, ours.copies_when_sharded) == (False, True)
    assert (vllm.columns, vllm.elsewhere, vllm.copies_when_sharded) == (("rollout_logprobs",), True, False)
    assert sampler_traits(sampling("user_samplers.undeclared")) == Traits(("rollout_logprobs",), True, False)
    assert not sampler_traits(sampling("user_samplers.here")).elsewhere


def test_the_default():
    policy = load_policy("embedded", "cpu")
    made = build_sampler(sampling("transformers", max_rows=7), policy, UNSHARDED)
    assert isinstance(made, TransformersSampler) and made.max_rows == 7 and made.policy is policy


def test_nothing_is_imported_before_it_is_chosen():
    code = "import sys, stepcredit.run.build, stepcredit.run.trainer\n"
    code += "print([name for name in sys.modules if name.startswith('stepcredit.samplers')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'stepcredit.samplers.table'" in found
    for path in SAMPLERS.values():
        assert f"'{path.rpartition('.')[0]}'" not in found


@pytest.mark.parametrize(
    "words, said",
    [
        (["--sampler.name", "vlm"], ["sampler.name: 'vlm' is not known", "did you mean 'vllm'?", "dotted path"]),
        (["--sampler.name", "user_samplers.missing"], ["sampler.name: cannot import 'user_samplers.missing'"]),
        (["--sampler.options.note", "x"], ["sampler.options: note", "a sampler of your own"]),
        (
            ["--sampler.name", "user_samplers.undeclared", "--sampler.options.nte", "x"],
            ["sampler.options", "user_samplers.undeclared", "'nte'"],
        ),
        (["--sampler.name", "user_samplers.elsewhere_without_logprobs"], ["the column rollout_logprobs", "comparison"]),
        (
            ["--sampler.name", "user_samplers.without_logprobs", "--objective.importance", "token"],
            ["the column rollout_logprobs", "objective.importance token"],
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else value,
)
def test_what_does_not_fit_is_said_at_the_start(words, said, tmp_path, capsys):
    assert main(["train", *TINY, "--run-dir", str(tmp_path / "run"), *words]) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in said) and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_sampler_of_ones_own(tmp_path):
    """One that declares nothing: its options come to it, and its log-probabilities are compared with the trainer's."""
    note = tmp_path / "note"
    options = ["--sampler.options.note", str(note), "--objective.importance", "token", "--temperature", "0.9"]
    assert train("undeclared", tmp_path / "run", *options) in (0, 1)
    calls = note.read_text().splitlines()
    assert calls.count("2 x 2 at 0.9") == 2 and "2 x 1 at 0.0" in calls  # two iterations, and greedy evaluation
    for row in rows(tmp_path / "run"):
        assert 0 < row["sampler/logprob_diff_mean"] < 1e-4  # the same model by another arithmetic
        assert row["policy/entropy"] > 0 and abs(row["sampler/ratio"] - 1) < 1e-3
        assert row["reward/judged"] == 1 and row["tokens/sampled"] > 4


def test_another_model_ends_the_run(tmp_path, capsys):
    assert train("undeclared", tmp_path / "run", "--sampler.options.shift", "0.5") == 2
    error = capsys.readouterr().err
    assert "differ from the trainer's by 0.5 nats" in error and "sampler.server.tolerance 0.005" in error
    assert "has other weights" in error and "vllm" not in error.lower()
    more = ["--sampler.options.shift", "0.5", "--sampler.server.tolerance", "0.6"]
    assert train("undeclared", tmp_path / "tolerated", *more) in (0, 1)


def test_a_column_that_is_promised_and_missing_ends_the_run(tmp_path, capsys):
    assert train("undeclared", tmp_path / "run", "--sampler.options.logprobs", "false") == 2
    assert "'user_samplers.undeclared' lack the column rollout_logprobs" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["here", "without_logprobs"])
def test_a_sampler_in_this_program_is_taken_at_its_word(name, tmp_path):
    """On-policy, so there is nothing to compute or compare."""
    assert train(name, tmp_path / "run") in (0, 1)
    assert not any("sampler/logprob_diff" in row for row in rows(tmp_path / "run"))


@credit("entropy")
def by_entropy(forest):
    return forest.token["entropy"] * forest.token_sampled


@credit("rollout_logprobs")
def by_logprobs(forest):
    return forest.token["rollout_logprobs"]


def test_columns_that_credit_needs(monkeypatch):
    """The entropy comes from the trainer's forward where the sampler does not bring it; nothing brings the other."""
    policy = load_policy("embedded", "cpu")
    monkeypatch.setitem(CREDIT, "by_entropy", by_entropy)
    monkeypatch.setitem(CREDIT, "by_logprobs", by_logprobs)

    def models(name: str, column: str) -> set[str]:
        config = resolve({"sampler": {"name": name}, "credit": {"name": column}})
        return set(build_estimators(config, build_parts(config), policy))

    assert models("transformers", "by_entropy") == set()
    assert models("user_samplers.here", "by_entropy") == {"old_logprobs"}
    assert models("user_samplers.here", "by_logprobs") == set()
    with pytest.raises(UserError, match="needs rollout_logprobs, which nothing here provides"):
        models("user_samplers.without_logprobs", "by_logprobs")


@pytest.mark.parametrize(
    "options, refused",
    [
        ({}, False),
        ({"temperature": 0.7}, False),
        ({"top_p": 0.9, "top_k": 5}, False),
        ({"temperature": 0.7, "top_p": 0.9}, True),
        ({"temperature": 1.3, "top_k": 5}, True),
    ],
)
@pytest.mark.parametrize("importance", ["none", "sequence"])
def test_options_at_which_a_sampler_has_no_logprobs(options, refused, importance):
    """The declaration and `gives_full_logprobs` are one rule; the sampler of this program has no such options."""
    given = {"sampler": {"name": "vllm", **options}, "objective": {"importance": importance}}
    if refused:
        with pytest.raises(UserError) as error:
            check_training(resolve(given))
        for text in ("sampler.top_p", "sampler.top_k", "sampler.temperature", "--sampler.temperature 1", "comparison"):
            assert text in str(error.value)
        assert ("objective.importance sequence" in str(error.value)) == (importance == "sequence")
    else:
        assert check_training(resolve(given)).elsewhere
    given["sampler"]["name"] = "transformers"
    assert not check_training(resolve(given)).elsewhere


def test_a_builder_is_called_with_its_options():
    policy = load_policy("embedded", "cpu")
    made = build_sampler(sampling("user_samplers.undeclared", options={"shift": 2.0}), policy, UNSHARDED)
    assert isinstance(made, user_samplers.Plain) and made.shift == 2.0 and made.policy is policy
