"""The policy gradients that credit functions make of the same completions, against that of Monte-Carlo advantages."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor, nn

from stepcredit.forest import Forest
from stepcredit.policy.batching import with_source
from stepcredit.policy.forward import Policy
from stepcredit.report.agreement import RESAMPLES, Array, Number, interval

SIZE = 16_381  # numbers that stand for a gradient: inner products come out to about 1%. A prime, no layer's width
COLUMN = "audit/"


@dataclass(frozen=True)
class GradientFit:
    """
    Attributes:
        cosine: with the gradient of the Monte-Carlo advantages, both of all completions together.
        noise: variance of the gradient of one problem over the square of the mean gradient's norm; None where the
            gradient is 0 or there is one problem.
    """

    cosine: Number
    noise: float | None


class Sketch:
    """A gradient as `SIZE` numbers whose inner products are, on average over signs, those of the gradients.

    Every entry is added to one of the numbers with a sign by chance (a count sketch), the same for all gradients.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.signs = [torch.randint(2, one.shape, generator=generator, dtype=torch.int8) for one in parameters]

    def of(self, gradients: Iterable[Tensor | None]) -> Tensor:
        """[SIZE] fp64, of a gradient for each parameter; None is 0."""
        total, place = torch.zeros(SIZE, dtype=torch.float64), 0
        for gradient, sign in zip(gradients, self.signs, strict=True):
            if gradient is not None:
                signed = torch.where(sign.to(gradient.device) > 0, gradient, -gradient).float().flatten()
                rest = -(place + len(signed)) % SIZE
                filled = torch.nn.functional.pad(signed, (place, rest)).view(-1, SIZE)
                total += filled.sum(0, dtype=torch.float64).cpu()
            place = (place + sign.numel()) % SIZE
        return total


def gradients(
    policy: Policy, forest: Forest, credits: Mapping[str, Tensor], temperature: float, max_tokens: int
) -> dict[str, Array]:
    """[trees, SIZE] for each credit: the sketch of the gradient of sum A_t log pi_t over each tree.

    Trees without any credit are left out.

    Args:
        credits: [num_tokens] each; 0 for tokens that do not count.
    """
    parameters = [one for one in policy.model.parameters() if one.requires_grad]
    sketch = Sketch(parameters)
    forest = forest.with_token(**{COLUMN + name: values.float() for name, values in credits.items()})
    counted = sum(values.abs() for values in credits.values())
    trees = forest.token_tree[torch.as_tensor(counted) > 0].unique()
    rows: dict[str, list[Tensor]] = {name: [] for name in credits}
    for tree in trees:
        one = with_source(forest.select_trees(tree[None]))
        sums = {name: torch.zeros(SIZE, dtype=torch.float64) for name in credits}
        for part in policy.parts(one, max_tokens):
            logprobs = policy(part, temperature).logprobs
            for name in credits:
                weights = part.token[COLUMN + name] * part.token.get("owned", torch.ones(part.num_tokens))
                if bool(weights.any()):
                    value = (weights.to(logprobs.device) * logprobs).sum()
                    sums[name] += sketch.of(
                        torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
                    )
        for name, row in sums.items():
            rows[name].append(row)
    return {name: torch.stack(own).numpy() if own else numpy.zeros((0, SIZE)) for name, own in rows.items()}


def fit(own: Array, truth: Array) -> GradientFit:
    """Of [trees, SIZE] gradients by a credit and by the Monte-Carlo advantages; the interval is over trees."""
    count = len(own)
    if not count:
        return GradientFit(Number(None), None)
    products = own @ truth.T, own @ own.T, truth @ truth.T
    everything = numpy.ones((1, count))
    value = _cosines(everything, *products)
    if not len(value):
        return GradientFit(Number(None), None)
    draws = numpy.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    times = numpy.stack([numpy.bincount(row, minlength=count) for row in draws]).astype(float)
    bounds = interval(_cosines(times, *products)) if count > 1 else (None, None)
    mean = float(products[1].sum()) / count**2
    spread = (float(numpy.trace(products[1])) - count * mean) / (count - 1) if count > 1 else math.nan
    return GradientFit(Number(float(value[0]), *bounds), spread / mean if count > 1 else None)


def _cosines(times: Array, across: Array, own: Array, truth: Array) -> Array:
    """[n] cosines of sums in which each tree stands as often as a row of `times` says; where neither sum is 0."""
    inner, one, two = (((times @ table) * times).sum(1) for table in (across, own, truth))
    there = (one > 0) & (two > 0)
    found: Array = inner[there] / numpy.sqrt(one[there] * two[there])
    return found
