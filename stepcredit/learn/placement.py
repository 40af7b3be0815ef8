"""How models lie on the processes: a copy on each (`replicas`), or in shards (FSDP2)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from stepcredit.errors import UserError
from stepcredit.learn.spread import copy_into, shared_copy, spread
from stepcredit.policy.forward import Policy
from stepcredit.policy.precision import hold_in
from stepcredit.processes.ranks import SINGLE_PROCESS, Ranks

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """
    Attributes:
        strategy: "ddp" or "fsdp"; without effect in a single process.
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

    @property
    def replicated(self) -> bool:
        """Whether several processes have a whole model each."""
        return self.ranks.size > 1 and not self.sharded

    def place(self, policy: Policy) -> Policy:
        """Prepare a policy for the run, in place; with "fsdp" it is sharded layer by layer.

        The weights are those of the main process (`spread.py`). Copies of the policy must be made before.
        """
        policy.ranks = self.ranks
        if not self.sharded:
            return policy
        mesh = dist.init_device_mesh(self.device.type, (self.ranks.size,))
        precision = MixedPrecisionPolicy(param_dtype=policy.autocast, reduce_dtype=torch.float32)
        offloads = self.cpu_offload and self.device.type != "cpu"
        offload = CPUOffloadPolicy() if offloads else OffloadPolicy()
        for layer in decoder_layers(policy):
            spread(layer, self.ranks, self.device)
            fully_shard(layer, mesh=mesh, mp_policy=precision, offload_policy=offload)
        # Resharded after each forward, so that gathered weights are never older than the last update.
        spread(policy, self.ranks, self.device)
        fully_shard(policy, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=True)
        policy.compute_device = self.device
        return policy

    def sampling_copy(self, policy: Policy) -> Policy:
        """The policy to sample with: itself, or an unsharded copy on each process if it will be sharded.

        Decoding takes a different number of steps on each process, so it cannot call modules that wait for each other.
        """
        if not self.sharded:
            return policy
        unsharded = shared_copy(policy).requires_grad_(False)
        if policy.autocast is not None:
            hold_in(unsharded.model, policy.autocast, self.device if self.ranks.main else None)
        spread(unsharded, self.ranks, self.device)
        return unsharded


UNSHARDED = Placement()


def decoder_layers(policy: Policy) -> list[nn.Module]:
    """The decoder layers: the modules that the model says must not be split."""
    names = set(policy.model._no_split_modules or ())
    layers = [module for module in policy.model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(
            f"distributed.strategy: {type(policy.model).__name__} does not name its layers, so it cannot be sharded; "
            "take --distributed.strategy ddp"
        )
    return layers


def full_tensor(value: Tensor) -> Tensor:
    """The full tensor of one that may be sharded; all processes call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def full_state(
    policy: Policy,
    collect: bool = True,
    on_host: bool = True,
    types: Callable[[str, Tensor], torch.dtype] | None = None,
) -> dict[str, Tensor]:
    """The model's state, gathered tensor by tensor; tied weights stay one tensor. All processes call this.

    For a model with adapters only the adapters' state.

    Args:
        collect: False: take part in the gathering, but return an empty state.
        on_host: in the memory of the CPU; False: what is not sharded stays the policy's own tensors.
        types: in which a tensor is wanted, by name; it is cast before it is gathered, in all processes alike.
    """
    state: dict[str, Tensor] = {}
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    adapted = getattr(policy.model, "_hf_peft_config_loaded", False)
    for name, value in policy.model.state_dict().items():
        if adapted and "lora_" not in name:
            continue
        sharded = isinstance(value, DTensor)
        local = value.to_local() if isinstance(value, DTensor) else value
        key = (local.data_ptr(), tuple(value.shape))
        tied = seen.setdefault(key, name) if local.numel() else name
        if tied != name:
            if collect:
                state[name] = state[tied]
            continue
        full = full_tensor(value.to(types(name, value)) if types else value)
        if collect:
            state[name] = full.cpu() if on_host or sharded else full
    return state


def full_heads_state(policy: Policy) -> dict[str, Tensor]:
    """The state of a policy's heads on the CPU, gathered. All processes call this."""
    return {name: full_tensor(value).cpu() for name, value in policy.heads.state_dict().items()}


@torch.no_grad()
def load_full_state(policy: Policy, state: Mapping[str, Tensor]) -> None:
    """Load full tensors, which every process has, into a model that may be sharded."""
    for name, value in policy.model.state_dict(keep_vars=True).items():
        if name in state:
            copy_into(value, state[name])


@torch.no_grad()
def load_full_heads(policy: Policy, state: Mapping[str, Tensor]) -> None:
    """Load the heads' full weights, which every process has, into a policy that has these heads."""
    for name, value in policy.heads.state_dict(keep_vars=True).items():
        copy_into(value, state[name])


@torch.no_grad()
def copy_weights(source: Policy, target: Policy) -> None:
    """Copy a sharded policy's trained weights into an unsharded one; all processes call this."""
    copies = dict(target.model.named_parameters())
    for name, value in source.model.named_parameters():
        if value.requires_grad:
            copies[name].copy_(full_tensor(value.detach()))
