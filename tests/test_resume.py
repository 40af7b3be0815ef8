"""Continuing runs: where they go, what they keep, and what they refuse."""

import json
import math
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from stepcredit.cli.main import main
from stepcredit.config import resolve
from stepcredit.estimators.prm import ImplicitPRM
from stepcredit.learn.update import PolicyUpdate
from stepcredit.policy.loading import load_policy
from stepcredit.run.build import build_parts
from stepcredit.run.checkpoint import checkpoints, load_checkpoint, newest_checkpoint
from stepcredit.run.resume import restore
from stepcredit.run.trainer import Trainer

TINY = ["--train.problems-per-iteration", "2", "--group-size", "4", "--num-problems", "2"]
TINY += ["--max-new-tokens", "48", "--save-every", "1"]


def train(run_dir: Path, *words: str) -> int:
    return main(["train", *TINY, "--optim.schedule", "constant", "--run-dir", str(run_dir), *words])


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    """A run of four iterations that kept all its checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "four"
    assert train(folder, "--iterations", "4", "--checkpoint.keep", "9") in (0, 1)
    return folder


def copy(source: Path, to: Path) -> Path:
    for file in source.rglob("*"):
        if file.is_file():
            target = to / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return to


def test_going_back_keeps_what_is_written_afterwards(four, tmp_path) -> None:
    """Numbers of the abandoned branch are higher, and are the first to go."""
    run = copy(four, tmp_path / "run")
    words = ["train", "--resume", str(run / "checkpoints" / "000001"), "--iterations", "3", "--checkpoint.keep", "2"]
    assert main(words) in (0, 1)
    assert newest_checkpoint(run) == run / "checkpoints" / "000003"
    assert [path.name for path in checkpoints(run)] == ["000002", "000003"]


def test_a_resumed_run_goes_nowhere_else(four, tmp_path, capsys) -> None:
    assert main(["train", "--resume", str(four), "--run-dir", str(tmp_path / "other")]) == 2
    assert "in place" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"), [("--algorithm", "opo"), ("--model", "elsewhere"), ("--prm.reference", "start")]
)
def test_another_algorithm_or_model_is_another_run(four, capsys, option: str, value: str) -> None:
    assert main(["train", "--resume", str(four), option, value]) == 2
    assert option.strip("-") in capsys.readouterr().err


def test_a_run_without_a_checkpoint_starts_anew_under_auto(four, tmp_path) -> None:
    """A run that was killed before it saved is no dead end."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_bytes((four / "config.yaml").read_bytes())
    (run / "metrics.jsonl").write_bytes((four / "metrics.jsonl").read_bytes())
    assert train(run, "--iterations", "1", "--resume", "auto") in (0, 1)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_options_of_the_optimiser_that_are_given_anew_hold(four) -> None:
    config = resolve({"optim": {"weight_decay": 0.1, "betas": [0.5, 0.9]}})
    trainer = Trainer(config, build_parts(config), load_policy("embedded", "cpu"), Console(quiet=True))
    restore(trainer, load_checkpoint(four / "checkpoints" / "000004"))
    assert trainer.learner.optimizer.param_groups[0]["weight_decay"] == 0.1
    assert trainer.learner.optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    assert trainer.source.position.drawn == 8  # four iterations of two problems


def test_runs_without_a_name_do_not_share_a_folder(tmp_path, monkeypatch) -> None:
    """Also when the second starts before the first has written anything."""
    from stepcredit.cli import train as command

    monkeypatch.chdir(tmp_path)
    config = resolve({})
    first, second = command._run_dir(config, False), command._run_dir(config, False)
    assert first == second
    assert command._claim(config, first) != command._claim(config, second)


