"""Short runs of the real command: what they write, exact repeats and resumes, and runs that learn nothing."""

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from builders import SAMPLING
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import stepcredit.estimators.frozen
from stepcredit.cli.main import main
from stepcredit.config.algorithms import ALGORITHMS
from stepcredit.forest.records import read_trees

TINY = {
    "iterations": 2,
    "train.problems-per-iteration": 4,
    "group-size": 4,
    "num-problems": 8,
    "sampler.max-new-tokens": 48,
    "device": "cpu",
    "eval.every": 0,
}


TREES = {"growth.num-branches": 2, "growth.depth": 2}


OWN = {  # what an algorithm needs beside TINY
    "dapo": {"filter.max-draws": 16},  # until the batch is full
    "posterior_grpo": {
        "reward.functions": "chain,format_think",
        "reward.weights": "1,0",
        "shapers": "[{name: outcome_gate, outcome: chain, think: format_think}]",
    },
}


def words(options: dict) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def train(run_dir: Path, **options) -> int:
    """Exit code of a tiny run; `_` in names stands for `-`, `__` for `.`."""
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in options.items()}
    options = TINY | {"run-dir": run_dir} | OWN.get(str(named.get("algorithm")), {}) | named
    if ALGORITHMS[options.get("algorithm", "grpo")].growth:
        options = {name: value for name, value in (TREES | options).items() if name != "group-size"}
    return main(["train", *words(options)])


def weights(run_dir: Path, iteration: int = 2) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"{iteration:06d}" / "model.safetensors")


def difference(one: Path, two: Path, iteration: int = 2) -> float:
    """Largest difference of any weight."""
    first, second = weights(one, iteration), weights(two, iteration)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each algorithm, made when it is asked for."""
    made: dict[str, Path] = {}

    def run(algorithm: str) -> Path:
        if algorithm not in made:
            made[algorithm] = tmp_path_factory.mktemp("runs") / algorithm
            assert train(made[algorithm], algorithm=algorithm) == 0
        return made[algorithm]

    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The embedded model's weights in the layout of a run, to compare with."""
    import stepcredit

    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(Path(stepcredit.__file__).parent / "demo" / "model", folder / "checkpoints" / "000002")
    return folder


# ---------------------------------------------------------------------- what a run leaves


@pytest.mark.parametrize("algorithm", SAMPLING)
def test_every_algorithm_learns_something(runs, base, algorithm):
    """Two iterations move the weights and leave finite numbers."""
    run = runs(algorithm)
    assert difference(run, base) > 0
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())
    assert all(row["optim/grad_norm"] > 0 for row in metrics(run)[1:] if not row["optim/skipped"])
    assert yaml.safe_load((run / "config.yaml").read_text())["credit"]["name"] == ALGORITHMS[algorithm].credit


def test_metrics(runs):
    """Iteration 0 is the state before; each iteration stands once; accuracy before and after."""
    rows = metrics(runs("grpo"))
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert [{"eval/accuracy", "eval/accuracy_greedy"} <= row.keys() for row in rows] == [True, False, True]
    assert all(0 <= rows[i][f"eval/{name}"] <= 1 for i in (0, 2) for name in ("accuracy", "accuracy_greedy"))
    assert all(a["tokens/total"] + b["tokens/sampled"] == b["tokens/total"] for a, b in pairwise(rows))
    assert {"reward/mean", "credit/std", "optim/loss", "policy/entropy", "completion/length"} <= rows[1].keys()


def test_config_is_the_resolved_one(runs):
    config = yaml.safe_load((runs("spro") / "config.yaml").read_text())
    assert config["run_dir"] == str(runs("spro"))
    assert (config["train"]["iterations"], config["growth"]["group_size"], config["eval"]["num_problems"]) == (2, 4, 8)
    assert config["credit"]["beta"] == 0.003 and config["loss"]["name"] == "clip"


def test_checkpoint_loads_with_transformers(runs):
    """`latest` names a folder that gives back the trained weights, the tokenizer and a working model."""
    run = runs("grpo")
    assert (run / "latest").read_text().strip() == "checkpoints/000002"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["000002"]
    folder = run / (run / "latest").read_text().strip()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    saved = weights(run)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items() if name in saved)
    ids = tokenizer("Ivy = 14 . Mia = Ivy - 1 . Mia ?", return_tensors="pt")["input_ids"]
    assert model(ids).logits.isfinite().all()
    assert main(["eval", "--model", str(folder), "--num-problems", "4", "--max-new-tokens", "16"]) == 0


