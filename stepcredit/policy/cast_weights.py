"""Copies of the weights of linear layers in the type that autocast computes in.

Autocast casts weights in every call, or keeps copies until its context ends. A CUDA graph reads the same memory in
every replay, also in later contexts, so it needs copies that stay; they are filled anew for every call of `sample`.
The arithmetic is that of autocast: everything that autocast leaves in fp32 stays so.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from stepcredit.policy.forward import Policy


class CastWeights:
    """Memory: the bytes of the linear layers' weights in autocast's type; none without autocast."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.copies: dict[tuple[nn.Module, str], nn.Parameter] = {}
        if policy.autocast is not None:
            for layer in policy.model.modules():
                for name, weight in layer._parameters.items() if isinstance(layer, nn.Linear) else ():
                    if weight is not None and weight.dtype == torch.float32:
                        copy = torch.empty_like(weight, dtype=policy.autocast, requires_grad=False)
                        self.copies[layer, name] = nn.Parameter(copy, requires_grad=False)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The layers compute with fresh copies, and autocast keeps none."""
        originals = {place: place[0]._parameters[place[1]] for place in self.copies}
        if self.copies:
            copies: list[Tensor] = list(self.copies.values())
            torch._foreach_copy_(copies, [weight.detach() for weight in originals.values() if weight is not None])
        kind, dtype = self.policy.device.type, self.policy.autocast
        try:
            for (layer, name), copy in self.copies.items():
                layer._parameters[name] = copy
            with torch.autocast(kind, dtype, cache_enabled=False) if dtype is not None else nullcontext():
                yield
        finally:
            for (layer, name), weight in originals.items():
                layer._parameters[name] = weight

    def addresses(self) -> tuple[int, ...]:
        """Where the weights that are in use lie."""
        return tuple(weight.data_ptr() for weight in self.policy.parameters())
