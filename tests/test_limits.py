"""Token ids and positions that a model has no weights for are found before anything is sampled."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_models import FAMILIES, OTHERS, SHAPE, fresh, tiny
from transformers import AutoTokenizer, PreTrainedModel

from stepcredit.cli.main import main
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.policy.forward import Policy, score
from stepcredit.policy.limits import (
    Positions,
    PromptCheck,
    check_positions,
    check_shared_vocabulary,
    check_stop_tokens,
    check_vocabulary,
    positions_of,
    steady_length,
)
from stepcredit.policy.loading import EMBEDDED_MODEL, load_policy, save_policy
from stepcredit.processes.ranks import Ranks

GPT2 = {"n_positions": 64, "bos_token_id": None, "eos_token_id": 2}
TRAIN = ["train", "--iterations", "1", "--train.problems-per-iteration", "1", "--device", "cpu", "--run-dir", "run"]


def tiny_model(family: str, **options) -> PreTrainedModel:
    """Of a family of `tiny_models`, or by the name of a config."""
    if family in FAMILIES | OTHERS:
        return fresh(family, **options).model
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range")
    config = getattr(transformers, f"{family}Config")(**{name: SHAPE[name] for name in shared} | options)
    return transformers.AutoModelForCausalLM.from_config(config)


def gpt2_policy() -> Policy:
    return Policy(tiny_model("GPT2", **GPT2), SimpleNamespace(eos_token_id=2))  # type: ignore[arg-type]


def yarn(**values) -> dict:
    return {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512} | values


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    """A folder with a GPT-2 of 64 learned positions and the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tiny_model("GPT2", **GPT2 | {"vocab_size": len(tokenizer)}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED_MODEL, tmp_path / "model"))


# ---------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("GPT2", GPT2, Positions(64, fixed=True)),
        ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 512}, Positions(512, fixed=True)),
        ("GPTJ", GPT2 | {"rotary_dim": 4}, Positions(64, True)),
        ("Bloom", {}, Positions()),
        ("Falcon", {"alibi": True}, Positions()),
        ("llama", {}, Positions(512)),
        ("gemma3", {}, Positions(512)),
        ("llama", {"rope_parameters": yarn()}, Positions(2048)),
        ("llama", {"rope_parameters": yarn(), "max_position_embeddings": 2048}, Positions(2048)),
    ],
)
def test_positions_of_models(family, options, expected):
    assert positions_of(tiny_model(family, **options)) == expected


def test_only_rotary_embeddings_that_change_are_bound_to_a_length():
    assert steady_length(tiny_model("llama", rope_parameters=yarn()).config) is None
    changing = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert steady_length(tiny_model("llama", rope_parameters=changing).config) == 512


def test_learned_positions_end_and_rotary_ones_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "stepcredit"):
        assert check_positions(Positions(64, fixed=True), 64, "x") and check_positions(Positions(), 10**9, "x")
        assert not caplog.messages
        assert not check_positions(Positions(64), 65, "x")
    (line,) = caplog.messages
    assert "65 positions" in line and "trained for 64" in line
    with pytest.raises(UserError, match=r"x make 65 positions, and the model has 64; lower --sampler.max-new-tokens"):
        check_positions(Positions(64, fixed=True), 65, "x")


def test_the_last_position_is_used_and_the_next_is_an_error():
    policy = gpt2_policy()

    def forest(length: int) -> Forest:
        return Forest.from_trees([Tree(Problem(id="p"), [1] * 4, [Segment([2] * (length - 4))])])

    assert bool(score(policy, forest(64), 1.0, 4096).logprobs.isfinite().all())
    with pytest.raises(UserError, match="65 positions, and the model has 64"):
        score(policy, forest(65), 1.0, 4096)


