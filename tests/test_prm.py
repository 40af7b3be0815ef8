"""The implicit process reward model: what it predicts, learns and gives, in each order of updates."""

import copy
import json

import pytest
import torch
from builders import random_trees
from test_train import metrics, train
from tiny_models import fresh
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForCausalLM

from stepcredit.auxiliary import ImplicitPRM, OldPolicy, PRMOptions, Reference, SameAsOld
from stepcredit.auxiliary.prm import prediction_metrics, sums
from stepcredit.cli.main import main
from stepcredit.credit import CREDIT, assign
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.policy.forward import Policy, score
from stepcredit.records import read_trees

RATE = 1e-3


def observed(kind: str = "chain", seed: int = 0, **options) -> Forest:
    """A forest with the reference's log-probabilities; the reference is the family's start."""
    forest = Forest.from_trees(random_trees(seed, kind, columns=(), **options))
    return Reference(fresh("qwen3"), 1.0, 4096).observe(forest)


def prm(**options) -> ImplicitPRM:
    return ImplicitPRM(fresh("qwen3"), PRMOptions(**{"learning_rate": RATE, "beta": 0.5} | options))


def weights(model: ImplicitPRM) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.policy.parameters()]


def test_at_first_it_is_the_reference():
    """Process rewards of 0, chances of 1/2, whatever the outcomes."""
    forest, model = observed(), prm(update="none")
    found = model.observe(forest)
    assert found.token["prm_logprobs"].equal(forest.token["ref_logprobs"])
    assert model.metrics["prm/loss"] == pytest.approx(0.6931, abs=1e-4) and model.metrics["prm/auc"] == 0.5
    for estimator in ("rloo", "grpo", "reinforce"):
        done = assign(found, "prime", CREDIT["prime"], {"estimator": estimator})
        assert done.token["process"].abs().max() == 0


@pytest.mark.parametrize("max_tokens", [8, 4096])
@pytest.mark.parametrize("kind", ["flat", "chain"])
def test_the_gradient_is_that_of_plain_autograd(kind, max_tokens, monkeypatch):
    """Mean cross-entropy of sigmoid(beta * sum of log-ratios) over judged completions, a row of its own each."""
    forest = observed(kind, seed=3, num_trees=6, unjudged=0.4)
    assert 0.5 in forest.segment["reward"] and not forest.judged.all()
    model = prm(max_tokens=max_tokens)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.mul_(1.05)
    plain = copy.deepcopy(model.policy)
    plain.path = "plain"
    caught: list[Tensor] = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: caught.extend(q.grad.clone() for q in p))
    monkeypatch.setattr(model.learner.optimizer, "step", lambda: None)
    model.options = PRMOptions(beta=0.5, max_tokens=max_tokens)
    with pytest.raises(TypeError):  # no norm
        model.observe(forest)
    totals, labels = [], []
    for tree in forest.to_trees():
        parents = {segment.parent for segment in tree.segments}
        for index, segment in enumerate(tree.segments):
            if index in parents or segment.reward is None:
                continue
            path, up = [], index
            while up >= 0:
                path.append(tree.segments[up])
                up = tree.segments[up].parent
            ids = [token for one in path[::-1] for token in one.token_ids]
            ref = sum(value for one in path for value in one.columns["ref_logprobs"])
            logits = plain.model(torch.tensor([[*tree.prompt_ids, *ids]])).logits[0, len(tree.prompt_ids) - 1 : -1]
            totals.append(logits.log_softmax(-1)[range(len(ids)), ids].sum() - ref)
            labels.append(segment.reward)
    binary_cross_entropy_with_logits(0.5 * torch.stack(totals), torch.tensor(labels)).backward()
    expected = [parameter.grad for parameter in plain.parameters()]
    size = max(float(grad.abs().max()) for grad in expected)
    assert size > 0
    for one, two in zip(caught, expected, strict=True):
        assert float((one - two).abs().max()) < 2e-5 * size


def count_calls(monkeypatch) -> list[bool]:
    """Whether gradients were on, of every forward call."""
    calls: list[bool] = []
    forward = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda self, *a: calls.append(torch.is_grad_enabled()) or forward(self, *a))
    return calls


@pytest.mark.parametrize(("minibatches", "expected"), [(1, [True]), (2, [False, True, True])])
def test_after_gives_the_rewards_of_the_model_before_the_batch(monkeypatch, minibatches, expected):
    """One pass with one minibatch; a scoring pass first with several. The weights have moved all the same."""
    forest, model = observed(seed=1), prm(num_minibatches=minibatches)
    model.observe(forest)
    before, moved = weights(model), score(model.policy, forest, 1.0, 4096).logprobs
    calls = count_calls(monkeypatch)
    found = model.observe(forest).token["prm_logprobs"]
    assert calls == expected
    torch.testing.assert_close(found, moved, atol=1e-5, rtol=0)
    assert not all(one.equal(two) for one, two in zip(before, weights(model), strict=True))


