"""Weights that the main process alone has read, on their way to the others, tensor by tensor.

A model that will be sharded is whole in the main process alone, in the memory of its CPU. The others have it without
weights (on the meta device) until it is sharded. So a process never holds more than its shards and one layer, whatever
the size of the model, and only the main process's machine needs room for all of it.
"""

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from stepcredit.policy.forward import Policy
from stepcredit.processes.ranks import Ranks


def shared_copy(policy: Policy) -> Policy:
    """A policy with modules and parameters of its own, whose weights are the same memory until they are replaced."""
    own = {id(value): nn.Parameter(value.detach(), value.requires_grad) for value in policy.parameters()}
    return copy.deepcopy(policy, dict(own))


@torch.no_grad()
def spread(module: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Put what a module has on a device, as the main process has it: weights, buffers and other tensors.

    What is sharded already is left alone, what is tied stays so. All processes call this; in the others than the main
    one the tensors may have no values.
    """
    made: dict[int, Tensor] = {}
    for held, name, value in list(_tensors(module)):
        if id(value) not in made:
            known = ranks.main or ranks.size == 1
            whole = value.detach().to(device) if known else torch.empty_like(value, device=device)
            whole = from_main(whole.contiguous(), ranks)
            is_weight = isinstance(value, nn.Parameter)
            made[id(value)] = nn.Parameter(whole, value.requires_grad) if is_weight else whole
        held[name] = made[id(value)]


def _tensors(module: nn.Module) -> Iterator[tuple[MutableMapping[str, Any], str, Tensor]]:
    """All tensors of a module that are not sharded: where it stands, its name there, and the tensor."""
    for part in module.modules():
        for held in (part._parameters, part._buffers, vars(part)):
            for name, value in held.items():
                if isinstance(value, Tensor) and not isinstance(value, DTensor):
                    yield held, name, value


def from_main(whole: Tensor, ranks: Ranks) -> Tensor:
    """A tensor filled with what the main process has in it; all processes call this."""
    if ranks.size > 1:
        with ranks.name_missing():
            dist.broadcast(whole, 0)
    return whole


@torch.no_grad()
def load_from_main(policy: Policy, state: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Load a model's state, which the main process alone has, into shards; all processes call this."""
    seen: set[int] = set()
    for name, value in policy.model.state_dict(keep_vars=True).items():
        if id(value) in seen:  # tied
            continue
        seen.add(id(value))
        whole = torch.empty(value.shape, dtype=value.dtype, device=policy.device)
        if ranks.main:
            whole.copy_(state[name])
        copy_into(value, from_main(whole, ranks))


def copy_into(value: Tensor, full: Tensor) -> None:
    """Copy a full tensor into one that may be sharded, without communication."""
    if isinstance(value, DTensor):
        on_device = full.to(value.device, value.dtype)
        full = distribute_tensor(on_device, value.device_mesh, value.placements, src_data_rank=None)
    value.copy_(full)
