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

from stepcredit.cli.main import main
from stepcredit.credit import CREDIT, assign
from stepcredit.errors import UserError
from stepcredit.estimators.frozen import OldPolicy, Reference, SameAsOld
from stepcredit.estimators.options import PRMOptions
from stepcredit.estimators.prm import ImplicitPRM, prediction_metrics, sums
from stepcredit.forest import Forest
from stepcredit.forest.records import read_trees
from stepcredit.policy.forward import Policy, score
from stepcredit.policy.loading import load_policy

RATE = 1e-3


def observed(kind: str = "chain", seed: int = 0, **options) -> Forest:
    """A forest with the reference's log-probabilities; the reference is the family's start."""
    forest = Forest.from_trees(random_trees(seed, kind, columns=(), **options))
    return Reference(fresh("qwen3"), 1.0, 4096).observe(forest)


def prm(**options) -> ImplicitPRM:
    own = {name: options.pop(name) for name in ("beta", "max_tokens", "seed") if name in options}
    return ImplicitPRM(fresh("qwen3"), PRMOptions(**{"learning_rate": RATE} | options), **{"beta": 0.5} | own)


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


def test_judging_teaches_nothing():
    """It gives what a model that does not learn gives, and leaves weights and the order of minibatches alone."""
    forest, model, still = observed(), prm(), prm(update="none")
    before = weights(model)
    judged = model.judge(forest)
    assert judged.token["prm_logprobs"].equal(still.observe(forest).token["prm_logprobs"])
    assert model.metrics == still.metrics and model.batches == 0
    assert all(map(torch.equal, weights(model), before))
    model.observe(forest)
    assert not all(map(torch.equal, weights(model), before)) and model.batches == 1


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
    plain.scoring_form = "plain"
    caught: list[Tensor] = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: caught.extend(q.grad.clone() for q in p))
    monkeypatch.setattr(model.learner.optimizer, "step", lambda: None)
    model.options = PRMOptions()
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


@pytest.mark.parametrize("minibatches", [1, 3])
def test_before_gives_the_rewards_of_the_trained_model(minibatches):
    """Double forward; the measures are those of the model that had not seen the batch."""
    forest, model = observed(seed=1), prm(update="before", num_minibatches=minibatches, learning_rate=0.02)
    found = model.observe(forest).token["prm_logprobs"]
    torch.testing.assert_close(found, score(model.policy, forest, 1.0, 4096).logprobs)
    assert (found - forest.token["ref_logprobs"]).abs().max() > 1e-3
    assert model.metrics["prm/auc"] == 0.5 and model.metrics["prm/loss"] == pytest.approx(0.6931, abs=1e-4)


def test_frozen_stays():
    forest, model = observed(), prm(update="none")
    before = weights(model)
    model.observe(forest)
    assert all(one.equal(two) for one, two in zip(before, weights(model), strict=True))
    assert "prm/grad_norm" not in model.metrics


def test_it_learns_the_outcomes():
    """Many rounds on one batch: loss near 0 for 0/1 outcomes, chances near the fraction for others."""
    forest = observed("flat", seed=5, num_trees=3, unjudged=0.0)
    model = prm(learning_rate=5e-3, num_minibatches=2, seed=2)
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


def test_a_forest_that_was_selected_from_another():
    forest = observed("flat", seed=1, num_trees=5)
    part = forest.select_trees(torch.tensor([3, 4]))
    one, two = prm(), prm()
    found = one.observe(part).token["prm_logprobs"]
    assert found.equal(two.observe(Forest.from_trees(part.to_trees())).token["prm_logprobs"]) and found.all()
    assert all(a.equal(b) for a, b in zip(weights(one), weights(two), strict=True))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_running_out_of_memory_cuts_the_step_smaller(monkeypatch, caplog, error):
    """As with the policy: the budget halves until the step fits, the gradient is that of the whole step."""
    forest, one, two = observed("flat", seed=6), prm(), prm()
    forward = Policy.forward
    expected = one.observe(forest).token["prm_logprobs"]

    def narrow(self, part, *rest):
        if torch.is_grad_enabled() and part.num_tokens > most:
            raise error
        return forward(self, part, *rest)

    monkeypatch.setattr(Policy, "forward", narrow)
    most = 12
    assert forest.num_tokens > 2 * most
    torch.testing.assert_close(two.observe(forest).token["prm_logprobs"], expected, atol=1e-5, rtol=0)
    assert two.metrics["prm/grad_norm"] == pytest.approx(one.metrics["prm/grad_norm"], rel=1e-4)
    assert two.learner.max_tokens < forest.num_tokens and "out of memory" in caplog.text
    one.load_state_dict(two.state_dict())
    two.load_state_dict(prm().state_dict())
    assert one.learner.max_tokens == two.learner.max_tokens < 4096
    most = 0
    with pytest.raises(UserError, match="process reward model with a single completion"):
        two.observe(forest)


