"""A real vLLM server on this machine: `make test-vllm`, which names its Python in STEPCREDIT_VLLM_PYTHON."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from stepcredit.cli.main import main
from stepcredit.demo.chain import problems
from stepcredit.forest import Forest
from stepcredit.forest.types import Tree
from stepcredit.policy.forward import Policy, score
from stepcredit.policy.loading import EMBEDDED_MODEL, load_policy
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.remote import launch
from stepcredit.samplers.remote.connection import Server
from stepcredit.samplers.remote.dialect import Start
from stepcredit.samplers.remote.launch import LocalServer
from stepcredit.samplers.remote.options import ServerOptions
from stepcredit.samplers.remote.sampler import RemoteSampler
from stepcredit.samplers.remote.vllm import VLLM
from stepcredit.samplers.transformers import TransformersSampler

PYTHON = os.environ.get("STEPCREDIT_VLLM_PYTHON")
ARGS = ["--enforce-eager", "--max-num-seqs", "64", "--block-size", "32"]  # prompts of 50 tokens are to be cached
pytestmark = pytest.mark.skipif(PYTHON is None, reason="make test-vllm sets up vLLM")

LAUNCH = ["--sampler.name", "vllm", "--sampler.server.launch", "true", "--sampler.server.python", str(PYTHON)]
LAUNCH += ["--sampler.server.args=" + ",".join(ARGS), "--eval.num-problems", "20", "--iterations", "5"]
LORA = "grpo --lora.rank 4 --learning-rate 2e-3"
PROBLEMS = problems("held_out", 0, 8)


def start(log: Path, port: int = 0, args: list[str] = ARGS) -> LocalServer:
    wanted = Start(str(EMBEDDED_MODEL), "float32", SamplingParams(), str(PYTHON), port, args=args)
    return LocalServer(VLLM(), wanted, log)


def remote(policy: Policy, server: LocalServer, way: str = "auto") -> RemoteSampler:
    return RemoteSampler(VLLM(), policy, [server.url], ServerOptions(patience_s=60, transfer=way))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    one = start(tmp_path_factory.mktemp("vllm") / "server.log")
    yield one
    one.close()


@pytest.fixture
def policy() -> Policy:
    return load_policy("embedded", "cpu")


@pytest.fixture(params=["folder", "gloo"])
def sampler(server, policy, request):
    one = remote(policy, server, request.param)
    one.sync(policy)
    yield one
    one.close()


def moved(policy: Policy) -> Policy:
    """Other weights, in the tied output layer too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.03 * torch.randn_like(weight))
    return policy


def difference(sampler: RemoteSampler, policy: Policy, n: int = 4) -> float:
    """Mean difference of log-probabilities between server and trainer on what the server samples."""
    prompts = [list(policy.tokenizer(str(problem.question))["input_ids"]) for problem in PROBLEMS]
    groups = sampler.sample(prompts, n, SamplingParams(), range(len(prompts)))
    trees = [Tree(*row) for row in zip(PROBLEMS, prompts, groups, strict=True)]
    forest = Forest.from_trees(trees)
    scores = score(policy, forest, 1.0, 4096).logprobs
    return float((scores - forest.token["rollout_logprobs"]).abs().mean())


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]


@pytest.mark.parametrize("algorithm", ["grpo", "treerpo --sampler.server.transfer gloo", LORA])
def test_five_iterations(algorithm, tmp_path):
    """Weights synced and compared each time; rewards as with the sampler of this program."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    common = ["train", "--algorithm", *algorithm.split(), "--sampler.max-rows", "256"]
    assert main([*common, *LAUNCH, "--run-dir", str(theirs)]) in (0, 1)
    plain = ["--eval.num-problems", "20", "--iterations", "5", "--run-dir", str(ours)]
    assert main([*common, *plain]) in (0, 1)
    assert all(row["sampler/logprob_diff_mean"] < 1e-4 for row in rows(theirs))
    assert all(row["policy/entropy"] > 0 for row in rows(theirs))
    rewards = [sum(row["reward/mean"] for row in rows(run)) / 5 for run in (ours, theirs)]
    assert abs(rewards[0] - rewards[1]) < 0.1, rewards
    if algorithm.startswith("treerpo"):
        assert all(row["sampler/prefix_hits"] > 0.1 for row in rows(theirs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a server on a CPU does not sleep")
@pytest.mark.parametrize(("algorithm", "level"), [("grpo", "2"), ("grpo", "1"), (LORA, "1")])
def test_five_iterations_beside_the_trainer(algorithm, level, tmp_path):
    """On one GPU, in bf16, asleep during each update; the weights are the trainer's whenever it is awake."""
    run, beside = tmp_path / "run", ["--sampler.server.sleep", level, "--sampler.server.memory", "0.3"]
    assert main(["train", "--algorithm", *algorithm.split(), *LAUNCH, *beside, "--run-dir", str(run)]) in (0, 1)
    assert len(rows(run)) == 5 and all(row["sampler/logprob_diff_mean"] < 0.03 for row in rows(run))


def test_seeds_and_weights(sampler, policy):
    first = [segment.token_ids for segment in sampler.sample([[5, 6, 7]], 4, SamplingParams(), [3])[0]]
    assert first == [segment.token_ids for segment in sampler.sample([[5, 6, 7]], 4, SamplingParams(), [3])[0]]
    assert difference(sampler, policy) < 1e-4
    moved(policy)
    assert difference(sampler, policy) > 0.05
    sampler.sync(policy)
    assert difference(sampler, policy) < 1e-4


