"""What a value head says and how it learns: squares, success probability, or bins of values."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from stepcredit.estimators.options import CriticOptions


@dataclass(frozen=True)
class ValueForm:
    """
    Attributes:
        kind: what the numbers are; heads of another kind say something else.
        outputs: numbers that the head gives for a state.
        range: least and largest target that it can learn.
        bounded: a target beyond is an error, not moved to the nearest one.
        decode: outputs [n] or [n, outputs] to values [n].
        loss: of outputs, targets [n] and the values [n] before the batch, to [n].
    """

    kind: str
    outputs: int
    range: tuple[float, float]
    bounded: bool
    decode: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]


def squares(clip: float = 0.0) -> ValueForm:
    """(V - R)^2 / 2, or with a clip c max((V - R)^2, (V_old + clamp(V - V_old, -c, c) - R)^2) / 2.

    The clip is that of OpenAI's baselines, TRL (0.2) and verl (0.5); the papers of PPO and GAE have none.
    """

    def loss(value: Tensor, target: Tensor, old: Tensor) -> Tensor:
        error = (value - target).square()
        if clip:
            error = torch.maximum(error, (old + (value - old).clamp(-clip, clip) - target).square())
        return error / 2

    return ValueForm("value", 1, (-math.inf, math.inf), False, lambda value: value, loss)


def success_probability() -> ValueForm:
    """V = sigmoid(z) and the cross-entropy -R log V - (1 - R) log(1 - V); targets lie in [0, 1]."""

    def loss(logit: Tensor, target: Tensor, old: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(logit, target, reduction="none")

    return ValueForm("logit of success", 1, (0.0, 1.0), True, torch.sigmoid, loss)


def gaussian_bins(low: float, high: float, num_bins: int, sigma: float) -> ValueForm:
    """HL-Gauss (arXiv 2403.03950): cross-entropy with a normal distribution around R, cut into bins of [low, high].

    Bin i has the share of N(R, (sigma w)^2) between its edges, w the width of a bin, out of what lies in [low, high];
    V is the mean of the centres under softmax(z). Targets outside are moved to the nearest end.
    """
    edges = torch.linspace(low, high, num_bins + 1, dtype=torch.float64)
    centres, scale = (edges[1:] + edges[:-1]) / 2, math.sqrt(2) * sigma * (high - low) / num_bins

    def decode(logits: Tensor) -> Tensor:
        return logits.softmax(-1) @ centres.to(logits)

    def loss(logits: Tensor, target: Tensor, old: Tensor) -> Tensor:
        middle = target.double().clamp(low, high)[:, None]
        below = torch.erf((edges.to(middle) - middle) / scale)
        shares = below.diff(dim=-1) / (below[:, -1:] - below[:, :1])
        return -(shares.to(logits) * logits.log_softmax(-1)).sum(-1)

    kind = f"logits of {num_bins} bins from {low:g} to {high:g}"
    return ValueForm(kind, num_bins, (low, high), False, decode, loss)


def value_form(options: CriticOptions) -> ValueForm:
    """The form that the options ask for."""
    if options.loss == "bce":
        return success_probability()
    if options.loss == "hl_gauss":
        return gaussian_bins(options.low, options.high, options.num_bins, options.sigma)
    return squares(options.clip)