def test_before_gives_the_rewards_of_the_trained_model():
    """Double forward; the measures are those of the model that had not seen the batch."""
    forest, model = observed(seed=1), prm(update="before")
    found = model.observe(forest).token["prm_logprobs"]
    torch.testing.assert_close(found, score(model.policy, forest, 1.0, 4096).logprobs)
    assert (found - forest.token["ref_logprobs"]).abs().max() > 1e-3
    assert model.metrics["prm/auc"] == 0.5


def test_frozen_stays():
    forest, model = observed(), prm(update="none")
    before = weights(model)
    model.observe(forest)
    assert all(one.equal(two) for one, two in zip(before, weights(model), strict=True))
    assert "prm/grad_norm" not in model.metrics


def test_it_learns_the_outcomes():
    """Many rounds on one batch: loss near 0 for 0/1 outcomes, chances near the fraction for others."""
    forest = observed("flat", seed=5, num_trees=3, unjudged=0.0)
    model = prm(learning_rate=5e-3, num_minibatches=2)
    for _ in range(80):
        found = model.observe(forest)
    leaf = forest.segment["is_leaf"].nonzero().squeeze(1)
    chance = (0.5 * sums(found, found.token["prm_logprobs"] - forest.token["ref_logprobs"])[leaf]).sigmoid()
    assert (chance - forest.segment["reward"][leaf]).abs().max() < 0.15
    assert model.metrics["prm/accuracy"] == 1


def test_masked_and_unjudged_completions_do_not_train_it():
    forest = observed("flat", seed=2)
    silent = forest.with_segment(mask=torch.zeros_like(forest.segment["mask"]))
    model = prm()
    before = weights(model)
    found = model.observe(silent)
    assert all(one.equal(two) for one, two in zip(before, weights(model), strict=True))
    assert found.token["prm_logprobs"].isfinite().all() and "prm/loss" not in model.metrics
    part = forest.segment["mask"].clone()
    part[::2] = False
    one, two = prm(), prm()
    one.observe(forest.with_segment(mask=part))
    two.observe(forest.with_segment(has_reward=forest.segment["has_reward"] & part))
    assert all(a.equal(b) for a, b in zip(weights(one), weights(two), strict=True))


def test_outcomes_outside_zero_and_one_are_refused():
    forest = observed("flat")
    with pytest.raises(UserError, match=r"tree 'flat-0', segment \d has the reward 2; .* in \[0, 1\]"):
        prm().observe(forest.with_segment(reward=2 * torch.ones(forest.num_segments)))


