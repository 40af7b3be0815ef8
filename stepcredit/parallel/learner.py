"""A model that learns: gradients over the parts of a step and over the processes, and AdamW."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from stepcredit.forest import Forest
from stepcredit.ops import TokenScores
from stepcredit.parallel.spread import Spread, whole
from stepcredit.policy.forward import Policy

T = TypeVar("T")

Call = Callable[..., TokenScores]  # the policy, or what stands for it in a training pass


class Learner:
    """
    Args:
        policy: trained in place; placed by `spread` already.
        grad_clip: largest norm of the gradient.
    """

    def __init__(
        self,
        policy: Policy,
        spread: Spread,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        grad_clip: float,
    ) -> None:
        self.policy, self.spread, self.grad_clip = policy, spread, grad_clip
        self.call = spread.callable(policy)
        trained = [value for value in policy.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def accumulate(self, parts: Sequence[Forest], loss: Callable[[Forest, Call], tuple[Tensor, T]]) -> list[T]:
        """Add up the gradient of a step.

        Args:
            parts: of this process; as many as every other process has.
            loss: of a part, to be summed over all parts of all processes, with whatever else is to be returned.
        """
        found, ranks = [], self.spread.ranks
        for number, part in enumerate(parts, 1):
            alone = isinstance(self.call, DistributedDataParallel) and number < len(parts)
            with ranks.named(), self.call.no_sync() if alone else nullcontext():  # type: ignore[attr-defined]
                value, result = loss(part, self.call)
                (value * ranks.size).backward()  # DDP and FSDP2 take the mean over processes
            found.append(result)
        return found

    def step(self, sound: bool = True) -> tuple[float, bool]:
        """Clip and step, unless the gradient is not finite or `sound` is False, and forget the gradient.

        Returns:
            The norm before clipping, and whether the step was taken.
        """
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.grad_clip)))
        taken = sound and math.isfinite(norm)
        if taken:  # otherwise the step would destroy the weights
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, taken

    def set(self, **options: Any) -> None:
        """Change options of the optimiser, such as `lr`."""
        for group in self.optimizer.param_groups:
            group.update(options)

    def tensors(self, fill: bool = False) -> dict[str, Tensor]:
        """The optimiser's state by the name of the weight; empty before its first step.

        Args:
            fill: make what is not there yet, to be loaded into.
        """
        found: dict[str, Tensor] = {}
        for name, value in self.policy.named_parameters():
            if not value.requires_grad:
                continue
            if fill and value not in self.optimizer.state:
                self.optimizer.state[value] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(value),
                    "exp_avg_sq": torch.zeros_like(value),
                }
            found |= {f"{name}.{kind}": tensor for kind, tensor in self.optimizer.state.get(value, {}).items()}
        return found
