"""From hidden states to log-probabilities without ever holding a [num_tokens, vocabulary] tensor."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepcredit.forest.ops import TokenScores

LEAST = -1e30  # stands in for the log of 0, which times 0 is 0
MAX_LOGITS = 1 << 22  # logits that exist at once: 16 MiB in fp32, about what a CPU's cache holds


@dataclass(frozen=True)
class LogitRule:
    """What a model does to the product of states and output embeddings: cap * tanh(scale * product / cap).

    Args:
        scale: Granite's 1 / logits_scaling, Cohere's logit_scale.
        cap: Gemma's final_logit_softcapping; None: no cap.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitRule":
        """The rule that a model's config states."""
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        return cls(scale, getattr(config, "final_logit_softcapping", None))


def score_logits(logits: Tensor, targets: Tensor, temperature: float, entropy_grad: bool) -> TokenScores:
    """Log-probability of `targets` and entropy of softmax(logits / temperature), in fp32.

    Args:
        logits: [n, vocabulary]; targets: [n].
    """
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy = -(logprobs.exp() * logprobs.clamp(min=LEAST)).sum(-1)
    return TokenScores(logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy)


def score_states(
    states: Tensor,
    targets: Tensor,
    head: nn.Module,
    temperature: float,
    *,
    rule: LogitRule = LogitRule(),
    entropy_grad: bool = False,
    max_logits: int = MAX_LOGITS,
) -> TokenScores:
    """`score_logits` of the logits of `states`, a few rows at a time; the backward computes each chunk's logits again.

    With logits z / temperature of one state, log-probabilities l, probabilities p = exp(l) and entropy H:

        d l[target] / d z = (onehot(target) - p) / temperature,      d H / d z = -p (l + H) / temperature

    Args:
        states: [n, hidden], the state that predicts each target; targets: [n].
        head: the output layer, a linear one.
        max_logits: logits that may exist at once.

    Raises:
        NotImplementedError: the output layer is not linear.
    """
    if not isinstance(head, nn.Linear):
        raise NotImplementedError(f"the output layer is a {type(head).__name__}, not linear")
    rows = max(1, max_logits // head.weight.shape[0])
    logprobs, entropy = _Score.apply(states, head.weight, head.bias, targets, temperature, rule, rows, entropy_grad)
    return TokenScores(logprobs, entropy)


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        rule: LogitRule,
        rows: int,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        n = len(states)
        logprobs, sums, entropy = (states.new_empty(n, dtype=torch.float32) for _ in range(3))
        with torch.autocast(kind, enabled=False):
            cast = _cast(weight, bias, dtype)
            for first in range(0, n, rows):
                part = slice(first, first + rows)
                logits, _ = _logits(states[part], cast, rule, temperature, slope=False)
                target = logits.gather(-1, targets[part, None]).squeeze(-1)
                largest = logits.amax(-1, keepdim=True)
                logits.sub_(largest)
                exps = logits.exp()
                total = exps.sum(-1)
                log_total = total.log()
                sums[part] = largest.squeeze(-1) + log_total
                logprobs[part] = target - sums[part]
                entropy[part] = log_total - exps.mul_(logits.clamp_(min=LEAST)).sum(-1) / total
        ctx.save_for_backward(states, weight, bias, targets, sums, entropy)
        ctx.settings = temperature, rule, rows, dtype
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        ctx.entropy_grad = entropy_grad
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, sums, entropy = ctx.saved_tensors
        temperature, rule, rows, dtype = ctx.settings
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_states = torch.empty_like(states) if needs_states else None
        grad_weight = torch.zeros(weight.shape, device=weight.device) if needs_weight else None
        grad_bias = torch.zeros(bias.shape, device=bias.device) if needs_bias else None
        with torch.autocast(states.device.type, enabled=False):
            cast = _cast(weight, bias, dtype)
            for first in range(0, len(states), rows):
                part = slice(first, first + rows)
                logits, slope = _logits(states[part], cast, rule, temperature, slope=True)
                logprobs = logits.sub_(sums[part, None])
                grad = logprobs.exp()
                if ctx.entropy_grad:
                    factor = logprobs.clamp_(min=LEAST).add_(entropy[part, None]).mul_(grad_entropy[part, None])
                    grad.mul_(factor.add_(grad_logprobs[part, None]).neg_())
                else:
                    grad.mul_(-grad_logprobs[part, None])
                grad.scatter_add_(-1, targets[part, None], grad_logprobs[part, None])
                if slope is not None:
                    grad.mul_(slope)
                grad = grad.mul_(rule.scale / temperature).to(dtype)
                if grad_states is not None:
                    grad_states[part] = (grad @ cast[0]).to(states.dtype)
                if grad_weight is not None:
                    _add_product(grad_weight, grad.T, states[part].to(dtype))
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
        return (
            grad_states,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 5,
        )


def _cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _logits(
    states: Tensor, head: tuple[Tensor, Tensor | None], rule: LogitRule, temperature: float, slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits / temperature [n, vocabulary] in fp32, and, with `slope`, the derivative of the cap."""
    logits = nn.functional.linear(states.to(head[0].dtype), *head).float()
    if rule.scale != 1.0:
        logits.mul_(rule.scale)
    cap_slope = None
    if rule.cap is not None:
        logits.div_(rule.cap).tanh_()
        if slope:
            cap_slope = 1 - logits * logits
        logits.mul_(rule.cap)
    if temperature != 1.0:
        logits.div_(temperature)
    return logits, cap_slope


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in fp32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
