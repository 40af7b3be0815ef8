"""Weights through a folder and as adapters, and the share of prompts that the prefix caches had."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_server import JOIN_S, LOAD, PARAMS, PROMPTS, RESET, RPC, SEEDS, Fake, sampling, status
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepcredit.errors import UserError
from stepcredit.learn.adapters import add_adapters
from stepcredit.policy.loading import load_policy
from stepcredit.samplers.remote import weights
from stepcredit.samplers.remote.vllm import lora_args


def test_weights_are_passed_on_in_a_folder(policy, fake, tmp_path):
    """It loads as any model; the cache is emptied afterwards; the one before is gone, and nothing else."""
    (tmp_path / "kept").write_text("not ours")
    other = load_policy("embedded", "cpu")
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    with sampling(policy, fake, folder=tmp_path) as sampler:
        # Which version, where it is, load, forget, commit, which version.
        assert fake.paths(RPC, RESET) == [RPC, RPC, RPC, RESET, RPC, RPC]
        first = Path(fake.loads[0][0])
        assert first.is_dir() and first.parents[1] == tmp_path
        assert first.parent.stat().st_mode & 0o777 == 0o755  # the server may be another user's
        sampler.sync(other)
        assert fake.paths(RPC, RESET) == [RPC, RPC, *[RPC, RESET, RPC, RPC] * 2]
        methods = [body["method"] for path, body in fake.requests if path == RPC]
        assert methods[-3:] == ["stepcredit_load", "stepcredit_commit", "stepcredit_loaded"]
        second, version = fake.loads[1]
        assert version == sampler.weights.version and version.endswith("-2") and not first.exists()
        assert len(AutoTokenizer.from_pretrained(second)) == len(policy.tokenizer)
        loaded = AutoModelForCausalLM.from_pretrained(second, dtype=torch.float32).state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in other.model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_weights_are_in_memory_and_go_with_the_sampler(policy, fake):
    with sampling(policy, fake) as sampler:
        assert list(weights.MEMORY.iterdir()) == [sampler.weights.folder]
        assert sampler.weights.folder.stat().st_mode & 0o077 == 0
        sampler.sync(policy)
        assert sampler.weights.folder.stat().st_mode & 0o077 == 0
        assert Path(fake.loads[1][0]).parent == sampler.weights.folder
    assert not list(weights.MEMORY.iterdir())


def in_bf16(fake: Fake) -> Fake:
    for worker in fake.workers:
        worker.model_config = SimpleNamespace(dtype=torch.bfloat16)
    return fake


@pytest.mark.parametrize("way", ["folder", "gloo"])
def test_weights_come_in_the_type_of_the_server(policy, fakes, way, monkeypatch):
    """Cast before they leave; what the model keeps in fp32 stays, and so does a server in fp32."""
    monkeypatch.setattr(policy.model, "_keep_in_fp32_modules_strict", {"input_layernorm"})
    half, full = in_bf16(fakes()), fakes()
    own = policy.model.state_dict()
    with sampling(policy, half, full, way=way, patience_s=JOIN_S) as sampler:
        for _ in range(2):
            for worker in half.workers:
                assert {value.dtype for value in worker.given.values()} == {torch.bfloat16, torch.float32}
                for name, value in worker.given.items():
                    kept = "input_layernorm" in name
                    assert value.equal(own[name] if kept else own[name].bfloat16()), name
            for worker in full.workers:
                assert all(value.equal(own[name]) for name, value in worker.given.items())
            assert half.version == full.version == sampler.weights.version
            sampler.sync(policy)
        if way == "folder":  # a second folder, in half the bytes
            sizes = [
                (sampler.weights.folder / f"{sampler.weights.version}{kind}" / "model.safetensors").stat().st_size
                for kind in ("-bfloat16", "")
            ]
            assert sizes[0] < 0.6 * sizes[1]


def test_a_server_that_comes_back_in_another_type_is_asked_again(policy, fake):
    with sampling(policy, fake) as sampler:
        fake.stop()
        fake.start()
        in_bf16(fake)
        sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
        assert {value.dtype for value in fake.workers[0].given.values()} == {torch.bfloat16}


def test_only_the_first_process_writes(policy, fakes, tmp_path):
    """The others know its folder, so that each can bring a server up to date."""

    class Other:
        main = False

        def on_main(self, _: Callable) -> str | Path:
            return next(answers)

    fake, theirs = fakes(), fakes()
    with sampling(policy, fake, folder=tmp_path) as sampler:
        theirs.version = sampler.weights.version
        answers = iter((sampler.weights.token, sampler.weights.folder, ["folder"]))
        with sampling(policy, theirs, ranks=Other(), folder=tmp_path) as second:
            assert not theirs.loads
            theirs.version = ""
            second.sample(PROMPTS, 2, PARAMS, SEEDS)
            assert [Path(folder) for folder, _ in theirs.loads] == [sampler.weights.folder / sampler.weights.version]
        assert (sampler.weights.folder / sampler.weights.version).is_dir()


def test_share_of_prompts_that_the_caches_had(policy, fakes):
    """Between one sync and the next, over all servers; what was before the run and a restart do not count."""
    first, second = fakes(), fakes()
    first.queries, first.hits = 1000, 900
    with sampling(policy, first, second) as sampler:

        def sample(prompt: list[int], times: int) -> None:
            for _ in range(times):
                sampler.sample([prompt], 1, PARAMS, [1])

        sample([5, 6, 7, 8], 4)  # one server has them all
        sampler.sync(policy)
        assert sampler.metrics == {"sampler/prefix_hits": 12 / 16}
        second.queries, second.hits = second.queries + 16, second.hits + 2
        sample([5, 6, 7, 8], 2)  # forgotten with the weights that it was of
        sampler.sync(policy)
        assert sampler.metrics == {"sampler/prefix_hits": (4 + 2) / (8 + 16)}
        first.queries = first.hits = 1
        second.queries, second.hits = second.queries + 10, second.hits + 5
        sampler.sync(policy)
        assert sampler.metrics == {"sampler/prefix_hits": 0.5}
        sampler.sync(policy)
        assert sampler.metrics == {}


def test_adapters_are_models_of_their_own(fakes):
    """Of a new name after each update, the one before gone; a server that is started anew gets them again."""
    fake, adapted = fakes(), load_policy("embedded", "cpu")
    add_adapters(adapted, 4, 8.0, [], seed=0)
    with sampling(adapted, fake) as sampler:
        for _ in range(2):
            sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
            assert list(fake.adapters) == [sampler.weights.version] and set(fake.served) == {sampler.weights.version}
            folder = Path(fake.adapters[sampler.weights.version])
            assert (folder / "adapter_model.safetensors").is_file() and not list(folder.glob("model*"))
            fake.served.clear()
            sampler.sync(adapted)
        fake.stop()
        fake.start()
        sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
        assert list(fake.adapters) == [sampler.weights.version]
    assert not fake.loads  # the base stays what it is


def test_a_server_that_takes_no_adapters(fakes):
    fake, adapted = fakes(), load_policy("embedded", "cpu")
    add_adapters(adapted, 4, 8.0, [], seed=0)
    fake.fail(LOAD, [status(400, "LoRA is not enabled")])
    with pytest.raises(UserError, match=r"refuses \(LoRA is not enabled\).*--enable-lora"), sampling(adapted, fake):
        pass


def test_weights_of_a_killed_run_go(policy, fake):
    """With the next run; those of a run that lives stay."""
    code = "import sys; from pathlib import Path; from stepcredit.samplers.remote import weights\n"
    code += "weights.MEMORY = Path(sys.argv[1]); print(weights.new_folder(None), flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(weights.MEMORY)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as dead, subprocess.Popen(command, **pipes) as alive:
        left, kept = Path(dead.stdout.readline().strip()), Path(alive.stdout.readline().strip())
        dead.kill()
        dead.wait()
        assert left.is_dir()
        with sampling(policy, fake) as sampler:
            assert not left.exists() and set(weights.MEMORY.iterdir()) == {sampler.weights.folder, kept}
        alive.stdin.close()


def test_ranks_that_vllm_takes():
    assert [lora_args(rank)[-1:] for rank in (0, 1, 8, 9, 512)] == [[], ["8"], ["8"], ["16"], ["512"]]
    with pytest.raises(UserError, match=r"lora.rank: .* up to rank 512"):
        lora_args(513)
