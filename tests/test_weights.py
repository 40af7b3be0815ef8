"""Weights that a checkpoint lacks, or has of another size or not finite, are errors; what it has too much is told."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, OTHERS, fresh
from transformers import BertConfig, BertForMaskedLM

from stepcredit.cli.main import main
from stepcredit.errors import UserError
from stepcredit.learn.adapters import add_adapters, load_adapters, merge_adapters
from stepcredit.policy.forward import choose_scoring_form
from stepcredit.policy.loading import EMBEDDED_MODEL, load_policy, save_policy
from stepcredit.policy.weights import Names, check_finite, load_network

MODEL, ADAPTERS = "model.safetensors", "adapter_model.safetensors"
NORM = "model.norm.weight"
TINY = ["--iterations", "1", "--train.problems-per-iteration", "2", "--group-size", "2", "--eval.num-problems", "0",
        "--max-new-tokens", "8", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the embedded model."""
    return Path(shutil.copytree(EMBEDDED_MODEL, tmp_path / "model"))


@pytest.fixture
def adapters(tmp_path) -> Path:
    """Adapters of the embedded model that change something."""
    policy = load_policy("embedded", "cpu")
    add_adapters(policy, 4, 8.0, [], seed=0)
    with torch.no_grad():
        for value in policy.parameters():
            value.add_(0.05 * value.requires_grad)
    save_policy(policy, tmp_path / "adapters")
    return tmp_path / "adapters"


def change(file: Path, function) -> None:
    """Write tensors anew as `function` of their dictionary gives them."""
    save_file({name: value.contiguous() for name, value in function(load_file(file)).items()}, file, {"format": "pt"})


def configure(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(source: Path, *words: str) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(UserError) as caught:
        load_policy(str(source), "cpu")
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "policy."])
def test_names_with_a_prefix(folder, prefix):
    change(folder / MODEL, lambda weights: {prefix + name: value for name, value in weights.items()})
    refused(folder, "lacks 36 of 36 weights", "model.embed_tokens.weight", f"begin with '{prefix}'", "take the prefix")


def test_a_prefix_that_transformers_takes_off_itself(folder):
    before = load_policy("embedded", "cpu").model.state_dict()
    change(folder / MODEL, lambda weights: {"model." + name: value for name, value in weights.items()})
    after = load_policy(str(folder), "cpu").model.state_dict()
    assert all(after[name].equal(value) for name, value in before.items())


def test_names_without_their_prefix():
    with pytest.raises(UserError, match=r"names lack the 'transformer\.'"):
        Names(["transformer.a.weight", "transformer.b.weight"], ["a.weight", "b.weight"]).check("x", 2)


@pytest.mark.parametrize("part", ["base_layer", "qweight", "weight_scale", "absmax"])
def test_how_a_checkpoint_was_written(part):
    with pytest.raises(UserError, match=r"merge them first|quantised"):
        Names(["a.weight"], [f"a.{part}"]).check("x", 1)


def test_a_classifier(folder):
    """Without output layer; the reason stands in its config."""
    configure(folder / "config.json", tie_word_embeddings=False, architectures=["Qwen3ForSequenceClassification"])
    change(folder / MODEL, lambda weights: weights | {"score.weight": torch.zeros(1, 64)})
    refused(folder, "lacks 1 of 36 weights (lm_head.weight)", "Qwen3ForSequenceClassification", "another class")


def test_an_output_layer_that_only_the_config_unties(folder):
    configure(folder / "config.json", tie_word_embeddings=False)
    refused(folder, "lm_head.weight", '"tie_word_embeddings": true')


def test_layers_that_are_not_there(folder):
    configure(folder / "config.json", num_hidden_layers=12, layer_types=None)
    message = refused(folder, "lacks 99 of 135 weights", "config.json are of two models")
    assert message.index("layers.3.input_layernorm") < message.index("layers.3.mlp")  # layer 3 before layer 10


def test_weights_of_another_size(folder):
    configure(folder / "config.json", intermediate_size=200)
    refused(folder, "9 weights of another size", "mlp.down_proj.weight: [64, 192], not [64, 200]")


def test_unexpected_weights_are_counted(folder, caplog):
    configure(folder / "config.json", num_hidden_layers=2, layer_types=None)
    with caplog.at_level(logging.WARNING, "stepcredit"):
        load_policy(str(folder), "cpu")
    (line,) = caplog.messages
    assert "has 11 weights that the model does not take (model.layers.2.input_layernorm.weight" in line


