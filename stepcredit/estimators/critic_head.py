"""A head that learns on the states of a policy, which it leaves as they are."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from stepcredit.forest import Forest
from stepcredit.learn.options import AdamWOptions
from stepcredit.learn.placement import Placement
from stepcredit.learn.replicas import sum_gradients
from stepcredit.policy.forward import STATES, Policy
from stepcredit.policy.heads import new_head

T = TypeVar("T")


class HeadLearner:
    """Does for a head what `Learner` does for a model. Every process has the whole head, also of a sharded policy.

    Args:
        policy: whose states the head reads, without gradient; it may be placed later.
        outputs: numbers for each state.
        max_tokens: token positions of a part at most.
    """

    def __init__(
        self, policy: Policy, outputs: int, placement: Placement, options: AdamWOptions, max_tokens: int
    ) -> None:
        self.policy, self.placement, self.max_tokens = policy, placement, max_tokens
        self.head = new_head(policy, outputs).requires_grad_(True)
        self.grad_clip = options.grad_clip
        self.trained = list(self.head.parameters())
        weight, bias = self.head.linear.weight, self.head.linear.bias
        groups: list[dict[str, Any]] = [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=options.learning_rate, betas=options.betas, weight_decay=options.weight_decay
        )

    def outputs(self, part: Forest, head: str) -> Tensor:
        """What the head says of each token of a part; 0 where there is nothing to say."""
        with torch.no_grad():
            states = self.policy(part, head=STATES)
        wanted = part.token_sampled & part.token["owned"] if "owned" in part.token else part.token_sampled
        found: Tensor = self.head(states)
        wanted = wanted.to(found.device)
        return torch.where(wanted if found.ndim == 1 else wanted[:, None], found, 0.0)

    def accumulate(
        self, step: Forest, loss: Callable[[Forest, Callable[..., Tensor]], tuple[Tensor, T]]
    ) -> tuple[list[Forest], list[T]]:
        """Add up the gradient of a step, part by part, over all processes.

        Args:
            loss: of a part, to be summed over all parts of all processes, with whatever else is to be returned.

        Returns:
            This process's parts, and what `loss` returned for each.
        """
        parts, results = self.policy.parts(step, self.max_tokens), []
        with self.placement.ranks.name_missing():
            for part in parts:
                value, result = loss(part, self.outputs)
                value.backward()
                results.append(result)
        if self.placement.ranks.size > 1:
            sum_gradients(self.trained, self.placement.ranks)
        return parts, results

    def step(self, loss_is_valid: bool = True) -> tuple[float, bool]:
        """Clip and step, unless the gradient is not finite or `loss_is_valid` is False, and clear the gradient.

        Returns:
            The norm before clipping, and whether the step was taken.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, self.grad_clip))
        taken = loss_is_valid and math.isfinite(norm)
        if taken:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, taken

    def state_dict(self) -> dict[str, Any]:
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()["state"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; options of the optimiser stay those that were given."""
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]})
