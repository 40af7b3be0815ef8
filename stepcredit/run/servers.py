"""Which sampler a run takes where none is named, and how a server that it starts fits on the GPUs of this machine."""

import logging
from importlib.util import find_spec

import torch

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.learn.placement import Placement
from stepcredit.plan.memory import ALWAYS, GIB, Plan, estimate_memory
from stepcredit.plan.sizes import size_of
from stepcredit.samplers.gpus import free_gpus
from stepcredit.samplers.table import AUTO, NONE, name_of, sampler_traits

log = logging.getLogger("stepcredit")

LARGEST_RANK = 512  # of adapters; vllm.py says which ranks there are
AT_LEAST = 1.25  # a server's weights, with what it computes in beside them and some keys and values


def choose_sampler(config: Config, placement: Placement, device: torch.device) -> tuple[Config, str]:
    """A config whose sampler has a name, and which it is and why, where the config leaves it open; else empty text.

    vLLM where the run can start a server of its own and gains by it, else the decode loop of this program.

    Args:
        device: on which the run computes.
    """
    if config.sampler.name != AUTO:
        return config, ""
    if config.growth.recorded:
        sampler = config.sampler.model_copy(update={"name": NONE})
        return config.model_copy(update={"sampler": sampler}), f"sampler: none ({config.growth.name} of the data)"
    server = config.sampler.server
    if server.urls or server.launch:
        name, why = name_of(config.sampler), "servers are named" if server.urls else "sampler.server.launch"
    else:
        why = _against_server(config, placement, device)
        name, why = ("transformers", why) if why else ("vllm", "a GPU, and vLLM is installed")
        server = server.model_copy(update={"launch": name == "vllm"})
    sampler = config.sampler.model_copy(update={"name": name, "server": server})
    return config.model_copy(update={"sampler": sampler}), f"sampler: {name} ({why})"


def _against_server(config: Config, placement: Placement, device: torch.device) -> str:
    """Why a run does not start a server of its own; empty: it does."""
    given = config.sampler
    if device.type != "cuda":
        return f"the device is {device.type}"
    if find_spec("vllm") is None and given.server.python is None:
        return "vLLM is not installed"
    if config.model == "embedded":
        return "the embedded model is too small for a server"
    if given.window:
        return "sampler.window goes on with completions in their own random numbers"
    if config.growth.name != "flat":
        return "trees go on from keys and values that it keeps"
    if placement.ranks.size > 1:
        return f"{placement.ranks.size} processes sample on as many GPUs; servers can be named by sampler.server.urls"
    if sampler_traits(_elsewhere(config)).why_no_logprobs(given):
        return "vLLM has no log-probabilities for this top_p, top_k and temperature"
    if config.lora.rank > LARGEST_RANK:
        return f"vLLM takes adapters up to rank {LARGEST_RANK}"
    if not free_gpus(device, placement.ranks):
        plan = _plan(config, placement, device)
        if share_left(plan, sleeps=given.server.sleep != "off") * plan.memory < _least(config):
            return "the GPU has no room for a server beside the trainer"
    return ""


def fit_server(config: Config, placement: Placement, device: torch.device) -> Config:
    """A config whose server, if the run starts one, has a share of its GPU and does or does not sleep.

    On a GPU of its own it takes what it likes and stays awake. On the trainer's it takes what the trainer leaves while
    it samples, and sleeps during an update: with all its weights forgotten, which it is given anew anyway, or, where it
    is given adapters alone, with the base's on the CPU.

    Raises:
        UserError: the GPU has no room for it, or it would forget a base that nobody gives it again.
    """
    server = config.sampler.server
    if server.sleep == "2" and config.lora.rank:
        raise UserError(
            "sampler.server.sleep: 2 lets a server forget its weights, and with --lora.rank it is given adapters alone;"
            " take --sampler.server.sleep 1"
        )
    starts_one = server.launch and name_of(config.sampler) not in ("transformers", NONE)
    if not starts_one or device.type != "cuda" or free_gpus(device, placement.ranks):
        return config
    if server.sleep == "auto":
        server = server.model_copy(update={"sleep": "1" if config.lora.rank else "2"})
    if server.memory is None and not any(word.startswith("--gpu-memory-utilization") for word in server.args):
        plan = _plan(config, placement, device)
        share, least = share_left(plan, sleeps=server.sleep != "off"), _least(config)
        if share * plan.memory < least:
            raise UserError(
                f"sampler.server.launch: beside the trainer's models the GPU has {share * plan.memory / GIB:.1f} GiB, "
                f"and a server of this model takes {least / GIB:.1f} GiB; take --lora.rank 16, a smaller model, or "
                "--sampler.name transformers"
            )
        server = server.model_copy(update={"memory": share})
        resting = "stays awake" if server.sleep == "off" else "sleeps during an update"
        log.info("sampler: the server takes %.0f%% of the GPU, and %s", 100 * share, resting)
    return config.model_copy(update={"sampler": config.sampler.model_copy(update={"server": server})})


def share_left(plan: Plan, sleeps: bool) -> float:
    """The share of a GPU that a run leaves to a server, in whole hundredths; 0 for none.

    Args:
        plan: with a sampler in another program.
        sleeps: the server sleeps during an update; else both must have room at once.
    """
    taken = plan.taken(ALWAYS) if sleeps else plan.peak
    return max(0, int(100 * (plan.usable - taken) / plan.memory)) / 100


def _plan(config: Config, placement: Placement, device: torch.device) -> Plan:
    """That of the run with a sampler in another program."""
    memory = torch.cuda.get_device_properties(device).total_memory
    return estimate_memory(_elsewhere(config), placement.ranks.size, placement.strategy, memory)


def _elsewhere(config: Config) -> Config:
    return config.model_copy(update={"sampler": config.sampler.model_copy(update={"name": "vllm"})})


def _least(config: Config) -> float:
    """Bytes without which a server cannot start."""
    width = 4 if config.train.dtype == "float32" else 2
    return AT_LEAST * width * size_of(config.model, config.trust_remote_code).weights
