"""Memory of a run by its parts, reckoned from the model's config alone."""

from dataclasses import dataclass
from functools import cache

import torch

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.policy.loading import source_of

GIB = 2**30
USABLE = 0.9  # share of a device's memory that a run may fill


@dataclass(frozen=True)
class Size:
    """Numbers of a model: weights (tied ones once), those of its largest layer, and those outside its layers."""

    weights: int
    largest_layer: int
    outside: int
    linear: dict[str, int]  # LoRA weights of rank 1 by name of the layer


@cache
def size_of(model: str, trust_remote_code: bool = False) -> Size:
    """Count a model's weights without loading them.

    Raises:
        UserError: its config cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source_of(model), trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model: cannot read the config of '{model}' ({str(error).strip().splitlines()[0]})") from error
    network.tie_weights()
    names = set(network._no_split_modules or ())
    layers = [module for module in network.modules() if type(module).__name__ in names]
    sizes = [sum(value.numel() for value in layer.parameters()) for layer in layers]
    total = sum(value.numel() for value in network.parameters())
    head = network.get_output_embeddings()
    linear: dict[str, int] = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            last = name.split(".")[-1]
            linear[last] = linear.get(last, 0) + module.in_features + module.out_features
    return Size(total, max(sizes, default=total), total - sum(sizes), linear)


def states(config: Config, gpus: int, sharded: bool) -> dict[str, float]:
    """Bytes on each GPU of what stays there during a run: weights, gradients, optimiser state and copies of models."""
    from stepcredit.build import build_credit
    from stepcredit.credit import needs_of

    size = size_of(config.model, config.trust_remote_code)
    rank, targets = config.lora.rank, config.lora.targets
    adapters = rank * sum(count for name, count in size.linear.items() if not targets or name in targets)
    learning = adapters or size.weights
    parts = gpus if sharded else 1
    here = 0 if config.distributed.cpu_offload else 1
    columns = needs_of(build_credit(config.credit)[0]).columns
    prm = "prm_logprobs" in columns
    reference = config.objective.kl.coef != 0 or "ref_logprobs" in columns or prm
    found = {
        "policy: weights, fp32": 4 * (size.weights + adapters) / parts * here,
        "policy: gradients, fp32": 4 * learning / parts * here,
        "policy: AdamW": 8 * learning / parts * here,
    }
    if reference and not (prm and config.prm.reference == "policy") and not (adapters and not config.prm.model):
        found["reference: weights, fp32"] = 4 * size.weights / parts * here
    if prm:
        theirs = size_of(config.prm.model, config.trust_remote_code).weights if config.prm.model else size.weights
        shared = adapters and not sharded and not config.prm.model
        found["reward model: weights, fp32"] = 4 * ((0 if shared else theirs) + adapters) / parts * here
        found["reward model: gradients, AdamW"] = 12 * (adapters or theirs) / parts * here
    if sharded:
        found["sampler: a whole copy, bf16"] = 2 * (size.weights + adapters)
    return found


def fits_whole(config: Config, device: torch.device) -> bool:
    """Whether a copy of every model, its gradients and optimiser state leave half of the device to activations."""
    if device.type != "cuda":
        return True
    free = torch.cuda.get_device_properties(device).total_memory
    return sum(states(config, 1, sharded=False).values()) < free / 2
