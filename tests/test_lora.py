"""LoRA: only adapters learn, without them the model is its own reference, and they are saved, merged and refused."""

import json
from pathlib import Path

import pytest
import torch
from test_resume import TINY, train
from transformers import AutoModelForCausalLM

from stepcredit.cli.main import main
from stepcredit.config import resolve
from stepcredit.errors import UserError
from stepcredit.estimators.frozen import ReferenceWithoutAdapters
from stepcredit.estimators.options import PRMOptions
from stepcredit.estimators.prm import ImplicitPRM
from stepcredit.learn.adapters import adapters_off, add_adapters, trainable_copy
from stepcredit.policy.forward import Policy, random_forest, score
from stepcredit.policy.loading import load_policy
from stepcredit.run.build import build_estimators, build_parts
from stepcredit.run.checkpoint import newest_checkpoint

ADAPTED = ("--lora.rank", "4", "--learning-rate", "1e-2", "--objective.kl.coef", "0.01")


def adapted(rank: int = 4, moved: bool = True) -> Policy:
    policy = load_policy("embedded", "cpu")
    add_adapters(policy, rank, 8.0, [], seed=0)
    if moved:
        with torch.no_grad():
            for value in policy.parameters():
                if value.requires_grad:
                    value.add_(0.05)
    return policy


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Three iterations with adapters."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(folder, "--iterations", "3", "--checkpoint.keep", "9", *ADAPTED) in (0, 1)
    return folder


def test_new_adapters_change_nothing_and_alone_learn():
    policy, forest = adapted(moved=False), random_forest(50)
    plain = load_policy("embedded", "cpu")
    assert score(policy, forest, 1.0, 4096).logprobs.equal(score(plain, forest, 1.0, 4096).logprobs)
    trained = {name for name, value in policy.named_parameters() if value.requires_grad}
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize("path", ["forest", "cached", "plain"])
def test_the_reference_is_the_base_to_the_last_bit(path):
    policy, plain, forest = adapted(), load_policy("embedded", "cpu"), random_forest(50)
    policy.scoring_form = plain.scoring_form = path
    expected = score(plain, forest, 0.7, 40).logprobs
    assert ReferenceWithoutAdapters(policy, 0.7, 40).observe(forest).token["ref_logprobs"].equal(expected)
    assert not score(policy, forest, 0.7, 40).logprobs.equal(expected)  # they are on again
    assert any(value.requires_grad for value in policy.parameters())


def test_adapters_are_on_again_after_an_error():
    policy, forest = adapted(), random_forest(50)
    before = score(policy, forest, 1.0, 4096).logprobs
    with pytest.raises(RuntimeError), adapters_off(policy):
        raise RuntimeError
    assert score(policy, forest, 1.0, 4096).logprobs.equal(before)


def test_no_second_copy_of_the_base():
    config = resolve({"algorithm": "prime", "lora": {"rank": 4}, "prm": {"reference": "start"}})
    policy = adapted()
    models = build_estimators(config, build_parts(config), policy)
    theirs = [model.policy for model in models.values() if hasattr(model, "policy")]
    storages = {value.data_ptr() for value in policy.parameters() if not value.requires_grad}
    for other in theirs:
        assert {value.data_ptr() for value in other.parameters() if not value.requires_grad} == storages
    prm = models["prm_logprobs"].policy
    own = {value.data_ptr() for value in prm.parameters() if value.requires_grad}
    assert not own & {value.data_ptr() for value in policy.parameters()}


def test_a_copy_without_adapters_learns_in_all_weights():
    copy = trainable_copy(load_policy("embedded", "cpu").requires_grad_(False), share_frozen=True)
    assert all(value.requires_grad for value in copy.parameters())


def test_a_reward_model_with_adapters_learns_in_them_alone():
    policy, forest = adapted(), random_forest(50)
    forest = forest.select(forest.segment["tree"] == 1).with_segment(
        reward=torch.tensor([1.0, 0.0]), has_reward=torch.ones(2, dtype=torch.bool)
    )
    forest = forest.with_token(ref_logprobs=torch.zeros(forest.num_tokens))
    model = ImplicitPRM(policy, PRMOptions(learning_rate=1e-2))
    before = {name: value.clone() for name, value in model.policy.named_parameters()}
    model.observe(forest)
    moved = {name for name, value in model.policy.named_parameters() if not value.equal(before[name])}
    assert moved and all("lora_" in name for name in moved)


def test_a_resumed_run_ends_in_the_same_bits(run, tmp_path):
    other = tmp_path / "other"
    assert train(other, "--iterations", "2", *ADAPTED) in (0, 1)
    assert main(["train", "--resume", str(other), "--iterations", "3"]) in (0, 1)
    one, two = (folder / "checkpoints" / "000003" / "adapter_model.safetensors" for folder in (run, other))
    assert one.read_bytes() == two.read_bytes()


def test_a_checkpoint_holds_adapters_alone(run):
    folder = newest_checkpoint(run)
    assert (folder / "adapter_config.json").is_file() and not list(folder.glob("model*.safetensors"))
    assert (folder / "adapter_model.safetensors").stat().st_size < 1_000_000


def test_merged_weights_give_what_adapters_give(run, tmp_path):
    folder, out = newest_checkpoint(run), tmp_path / "merged"
    assert main(["merge", "--in", str(folder), "--out", str(out)]) == 0
    forest, with_adapters, merged = random_forest(50), load_policy(str(folder), "cpu"), load_policy(str(out), "cpu")
    expected = score(with_adapters, forest, 1.0, 4096).logprobs
    torch.testing.assert_close(score(merged, forest, 1.0, 4096).logprobs, expected, atol=2e-5, rtol=0)
    plain = score(load_policy("embedded", "cpu"), forest, 1.0, 4096).logprobs
    assert float((expected - plain).abs().max()) > 1e-3
    AutoModelForCausalLM.from_pretrained(out)


def test_adapters_are_evaluated_as_they_are(run, tmp_path, capsys):
    result = tmp_path / "result.json"
    words = ["--num-problems", "4", "--max-new-tokens", "32", "--json", str(result)]
    assert main(["eval", "--model", str(newest_checkpoint(run)), *words]) == 0
    assert json.loads(result.read_text())


@pytest.mark.parametrize("rank", ["0", "4"])
def test_adapters_are_not_trained_on_top_of(run, tmp_path, capsys, rank):
    words = ["--model", str(newest_checkpoint(run)), "--lora.rank", rank, "--run-dir", str(tmp_path / "run")]
    assert main(["train", *TINY, *words]) == 2
    assert "stepcredit merge" in capsys.readouterr().err


def test_unknown_layers_are_named():
    with pytest.raises(UserError, match=r"lora.targets: no layer has this name; there are .*q_proj"):
        add_adapters(load_policy("embedded", "cpu"), 4, 8.0, ["query"], seed=0)


def test_targets_choose_layers():
    policy = load_policy("embedded", "cpu")
    add_adapters(policy, 4, 8.0, ["q_proj"], seed=0)
    assert all("q_proj" in name for name, value in policy.named_parameters() if value.requires_grad)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--in is missing"),
        (["--in", "recipes", "--out", "{new}"], "holds no adapters"),
        (["--in", "recipes", "--out", "recipes"], "is not empty"),
        (["--in", "recipes", "--out", "{new}", "--seed", "1"], "unknown option"),
    ],
)
def test_merge_refuses(words, message, tmp_path, capsys):
    assert main(["merge", *(word.format(new=tmp_path / "new") for word in words)]) == 2
    assert message in capsys.readouterr().err
