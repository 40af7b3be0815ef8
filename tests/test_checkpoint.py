"""Faults: damaged checkpoints, full disks, memory that does not suffice, signals, numbers that explode."""

import errno
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from test_resume import TINY, train
from tiny_models import random_trees

from stepcredit.cli.main import main
from stepcredit.config import resolve
from stepcredit.forest import Forest
from stepcredit.forest.ops import out_of_memory
from stepcredit.learn.update import PolicyUpdate
from stepcredit.policy.forward import Policy
from stepcredit.policy.loading import load_policy
from stepcredit.run import checkpoint
from stepcredit.run.build import build_parts
from stepcredit.run.checkpoint import checkpoints, newest_checkpoint, read_pointer, verify
from stepcredit.run.interrupt import Interrupted, StopRequest
from stepcredit.run.resume import run_state
from stepcredit.run.state import load_state, save_state
from stepcredit.run.trainer import Trainer

EPOCHS = ("--optim.num-epochs", "2", "--optim.num-minibatches", "2", "--train.problems-per-iteration", "6")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of three iterations that kept its checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train(folder, "--iterations", "3", "--checkpoint.keep", "9", *EPOCHS) in (0, 1)
    return folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy to damage, whose config says where it is."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def weights(run: Path, name: str = "000003") -> bytes:
    return (run / "checkpoints" / name / "model.safetensors").read_bytes()