def test_a_whole_model_says_nothing(folder, caplog):
    with caplog.at_level(logging.WARNING, "stepcredit"):
        load_policy(str(folder), "cpu")
    assert not caplog.messages


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_families_are_whole_or_refused(family, tied, tmp_path, caplog):
    """Tied weights are not missing, old rotary buffers not unexpected, and a norm that is gone is named."""
    policy = fresh(family, tie_word_embeddings=tied)
    policy.model.save_pretrained(tmp_path)
    change(tmp_path / MODEL, lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    with caplog.at_level(logging.WARNING, "stepcredit"):
        again = load_network(str(tmp_path))
    assert not caplog.messages
    assert all(value.equal(again.state_dict()[name]) for name, value in policy.model.state_dict().items())
    whole = load_file(tmp_path / MODEL)
    for gone in (NORM, "model.embed_tokens.weight"):
        save_file({name: value for name, value in whole.items() if name != gone}, tmp_path / MODEL, {"format": "pt"})
        with pytest.raises(UserError, match=rf"\(.*{gone}.*\)"):
            load_network(str(tmp_path))


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen3", "llama", "mistral", "granite", "cohere", "phi3"])
def test_loaded_models_keep_the_packed_form(family, tmp_path):
    """With the attention that transformers chooses for a model that it loads."""
    fresh(family).model.save_pretrained(tmp_path)
    load_policy("embedded", "cpu").tokenizer.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), "cpu")
    assert choose_scoring_form(policy) < 1e-4 and policy.scoring_form == "forest"


# ---------------------------------------------------------------------- values and files


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder, value):
    def spoil(weights):
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        return weights

    change(folder / MODEL, spoil)
    refused(folder, "NaN or infinity in model.layers.1.mlp.up_proj.weight")


def test_large_weights_and_whole_numbers_are_finite():
    check_finite({"a": torch.full((1000,), 3e38), "b": torch.arange(3), "c": torch.zeros(0)}, "x")


def test_bf16_and_bin(folder):
    before = load_policy("embedded", "cpu").model.state_dict()
    rounded = {name: value.bfloat16() for name, value in load_file(folder / MODEL).items()}
    torch.save(rounded, folder / "pytorch_model.bin")
    (folder / MODEL).unlink()
    after = load_policy(str(folder), "cpu").model.state_dict()
    assert all(after[name].equal(value.bfloat16().float()) for name, value in before.items())


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        (MODEL, None, "model.safetensors is damaged or cut off"),
        (MODEL, b"", "model.safetensors is damaged or cut off"),
        (MODEL, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("config.json", b"{", "config.json"),
        ("tokenizer.json", b"{}", "no tokenizer to load"),
        ("heads.safetensors", b"abc", "heads.safetensors is damaged or cut off"),
    ],
)
def test_broken_files(folder, name, content, word):
    file = folder / name
    file.write_bytes(file.read_bytes()[:1000] if content is None else content)
    refused(folder, word)


def test_shards_that_the_index_names(folder):
    weights = load_file(folder / MODEL)
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    index = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / MODEL).unlink()
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
    load_policy(str(folder), "cpu")
    change(folder / "model-00002-of-00002.safetensors", lambda w: {name: w[name] for name in names[11:]})
    refused(folder, "lacks 2 of 36 weights", names[9], names[10])
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors")


def test_heads_that_are_not_finite(folder):
    head = {"value.linear.weight": torch.full((1, 64), float("nan")), "value.linear.bias": torch.zeros(1)}
    save_file(head, folder / "heads.safetensors")
    refused(folder, "heads.safetensors has NaN or infinity in value.linear.weight")