def test_its_state_comes_back():
    """Optimiser, order of minibatches and weights: the next batch ends in the same bits."""
    forest, one = observed(seed=4), prm(num_minibatches=2)
    one.observe(forest)
    two = prm(num_minibatches=2)
    two.policy.load_state_dict(one.policy.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for name, tensor in two.learner.tensors(fill=True).items():
        tensor.copy_(one.learner.tensors()[name])
    assert one.observe(forest).token["prm_logprobs"].equal(two.observe(forest).token["prm_logprobs"])
    assert all(a.equal(b) for a, b in zip(weights(one), weights(two), strict=True))


def test_measures_by_hand():
    """Two right at .8 and .5, two wrong at .5 and .1: three pairs ordered, one tied; bins .8, .5 (two) and .1."""
    found = prediction_metrics(torch.tensor([0.8, 0.5, 0.5, 0.1]), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert found["prm/auc"] == pytest.approx(3.5 / 4)
    assert found["prm/accuracy"] == pytest.approx(0.75)
    assert found["prm/calibration"] == pytest.approx((0.2 + 0.0 + 0.1) / 4)
    assert found["prm/loss"] == pytest.approx(-sum(torch.tensor([0.8, 0.5, 0.5, 0.9]).log().tolist()) / 4)
    assert "prm/auc" not in prediction_metrics(torch.tensor([0.3]), torch.tensor([1.0]))
    assert prediction_metrics(torch.tensor([]), torch.tensor([])) == {}


def test_the_policy_as_its_own_reference():
    forest = OldPolicy(fresh("qwen3"), 1.0, 4096).observe(Forest.from_trees(random_trees(0, "flat", columns=())))
    found = SameAsOld().observe(forest)
    assert found.token["ref_logprobs"].equal(forest.token["old_logprobs"])


# ---------------------------------------------------------------------- runs


def test_it_is_saved_with_every_checkpoint(tmp_path):
    """A folder that transformers loads, and that another run can start from; its numbers stand in the metrics."""
    run = tmp_path / "run"
    assert train(run, algorithm="prime", prm__num_minibatches=2, filter__enabled="true") == 0
    folder = run / "checkpoints" / "000002" / "prm"
    policy, reward = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder.parent, folder))
    assert any(not policy[name].equal(reward[name]) for name in policy)
    rows = metrics(run)[1:]
    assert all({"prm/loss", "prm/accuracy", "prm/calibration", "prm/grad_norm"} <= row.keys() for row in rows)
    assert all(row["tokens/sampled"] > row["tokens/left_out"] > 0 for row in rows)
    assert rows[0]["credit/process_rms"] == 0 and rows[1]["credit/process_rms"] > 0
    assert train(tmp_path / "two", algorithm="prime", prm__model=str(folder), prm__update="before") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--temperature 0.7 --prm.reference policy", "needs --sampler.temperature 1"),
        (
            "--temperature 0.7 --objective.kl.coef 0.1 --prm.reference start",
            "another reference than the process reward model",
        ),
        ("--prm.update sometimes", "prm.update: 'sometimes' is not known"),
        ("--filter.enabled true --filter.low 0.9", "filter.low (0.9) is above filter.high (0.8)"),
        ("--prm.model nowhere", "model: 'nowhere'"),
    ],
)
def test_what_does_not_go_together_is_refused(words, said, capsys, tmp_path):
    assert main(["train", "--algorithm", "prime", *words.split(), "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1


def test_the_policy_as_reference_in_a_run(tmp_path):
    """No reference model is there: `ref_logprobs` are the policy's own, and so are the rewards' zero points."""
    assert train(tmp_path / "run", algorithm="prime", prm__reference="policy", rollouts__every=1) == 0
    for tree in read_trees(str(tmp_path / "run" / "rollouts" / "000002.jsonl.zst")):
        for segment in tree.segments:
            assert segment.columns["ref_logprobs"] == segment.columns["old_logprobs"]
            assert segment.columns["ref_logprobs"] != segment.columns["prm_logprobs"]


def test_token_rewards_of_saved_rollouts(tmp_path, capsys):
    """`score --prm` with the checkpoint before an iteration gives the rewards that the iteration used."""
    run, out = tmp_path / "run", tmp_path / "rewarded.jsonl"
    options = {"checkpoint__every": 1, "rollouts__every": 1, "credit__beta": 0.5, "prm__reference": "start"}
    assert train(run, algorithm="prime", **options) == 0
    saved = run / "rollouts" / "000002.jsonl.zst"
    words = ["score", "--in", str(saved), "--out", str(out), "--ref", "embedded", "--beta", "0.5", "--device", "cpu"]
    assert main([*words, "--prm", str(run / "checkpoints" / "000001" / "prm")]) == 0
    assert "prm/auc" in capsys.readouterr().out
    moved = 0.0
    for before, after in zip(read_trees(str(saved)), read_trees(str(out)), strict=True):
        for one, two in zip(before.segments, after.segments, strict=True):
            for column in ("prm_logprobs", "ref_logprobs"):
                assert two.columns[column] == pytest.approx(one.columns[column], abs=1e-4)
            differences = [a - b for a, b in zip(one.columns["prm_logprobs"], one.columns["ref_logprobs"], strict=True)]
            assert two.columns["token_rewards"] == pytest.approx([0.5 * value for value in differences], abs=1e-4)
            assert two.extra["text"] == one.extra["text"] and two.reward == one.reward
            moved = max(moved, *map(abs, differences))
    assert moved > 1e-3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--prm embedded --ref embedded --in none.jsonl", "--in ROLLOUTS, --prm MODEL, --ref MODEL and --out FILE"),
        ("--prm embedded --ref embedded --in none.jsonl --out out.jsonl", "none.jsonl: no such file"),
        ("--prm embedded --ref embedded --in ids.jsonl --out out.jsonl", "has token id 900"),
        ("--prm embedded --ref embedded --in bare.jsonl --out out.jsonl", "has no prompt_ids"),
        ("--prm embedded --ref embedded --in ids.jsonl --out out.jsonl --beta -1", "--beta must be a number above 0"),
        ("--prm nowhere --ref embedded --in fine.jsonl --out out.jsonl", "model: 'nowhere'"),
    ],
)
def test_what_cannot_be_rewarded_is_refused(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, ids, prompt in (("ids", [900], [1]), ("bare", [4], []), ("fine", [4], [1])):
        record = {"id": "a", "prompt_ids": prompt, "segments": [{"token_ids": ids}]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record))
    assert main(["score", *words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1 and not (tmp_path / "out.jsonl").exists()