def test_measures_by_hand():
    """Two right at .8 and .5, two wrong at .5 and .1: three pairs ordered, one tied; bins .8, .5 (two) and .1."""
    found = prediction_metrics(torch.tensor([0.8, 0.5, 0.5, 0.1]).logit(), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert found["prm/auc"] == pytest.approx(3.5 / 4)
    assert found["prm/accuracy"] == pytest.approx(0.75)
    assert found["prm/calibration"] == pytest.approx((0.2 + 0.0 + 0.1) / 4)
    assert found["prm/loss"] == pytest.approx(-sum(torch.tensor([0.8, 0.5, 0.5, 0.9]).log().tolist()) / 4)
    assert "prm/auc" not in prediction_metrics(torch.tensor([-0.3]), torch.tensor([1.0]))
    assert prediction_metrics(torch.tensor([]), torch.tensor([])) == {}


def test_measures_of_chances_that_fp32_rounds_to_0_or_1():
    """The loss is not bounded, and 30 is more than 20."""
    found = prediction_metrics(torch.tensor([30.0, 20.0, -40.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert found["prm/loss"] == pytest.approx(60 / 3) and found["prm/auc"] == 0.5


def test_the_area_is_that_over_all_pairs():
    generator = torch.Generator().manual_seed(0)
    logit = torch.randint(-4, 5, (200,), generator=generator) / 4
    label = (torch.rand(200, generator=generator) < 0.3).float()
    high, low = logit[label == 1][:, None], logit[label == 0][None]
    expected = ((high > low).double() + 0.5 * (high == low).double()).mean()
    assert prediction_metrics(logit, label)["prm/auc"] == pytest.approx(float(expected), abs=1e-12)


def test_what_is_not_finite_is_measured_by_nothing_and_named_by_credit():
    """The measures leave it out; the run ends where the credit function is asked."""
    logit, label = torch.tensor([2.0, torch.nan, -torch.inf, -1.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert prediction_metrics(logit, label) == prediction_metrics(logit[[0, 3]], label[[0, 3]])
    assert prediction_metrics(logit[1:3], label[1:3]) == {}
    forest, model = observed("flat", seed=5), prm()
    with torch.no_grad():
        next(model.policy.parameters()).fill_(torch.nan)
    found = model.observe(forest)
    assert model.metrics["prm/nonfinite"] == 1
    with pytest.raises(UserError, match=r"credit 'prime': .* not finite in tree"):
        assign(found, "prime", CREDIT["prime"], {})


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
        ("--prm.model nowhere", "prm.model: 'nowhere'"),
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


@pytest.mark.parametrize(
    ("options", "there"),
    [
        ({}, True),
        ({"temperature": 0.5}, False),
        ({"prm__reference": "policy"}, False),
        ({"prm__model": "embedded"}, False),
    ],
    ids=str,
)
def test_the_distance_from_the_reference_is_left_out_where_it_is_of_another(tmp_path, options, there):
    """Only the policy's own start, at the temperature of the samples, is what `policy/kl_ref` means."""
    options = {"prm__reference": "start", "temperature": 1, "optim__num_minibatches": 2, "iterations": 1} | options
    assert train(tmp_path / "run", algorithm="prime", num_problems=0, **options) == 0
    row = metrics(tmp_path / "run")[-1]
    assert ("policy/kl_ref" in row) == there and "prm/loss" in row


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


@pytest.fixture(scope="module")
def odd_models(tmp_path_factory):
    """The embedded model with weights that are NaN, with ones that overflow, and with two tokens exchanged."""
    folder, policy = tmp_path_factory.mktemp("models"), load_policy("embedded", "cpu")
    for name, weight in (("other", 1.0), ("huge", 5e37), ("nan", torch.nan)):
        with torch.no_grad():
            policy.model.get_parameter("model.norm.weight").mul_(weight)
        policy.model.save_pretrained(folder / name)
        policy.tokenizer.save_pretrained(folder / name)
    file = folder / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[-5], list(vocabulary)[-3]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--prm embedded --ref embedded --in none.jsonl", "--in ROLLOUTS, --prm MODEL, --ref MODEL and --out FILE"),
        ("--prm embedded --ref embedded --in none.jsonl --out out.jsonl", "none.jsonl: no such file"),
        ("--prm embedded --ref embedded --in ids.jsonl --out out.jsonl", "has token id 900"),
        ("--prm embedded --ref embedded --in bare.jsonl --out out.jsonl", "has no prompt_ids"),
        ("--prm embedded --ref embedded --in ids.jsonl --out out.jsonl --beta -1", "--beta must be a number above 0"),
        ("--prm nowhere --ref embedded --in fine.jsonl --out out.jsonl", "--prm: 'nowhere'"),
        (
            "--prm huge --ref embedded --in fine.jsonl --out out.jsonl",
            "--prm: 'huge' gives log-probabilities that are not",
        ),
        (
            "--prm embedded --ref huge --in fine.jsonl --out out.jsonl",
            "--ref: 'huge' gives log-probabilities that are not",
        ),
        ("--prm nan --ref embedded --in fine.jsonl --out out.jsonl", "--prm: 'nan' has NaN or infinity in model.norm"),
        ("--prm embedded --ref nan --in fine.jsonl --out out.jsonl", "--ref: 'nan' has NaN or infinity in model.norm"),
        ("--prm embedded --ref other --in fine.jsonl --out out.jsonl", "--ref: 'other' has another vocabulary"),
        *(
            (f"--prm embedded --ref embedded --in fine.jsonl --out out.jsonl {word}", f"go with {word.split()[0]}")
            for word in ("--json out.json", "--verifier chain", "--data rows.jsonl")
        ),
        ("--prm embedded --ref embedded --in fine.jsonl --out out.jsonl --gold", "give one of --gold"),
    ],
)
def test_what_cannot_be_rewarded_is_refused(words, said, odd_models, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in odd_models.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    for name, ids, prompt in (("ids", [900], [1]), ("bare", [4], []), ("fine", [4], [1])):
        record = {"id": "a", "prompt_ids": prompt, "segments": [{"token_ids": ids}]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record))
    assert main(["score", *words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("error:") == 1 and not (tmp_path / "out.jsonl").exists()
