"""How models lie on the processes: a copy on each, whose gradients DDP adds up, or in shards (FSDP2)."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from stepcredit.errors import UserError
from stepcredit.policy.forward import Policy
from stepcredit.processes.ranks import SINGLE_PROCESS, Ranks

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """
    Attributes:
        strategy: "ddp" or "fsdp"; alone there is nothing to place.
        cpu_offload: shards, gradients and optimiser state stay in the memory of the CPU (FSDP2 only).
        device: on which models compute.
    """

    ranks: Ranks = SINGLE_PROCESS
    strategy: Literal["ddp", "fsdp"] = "ddp"
    cpu_offload: bool = False
    device: torch.device = CPU

    @property
    def sharded(self) -> bool:
        return self.ranks.distributed and self.strategy == "fsdp"

    def place(self, policy: Policy) -> Policy:
        """Put a policy where it lies during the run, in place; with shards it is sharded layer by layer.

        What copies it must have come before.
        """
        policy.ranks = self.ranks
        if not self.sharded:
            return policy
        mesh = dist.init_device_mesh(self.device.type, (self.ranks.size,))
        precision = MixedPrecisionPolicy(param_dtype=policy.autocast, reduce_dtype=torch.float32)
        away = self.cpu_offload and self.device.type != "cpu"
        offload = CPUOffloadPolicy() if away else OffloadPolicy()
        for layer in layers(policy):
            fully_shard(layer, mesh=mesh, mp_policy=precision, offload_policy=offload)
        # Resharded after each pass, so that weights are never those of before an update.
        fully_shard(policy, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=True)
        policy.home = self.device
        return policy

    def sampling_copy(self, policy: Policy) -> Policy:
        """The policy to sample with: itself, or, of one that is to be sharded, a whole one on each process.

        Decoding takes other numbers of steps on each process, so it cannot call modules that wait for each other.
        """
        if not self.sharded:
            return policy
        whole = copy.deepcopy(policy).requires_grad_(False)
        return whole.to(self.device, policy.autocast) if policy.autocast else whole.to(self.device)

    def callable(self, policy: Policy) -> Callable[..., Any]:
        """What a training pass calls in place of the policy, so that gradients are summed over the processes."""
        if self.ranks.size == 1 or self.sharded:
            return policy
        return DistributedDataParallel(policy, find_unused_parameters=_sparse(policy))


WHOLE = Placement()


def layers(policy: Policy) -> list[nn.Module]:
    """The decoder layers, as the model names what must not be split."""
    names = set(policy.model._no_split_modules or ())
    found = [module for module in policy.model.modules() if type(module).__name__ in names]
    if not found:
        raise UserError(
            f"distributed.strategy: {type(policy.model).__name__} does not name its layers, so it cannot be sharded; "
            "take --distributed.strategy ddp"
        )
    return found


def _sparse(policy: Policy) -> bool:
    """Whether a pass may leave weights out: those of experts that no token chose."""
    return any("expert" in name for name, _ in policy.named_parameters())


def whole(value: Tensor) -> Tensor:
    """All of a tensor that may be sharded; all processes call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def full_state(policy: Policy, keep: bool = True) -> dict[str, Tensor]:
    """The model's state on the CPU, gathered tensor by tensor; tied ones stay one. All processes call this.

    Of a model with adapters these alone.

    Args:
        keep: of which only those with this get it.
    """
    found: dict[str, Tensor] = {}
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    adapted = getattr(policy.model, "_hf_peft_config_loaded", False)
    for name, value in policy.model.state_dict().items():
        if adapted and "lora_" not in name:
            continue
        local = value.to_local() if isinstance(value, DTensor) else value
        key = (local.data_ptr(), tuple(value.shape))
        tied = seen.setdefault(key, name) if local.numel() else name
        if tied != name:
            if keep:
                found[name] = found[tied]
            continue
        full = whole(value)
        if keep:
            found[name] = full.cpu()
    return found


def heads_state(policy: Policy) -> dict[str, Tensor]:
    """The state of a policy's further heads on the CPU, gathered. All processes call this."""
    return {name: whole(value).cpu() for name, value in policy.heads.state_dict().items()}


@torch.no_grad()
def put_state(policy: Policy, state: Mapping[str, Tensor]) -> None:
    """Write whole tensors, which every process has, into a model that may be sharded."""
    for name, value in policy.model.state_dict(keep_vars=True).items():
        if name in state:
            copy_into(value, state[name])


@torch.no_grad()
def put_heads(policy: Policy, state: Mapping[str, Tensor]) -> None:
    """Write the heads' weights, which every process has, into a policy that has these heads."""
    for name, value in policy.heads.state_dict(keep_vars=True).items():
        copy_into(value, state[name])


def copy_into(value: Tensor, full: Tensor) -> None:
    """Write a whole tensor into one that may be a shard, without asking other processes."""
    if isinstance(value, DTensor):
        given = full.to(value.device, value.dtype)
        full = distribute_tensor(given, value.device_mesh, value.placements, src_data_rank=None)
    value.copy_(full)


@torch.no_grad()
def copy_weights(source: Policy, target: Policy) -> None:
    """Bring a whole policy up to date with a sharded one; all processes call this. Frozen weights never change."""
    theirs = dict(target.model.named_parameters())
    for name, value in source.model.named_parameters():
        if value.requires_grad:
            theirs[name].copy_(whole(value.detach()))