@pytest.mark.parametrize("algorithm", SAMPLING)
def test_saved_rollouts_score_the_same_again(runs, tmp_path, algorithm):
    """`stepcredit credit` on a run's rollouts gives the advantages that the run used."""
    saved = runs(algorithm) / "rollouts" / "000002.jsonl.zst"
    again = tmp_path / "again.jsonl.zst"
    options = {"spro": ["--credit.beta", "0.003"], "prime": ["--credit.process-coef", "0.1"]}
    own = ["--sampler.max-new-tokens", "48", *options.get(algorithm, [])]
    code = main(["credit", "--in", str(saved), "--out", str(again), "--credit.name", algorithm, *own])
    assert code == 0
    one, two = (scored(path) for path in (saved, again))
    assert [(r["id"], r["iteration"], r["prompt"], r["answer"]) for r in one] == [
        (r["id"], r["iteration"], r["prompt"], r["answer"]) for r in two
    ]
    assert len(one) == 4 and all(len(r["segments"]) >= 4 for r in one)
    for before, after in zip(one, two, strict=True):
        for a, b in zip(before["segments"], after["segments"], strict=True):
            assert all(a.get(name) == b.get(name) for name in ("token_ids", "value", "pruned"))
            if a.get("pruned"):
                continue
            assert len(a["advantages"]) == len(a["token_ids"])
            assert b["advantages"] == pytest.approx(a["advantages"], rel=1e-5, abs=1e-6)
            assert b["weights"] == pytest.approx(a["weights"], rel=1e-5)
    assert any(value for r in one for s in r["segments"] for value in s.get("advantages", []))


def scored(path: Path) -> list[dict]:
    import zstandard

    assert list(read_trees(str(path)))  # also a file that the format's own checks accept
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        return [json.loads(line) for line in stream.read().decode().splitlines()]


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("algorithm", ["grpo", "spro"])
def test_same_seed_same_weights(runs, tmp_path, algorithm):
    assert train(tmp_path / "again", algorithm=algorithm) == 0
    assert difference(runs(algorithm), tmp_path / "again") == 0.0
    one, two = metrics(runs(algorithm)), metrics(tmp_path / "again")
    for name in ("reward/mean", "tokens/total", "policy/entropy", "optim/loss", "optim/grad_norm", "eval/accuracy"):
        assert [row.get(name) for row in one] == [row.get(name) for row in two]


def test_other_seed_other_weights(runs, tmp_path):
    assert train(tmp_path / "other", seed=1) == 0
    assert difference(runs("grpo"), tmp_path / "other") > 1e-6


EXACT = {
    "grpo": {"algorithm": "grpo", "optim.weight-decay": 0.1},
    "spro": {"algorithm": "spro", "credit.beta": 0.05, "optim.num-epochs": 2, "optim.num-minibatches": 2},
}


@pytest.mark.parametrize("name", EXACT)
def test_resume_equals_going_straight_on(tmp_path, name):
    """Killed after iteration 2, and lengthened from 2 to 4 iterations: both end in the bits of 4 in one go."""
    options = EXACT[name] | {"optim.schedule": "constant", "iterations": 4, "save-every": 2, "checkpoint.keep": 9}
    straight, killed, short = (tmp_path / part for part in ("straight", "killed", "short"))
    assert train(straight, **options) == 0
    shutil.copytree(straight, killed)
    shutil.rmtree(killed / "checkpoints" / "000004")
    (killed / "latest").write_text("checkpoints/000002\n")
    assert main(["train", "--resume", "auto", "--run-dir", str(killed)]) == 0
    assert difference(straight, killed, 4) == 0.0
    assert train(short, **options | {"iterations": 2}) == 0
    assert main(["train", "--resume", str(short), "--iterations", "4"]) == 0
    assert difference(straight, short, 4) == 0.0
    for run in (killed, short):
        assert [row["iteration"] for row in metrics(run)] == [0, 1, 2, 3, 4]
        assert metrics(run)[4]["reward/mean"] == metrics(straight)[4]["reward/mean"]
        assert metrics(run)[4]["tokens/total"] == metrics(straight)[4]["tokens/total"]


