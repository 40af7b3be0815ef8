"""`stepcredit convert`: what a GGUF file holds is what the folder holds."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stepcredit.cli.main import main
from stepcredit.policy.loading import load_policy

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS, HIDDEN, INNER, LAYERS = 4, 2, 32, 48, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HIDDEN // HEADS,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ["<unk>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "12", "Ġa"]


def network(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet()), **SHAPE)).eval()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Queries and keys as llama.cpp keeps them: the two halves that are rotated together stand side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write(path: Path, model: LlamaForCausalLM, pre: str = "smollm", leave_out: str = "-") -> Path:
    """The model as llama.cpp would have it."""
    out = gguf.GGUFWriter(path, "llama")
    for key, value in (
        ("context_length", 256),
        ("embedding_length", HIDDEN),
        ("block_count", LAYERS),
        ("feed_forward_length", INNER),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", KV_HEADS),
        ("rope.dimension_count", HIDDEN // HEADS),
        ("vocab_size", len(alphabet())),
    ):
        out.add_uint32(f"llama.{key}", value)
    out.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    out.add_float32("llama.rope.freq_base", model.config.rope_parameters["rope_theta"])
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(alphabet())
    out.add_token_types([3] * 3 + [1] * (len(alphabet()) - 3))
    out.add_token_merges(["1 2", "Ġ a"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    out.add_pad_token_id(2)
    out.add_chat_template(TEMPLATE)
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
    }
    for number, layer in enumerate(model.model.layers):
        for ours, theirs in NAMES.items():
            weight = layer.get_submodule(ours).weight
            if theirs in ("attn_q", "attn_k"):
                weight = interleaved(weight, HEADS if theirs == "attn_q" else KV_HEADS)
            tensors[f"blk.{number}.{theirs}.weight"] = weight
    for name, weight in tensors.items():
        if leave_out not in name:
            out.add_tensor(name, weight.detach().numpy().astype(np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def convert(source: Path, out: Path, *more: str) -> int:
    return main(["convert", "--in", str(source), "--out", str(out), *more])


def test_the_folder_is_the_model_of_the_file(tmp_path) -> None:
    """Same log-probabilities, tokenizer with its special tokens and chat template, loaded as any other model."""
    model = network()
    assert convert(write(tmp_path / "m.gguf", model), tmp_path / "out") == 0
    policy = load_policy(str(tmp_path / "out"), "cpu")
    assert policy.scoring_form == "forest"
    ids = torch.randint(3, len(alphabet()), (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(policy.model(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=0)
    assert policy.stop_token_ids == [2]
    assert policy.tokenizer.chat_template == TEMPLATE
    assert not hasattr(policy.model.config, "quantization_config")


def test_digits_are_split_as_the_file_says(tmp_path) -> None:
    """The rule 'smollm' keeps every digit alone, even where the vocabulary has a pair; other rules do not."""
    for pre, pieces in (("smollm", ["1", "2", "Ġa"]), ("gpt-2", ["12", "Ġa"])):
        convert(write(tmp_path / f"{pre}.gguf", network(), pre), tmp_path / pre)
        assert load_policy(str(tmp_path / pre), "cpu").tokenizer.tokenize("12 a") == pieces


def test_unknown_rule_is_said(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING, "stepcredit"):
        convert(write(tmp_path / "m.gguf", network(), "jais"), tmp_path / "out")
    assert "'jais', which is not known here" in caplog.text


def test_half_precision_on_request(tmp_path) -> None:
    from safetensors.torch import load_file

    model = network()
    convert(write(tmp_path / "m.gguf", model), tmp_path / "out", "--dtype", "bfloat16")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["model.norm.weight"], model.model.norm.weight.bfloat16())


def test_what_cannot_be_converted(tmp_path, capsys, monkeypatch) -> None:
    """One line each, with the remedy; nothing is written."""
    good = write(tmp_path / "good.gguf", network())
    lacking = write(tmp_path / "lacking.gguf, short.gguf", network(), leave_out="blk.1.ffn_up")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(good.read_bytes()[:3000])
    short = tmp_path / "short.gguf"
    short.write_bytes(good.read_bytes()[:-5000])
    other = tmp_path / "other.bin"
    other.write_bytes(b"PK\x03\x04 nothing")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    out = tmp_path / "out"
    for source, target, words in (
        (lacking, out, "lacks 1 of"),
        (cut, out, "is damaged or cut off"),
        (short, out, "cannot be converted"),
        (other, out, "is no GGUF file"),
        (tmp_path, out, "it holds cut.gguf, good.gguf, lacking.gguf, short.gguf"),
        (tmp_path / "none.gguf", out, "there is no file"),
        (good, full, "is not empty"),
    ):
        assert convert(source, target) == 2
        assert words in capsys.readouterr().err
        assert not out.exists()
    assert main(["train", "--model", str(good)]) == 2
    assert "stepcredit convert --in" in capsys.readouterr().err
    monkeypatch.setattr("stepcredit.policy.convert.find_spec", lambda name: None)
    assert convert(good, out) == 2
    assert "pip install 'stepcredit[gguf]'" in capsys.readouterr().err
