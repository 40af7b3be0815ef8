"""Weights by broadcast, and which way they take."""

import logging
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from fake_server import (
    JOIN_S,
    PARAMS,
    PROMPTS,
    RESET,
    RPC,
    SEEDS,
    Worker,
    bigger,
    has,
    placed,
    remote,
    rows,
    sampling,
    status,
    train,
)
from safetensors.torch import load_file
from tiny_models import fresh

from stepcredit.errors import UserError
from stepcredit.learn.adapters import add_adapters
from stepcredit.learn.placement import full_state
from stepcredit.policy.loading import checkpoint_tensors, load_policy
from stepcredit.samplers.remote import transfer, weights
from stepcredit.samplers.remote.server import stepcredit_worker
from stepcredit.samplers.remote.transfer import TransferError


@pytest.mark.parametrize("chunk", [1, 1 << 14, 1 << 28])
def test_weights_by_broadcast(policy, fakes, tmp_path, monkeypatch, chunk):
    """The tensors that a folder would hold, to all workers of all servers, and nothing is written."""
    monkeypatch.setitem(transfer.CHUNK, "gloo", chunk)
    first, second = fakes(), fakes()
    with sampling(policy, first, second, way="gloo", patience_s=JOIN_S) as sampler:
        assert has(first, policy, tmp_path / "a") and has(second, policy, tmp_path / "a")
        other = bigger(policy)
        sampler.sync(other)
        assert has(first, other, tmp_path / "b") and has(second, other, tmp_path / "b")
        assert [path.name for path in sampler.weights.folder.iterdir()] == ["lock"]
        assert {first.version, second.version} == {sampler.weights.version}
        assert first.paths(RPC, RESET)[-4:] == [RPC, RESET, RPC, RPC]  # the group of before
        sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
    assert set(first.served + second.served) == {sampler.weights.version}


@pytest.mark.parametrize("family", ["qwen2", "llama", "mixtral", "qwen3_moe"])
def test_tensors_are_those_of_a_saved_model(family, tmp_path):
    """Experts one by one, as checkpoints have them, and a tied output layer not twice."""
    model = fresh(family)
    found = checkpoint_tensors(model, full_state(model))
    model.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)


def test_tensors_of_all_types_and_shapes():
    """Example: pieces of a chunk start where any type can be read."""
    given = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(5, 2, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "c": torch.randn(7),
    }
    entries = [(name, str(one.dtype).removeprefix("torch."), list(one.shape)) for name, one in given.items()]
    flat = torch.empty(sum(map(stepcredit_worker.room, entries)), dtype=torch.uint8)
    for name, piece in stepcredit_worker.pieces(flat, entries):
        piece.copy_(given[name])
    found = dict(stepcredit_worker.pieces(flat, entries))
    assert all(torch.equal(found[name], one) and found[name].dtype == one.dtype for name, one in given.items())


def test_the_way_of_the_weights(policy, fakes, caplog, monkeypatch):
    """Through the folder where the server sees it, by the network where not, between GPUs only if they are two."""
    caplog.set_level(logging.INFO, "stepcredit")
    near, far = fakes(), placed(fakes(), sees=False)
    with sampling(policy, near, far) as sampler:
        assert [one.way for one in sampler.pool.servers] == ["folder", "gloo"]
        assert len(near.loads) == len(far.loads) == 1
    assert f"weights go to {far.url} by gloo" in caplog.text
    with sampling(policy, placed(fakes(), gpu="GPU-1")) as sampler:
        assert sampler.pool.servers[0].way == "folder"  # the policy has none
    monkeypatch.setattr(weights, "gpu_of", lambda _: "GPU-1")
    with sampling(policy, placed(fakes(), gpu="GPU-1")) as sampler:
        assert sampler.pool.servers[0].way == "folder"  # the same
    tried: list[str] = []

    def refused(url: str, backend: str, *_: object) -> None:
        tried.append(backend)
        raise TransferError(f"{backend}: not today")

    monkeypatch.setattr(weights, "Transfer", refused)
    caplog.clear()
    with sampling(policy, placed(fakes(), gpu="GPU-2")) as sampler:
        assert sampler.pool.servers[0].way == "folder" and tried == ["nccl"]
    assert "by nccl: not today" in caplog.text
    with pytest.raises(UserError, match=r"sampler\.server\.folder.*gloo: not today"):
        remote(policy, [placed(fakes(), sees=False).url])