def test_an_encoder_is_no_policy(folder):
    config = BertConfig(vocab_size=56, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForMaskedLM(config).save_pretrained(folder)
    refused(folder, "bert", "no causal language model")


def test_misspelt_names_say_what_was_looked_for(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the environment was read long ago
    with pytest.raises(UserError, match=r"there is no folder of this name, and as a hub id: .*Check the spelling"):
        load_network("Owner/no-such-model")
    with pytest.raises(UserError, match="there is no folder of this name"):
        load_network("/no/such/folder")


# ---------------------------------------------------------------------- adapters


def spoiled(adapters: Path, how: str) -> str:
    """Damage adapters; the words of the error."""
    file, config = adapters / ADAPTERS, adapters / "adapter_config.json"
    first = "layers.0.mlp.down_proj.lora_A"

    def without(weights):
        return {name: value for name, value in weights.items() if first not in name}

    def deeper(weights):
        return weights | {
            name.replace("layers.0", "layers.7"): value.clone() for name, value in weights.items() if first in name
        }

    def infinite(weights):
        return {name: value / 0 if first in name else value for name, value in weights.items()}

    if how == "missing":
        change(file, without)
        return rf"lacks 1 of 42 weights \(.*{first}.*\); they were made for another model"
    if how == "other layers":
        change(file, deeper)
        return "1 adapter weight.? for layers that are not there .*layers.7.mlp"
    if how == "infinite":
        change(file, infinite)
        return f"infinity in .*{first}"
    if how == "rank":
        configure(config, r=8)
        return r"(another size|size mismatch).*lora_A"
    if how == "cut off":
        file.write_bytes(file.read_bytes()[:500])
        return f"{ADAPTERS} is damaged or cut off"
    if how == "gone":
        file.unlink()
        return f"no {ADAPTERS}"
    if how == "base gone":
        configure(config, base_model_name_or_path="/no/such/base")
        return "base of .*there is no folder of this name|/no/such/base.*, the base of the adapters"
    if how == "base unnamed":
        configure(config, base_model_name_or_path=None)
        return "does not name the model that the adapters belong to"
    shutil.copy(EMBEDDED_MODEL / "config.json", adapters)
    shutil.copy(EMBEDDED_MODEL / MODEL, adapters)
    return "holds adapters .* and a whole model"


SPOILT = ["missing", "other layers", "infinite", "rank", "cut off", "gone", "base gone", "base unnamed", "model beside"]


@pytest.mark.parametrize("how", SPOILT)
def test_adapters_that_are_not_whole(adapters, tmp_path, how):
    """Neither loaded nor merged."""
    words = spoiled(adapters, how)
    with pytest.raises(UserError, match=words):
        load_policy(str(adapters), "cpu")
    with pytest.raises(UserError, match=words):
        merge_adapters(adapters, tmp_path / "merged")
    assert not (tmp_path / "merged" / MODEL).exists()


@pytest.mark.parametrize("how", ["missing", "other layers", "infinite", "cut off", "gone"])
def test_adapters_of_a_checkpoint_that_are_not_whole(adapters, how):
    policy = load_policy("embedded", "cpu")
    add_adapters(policy, 4, 8.0, [], seed=0)
    before = {name: value.clone() for name, value in policy.named_parameters()}
    spoiled(adapters, how)
    with pytest.raises(UserError, match="--resume"):
        load_adapters(policy, adapters, "--resume")
    assert all(value.equal(before[name]) for name, value in policy.named_parameters())


def test_a_config_beside_adapters_is_no_model(adapters):
    """Some programs write the base's config beside them."""
    before = load_policy(str(adapters), "cpu").model.state_dict()
    shutil.copy(EMBEDDED_MODEL / "config.json", adapters)
    after = load_policy(str(adapters), "cpu").model.state_dict()
    assert before.keys() == after.keys() and all(after[name].equal(value) for name, value in before.items())


def test_a_base_that_lacks_weights(adapters, folder):
    change(folder / MODEL, lambda weights: {name: value for name, value in weights.items() if name != NORM})
    configure(adapters / "adapter_config.json", base_model_name_or_path=str(folder))
    refused(adapters, f"'{folder}', the base of the adapters", f"lacks 1 of 36 weights ({NORM})")


# ---------------------------------------------------------------------- commands


def test_commands_name_the_option(folder, tmp_path, monkeypatch, capsys):
    """Policy, process reward model and both models of `score --prm`."""
    monkeypatch.chdir(tmp_path)
    change(folder / MODEL, lambda weights: {"module." + name: value for name, value in weights.items()})
    assert main(["sample", "--num-problems", "1", "--group-size", "1", "--out", "r.jsonl"]) == 0
    runs = {
        "model: ": ["train", *TINY, "--run-dir", "run", "--model", str(folder)],
        "prm.model: ": ["train", *TINY, "--run-dir", "run", "--algorithm", "prime", "--prm.model", str(folder)],
        "--prm: ": ["score", "--prm", str(folder), "--ref", "embedded", "--in", "r.jsonl", "--out", "s.jsonl"],
        "--ref: ": ["score", "--prm", "embedded", "--ref", str(folder), "--in", "r.jsonl", "--out", "s.jsonl"],
    }
    for option, words in runs.items():
        capsys.readouterr()
        assert main(words) == 2
        assert f"error: {option}'{folder}' lacks 36 of 36" in capsys.readouterr().err
    assert not Path("run").exists() and not Path("s.jsonl").exists()


def test_a_run_goes_on_with_the_adapters_that_it_had(tmp_path, monkeypatch, capsys):
    """Without them the base's names would not be those of the policy, and hardly a weight would be loaded."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY, "--run-dir", "adapted", "--lora.rank", "4"]) in (0, 1)
    assert main(["train", *TINY, "--run-dir", "plain"]) in (0, 1)
    for run, words, expected in (
        ("adapted", ["--lora.rank", "0"], "has adapters; continue with its --lora.rank"),
        ("adapted", ["--lora.rank", "8"], "42 weights of another size"),
        ("adapted", ["--lora.targets", "q_proj"], "for layers that are not there"),
        ("plain", ["--lora.rank", "4"], "has no adapters; continue with --lora.rank 0"),
    ):
        capsys.readouterr()
        assert main(["train", "--resume", run, "--iterations", "2", *words]) == 2
        assert expected in capsys.readouterr().err
