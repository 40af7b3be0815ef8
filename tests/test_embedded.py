"""The shipped base model, and the command that makes such a one."""

import pytest
import torch

from stepcredit.cli.main import main
from stepcredit.demo.chain import problems, verify
from stepcredit.growth.flat import flat
from stepcredit.policy.loading import EMBEDDED_MODEL, load_policy
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.transformers import TransformersSampler
from stepcredit.tasks.prompts import PromptFormat
from stepcredit.verifiers.judging import Judge


@pytest.fixture(scope="module")
def accuracy() -> dict[str, float]:
    """Greedy and sampled accuracy and pass@8 of the shipped model on 200 held-out problems."""
    policy = load_policy("embedded", "cpu")
    sampler, encode = TransformersSampler(policy), PromptFormat(policy.tokenizer)
    judge, held_out = Judge({"chain": verify}, [1.0], policy.tokenizer), problems("held_out", 0, 200)

    def correct(count: int, temperature: float) -> torch.Tensor:
        params = SamplingParams(temperature=temperature, max_new_tokens=128)
        forest = judge(flat(sampler, held_out, encode, params, range(len(held_out)), count))
        return (forest.segment["reward"] == 1).float().reshape(len(held_out), count)

    sampled = correct(8, 1.0)
    return {
        "greedy": float(correct(1, 0.0).mean()),
        "sampled": float(sampled.mean()),
        "pass@8": float(sampled.amax(1).mean()),
    }


def test_base_model_is_neither_hopeless_nor_done(accuracy: dict[str, float]) -> None:
    """Greedy 30-50%, sampled below it: there is something to learn, and something to learn from."""
    assert 0.30 <= accuracy["greedy"] <= 0.50
    assert 0.15 <= accuracy["sampled"] < accuracy["greedy"]


def test_base_model_has_headroom(accuracy: dict[str, float]) -> None:
    """At least 20 points from greedy to the best of eight samples."""
    assert accuracy["pass@8"] >= accuracy["greedy"] + 0.20


def test_base_model_is_small_and_a_real_architecture() -> None:
    """About half a megabyte, Qwen3, in the form that transformers loads."""
    assert (EMBEDDED_MODEL / "model.safetensors").stat().st_size < 1_000_000
    assert load_policy("embedded", "cpu").model.config.model_type == "qwen3"


def test_warmstart_makes_a_model_that_loads(tmp_path, capsys) -> None:
    """Two steps are enough to see the whole command work; it prints the accuracy."""
    out = tmp_path / "base"
    assert main(["warmstart", "--out", str(out), "--steps", "2", "--batch-size", "2", "--num-problems", "4"]) == 0
    assert "accuracy_greedy" in capsys.readouterr().out
    assert load_policy(str(out), "cpu").scoring_form == "forest"


def test_warmstart_refuses_a_folder_in_use(tmp_path, capsys) -> None:
    """Nothing is overwritten."""
    (tmp_path / "file").write_text("mine")
    assert main(["warmstart", "--out", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
