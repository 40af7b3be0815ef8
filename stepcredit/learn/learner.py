"""A model that learns: gradients over the parts of a step and over the processes, and AdamW."""

import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.ops import TokenScores, out_of_memory
from stepcredit.learn.options import AdamWOptions
from stepcredit.learn.placement import Placement, full_tensor
from stepcredit.learn.replicas import share_weights, sum_gradients
from stepcredit.policy.forward import Policy

log = logging.getLogger("stepcredit")

NOT_DECAYING = re.compile(r"bias|layernorm|rmsnorm|(^|[._])norm(\.|$)")  # names, as in the Trainer of transformers

T = TypeVar("T")

FUSED = {"cuda"}  # kinds of devices on which AdamW is one kernel for many weights

ScoreFunction = Callable[..., TokenScores]  # the policy as it is called in a training pass


class Learner:
    """
    Args:
        policy: trained in place; placed by `placement` already.
        options: of AdamW.
        max_tokens: token positions of a micro-batch at most; halved when out of memory.
        where: added to messages about it, such as " in the process reward model".
    """

    def __init__(
        self,
        policy: Policy,
        placement: Placement,
        options: AdamWOptions,
        max_tokens: int,
        where: str = "",
    ) -> None:
        self.policy, self.placement, self.grad_clip = policy, placement, options.grad_clip
        self.max_tokens, self.where = max_tokens, where
        self.trained = [value for value in policy.parameters() if value.requires_grad]
        if placement.replicated:
            share_weights(policy, placement.ranks)
        self.fused = self.trained[0].device.type in FUSED
        self.optimizer = torch.optim.AdamW(
            parameter_groups(policy),
            lr=options.learning_rate,
            betas=options.betas,
            weight_decay=options.weight_decay,
            fused=True if self.fused else None,
        )

    def accumulate(
        self,
        step: Forest,
        loss: Callable[[Forest, ScoreFunction], tuple[Tensor, T]],
        whole_trees: bool = False,
        beside: tuple[Forest, Callable[[Forest, ScoreFunction], tuple[Tensor, Any]]] | None = None,
    ) -> tuple[list[Forest], list[T]]:
        """Add up the gradient of a step, part by part.

        When out of memory, in whichever process, `max_tokens` is halved for good in all and the step begins again: how
        a step is split changes nothing else. In shards the run ends, because in every layer the others wait for this
        process.

        Args:
            loss: of a part, to be summed over all parts of all processes, with whatever else is to be returned.
            whole_trees: the loss must see all of a tree at once.
            beside: another forest with a loss of its own, whose gradient is added.

        Returns:
            This process's parts, and what `loss` returned for each; behind it what that of `beside` did.
        """
        while True:
            parts = self.policy.parts(step, self.max_tokens, whole_trees)
            passes = [(part, loss) for part in parts]
            if beside is not None:
                passes += [(part, beside[1]) for part in self.policy.parts(beside[0], self.max_tokens)]
            results = self._passes(passes)
            own = self._smaller([part for part, _ in passes], whole_trees) if results is None else None
            asked = [own] if self.placement.sharded else self.placement.ranks.gather(own)
            smaller = min((size for size in asked if size is not None), default=None)
            if results is not None and smaller is None:
                if self.placement.replicated:
                    sum_gradients(self.trained, self.placement.ranks)
                return parts, results
            assert smaller is not None
            self._check_cut(smaller, whole_trees)
            self.optimizer.zero_grad()
            results, self.max_tokens = None, smaller
            log.warning(
                "out of memory%s: micro-batches have at most %d tokens from now on", self.where, self.max_tokens
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _passes(
        self, passes: Sequence[tuple[Forest, Callable[[Forest, ScoreFunction], tuple[Tensor, T]]]]
    ) -> list[T] | None:
        """A forward and backward for each part; None when out of memory. In shards every process has as many parts."""
        results, ranks = [], self.placement.ranks
        scale = ranks.size if self.placement.sharded else 1  # FSDP2 takes the mean over processes
        try:
            for part, loss in passes:
                with ranks.name_missing():
                    value, result = loss(part, self.policy)
                    (value * scale).backward()
                results.append(result)
        except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is a RuntimeError
            if not out_of_memory(error):
                raise
            return None
        return results

    def _smaller(self, parts: Sequence[Forest], whole_trees: bool = False) -> int:
        """The budget to try when these parts were too large; 0: they cannot be cut."""
        if all((part.num_trees if whole_trees else int(part.ends.sum())) == 1 for part in parts):
            return 0
        return max(1, min(self.max_tokens, max(map(self.policy.num_positions, parts))) // 2)

    def _check_cut(self, smaller: int, whole_trees: bool) -> None:
        """Refuse to go on where a step cannot be cut smaller, and in shards, where all wait for each in every layer."""
        if not smaller:
            what = "tree" if whole_trees else "completion"
            raise UserError(
                f"out of memory{self.where} with a single {what} in a micro-batch; set --train.gradient-checkpointing "
                "true, lower --sampler.max-new-tokens or --task.max-prompt-tokens, or take a smaller model"
            )
        if self.placement.sharded and self.placement.ranks.size > 1:
            raise UserError(
                f"out of memory{self.where} with {self.max_tokens} tokens in a micro-batch; continue with --resume auto"
                f" --optim.max-tokens-per-micro-batch {smaller}, or set --train.gradient-checkpointing true "
                "('stepcredit plan' estimates what fits)"
            )

    def step(self, loss_is_valid: bool = True) -> tuple[float, bool]:
        """Clip and step, unless the gradient is not finite or `loss_is_valid` is False, and clear the gradient.

        Returns:
            The norm before clipping, and whether the step was taken.
        """
        norm = float(full_tensor(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.grad_clip)))
        taken = loss_is_valid and math.isfinite(norm)
        if taken:  # otherwise the step would destroy the weights
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, taken

    def set(self, **options: Any) -> None:
        """Change options of the optimiser, such as `lr`; `weight_decay` stays 0 for what does not decay."""
        for group in self.optimizer.param_groups:
            group.update(options if group["decays"] else {**options, "weight_decay": 0.0})

    def tensors(self, fill: bool = False) -> dict[str, Tensor]:
        """The optimiser's state by the name of the weight; empty before its first step.

        Args:
            fill: add zeros for weights without a state yet, to be loaded into.
        """
        tensors: dict[str, Tensor] = {}
        for name, value in self.policy.named_parameters():
            if not value.requires_grad:
                continue
            if fill and value not in self.optimizer.state:
                self.optimizer.state[value] = {
                    "step": torch.zeros((), device=value.device if self.fused else "cpu"),
                    "exp_avg": torch.zeros_like(value),
                    "exp_avg_sq": torch.zeros_like(value),
                }
            tensors |= {f"{name}.{kind}": tensor for kind, tensor in self.optimizer.state.get(value, {}).items()}
        return tensors


def parameter_groups(policy: Policy) -> list[dict[str, Any]]:
    """What is trained, for AdamW: first what decays, then norms, biases and other vectors, which do not.

    The same as the Trainer of transformers does. A group without parameters is left out.
    """
    trained = [(name, value) for name, value in policy.named_parameters() if value.requires_grad]
    decaying = [value for name, value in trained if decays(name, value)]
    others = [value for name, value in trained if not decays(name, value)]
    groups = [{"params": decaying, "decays": True}, {"params": others, "decays": False, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def decays(name: str, value: Tensor) -> bool:
    """Whether weight decay acts on a parameter: on matrices, embeddings among them, outside norms and biases."""
    return value.ndim >= 2 and not NOT_DECAYING.search(name.lower())
