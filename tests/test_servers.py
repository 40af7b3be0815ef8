"""Which sampler a run takes, and how a server that it starts fits beside the trainer; with a GPU that is made up."""

import logging
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_resume import train
from tiny_models import fresh

from stepcredit.cli.main import main
from stepcredit.config import resolve
from stepcredit.errors import UserError
from stepcredit.learn.placement import UNSHARDED, Placement
from stepcredit.plan.memory import ALWAYS, GIB, estimate_memory
from stepcredit.processes.ranks import Ranks
from stepcredit.run import servers
from stepcredit.run.servers import choose_sampler, fit_server, share_left
from stepcredit.samplers.gpus import server_gpus
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.remote.dialect import Start
from stepcredit.samplers.remote.launch import server_environment
from stepcredit.samplers.remote.vllm import LORA_RANKS, VLLM
from stepcredit.samplers.table import sampler_traits

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """Set how many GPUs there are, of what size, and whether vLLM is installed."""

    def make(count: int = 1, gib: float = 80.0, vllm: bool = True, visible: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        properties = SimpleNamespace(total_memory=gib * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(servers, "find_spec", lambda name: object() if vllm and name == "vllm" else None)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    make()
    return make


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A model of 1.2 million weights by its config alone."""
    folder = tmp_path_factory.mktemp("model")
    fresh("qwen3", hidden_size=128, intermediate_size=512, num_hidden_layers=4).model.config.save_pretrained(folder)
    return str(folder)


def chosen(given: dict, device: torch.device = CUDA, size: int = 1) -> tuple[str, bool]:
    config, why = choose_sampler(resolve(given), Placement(Ranks(0, size)), device)
    if why:
        logging.getLogger("stepcredit").info("%s", why)
    return config.sampler.name, config.sampler.server.launch


# ---------------------------------------------------------------------- which sampler


def test_a_gpu_with_vllm_gets_a_server(gpu, model, caplog):
    caplog.set_level(logging.INFO)
    assert chosen({"model": model}) == ("vllm", True)
    assert "sampler: vllm (a GPU, and vLLM is installed)" in caplog.text


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"algorithm": "treerpo"}, "trees go on from keys and values"),
        ({"model": "embedded"}, "the embedded model is too small"),
        ({"sampler": {"temperature": 0.7, "top_p": 0.9}}, "vLLM has no log-probabilities"),
        ({"lora": {"rank": 1024}}, "vLLM takes adapters up to rank 512"),
    ],
)
def test_what_a_server_is_not_for(gpu, model, caplog, given, why):
    caplog.set_level(logging.INFO)
    assert chosen({"model": model} | given) == ("transformers", False)
    assert f"sampler: transformers ({why}" in caplog.text


def test_without_a_gpu_or_vllm_or_room(gpu, model, caplog):
    caplog.set_level(logging.INFO)
    assert chosen({"model": model}, CPU) == ("transformers", False)
    assert chosen({"model": model}, size=2) == ("transformers", False)
    gpu(vllm=False)
    assert chosen({"model": model}) == ("transformers", False)
    assert chosen({"model": model, "sampler": {"server": {"python": "/else/python"}}}) == ("vllm", True)
    gpu(gib=0.013)
    assert chosen({"model": model}) == ("transformers", False)
    gpu(count=2, gib=0.013)  # one of its own
    assert chosen({"model": model}) == ("vllm", True)
    for why in ("the device is cpu", "2 processes", "vLLM is not installed", "no room"):
        assert f"transformers ({why}" in caplog.text or f"transformers (the GPU has {why}" in caplog.text


def test_what_is_named_holds(gpu, model):
    for name in ("transformers", "vllm", "my.own"):
        assert chosen({"model": model, "sampler": {"name": name}}) == (name, False)
    urls = {"sampler": {"server": {"urls": ["http://a:1"]}}}
    assert chosen({"model": model} | urls, CPU) == ("vllm", False)
    assert chosen({"model": model, "sampler": {"server": {"launch": True}}}, CPU) == ("vllm", True)
    assert sampler_traits(resolve(urls)).elsewhere  # also of what does not choose
    assert not sampler_traits(resolve({})).elsewhere


def test_a_run_keeps_what_it_chose(tmp_path, caplog):
    """Written as it was resolved, and kept when the run goes on."""
    run = tmp_path / "run"
    caplog.set_level(logging.INFO)
    assert train(run, "--iterations", "1") in (0, 1)
    assert "sampler: transformers (the device is cpu)" in caplog.text
    file = run / "config.yaml"
    given = yaml.safe_load(file.read_text())
    assert given["sampler"]["name"] == "transformers"
    given["sampler"]["name"] = "stepcredit.samplers.transformers.build"
    file.write_text(yaml.safe_dump(given))
    assert main(["train", "--resume", str(run), "--iterations", "2"]) in (0, 1)
    assert yaml.safe_load(file.read_text())["sampler"]["name"] == "stepcredit.samplers.transformers.build"


# ---------------------------------------------------------------------- beside the trainer


def test_a_server_takes_what_the_trainer_leaves(gpu, model):
    config = resolve({"model": model, "sampler": {"name": "vllm", "server": {"launch": True}}})
    gpu(gib=1.0)
    found = fit_server(config, UNSHARDED, CUDA).sampler.server
    plan = estimate_memory(config, 1, "ddp", GIB)
    taken = sum(part.bytes for part in plan.parts if part.when == ALWAYS)
    assert found.sleep == "2" and found.memory == share_left(plan, sleeps=True)
    assert found.memory * GIB + taken <= 0.9 * GIB < (found.memory + 0.01) * GIB + taken
    assert share_left(plan, sleeps=False) == pytest.approx((0.9 * GIB - plan.peak) / GIB, abs=0.01) or plan.peak > GIB
    assert share_left(plan, sleeps=False) < found.memory
    adapted = config.model_copy(update={"lora": config.lora.model_copy(update={"rank": 8})})
    less = fit_server(adapted, UNSHARDED, CUDA).sampler.server
    assert less.sleep == "1" and less.memory >= found.memory


def test_a_server_on_a_gpu_of_its_own_stays_awake(gpu, model):
    config = resolve({"model": model, "sampler": {"name": "vllm", "server": {"launch": True}}})
    gpu(count=2)
    assert fit_server(config, UNSHARDED, CUDA) == config
    gpu()
    assert fit_server(config, UNSHARDED, CPU) == config
    named = resolve({"model": model, "sampler": {"name": "vllm", "server": {"urls": ["http://a:1"], "sleep": "1"}}})
    assert fit_server(named, UNSHARDED, CUDA) == named


def test_what_a_user_gave_a_server_holds(gpu, model):
    server = {"launch": True, "sleep": "off", "memory": 0.3}
    found = fit_server(resolve({"model": model, "sampler": {"name": "vllm", "server": server}}), UNSHARDED, CUDA)
    assert (found.sampler.server.sleep, found.sampler.server.memory) == ("off", 0.3)
    server = {"launch": True, "args": ["--gpu-memory-utilization", "0.4"]}
    found = fit_server(resolve({"model": model, "sampler": {"name": "vllm", "server": server}}), UNSHARDED, CUDA)
    assert found.sampler.server.memory is None


def test_no_room_for_a_server(gpu, model):
    config = resolve({"model": model, "sampler": {"name": "vllm", "server": {"launch": True}}})
    gpu(gib=0.013)
    with pytest.raises(UserError, match=r"the GPU has .* GiB, and a server of this model takes .*--lora.rank"):
        fit_server(config, UNSHARDED, CUDA)


def test_a_base_is_not_forgotten(gpu, model):
    server = {"urls": ["http://a:1"], "sleep": "2"}
    config = resolve({"model": model, "lora": {"rank": 8}, "sampler": {"name": "vllm", "server": server}})
    with pytest.raises(UserError, match=r"take --sampler\.server\.sleep 1"):
        fit_server(config, UNSHARDED, CUDA)


@pytest.mark.parametrize(
    ("count", "visible", "device", "ranks", "seen"),
    [
        (1, None, "cuda", Ranks(), ["0"]),
        (4, None, "cuda", Ranks(), ["1", "2", "3"]),
        (3, "2,5,7", "cuda:1", Ranks(), ["2", "7"]),
        (1, "GPU-a", "cuda", Ranks(), ["GPU-a"]),
        (0, None, "cpu", Ranks(), None),
        (2, None, "cpu", Ranks(), None),
    ],
)
def test_the_gpus_that_a_server_sees(gpu, count, visible, device, ranks, seen):
    gpu(count=count, visible=visible)
    assert server_gpus(torch.device(device), ranks) == seen
    given = server_environment(VLLM(), {"CUDA_VISIBLE_DEVICES": "9"}, seen)
    assert given["CUDA_VISIBLE_DEVICES"] == ("9" if seen is None else ",".join(seen))


def test_the_processes_of_a_run_have_the_first_gpus(gpu):
    ranks = Ranks(0, 2, 0, 2)
    ranks._host = object()
    gpu(count=4)
    assert server_gpus(CUDA, ranks) == ["2", "3"]
    gpu(count=2)
    assert server_gpus(CUDA, ranks) == ["0"]


def test_the_largest_rank_is_that_of_vllm():
    assert LORA_RANKS[-1] == servers.LARGEST_RANK


def test_how_a_server_is_told():
    command = VLLM().command(Start("m", "bfloat16", SamplingParams(), sleeps=True, memory=0.31))
    assert command[command.index("--gpu-memory-utilization") + 1] == "0.31" and "--enable-sleep-mode" in command
    plain = VLLM().command(Start("m", "bfloat16", SamplingParams()))
    assert "--gpu-memory-utilization" not in plain and "--enable-sleep-mode" not in plain
