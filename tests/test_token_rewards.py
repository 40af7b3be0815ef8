"""Rewards of tokens from the log-ratio of two models (RTO, arXiv 2404.18922)."""

import json
from pathlib import Path

import pytest
import torch
from builders import random_forest
from tiny_models import fresh

from stepcredit.cli.main import main
from stepcredit.config import resolve
from stepcredit.estimators.penalty import LogRatioRewards, RewardPenalty
from stepcredit.policy.forward import score
from stepcredit.run.build import build_parts

close = torch.testing.assert_close
SMALL = "--device cpu --sampler.max-new-tokens 32 --iterations 2 --num-problems 4 --train.problems-per-iteration 4"


def rewarded(bound: float, coef: float):
    """The forest before and behind the estimator, and the model's log-probabilities; the model is not the reference."""
    policy, forest = fresh("qwen3"), random_forest(3, "chain", unsampled=0.3)
    noise = torch.randn(forest.num_tokens, generator=torch.Generator().manual_seed(1))
    logprobs = score(policy, forest, 1.0, 16384).logprobs
    forest = forest.with_token(ref_logprobs=logprobs + noise, old_logprobs=logprobs - noise)
    forest = forest.with_token(token_rewards=torch.arange(forest.num_tokens) / 8)
    estimator = LogRatioRewards(policy, 0.1, bound, RewardPenalty(coef))
    return forest, estimator.observe(forest), noise, estimator


@pytest.mark.parametrize("coef", [0.0, 0.25])
def test_the_formula(coef):
    """What was there + clamp(0.1 log(pi_model / pi_ref), -0.05, 0.05) - coef log(pi_old / pi_ref), where sampled."""
    before, after, noise, estimator = rewarded(0.05, coef)
    own = (-0.1 * noise).clamp(-0.05, 0.05) + 2 * coef * noise  # log(pi_old / pi_ref) = -2 noise
    expected = before.token["token_rewards"] + torch.where(before.token_sampled, own, 0.0)
    close(after.token["token_rewards"], expected, atol=1e-5, rtol=0)
    sampled = before.token_sampled
    assert estimator.metrics["token_rewards/at_bound"] == pytest.approx(
        float((noise[sampled].abs() > 0.5).float().mean())
    )
    assert 0 < estimator.metrics["token_rewards/at_bound"] < 1


def test_without_a_bound_the_rewards_of_a_completion_add_up_to_its_log_ratio():
    before, after, noise, estimator = rewarded(0.0, 0.0)
    sampled = before.token_sampled
    added = (after.token["token_rewards"] - before.token["token_rewards"])[sampled].sum()
    assert float(added) == pytest.approx(-0.1 * float(noise[sampled].sum()), abs=1e-4)
    assert estimator.metrics["token_rewards/at_bound"] == 0


def test_who_reads_what():
    """The reference and the penalty's columns are observed first, the critic behind it; the plan knows the model."""
    given = {"algorithm": "ppo", "estimators": {"token_rewards": {"name": "log_ratio", "model": "embedded"}}}
    found = build_parts(resolve(given)).observers
    assert list(found.providers) == ["ref_logprobs", "token_rewards", "values"]
    penalised = given | {"objective": {"kl": {"estimator": "k1", "coef": 0.1}}}
    assert list(build_parts(resolve(penalised)).observers.providers)[:2] == ["old_logprobs", "ref_logprobs"]
    loads = found.loads(resolve(given))
    assert ("token reward model", False) in [(load.name, load.learns) for load in loads]


@pytest.mark.parametrize(
    "options, words",
    [
        ("name log_ratio", "log_ratio needs a model"),
        ("name log_ratio model embedded beta 0", "beta (0) must be above 0"),
        ("name log_ratio model nowhere", "estimators.token_rewards.model: 'nowhere'"),
        ("name log_ratoi model embedded", "did you mean 'log_ratio'"),
        ("name log_ratio model embedded bound much", "estimators.token_rewards.bound: 'much' is not a float"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, capsys, options, words):
    given = [
        f"--estimators.token-rewards.{word}" if number % 2 == 0 else word for number, word in enumerate(options.split())
    ]
    assert main(["train", *SMALL.split(), *given, "--run-dir", str(tmp_path / "run")]) == 2
    assert words in capsys.readouterr().err


def test_a_run_with_a_model_of_its_own(tmp_path: Path, capsys):
    """Two stages: a model that has moved, then PPO on its log-ratio; on resume it must be the same model."""
    first, run = tmp_path / "first", tmp_path / "run"
    assert main(["train", *SMALL.split(), "--learning-rate", "1e-3", "--run-dir", str(first)]) == 0
    model = first / "checkpoints" / "000002"
    recipe = str(Path(__file__).parents[1] / "recipes" / "rto.yaml")
    more = ["--estimators.token_rewards.model", str(model), "--save-every", "1"]
    assert main(["train", recipe, *SMALL.split(), *more, "--run-dir", str(run)]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    assert all(row["token_rewards/mean"] != 0 and 0 < row["token_rewards/at_bound"] < 1 for row in rows)
    other = tmp_path / "other"
    assert main(["train", *SMALL.split(), "--learning-rate", "2e-3", "--run-dir", str(other)]) == 0
    capsys.readouterr()
    moved = [
        "--estimators.token_rewards.name",
        "log_ratio",
        "--estimators.token_rewards.model",
        str(other / "checkpoints" / "000002"),
        "--iterations",
        "3",
    ]
    assert main(["train", "--resume", str(run), *moved]) == 2
    assert "estimators.token_rewards.model is not the one that the run began with" in capsys.readouterr().err