# ------------------------------------------------------------------ damage


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_flipped_bit_is_found(whole, data) -> None:
    """In any file of a checkpoint, the manifest and its seal included."""
    folder = whole / "checkpoints" / "000002"
    path = data.draw(st.sampled_from(files(folder)))
    good = path.read_bytes()
    at, bit = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 7))
    try:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
        assert verify(folder) is not None
    finally:
        path.write_bytes(good)
    assert verify(folder) is None


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_cut_file_is_found(whole, data) -> None:
    """Cut anywhere, emptied or gone."""
    folder = whole / "checkpoints" / "000001"
    path = data.draw(st.sampled_from(files(folder)))
    good, when = path.read_bytes(), folder.stat().st_mtime
    end = data.draw(st.integers(-1, len(good) - 1))
    try:
        path.unlink() if end < 0 else path.write_bytes(good[:end])
        damage = verify(folder)
        assert damage is not None and damage.reason
    finally:
        path.write_bytes(good)
        os.utime(folder, (when, when))  # which of several is the newest goes by that


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over(run, whole, caplog) -> None:
    """The run goes on from the one before, says so, and ends as it would have."""
    flip(run / "checkpoints" / "000003" / "trainer_state" / "state.safetensors")
    assert newest_checkpoint(run) == run / "checkpoints" / "000002"
    assert "000003 is damaged: trainer_state/state.safetensors has another checksum" in caplog.text
    assert main(["train", "--resume", str(run)]) in (0, 1)
    assert weights(run) == weights(whole)
    assert [json.loads(line)["iteration"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(run, capsys) -> None:
    flip(run / "checkpoints" / "000003" / "model.safetensors")
    assert main(["train", "--resume", str(run / "checkpoints" / "000003")]) == 2
    assert "000003 is damaged: model.safetensors" in capsys.readouterr().err


def test_no_whole_checkpoint_is_an_error(run, capsys) -> None:
    for folder in checkpoints(run):
        (folder / "manifest.json").unlink()
    assert main(["train", "--resume", str(run)]) == 2
    assert "every checkpoint of" in capsys.readouterr().err


def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(run) -> None:
    """Between taking the old one away and putting the new one there: the old one comes back, the half one goes."""
    root = run / "checkpoints"
    shutil.copytree(root / "000003", root / ".000003.part")
    (root / "000003").rename(root / ".000003.old")
    assert newest_checkpoint(run) == root / "000003"
    assert sorted(path.name for path in root.iterdir()) == ["000001", "000002", "000003"]


def test_a_damaged_pointer_does_not_matter(run) -> None:
    (run / "latest").write_bytes(b"\xff\x00nonsense")
    assert newest_checkpoint(run) == run / "checkpoints" / "000003"


def test_lines_of_metrics_that_cannot_be_read_are_told(run, caplog) -> None:
    """The others stay, each iteration once."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "{broken", lines[2], lines[2], lines[3]]) + "\n")
    assert main(["train", "--resume", str(run), "--iterations", "4"]) in (0, 1)
    assert [json.loads(line)["iteration"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [0, 2, 3, 4]
    assert "lacks 1 of the 4 iterations" in caplog.text


@pytest.mark.parametrize("content", ["", "algorithm: [", "grpo"])
def test_a_damaged_config_is_taken_from_the_checkpoint(run, whole, caplog, content) -> None:
    """Not from the defaults, which would go on with another run."""
    shutil.rmtree(run / "checkpoints" / "000003")
    (run / "config.yaml").write_text(content)
    assert main(["train", "--resume", "auto", "--run-dir", str(run)]) in (0, 1)
    assert "config.yaml is damaged" in caplog.text
    assert weights(run) == weights(whole)


# ------------------------------------------------------------------ what is in it


def test_nothing_is_pickled(whole) -> None:
    """Tensors are safetensors, the rest is JSON, YAML or text."""
    kinds = {path.suffix for path in files(whole)}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".zst", ".yaml", ".sha256", ""}


def test_a_manifest_names_versions_and_every_file(whole) -> None:
    folder = whole / "checkpoints" / "000003"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {
        path.relative_to(folder).as_posix() for path in files(folder) if not path.name.startswith("manifest")
    }
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0] or manifest["versions"]["torch"]
    assert {"python", "stepcredit", "transformers"} <= set(manifest["versions"])


STATES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        | st.dictionaries(st.integers(-5, 5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), STATES, max_size=4))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_plain_state_comes_back(tmp_path_factory, state) -> None:
    stem = tmp_path_factory.mktemp("state") / "state"
    save_state(state, stem)
    assert load_state(stem) == state


def test_tensors_come_back_bit_for_bit(tmp_path) -> None:
    """Every type, no dimension and none at all, NaN payloads, tensors that share memory."""
    base = torch.tensor([1.0, -0.0, math.inf, math.nan])
    state = {
        "a": {3: base, 4: base[1:], "b": [base.to(torch.bfloat16), torch.tensor(7), torch.zeros(0, 3)]}["b"],
        "shared": {0: base, 1: base[::2]},
        "mask": torch.tensor([True, False]),
    }
    save_state(state, tmp_path / "state")
    found = load_state(tmp_path / "state")
    assert found["shared"][0].view(torch.int32).equal(base.view(torch.int32))
    assert found["shared"][1].view(torch.int32).equal(base[::2].contiguous().view(torch.int32))
    assert [tensor.dtype for tensor in found["a"]] == [tensor.dtype for tensor in state["a"]]
    assert [tensor.shape for tensor in found["a"]] == [tensor.shape for tensor in state["a"]]
    assert found["mask"].equal(state["mask"])


def test_another_kind_of_value_is_named(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"a\.b.*set"):
        save_state({"a": {"b": {1, 2}}}, tmp_path / "state")


@pytest.mark.parametrize("deep", [False, True])
def test_a_forest_comes_back(tmp_path, deep) -> None:
    forest = Forest.from_trees(random_trees(0, deep))
    forest = forest.with_token(advantages=torch.randn(forest.num_tokens))
    save_state(forest.state_dict(), tmp_path / "state")
    found = Forest.from_state(load_state(tmp_path / "state"))
    assert found.to_trees() == forest.to_trees()
    for table in ("tree", "segment", "token"):
        assert getattr(found, table).keys() == getattr(forest, table).keys()
        assert all(getattr(found, table)[name].equal(column) for name, column in getattr(forest, table).items())


def test_the_best_checkpoint_stays(tmp_path, monkeypatch) -> None:
    """Beside the last ones; of equal scores the newer one is the best."""
    scores = iter([0.0, 0.3, 0.9, 0.1, 0.2])  # iteration 0, then one each
    accuracy = "stepcredit.run.trainer.Trainer.evaluate"
    monkeypatch.setattr(accuracy, lambda self: {"eval/accuracy": next(scores), "eval/accuracy_greedy": 0.0})
    words = ("--iterations", "4", "--eval-every", "1", "--checkpoint.keep", "1")
    assert train(tmp_path / "run", *words) in (0, 1)
    assert read_pointer(tmp_path / "run", "best") == tmp_path / "run" / "checkpoints" / "000002"
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["000002", "000004"]


# ------------------------------------------------------------------ the disk


@pytest.mark.parametrize("where", ["save_state", "save_policy", "_sync"])
def test_a_full_disk_keeps_what_there_was(run, monkeypatch, capsys, where) -> None:
    """The error says what stays and how to go on; and going on works."""

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, where, full)
    assert main(["train", "--resume", str(run), "--iterations", "4"]) == 2
    error = capsys.readouterr().err
    assert "the disk is full" in error and "000003 stays" in error and "--resume auto" in error
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []
    monkeypatch.undo()
    assert newest_checkpoint(run) == run / "checkpoints" / "000003"
    assert main(["train", "--resume", str(run), "--iterations", "4"]) in (0, 1)


def test_a_disk_that_fills_up_between_checkpoints(run, monkeypatch, capsys) -> None:
    """While metrics or rollouts are written: one line, no traceback, and the checkpoint is as it was."""

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("stepcredit.run.tracking.write_trees", full)
    assert main(["train", "--resume", str(run), "--iterations", "4"]) == 2
    assert "the disk is full; make room" in capsys.readouterr().err
    assert newest_checkpoint(run) == run / "checkpoints" / "000003"


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys) -> None:
    """Before anything is sampled."""
    (tmp_path / "file").write_text("")
    assert train(tmp_path / "file" / "run", "--iterations", "1") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


# ------------------------------------------------------------------ signals


def stop_in_second_iteration(monkeypatch, run: Path, after: int, number: int = signal.SIGTERM) -> int:
    """Train, with a signal while this optimiser step of the second iteration is taken; the exit code."""
    learn, steps = PolicyUpdate.take, []

    def signalled(self, step):
        steps.append(step)
        if len(steps) == 4 + after:
            os.kill(os.getpid(), number)
        return learn(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(PolicyUpdate, "take", signalled)
        return train(run, "--iterations", "3", *EPOCHS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_signal_stops_between_optimiser_steps(whole, tmp_path, monkeypatch, capsys, number, after) -> None:
    """The step is finished, the iteration under way is saved, the exit code is 130, and the rest is as without it."""
    run = tmp_path / "run"
    assert stop_in_second_iteration(monkeypatch, run, after, number) == 130
    assert f"continue with --resume {run}" in capsys.readouterr().out
    assert newest_checkpoint(run).name == f"000001.00{after}"
    assert main(["train", "--resume", str(run)]) in (0, 1)
    assert weights(run) == weights(whole) != weights(whole, "000001")
    assert losses(run) == losses(whole)


def losses(run: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(row["iteration"], row.get("optim/loss"), row.get("optim/grad_norm")) for row in rows]
    assert sum(loss is not None for _, loss, _ in found) > 1
    return found


def test_steps_of_an_iteration_under_way_cannot_change(tmp_path, monkeypatch, capsys) -> None:
    run = tmp_path / "run"
    assert stop_in_second_iteration(monkeypatch, run, 2) == 130
    assert main(["train", "--resume", str(run), "--optim.num-minibatches", "1"]) == 2
    assert "num_minibatches" in capsys.readouterr().err


def test_a_signal_while_sampling_saves_what_there_was(tmp_path, monkeypatch) -> None:
    """Nothing of the iteration under way is kept, and nothing is lost."""
    begin = Trainer.begin

    def signalled(self):
        if self.done == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return begin(self)

    monkeypatch.setattr(Trainer, "begin", signalled)
    assert train(tmp_path / "run", "--iterations", "3") == 130
    assert newest_checkpoint(tmp_path / "run").name == "000001"


def test_a_second_signal_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.asked
        with pytest.raises(Interrupted):
            request.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# ------------------------------------------------------------------ memory and numbers


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_cuts_the_step_smaller(monkeypatch, caplog, error) -> None:
    """The budget halves until the step fits; the gradient is that of the whole step."""
    config = resolve({"train": {"problems_per_iteration": 4}, "eval": {"num_problems": 0}})
    trainer = Trainer(config, build_parts(config), load_policy("embedded", "cpu"), Console(quiet=True))
    forest = trainer.policy_update.weighted(trainer.begin().forest)
    expected = trainer.policy_update.take(forest)
    other = Trainer(config, build_parts(config), load_policy("embedded", "cpu"), Console(quiet=True))
    forward = Policy.forward

    def narrow(self, part, *rest):
        if torch.is_grad_enabled() and part.num_tokens > 300:
            raise error
        return forward(self, part, *rest)

    monkeypatch.setattr(Policy, "forward", narrow)
    found = other.policy_update.take(forest)
    assert other.learner.max_tokens < 700 and "out of memory" in caplog.text
    assert found["optim/grad_norm"] == pytest.approx(expected["optim/grad_norm"], rel=1e-4)
    assert found["optim/loss"] == pytest.approx(expected["optim/loss"], rel=1e-4, abs=1e-6)
    assert run_state(other)["max_tokens"] == other.learner.max_tokens


def test_one_completion_that_does_not_fit_is_an_error(run, monkeypatch, capsys) -> None:
    forward = Policy.forward

    def never(self, part, *rest):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, part, *rest)

    monkeypatch.setattr(Policy, "forward", never)
    assert main(["train", "--resume", str(run), "--iterations", "9"]) == 2
    assert "out of memory with a single completion" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_memory() -> None:
    assert not out_of_memory(RuntimeError("shapes do not match"))


def test_numbers_that_stay_bad_stop_the_run(tmp_path, monkeypatch, capsys) -> None:
    """After K steps in a row; the weights are those of before, and the rollouts are there to look at."""
    forward = Policy.forward

    def bad(self, part, *rest):
        scores = forward(self, part, *rest)
        return scores._replace(logprobs=scores.logprobs * math.nan) if torch.is_grad_enabled() else scores

    monkeypatch.setattr(Policy, "forward", bad)
    run = tmp_path / "run"
    words = ("--iterations", "30", "--optim.max-nonfinite", "3")
    assert train(run, *words, "--train.problems-per-iteration", "8", "--max-new-tokens", "64") == 2
    error = capsys.readouterr().err
    saved = list((run / "rollouts").glob("nonfinite-*"))
    assert "3 optimiser steps in a row" in error and len(saved) == 1 and str(saved[0]) in error
    newest = newest_checkpoint(run)
    start = load_file(Path(checkpoint.__file__).parents[1] / "demo" / "model" / "model.safetensors")
    assert all(tensor.equal(start[name]) for name, tensor in load_file(newest / "model.safetensors").items())


# ------------------------------------------------------------------ going on with something else


@pytest.mark.parametrize(
    "words", [("--seed", "5"), ("--task.held-out", "0.3"), ("--credit.name", "opo"), ("--algorithm", "spro")]
)
def test_what_makes_another_run_is_refused(run, capsys, words) -> None:
    assert main(["train", "--resume", str(run), *words]) == 2
    assert "start a new run" in capsys.readouterr().err


def test_another_start_of_the_reference_is_found(tmp_path, capsys) -> None:
    """A model folder that changed while the run stood still would give another reference."""
    model = tmp_path / "model"
    shutil.copytree(Path(checkpoint.__file__).parents[1] / "demo" / "model", model)
    words = ["train", *TINY, "--model", str(model), "--algorithm", "spro", "--data", "embedded"]
    assert main([*words, "--iterations", "1", "--run-dir", str(tmp_path / "run")]) in (0, 1)
    policy = load_policy(str(model), "cpu")
    with torch.no_grad():
        next(iter(policy.parameters())).view(-1)[0] += 1e-3
    policy.model.save_pretrained(model)
    assert main(["train", "--resume", str(tmp_path / "run"), "--iterations", "2"]) == 2
    assert "not the one that the run began with" in capsys.readouterr().err