def test_prompts_are_looked_at_with_what_comes_behind_them(caplog):
    policy = gpt2_policy()
    check = PromptCheck(policy, max_new_tokens=60)
    check("p1", [1, 2, 3, 4])
    with pytest.raises(UserError, match=r"problem 'p2': the prompt of 5 tokens and sampler.max_new_tokens 60 make 65"):
        check("p2", [1, 2, 3, 4, 5])
    with pytest.raises(UserError, match=r"a prompt of 1 token and sampler.max_new_tokens 64"):
        PromptCheck(policy, max_new_tokens=64)
    with caplog.at_level(logging.WARNING, "stepcredit"):
        check = PromptCheck(fresh("llama"), max_new_tokens=511)
        check("p1", [1])
        assert not caplog.messages
        check("p2", [1, 2])
        check("p3", [1, 2, 3])
    (line,) = caplog.messages  # once
    assert "problem 'p2'" in line and "513 positions" in line


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "--num-problems", "1"],
        ["eval", "--num-problems", "2"],
        [*TRAIN, "--group-size", "2"],
        [*TRAIN, "--algorithm", "treerpo", "--growth.num-branches", "2", "--growth.depth", "2"],
        ["sample", "--prompt", "Ivy = 14 . Mia = Ivy - 1 . Mia ?"],
    ],
    ids=["sample", "eval", "train", "trees", "prompt"],
)
def test_commands_stop_before_they_sample(gpt2, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--model", gpt2, "--max-new-tokens", "60"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "and sampler.max_new_tokens 60 make" in error and "the model has 64; lower" in error
    assert not Path("run").exists()


def test_the_reward_model_has_fewer_positions(gpt2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--algorithm", "prime", "--prm.model", gpt2, "--group-size", "2", "--max-new-tokens", "64"]
    assert main([*TRAIN, *words]) == 2
    assert f"prm.model: '{gpt2}': a prompt of" in capsys.readouterr().err


def test_saved_rollouts_longer_than_the_model(gpt2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prompt, tokens = [3] * 40, [5] * 30
    row = {"id": "p", "prompt_ids": prompt, "segments": [{"token_ids": tokens, "reward": 1.0}]}
    Path("r.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["score", "--prm", gpt2, "--ref", "embedded", "--in", "r.jsonl", "--out", "s.jsonl"]) == 2
    assert "of --prm, make 70 positions, and the model has 64" in capsys.readouterr().err


# ---------------------------------------------------------------------- token ids


def test_a_tokenizer_larger_than_the_embedding(tmp_path, caplog, capsys, monkeypatch):
    """Told when it is loaded; an error once a prompt has a token beyond."""
    monkeypatch.chdir(tmp_path)
    folder, policy = tmp_path / "model", load_policy("embedded", "cpu")
    policy.model.resize_token_embeddings(50, mean_resizing=False)
    save_policy(policy, folder)
    with caplog.at_level(logging.WARNING, "stepcredit"):
        smaller = load_policy(str(folder), "cpu")
    assert any("6 tokens beyond the model's 50" in line for line in caplog.messages)
    assert main(["eval", "--model", str(folder), "--num-problems", "4"]) == 2
    assert "and the model has 0 to 49; give the model its own tokenizer" in capsys.readouterr().err
    with pytest.raises(UserError, match="x has 50 tokens and lacks 6 of those that the policy samples"):
        check_shared_vocabulary(smaller, load_policy("embedded", "cpu"), "x")
    assert main([*TRAIN, "--algorithm", "prime", "--prm.model", str(folder), "--group-size", "2"]) == 2
    assert "prm.model: " in capsys.readouterr().err and not Path("run/metrics.jsonl").exists()


def test_padded_vocabularies_are_taken(tmp_path, caplog):
    """Rows without a token are usual; those of two models of a family may differ in number."""
    folder, policy = tmp_path / "model", load_policy("embedded", "cpu")
    policy.model.resize_token_embeddings(64, mean_resizing=False)
    save_policy(policy, folder)
    with caplog.at_level(logging.WARNING, "stepcredit"):
        padded = load_policy(str(folder), "cpu")
        check_shared_vocabulary(padded, load_policy("embedded", "cpu"), "x")
        assert not caplog.messages
        check_shared_vocabulary(load_policy("embedded", "cpu"), padded, "x")
    (line,) = caplog.messages
    assert "56 rows for tokens and the policy 64" in line


def test_an_output_layer_of_another_size(tmp_path):
    folder, policy = copied(tmp_path), load_policy("embedded", "cpu")
    policy.model.config.tie_word_embeddings = False
    policy.model.lm_head = torch.nn.Linear(64, 60, bias=False)
    weights = {name: value.clone() for name, value in policy.model.state_dict().items()}
    policy.model.save_pretrained(folder, state_dict=weights)
    with pytest.raises(UserError, match="x reads 56 tokens and gives 60"):
        check_vocabulary(policy, "x")
    with pytest.raises(UserError, match=r"1 weight of another size \(lm_head.weight: \[60, 64\], not \[56, 64\]\)"):
        load_policy(str(folder), "cpu")


def test_ids_outside_of_the_vocabulary_are_no_index_error():
    for prompt, ids in (([1, 2], [1, 97]), ([97, 1], [2])):
        forest = Forest.from_trees([Tree(Problem(id="p"), prompt, [Segment(ids)])])
        with pytest.raises(UserError, match="has token id 97, and the model has 0 to 96"):
            score(tiny("llama"), forest, 1.0, 4096)


def test_stop_tokens(caplog):
    with caplog.at_level(logging.WARNING, "stepcredit"):
        check_stop_tokens([0, 55], 56)
        assert not caplog.messages
        check_stop_tokens([], 56)
    assert "no" in caplog.text and "run to --sampler.max-new-tokens" in caplog.text
    with pytest.raises(UserError, match="0 to 55, so 56, 99 cannot end a completion"):
        check_stop_tokens([2, 56, 99], 56)


def test_stop_tokens_of_models_and_options(tmp_path, capsys):
    folder = copied(tmp_path)
    assert main(["sample", "--num-problems", "1", "--sampler.stop-token-ids", "[77]"]) == 2
    assert "so 77 cannot end a completion" in capsys.readouterr().err
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 99999]}))
    assert main(["sample", "--num-problems", "1", "--model", str(folder)]) == 2
    assert "so 99999 cannot end a completion" in capsys.readouterr().err


# ---------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("device", "local_size", "taken"),
    [("cuda:0", 2, False), ("cuda:1", 1, False), ("cuda:0", 1, True), ("cuda", 2, True), ("auto", 2, True)],
)
def test_each_process_takes_its_own_gpu(device, local_size, taken):
    ranks = Ranks(0, 2, 0, local_size)
    if taken:
        ranks.check_device(device)
    else:
        with pytest.raises(UserError, match=f"{device} names one GPU, .* take --device cuda"):
            ranks.check_device(device)