def test_greedy(sampler, policy):
    """Several copies of what the sampler of this program gives."""
    prompts, greedy = [[5, 6, 7], [8, 9]], SamplingParams(temperature=0.0, max_new_tokens=8)
    theirs = sampler.sample(prompts, 2, greedy, [1, 2])
    ours = TransformersSampler(policy).sample(prompts, 2, greedy, [1, 2])
    assert [[one.token_ids for one in group] for group in theirs] == [
        [one.token_ids for one in group] for group in ours
    ]


def test_a_stale_prefix_cache_shows(sampler, policy, monkeypatch):
    """The tolerance of a run in fp32 is 0.005."""
    difference(sampler, policy)  # fills the cache
    post = Server.post
    monkeypatch.setattr(Server, "post", lambda self, path, body: {} if "reset" in path else post(self, path, body))
    sampler.sync(moved(policy))
    assert difference(sampler, policy) > 0.005


def test_a_stale_tied_head_shows(policy, tmp_path, monkeypatch):
    """A worker without the renewal of the output layer."""
    whole = launch.SERVER / "stepcredit_worker.py"
    text = whole.read_text()
    stale = re.sub(r"        for module in .*?(?=        if self\.device)", "", text, flags=re.DOTALL)
    assert stale != text
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "stepcredit_worker.py").write_text(stale)
    (folder / "supervise.py").write_text((whole.parent / "supervise.py").read_text())
    monkeypatch.setattr(launch, "SERVER", folder)
    one = start(tmp_path / "log")
    try:
        sampler = remote(policy, one)
        sampler.sync(moved(policy))
        assert difference(sampler, policy) > 0.005
    finally:
        one.close()


@pytest.mark.parametrize("way", ["folder", "gloo"])
def test_a_server_that_is_killed_and_comes_back(way, policy, tmp_path):
    """The run reports it, tries again, and goes on with the weights of now."""
    first = start(tmp_path / "one.log")
    made: list[LocalServer] = []
    run = tmp_path / "run"

    def replace() -> None:
        while not (run / "metrics.jsonl").exists() or len(rows(run)) < 2:
            time.sleep(0.1)
        first.close()
        made.append(start(tmp_path / "two.log", first.port))

    thread = threading.Thread(target=replace, daemon=True)
    thread.start()
    words = ["--sampler.name", "vllm", "--sampler.server.urls", first.url, "--eval.num-problems", "4"]
    words += [
        "--eval.greedy",
        "false",
        "--iterations",
        "6",
        "--run-dir",
        str(run),
        "--sampler.server.patience-s",
        "200",
    ]
    words += ["--sampler.server.transfer", way]
    try:
        assert main(["train", *words]) in (0, 1)
        thread.join()
    finally:
        for one in made:
            one.close()
    assert len(rows(run)) == 6
    assert all(row["sampler/logprob_diff_mean"] < 1e-4 for row in rows(run))


FAILS_ONCE = """

class Faulty(Extension):
    def _stepcredit_take(self, version, **weights):
        config, number = self.parallel_config, int(os.environ["FAULT_AT"])
        last = self.rank % config.world_size == config.world_size - 1
        last = last and getattr(config, "data_parallel_index", 0) == config.data_parallel_size - 1
        self.loads = getattr(self, "loads", 0) + 1
        if last and self.loads == number:
            next(weights["weights_iterator"])
            raise RuntimeError("out of room")
        return super()._stepcredit_take(version, **weights)


Extension = Faulty
"""


@pytest.mark.parametrize("kind", ["tensor", "data"])
def test_the_second_of_two_workers_fails_once(kind, policy, tmp_path, monkeypatch, caplog):
    """Both get the weights; the failure is noticed, and mended before anything is sampled."""
    folder = tmp_path / "server"
    shutil.copytree(launch.SERVER, folder)
    (folder / "stepcredit_worker.py").open("a").write(FAILS_ONCE)
    monkeypatch.setattr(launch, "SERVER", folder)
    monkeypatch.setenv("FAULT_AT", "2")
    one = start(tmp_path / "log", args=[*ARGS, f"--{kind}-parallel-size", "2"])
    try:
        sampler = remote(policy, one, "gloo")
        assert sampler.pool.servers[0].transfer.size == 3 and difference(sampler, policy) < 1e-4
        sampler.sync(moved(policy))
        assert sampler.pool.servers[0].down and "out of room" in caplog.text
        assert difference(sampler, policy, 16) < 1e-4
        sampler.close()
    finally:
        one.close()


def test_it_ends_when_the_run_is_killed(tmp_path):
    run = tmp_path / "run"
    before = servers()
    command = [sys.executable, "-m", "stepcredit", "train", *LAUNCH, "--iterations", "500", "--run-dir", str(run)]
    with subprocess.Popen(command) as job:
        while not (run / "metrics.jsonl").exists() or not rows(run):
            assert job.poll() is None
            time.sleep(0.2)
        job.send_signal(signal.SIGKILL)
    until = time.monotonic() + 30
    while servers() - before and time.monotonic() < until:
        time.sleep(0.5)
    assert not servers() - before


def servers() -> set[str]:
    """Processes of vLLM servers that are running."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if "vllm.entrypoints" in line or line.startswith("VLLM::"):
            found.add(path.parent.name)
    return found
