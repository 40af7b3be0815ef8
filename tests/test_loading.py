"""What can be loaded as a policy, and what is refused with a clear line."""

import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM

from stepcredit.errors import UserError
from stepcredit.policy.loading import EMBEDDED_MODEL, frozen_copy, load_policy, pick_device, save_policy


def test_weights_are_fp32_whatever_the_computation() -> None:
    """A learning rate of 1e-6 would vanish in bf16 weights."""
    policy = load_policy("embedded", "cpu", "bfloat16")
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert policy.autocast is torch.bfloat16


def test_save_and_load_give_the_same_weights(tmp_path) -> None:
    policy = load_policy("embedded", "cpu")
    save_policy(policy, tmp_path)
    again = load_policy(str(tmp_path), "cpu")
    for name, parameter in policy.model.state_dict().items():
        assert torch.equal(parameter, again.model.state_dict()[name])


def test_frozen_copy_stays_behind() -> None:
    """The reference neither moves with the policy nor takes gradients."""
    policy = load_policy("embedded", "cpu")
    copy = frozen_copy(policy)
    with torch.no_grad():
        next(policy.parameters()).add_(1.0)
    assert not torch.equal(next(policy.parameters()), next(copy.parameters()))
    assert not any(parameter.requires_grad for parameter in copy.parameters())


def test_models_with_other_states_than_keys_and_values_are_refused(tmp_path) -> None:
    """They cannot be sampled row by row from a shared prompt."""
    config = Lfm2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    load_policy("embedded", "cpu").tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lfm2.*recurrent or convolution"):
        load_policy(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("missing", "word"), [("model.safetensors", "holds no model"), ("tokenizer.json", "holds no tokenizer")]
)
def test_incomplete_folders(tmp_path, missing: str, word: str) -> None:
    """The message names what is not there."""
    for file in EMBEDDED_MODEL.iterdir():
        if file.name != missing and not (missing == "tokenizer.json" and file.name.startswith("tokenizer")):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=word):
        load_policy(str(tmp_path))


@pytest.mark.parametrize("name", ["tpu9", "cuda:99", ""])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(UserError, match="not available"):
        pick_device(name)