def test_ways_that_cannot_be(policy, fakes):
    adapted = load_policy("embedded", "cpu")
    add_adapters(adapted, 4, 8.0, [], seed=0)
    for one, way, why in [
        (policy, "nccl", "from GPU to GPU"),
        (adapted, "gloo", "adapters go through a folder"),
        (policy, "folder", "sampler.server.folder"),
    ]:
        with pytest.raises(UserError, match=why):
            remote(one, [placed(fakes(), sees=False).url], way=way)
        assert not list(weights.MEMORY.iterdir())


def test_a_server_that_is_started_anew_joins_again(policy, fake, tmp_path, caplog):
    with sampling(policy, fake, way="gloo", patience_s=JOIN_S) as sampler:
        fake.stop()
        fake.start()
        sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
        assert has(fake, policy, tmp_path / "a") and set(fake.served) == {sampler.weights.version}
        assert f"{fake.url} was started anew" in caplog.text
        other = bigger(policy)
        sampler.sync(other)
        assert has(fake, other, tmp_path / "b")


def test_a_server_that_ends_while_it_is_given_weights(policy, fakes, tmp_path, caplog, monkeypatch):
    """It is left alone, the other goes on; when it is back it is given them from the start."""
    monkeypatch.setitem(transfer.CHUNK, "gloo", 1 << 12)
    first, second = fakes(), fakes()
    with sampling(policy, first, second, way="gloo", patience_s=JOIN_S) as sampler:
        for worker in first.workers:
            worker.fault = RuntimeError("out of room")
        other = bigger(policy)
        sampler.sync(other)
        assert f"{first.url} has not got the weights" in caplog.text and "out of room" in caplog.text
        assert sampler.pool.servers[0].down and has(second, other, tmp_path / "a")
        assert first.version == ""  # neither those of before
        for worker in first.workers:
            worker.fault = None
        sampler.sample(PROMPTS * 4, 2, PARAMS, range(16))
        assert f"{first.url} is back" in caplog.text and has(first, other, tmp_path / "a")
        assert set(first.served + second.served) == {sampler.weights.version}


FAILURES = {
    "in the middle": ("fault", (0, 1), 2),
    "at the end": ("late", (0, 1), 2),
    "one worker": ("fault", (1,), 2),
    "one worker at the end": ("late", (1,), 2),
    "one that is not heard of": ("late", (1,), 1),
}


@pytest.mark.parametrize("raises", [False, True], ids=["says", "raises"])
@pytest.mark.parametrize("name", FAILURES)
def test_workers_that_fail_in_a_broadcast(policy, fakes, tmp_path, caplog, monkeypatch, name, raises):
    """Soon noticed and said, whatever fails when; nothing is sampled with what they have; it is tried again."""
    where, numbers, answers = FAILURES[name]
    monkeypatch.setitem(transfer.CHUNK, "gloo", 1 << 12)
    monkeypatch.setattr(Worker, "parallel_config", SimpleNamespace(world_size=1 if raises else 2, data_parallel_size=2))
    first, second = fakes(), fakes()
    first.answers = answers
    other = bigger(policy)
    with sampling(policy, second, first, way="gloo", patience_s=JOIN_S) as sampler:
        for number in numbers:
            setattr(first.workers[number], where, RuntimeError("out of room"))
        started = time.monotonic()
        sampler.sync(other)
        assert time.monotonic() - started < 10
        assert f"{first.url} has not got the weights" in caplog.text
        if not (raises and name == "one worker"):  # this server passes on that the other was left alone
            assert ("1 of 2 workers" if answers == 1 and not raises else "out of room") in caplog.text
        assert sampler.pool.servers[1].down and first.version != sampler.weights.version
        sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
        assert not first.served
        for number in numbers:
            setattr(first.workers[number], where, None)
        sampler.sample(PROMPTS * 4, 2, PARAMS, range(16))
        assert has(first, other, tmp_path / "a") and set(first.served) <= {sampler.weights.version}


@pytest.mark.parametrize(
    "name, raises",
    [
        ("at the end", False),
        ("at the end", True),
        ("one worker at the end", False),
        ("one worker at the end", True),
        ("one that is not heard of", True),
    ],
)
def test_workers_that_fail_to_load_a_folder(policy, fake, monkeypatch, name, raises):
    """That ends the run: what lies there will not change."""
    where, numbers, fake.answers = FAILURES[name]
    monkeypatch.setattr(Worker, "parallel_config", SimpleNamespace(world_size=1 if raises else 2, data_parallel_size=1))
    with sampling(policy, fake) as sampler:
        assert sampler.pool.servers[0].way == "folder"
        for number in numbers:
            setattr(fake.workers[number], where, RuntimeError("out of room"))
        with pytest.raises(UserError, match="out of room"):
            sampler.sync(policy)
        assert fake.version == ""


