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
        beside = None if self.text is None else (self.text.next(), self.text.loss)
        parts, own = self.learner.accumulate(step, self._loss, self._whole_trees, beside)
        sums = self._of_all(own[: len(parts)])
        if beside is None:
            return sums, {}
        text: list[Any] = own[len(parts) :]
        total = sum(float(value) for value in text)
        return sums, {"ptx/loss": sum(self.learner.placement.ranks.gather(total))}

    @torch.no_grad()
    def measure(self, forest: Forest) -> dict[str, float]:
        """What the loss is on a forest that is not trained on: the metrics of `take` that come from it."""
        policy = self.learner.policy
        parts = policy.parts(self.weighted(forest), self.learner.max_tokens, self._whole_trees)
        with policy.ranks.name_missing():
            own = [self._loss(part, policy)[1] for part in parts]
        return step_metrics(self._of_all(own))

    @property
    def _whole_trees(self) -> bool:
        return self.objective.needs.unit == "tree"

    def _loss(self, part: Forest, call: ScoreFunction) -> tuple[Tensor, Sums]:
        """Of a part, with the policy as it is called."""
        weights = part.token["weights"] * part.token["owned"]
        owned = part.with_token(weights=weights, owned=weights != 0)
        scores = call(owned, self.temperature, self.objective.given.entropy_coef != 0)
        value, sums = self.objective.loss(scores, owned)
        sums.sums["optim/loss"] = value.detach()
        sums.sums["tokens/computed"] = float(self.learner.policy.num_positions(part))
        return value, sums

    def _of_all(self, own: Sequence[Sums]) -> list[Sums]:
        """The sums of the parts of all processes."""
        return [sums for each in self.learner.placement.ranks.gather(read_sums(own)) for sums in each]


def step_metrics(parts: Sequence[Sums]) -> dict[str, float]:
    """Of an optimiser step from its parts: the loss, computed tokens and what else adds up; means over tokens of the
    other sums."""
    count = sum(part.count for part in parts)
    added = {"optim/loss", "tokens/computed", *parts[0].added}
    metrics: dict[str, float] = {}
    for name in parts[0].sums:
        total = sum(float(part.sums[name]) for part in parts)
        metrics[name] = total if name in added else total / count
    return metrics | {name: max(float(part.largest[name]) for part in parts) for name in parts[0].largest}
