"""Whether a scoring form gives, in the types that training computes in, what the plain form gives.

`choose_scoring_form` compares forms in fp32. Training may compute in 16 bits, by another kernel, and goes backward. So
log-probabilities and gradients are compared in these types too. Where a model is loaded in the CPU's memory and will
compute elsewhere, only the kernel can be tried there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from stepcredit.forest import Forest
from stepcredit.policy.attention import ForestPlan, in_one_call
from stepcredit.policy.packing import Packing

if TYPE_CHECKING:
    from stepcredit.policy.forward import Policy, ScoringForm

FP32_LIMIT = 1e-2  # of the distance, relative to the size
HALF_LIMIT = 0.1  # where anything is computed in 16 bits; a kernel that is wrong differs by about 1
MORE_THAN_PLAIN = 3.0  # times the plain form's own error in 16 bits


class Scores(NamedTuple):
    """Log-probabilities [num_tokens] and gradients of some parameters, as one vector."""

    logprobs: Tensor
    gradients: Tensor


def difference_in_training(policy: "Policy", forest: Forest, form: "ScoringForm") -> str:
    """What of a form differs from the plain form more than rounding explains, in the types of training; "": nothing.

    In 16 bits the plain form has an error too, against itself in fp32; the form may have a few times that error.
    """
    autocast = policy.autocast
    dtype = autocast or next(policy.model.parameters()).dtype
    with _some_trainable(policy.model) as parameters:
        exact = plain = _scores(policy, forest, "plain", None, parameters)
        if autocast is not None:
            plain = _scores(policy, forest, "plain", autocast, parameters)
        scores = _scores(policy, forest, form, autocast, parameters)
    sizes = exact.logprobs - exact.logprobs.mean(), exact.gradients
    for name, found, usual, wanted, size in zip(Scores._fields, scores, plain, exact, sizes, strict=True):
        distance, own = (float((value - wanted).norm() / size.norm()) for value in (found, usual))
        limit = max(FP32_LIMIT if dtype == torch.float32 else HALF_LIMIT, MORE_THAN_PLAIN * own)
        if len(wanted) and not distance <= limit:  # not a number is a difference
            kind = str(dtype).removeprefix("torch.")
            return f"its {name} in {kind} differ from the plain form's by {distance:.2g} of their size"
    return ""


def try_kernels(policy: "Policy", home: torch.device) -> None:
    """Try the attention call with the types, heads and windows of a model on the device that it will compute on.

    What fails is named in the log, and is not used.
    """
    packing = Packing.of_rows([[0]], policy.device)
    plan = ForestPlan(packing)
    policy.hidden(packing.token_ids[None], packing.position[None], plan)
    dtype = policy.autocast or next(policy.model.parameters()).dtype
    for heads in plan.heads:
        in_one_call(home, dtype, heads)


def _scores(
    policy: "Policy",
    forest: Forest,
    form: "ScoringForm",
    autocast: torch.dtype | None,
    parameters: Sequence[nn.Parameter],
) -> Scores:
    policy.scoring_form, policy.autocast = form, autocast
    with torch.enable_grad():
        logprobs = policy(forest).logprobs
        weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(0)).to(logprobs.device)
        gradients = torch.autograd.grad((weights * logprobs).sum(), parameters) if parameters else ()
    whole = torch.cat([gradient.float().flatten() for gradient in gradients] or [logprobs.new_zeros(0)])
    return Scores(logprobs.detach(), whole)


@contextmanager
def _some_trainable(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Weights of the first and the last attention layer; meanwhile no other parameter takes a gradient."""
    layers = [module for module in model.modules() if hasattr(module, "layer_idx")]
    weights = dict.fromkeys(weight for layer in (*layers[:1], *layers[-1:]) for weight in layer.parameters())
    some = [weight for weight in weights if weight.is_floating_point() and weight.dim() > 1]
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for weight in some:
            weight.requires_grad_(True)
        yield some
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