def test_a_folder_of_engines_that_are_not_heard_must_be_asked_for(policy, fakes, monkeypatch):
    """Several engines of several workers each."""
    monkeypatch.setattr(Worker, "parallel_config", SimpleNamespace(world_size=2, data_parallel_size=2))
    for way, taken in (("auto", "gloo"), ("folder", "folder")):
        with sampling(policy, fakes(), way=way, patience_s=JOIN_S) as sampler:
            assert sampler.pool.servers[0].way == taken


def test_a_start_at_which_no_server_takes_the_weights(policy, fake):
    for worker in fake.workers:
        worker.late = RuntimeError("out of room")
    with pytest.raises(UserError, match="out of room"):
        remote(policy, [fake.url], way="gloo")


@pytest.mark.parametrize("answer", [status(503), lambda _: (200, b'{"success": false}')], ids=["down", "in use"])
@pytest.mark.parametrize("way", ["folder", "gloo"])
def test_a_cache_that_is_not_emptied_is_emptied_before_the_server_is_used(policy, fake, caplog, way, answer):
    with sampling(policy, fake, way=way, patience_s=JOIN_S) as sampler:
        sampler.sample(PROMPTS, 1, PARAMS, SEEDS)
        assert fake.seen
        fake.fail(RESET, [answer])
        sampler.sync(bigger(policy))
        assert fake.version == "" and sampler.pool.servers[0].down
        fake.seen = {tuple(PROMPTS[1])}  # it was not emptied
        fake.served.clear()
        before = len(fake.paths(RESET))
        sampler.sample([PROMPTS[0]], 1, PARAMS, SEEDS[:1])
        assert len(fake.paths(RESET)) > before and fake.seen == {tuple(PROMPTS[0])}
        assert fake.served == [sampler.weights.version]


def test_two_trainers_of_one_server(policy, fake, tmp_path, caplog):
    """A worker takes weights from the one that it met last; the other notices, and meets it again."""
    with (
        sampling(policy, fake, way="gloo", patience_s=JOIN_S) as one,
        sampling(policy, fake, way="gloo", patience_s=JOIN_S),
    ):
        other = bigger(policy)
        one.sync(other)
        assert "another trainer" in caplog.text and one.pool.servers[0].down
        one.sample(PROMPTS, 1, PARAMS, SEEDS)
        assert has(fake, other, tmp_path / "a") and fake.version == one.weights.version


def test_the_gpu_is_the_one_that_a_sharded_policy_will_be_on(policy, fake):
    """It is on the CPU when the sampler is made."""
    with pytest.raises(UserError, match="nccl, which this torch does not have"):
        remote(policy, [fake.url], way="nccl", device=torch.device("cuda"))


def test_only_the_first_process_broadcasts(policy, fake, caplog):
    """Others wait until a server that was started anew has been given the weights."""

    class Other:
        main = False

        def on_main(self, _: Callable) -> object:
            return next(answers)

    with sampling(policy, fake, way="gloo", patience_s=JOIN_S) as sampler:
        answers = iter((sampler.weights.token, sampler.weights.folder, ["gloo"]))
        with sampling(policy, fake, ranks=Other(), way="gloo", patience_s=JOIN_S) as second:
            fake.stop()
            fake.start()
            later = threading.Timer(0.3, lambda: sampler.sample(PROMPTS, 1, PARAMS, SEEDS))
            later.start()
            second.sample(PROMPTS, 2, PARAMS, SEEDS)
            later.join()
    assert set(fake.served) == {sampler.weights.version} and len(fake.loads) == 1
    assert "waits for the first process" in caplog.text


def test_a_run_by_broadcast(policy, fakes, tmp_path):
    fake = placed(fakes(model=True), sees=False)
    assert train(fake, tmp_path / "run", "--group-size", "4") == 0
    assert all(row["sampler/logprob_diff_mean"] < 1e-4 for row in rows(tmp_path / "run")[1:])
    end = load_file(tmp_path / "run" / "checkpoints" / "000002" / "model.safetensors")
    served = fake.sampler.policy.model.state_dict()
    assert all(torch.equal(value, served[name]) for name, value in end.items())