@pytest.mark.parametrize("place", ["/proc/nowhere/run", __file__ + "/run"])
def test_a_place_that_cannot_be_written_is_named(place: str, capsys) -> None:
    assert train(Path(place), "--iterations", "1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("stepcredit: error: ") and place.split("/run")[0] in error


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    """The step is skipped and counted, the weights stay."""
    config = resolve({"train": {"problems_per_iteration": 4}, "eval": {"num_problems": 0}})
    policy = load_policy("embedded", "cpu")
    trainer = Trainer(config, build_parts(config), policy, Console(quiet=True))
    forest = trainer.policy_update.weighted(trainer.begin().forest)
    advantages = torch.where(forest.active, math.inf, 0.0)
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    assert trainer.policy_update.take(forest.with_token(advantages=advantages))["optim/nonfinite"] == 1.0
    assert all(torch.equal(old, new) for old, new in zip(before, policy.parameters(), strict=True))
    assert trainer.policy_update.take(forest)["optim/nonfinite"] == 0.0
    assert not all(torch.equal(old, new) for old, new in zip(before, policy.parameters(), strict=True))


def test_a_temperature_in_the_generation_config_does_not_stop_saving(tmp_path) -> None:
    """Some hub models have one without `do_sample`, which transformers refuses to save."""
    policy = load_policy("embedded", "cpu")
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}')
    again = load_policy(str(tmp_path), "cpu")
    again.model.save_pretrained(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.temperature == 0.6


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys) -> None:
    """Exit code 130, and the line names the checkpoint that there is."""
    learn, steps = PolicyUpdate.take, []

    def interrupted(self, step):
        steps.append(step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return learn(self, step)

    monkeypatch.setattr(PolicyUpdate, "take", interrupted)
    assert train(tmp_path / "run", "--iterations", "4") == 130
    assert "what came after 000002 is lost" in capsys.readouterr().out
    monkeypatch.undo()
    assert train(tmp_path / "run", "--iterations", "4", "--resume", "auto") in (0, 1)
    assert newest_checkpoint(tmp_path / "run").name == "000004"


def test_a_run_that_was_killed_while_it_wrote_its_config(four, tmp_path) -> None:
    """Half a config beside the old one changes nothing; half a first one is a new run's."""
    run = copy(four, tmp_path / "run")
    (run / ".config.yaml.part").write_text("algorithm: gr")
    assert main(["train", "--resume", str(run), "--iterations", "5"]) in (0, 1)
    assert not (run / ".config.yaml.part").exists()
    new = tmp_path / "new"
    new.mkdir()
    (new / ".config.yaml.part").write_text("algorithm: gr")
    assert train(new, "--iterations", "1", "--resume", "auto") in (0, 1)


def test_a_stop_between_the_reward_model_and_the_policy(tmp_path, monkeypatch) -> None:
    """The model has learnt, the policy has not: saved there, continued, and identical to a run that went through."""
    words = ["--algorithm", "prime", "--iterations", "2", "--prm.num-minibatches", "2", "--filter.enabled", "true"]
    words += ["--filter.oversample", "2"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(whole, *words) in (0, 1)
    observe = ImplicitPRM.observe

    def stopping(self, forest):
        found = observe(self, forest)
        if self.batches == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(ImplicitPRM, "observe", stopping)
        assert train(run, *words) == 130
    stopped = newest_checkpoint(run)
    assert stopped is not None and stopped.name == "000001.000"
    names = ("model.safetensors", "prm/model.safetensors")
    before = whole / "checkpoints" / "000001"
    assert [(stopped / name).read_bytes() == (before / name).read_bytes() for name in names] == [True, False]
    assert main(["train", "--resume", str(run)]) in (0, 1)
    one, two = (folder / "checkpoints" / "000002" for folder in (whole, run))
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    assert load_checkpoint(one)["position"] == load_checkpoint(two)["position"]


# ------------------------------------------------------------------ other data


def write_sums(path: Path, first: int, rows: int = 30) -> None:
    lines = [{"question": f"{number} + 1?", "answer": str(number + 1)} for number in range(first, first + rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def on_a_file(tmp_path, monkeypatch) -> Path:
    """A run of two iterations on `d.jsonl`."""
    monkeypatch.chdir(tmp_path)
    write_sums(tmp_path / "d.jsonl", 0)
    words = ["--data", "d.jsonl", "--reward.functions", "exact", "--eval.num-problems", "3"]
    assert train(tmp_path / "run", "--iterations", "2", *words) in (0, 1)
    return tmp_path


@pytest.mark.parametrize("first, rows", [(100, 30), (0, 29), (0, 31)])
def test_other_rows_stop_a_resumed_run(on_a_file, capsys, caplog, first, rows) -> None:
    """What changed, and how to go on all the same."""
    write_sums(on_a_file / "d.jsonl", first, rows)
    capsys.readouterr()
    assert main(["train", "--resume", "run", "--iterations", "3"]) == 2
    error = capsys.readouterr().err
    assert "training problems" in error and "--checkpoint.changed-data continue" in error
    words = ["--iterations", "3", "--checkpoint.changed-data", "continue"]
    assert main(["train", "--resume", "run", *words]) in (0, 1)
    assert "continuing with other training problems" in caplog.text


def test_the_same_rows_elsewhere_and_rows_of_before_go_on(on_a_file, caplog) -> None:
    """The contents count, not the file; a checkpoint without fingerprints says so."""
    text = (on_a_file / "d.jsonl").read_text()
    (on_a_file / "d.jsonl").unlink()
    (on_a_file / "d.jsonl").write_text(text)
    assert main(["train", "--resume", "run", "--iterations", "3"]) in (0, 1)
    assert "other training problems" not in caplog.text
    state = load_checkpoint(on_a_file / "run" / "checkpoints" / "000003")
    config = resolve({"task": {"data": "d.jsonl"}, "reward": {"functions": ["exact"]}, "model": "embedded"})
    trainer = Trainer(config, build_parts(config), load_policy("embedded", "cpu"), Console(quiet=True))
    del state["data"]
    restore(trainer, state)
    assert "cannot be compared" in caplog.text and trainer.done == 3


def test_runs_of_one_seed_draw_alike(tmp_path) -> None:
    """Every global generator is the same at the end, whatever it was before; another seed makes others."""
    states = []
    for number, seed in enumerate(("3", "3", "4")):
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        assert train(tmp_path / str(number), "--iterations", "1", "--seed", seed) in (0, 1)
        states.append(load_checkpoint(tmp_path / str(number) / "checkpoints" / "000001")["random"])

    def drawn(state) -> list[object]:
        return [state["python"], state["numpy"][1].tolist(), state["numpy"][2:], state["torch"].tolist()]

    same, again, other = map(drawn, states)
    assert same == again
    assert all(one != two for one, two in zip(same[:2], other[:2], strict=True))