def test_resume_with_a_schedule(tmp_path):
    """A killed run continues at its place in the learning-rate schedule."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    options = {"iterations": 4, "save_every": 3, "checkpoint__keep": 9, "optim__schedule": "cosine", "optim__warmup": 1}
    assert train(straight, **options) == 0
    shutil.copytree(straight, killed)
    shutil.rmtree(killed / "checkpoints" / "000004")
    (killed / "latest").write_text("checkpoints/000003\n")
    assert main(["train", "--resume", str(killed / "checkpoints" / "000003")]) == 0
    assert difference(straight, killed, 4) == 0.0
    rates = [row["optim/learning_rate"] for row in metrics(killed)[1:]]
    assert rates == [row["optim/learning_rate"] for row in metrics(straight)[1:]] and len(set(rates)) > 2


def test_resume_after_a_kill_in_mid_write(runs, tmp_path):
    """Half a metrics line and half a checkpoint do not keep a run from continuing."""
    killed = tmp_path / "killed"
    shutil.copytree(runs("grpo"), killed)
    (killed / "checkpoints" / ".000003.part").mkdir()
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "rew')
    assert main(["train", "--resume", str(killed), "--iterations", "3"]) == 0
    assert [row["iteration"] for row in metrics(killed)] == [0, 1, 2, 3]
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == ["000002", "000003"]


def test_micro_batches_do_not_change_the_result(runs, tmp_path):
    """One completion at a time or all at once: the same gradients and, up to what AdamW makes of rounding, weights."""
    assert train(tmp_path / "cut", optim__max_tokens_per_micro_batch=1) == 0
    one, two = metrics(runs("grpo"))[1:], metrics(tmp_path / "cut")[1:]
    for name in ("optim/grad_norm", "policy/ratio_max"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-4)
    assert [b["tokens/computed"] > a["tokens/computed"] for a, b in zip(one, two, strict=True)] == [True, True]
    assert difference(runs("grpo"), tmp_path / "cut") < 0.1 * one[0]["optim/learning_rate"]


# ---------------------------------------------------------------------- variants


KL = {"objective.kl.coef": 0.5, "optim.num-epochs": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"optim.num-epochs": 2, "optim.num-minibatches": 2},
        {"optim.num-minibatches": 3, "loss.dual-clip": 3},
        {"objective.entropy-coef": 0.01},
        *(KL | {"objective.kl.estimator": kind} for kind in ("k1", "k2", "k3")),
        {"shapers": "drop_uniform"},
    ],
    ids=str,
)
def test_options_run_and_matter(runs, tmp_path, options):
    """Each option changes what is learnt."""
    assert train(tmp_path / "run", **options) == 0
    assert difference(runs("grpo"), tmp_path / "run") > 0
    rows = metrics(tmp_path / "run")
    assert ("policy/kl_ref" in rows[1]) == ("objective.kl.coef" in options)


@pytest.mark.parametrize("algorithm, per_iteration", [("grpo", 0), ("opo", 0), ("spro", 2)])
def test_scoring_passes(tmp_path, monkeypatch, algorithm, per_iteration):
    """Exactly on-policy outcome credit scores nothing; SPRO scores with the policy and with the reference."""
    calls, score = [], stepcredit.estimators.frozen.score
    monkeypatch.setattr(stepcredit.estimators.frozen, "score", lambda *given: calls.append(given[0]) or score(*given))
    assert train(tmp_path / "run", algorithm=algorithm, num_problems=0) == 0
    assert len(calls) == 2 * per_iteration
    assert len({id(policy) for policy in calls}) == per_iteration


# ---------------------------------------------------------------------- nothing learnt


@pytest.mark.parametrize("value, reason", [("0.0", "reward was 0"), ("1.0", "reward was 1"), ("None", "None")])
def test_nothing_learnt(tmp_path, monkeypatch, capsys, base, value, reason):
    """Equal rewards everywhere, or none: exit code 1, the reason and what to do; the weights are as they were."""
    (tmp_path / "constant_reward.py").write_text(
        f"def f(completions, **columns):\n    return [{value}] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "constant_reward", raising=False)
    assert train(tmp_path / "run", reward__functions="constant_reward.f") == 1
    shown = capsys.readouterr().out
    assert "nothing was learnt" in shown and reason in shown and "Check the reward function" in shown
    assert difference(tmp_path / "run", base) == 0.0
    assert [row["iteration"] for row in metrics(tmp_path / "run")] == [0, 1, 2]
