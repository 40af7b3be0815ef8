"""Configs of before: old names of options mean what they are called now."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stepcredit.cli.arguments import parse
from stepcredit.config import read_yaml, resolve
from stepcredit.config.renamed import new_name, with_new_names
from stepcredit.losses.choose import build_objective

SAVED = """\
algorithm: {algorithm}
model: embedded
sampler:
  name: transformers
  temperature: 1.0
  vllm:
    servers: []
    launch: false
    folder: null
    timeout_s: 500.0
objective:
  surrogate: {surrogate}
  clip_low: 0.1
  clip_high: 0.3
  dual_clip: 3.0
  aggregate: token_mean
  kl:
    estimator: k3
    coef: 0.0
"""


@pytest.mark.parametrize("algorithm, surrogate", [("rloo", "clip"), ("opo", "reinforce")])
def test_a_saved_config_of_before_loads(tmp_path, caplog, algorithm, surrogate):
    """With the options of a loss that it has, without those that stood beside another."""
    (tmp_path / "config.yaml").write_text(SAVED.format(algorithm=algorithm, surrogate=surrogate))
    config = resolve(read_yaml(str(tmp_path / "config.yaml")))
    assert config.loss.name == surrogate and config.sampler.server.timeout_s == 500.0
    clip = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 3.0}
    assert config.loss.options == (clip if surrogate == "clip" else {})
    assert build_objective(config, flat=True).given.aggregate == "token_mean"
    assert "sampler.vllm is sampler.server now" in caplog.text and "objective.surrogate is loss.name" in caplog.text


def test_old_words_on_the_command_line():
    words = ["--objective.clip-high", "0.28", "--sampler.vllm.launch", "true", "--sampler.vllm.servers", "http://a:1"]
    given, _ = parse(words, {}, "train")
    assert given["loss"] == {"clip_high": 0.28}
    assert given["sampler"]["server"] == {"launch": True, "urls": "http://a:1"}


def test_the_new_name_holds_where_both_are_given():
    given = {"objective": {"clip_low": 0.1, "entropy_coef": 0.5}, "loss": {"clip_low": 0.4}}
    assert with_new_names(given) == {"objective": {"entropy_coef": 0.5}, "loss": {"clip_low": 0.4}}
    assert new_name("sampler.vllm.args") == "sampler.server.args" and new_name("sampler.name") == "sampler.name"


def test_nothing_else_changes():
    given = {"reward": {"options": {"my.fn": {"x": None}}}, "task": {"columns": {}}, "credit": None, "shapers": ["a.b"]}
    assert with_new_names(given) == given


# ---------------------------------------------------------------------- what is loaded

SEGMENTS = [{"parent": -1, "token_ids": [5, 6], "reward": 1.0}]
ROLLOUT = json.dumps({"version": 1, "id": "a", "prompt_ids": [1], "segments": SEGMENTS})
CODE = """
import sys
from stepcredit.cli.main import main

code = main(sys.argv[1:])
print(*sys.modules)
sys.exit(code)
"""
HEAVY = {"transformers", "datasets", "stepcredit.run.build", "stepcredit.policy", "stepcredit.samplers.table"}


@pytest.mark.parametrize("words", ["--help", "credit --help", "train --help", "credit --in r.jsonl --out s.jsonl"])
def test_credit_of_saved_rollouts_loads_no_model(tmp_path, words):
    """Neither transformers nor what builds a run; help loads not even torch."""
    Path(tmp_path / "r.jsonl").write_text(ROLLOUT)
    done = subprocess.run([sys.executable, "-c", CODE, *words.split()], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "stepcredit.cli.main" in loaded
    assert not loaded & HEAVY
    assert "torch" not in loaded or "--help" not in words
