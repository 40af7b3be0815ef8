"""The optimiser steps of a batch: trees shuffled into minibatches, weights for each, and the gradient part by part."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stepcredit.forest import Forest
from stepcredit.learn.learner import Learner, ScoreFunction
from stepcredit.learn.options import OptimOptions
from stepcredit.learn.text import PretrainingText
from stepcredit.losses.objective import Objective, Sums, read_sums
from stepcredit.policy.batching import unshared_positions
from stepcredit.seeds import MINIBATCHES, generator, mixed


class PolicyUpdate:
    """
    Args:
        learner: of the policy.
        temperature: that the log-probabilities of the loss are of.
        seed: of the run.
        text: that each optimiser step learns beside the batch; None: none.
    """

    def __init__(
        self,
        learner: Learner,
        objective: Objective,
        given: OptimOptions,
        temperature: float,
        seed: int,
        text: PretrainingText | None = None,
    ) -> None:
        self.learner, self.objective, self.given = learner, objective, given
        self.temperature, self.seed, self.text = temperature, seed, text

    @property
    def shape(self) -> list[int]:
        """What decides how a batch becomes optimiser steps."""
        return [self.given.num_epochs, self.given.num_minibatches]

    def steps(self, forest: Forest, iteration: int) -> Iterator[Forest]:
        """The weighted forests of an iteration's optimiser steps; each epoch shuffles trees into minibatches."""
        given = self.given
        for epoch in range(given.num_epochs):
            if given.num_minibatches == 1:
                yield self.weighted(forest)
                continue
            shuffle = generator(mixed(self.seed, MINIBATCHES, iteration, epoch))
            order = torch.from_numpy(shuffle.permutation(forest.num_trees))
            for trees in order.tensor_split(given.num_minibatches):
                if len(trees):
                    yield self.weighted(forest.select_trees(trees))

    def weighted(self, forest: Forest) -> Forest:
        return forest.with_token(weights=self.objective.weights(forest))

    def take(self, step: Forest) -> dict[str, float]:
        """One optimiser step; one without gradient changes nothing. Its metrics are of all processes."""
        segments = torch.zeros(step.num_segments, dtype=torch.bool)
        segments[step.token["segment"][self.objective.has_gradient(step)]] = True
        if not bool(segments.any()):
            return {"optim/skipped": 1.0}
        whole, step = step, step.select(segments)
        by_node = self.objective.unit == "segment"
        unshared = unshared_positions(whole, segments) if by_node else unshared_positions(step)
        sums, text = self._accumulate(step)
        finite_loss = all(math.isfinite(float(row.sums["optim/loss"])) for row in sums)
        norm, finite = self.learner.step(finite_loss)
        flags = {"optim/grad_norm": norm, "optim/skipped": 0.0, "optim/nonfinite": float(not finite)}
        return step_metrics(sums) | flags | text | {"tokens/unshared": float(unshared)}

    def _accumulate(self, step: Forest) -> tuple[list[Sums], dict[str, float]]:
        """Add up the gradient of an optimiser step; the sums of its parts, those of all processes, and the metrics of
        the text."""
        policy, entropy_grad = self.learner.policy, self.objective.given.entropy_coef != 0

        def loss(part: Forest, call: ScoreFunction) -> tuple[Tensor, Sums]:
            weights = part.token["weights"] * part.token["owned"]
            owned = part.with_token(weights=weights, owned=weights != 0)
            scores = call(owned, self.temperature, entropy_grad)
            value, sums = self.objective.loss(scores, owned)
            sums.sums["optim/loss"] = value.detach()
            sums.sums["tokens/computed"] = float(policy.num_positions(part))
            return value, sums

        beside = None if self.text is None else (self.text.next(), self.text.loss)
        whole_trees, ranks = self.objective.needs.unit == "tree", self.learner.placement.ranks
        parts, own = self.learner.accumulate(step, loss, whole_trees, beside)
        sums = [sums for each in ranks.gather(read_sums(own[: len(parts)])) for sums in each]
        if beside is None:
            return sums, {}
        text: list[Any] = own[len(parts) :]
        return sums, {"ptx/loss": sum(ranks.gather(sum(float(value) for value in text)))}


def step_metrics(parts: Sequence[Sums]) -> dict[str, float]:
    """Of an optimiser step from its parts: the loss and computed tokens add up, other sums become means over tokens."""
    count = sum(part.count for part in parts)
    metrics: dict[str, float] = {}
    for name in parts[0].sums:
        total = sum(float(part.sums[name]) for part in parts)
        metrics[name] = total if name in ("optim/loss", "tokens/computed") else total / count
    return metrics | {name: max(float(part.largest[name]) for part in parts) for name in parts[0].largest}
