"""From hidden states to log-probabilities without ever holding a [num_tokens, vocabulary] tensor.

A token's forward and backward, with vocabulary V, hidden size H and operands of `a` bytes (2 in bf16):

    products   its logits, the same again in the backward, and two gradients          8 V H operations
    forward    logits written, read for the largest, read for the sums                12 V bytes
    backward   logits written and read; their gradient written, read by two products  (8 + 3 a) V bytes
    weights    read by three products; their fp32 gradient read and written           (3 a + 8) V H / rows bytes

where the passes between the products are fused, as on a GPU, and `rows` are those of a chunk. On a CPU each pass is a
call, over chunks that stay in its cache.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stepcredit.forest.ops import TokenScores, out_of_memory

log = logging.getLogger("stepcredit")

LEAST = -1e30  # stands in for the log of 0, which times 0 is 0
LOGITS_ON_CPU = 1 << 22  # logits that exist at once: 16 MiB in fp32, about what a cache holds
# 1 GiB: 1,766 rows at a vocabulary of 152,000. With far fewer, reading and writing the gradient of the weights in each
# chunk takes longer than the products.
LOGITS_ON_GPU = 1 << 28


def max_logits_on(device: str) -> int:
    """Logits that exist at once on a kind of device."""
    return LOGITS_ON_GPU if device == "cuda" else LOGITS_ON_CPU


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
    max_logits: int | None = None,
) -> TokenScores:
    """`score_logits` of the logits of `states`, a few rows at a time; the backward computes each chunk's logits again.

    With logits z / temperature of one state, log-probabilities l, probabilities p = exp(l) and entropy H:

        d l[target] / d z = (onehot(target) - p) / temperature,      d H / d z = -p (l + H) / temperature

    Args:
        states: [n, hidden], the state that predicts each target; targets: [n].
        head: the output layer, a linear one.
        max_logits: logits that may exist at once; None: what suits the device.

    Raises:
        NotImplementedError: the output layer is not linear.
    """
    if not isinstance(head, nn.Linear):
        raise NotImplementedError(f"the output layer is a {type(head).__name__}, not linear")
    rows = max(1, (max_logits or max_logits_on(states.device.type)) // head.weight.shape[0])
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
            head = _operand(weight, dtype), None if bias is None else _operand(bias, dtype)
            numbers = _numbers(rule, temperature, states.device)
            for first in range(0, n, rows):
                part = slice(first, first + rows)
                product = _logits(_operand(states[part], dtype), *head)
                logprobs[part], sums[part], entropy[part] = FORWARD(product, targets[part], *numbers)
                del product  # before the next chunk's is made
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
            head = _operand(weight, dtype), None if bias is None else _operand(bias, dtype)
            numbers = _numbers(rule, temperature, states.device)
            for first in range(0, len(states), rows):
                part = slice(first, first + rows)
                entropies = (entropy[part], grad_entropy[part]) if ctx.entropy_grad else (None, None)
                chunk = _operand(states[part], dtype)
                product = _logits(chunk, *head)
                grad = BACKWARD(product, targets[part], sums[part], grad_logprobs[part], *entropies, *numbers, dtype)
                del product
                grad = _operand(grad, dtype)
                if grad_states is not None:
                    grad_states[part] = _product(grad, head[0])
                if grad_weight is not None:
                    _add_product(grad_weight, grad.T, chunk)
                if grad_bias is not None:
                    grad_bias += grad.sum(0, dtype=torch.float32)
                del grad
        return (
            grad_states,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 5,
        )


# ---------------------------------------------------------------------- passes over the logits of a chunk


def _numbers(rule: LogitRule, temperature: float, device: torch.device) -> list[Tensor | None]:
    """Scale, temperature, scale / temperature and cap, on the device; None where there is nothing to do."""
    factors = [None if value == 1.0 else value for value in (rule.scale, temperature, rule.scale / temperature)]
    return [None if value is None else torch.full((), value, device=device) for value in (*factors, rule.cap)]


class Fused:
    """A function of tensors; on a GPU compiled to few passes, elsewhere, or where that fails, as it is.

    Changing a tensor in place saves memory where each operation is a call, and costs a pass in a compiled function, so
    such a function begins with `_owned`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.failed = False

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        return torch.compile(self.function, dynamic=True)

    def __call__(self, *args: Any) -> Any:
        if args[0].device.type != "cuda" or self.failed:
            return self.function(*args)
        try:
            return self.compiled(*args)
        except Exception as error:  # a compiler may fail in any way
            if out_of_memory(error):
                raise
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.warning("the passes over logits are not compiled, so they take longer (%s)", why)
            self.failed = True
        return self.function(*args)


def _owned(values: Tensor) -> Tensor:
    """What may be changed in place: `values` itself, or, while a function is compiled, a copy that is never made."""
    return values.clone() if torch.compiler.is_compiling() else values


def _forward(
    product: Tensor,
    targets: Tensor,
    scale: Tensor | None,
    temperature: Tensor | None,
    factor: Tensor | None,
    cap: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the target, log of the sum of exponentiated logits, and entropy of each row, [n] each.

    Args:
        product: [n, vocabulary] of states and output embeddings in fp32; overwritten.
    """
    logits, _ = _changed(product, scale, temperature, cap, slope=False)
    target = logits.gather(-1, targets[:, None]).squeeze(-1)
    largest = logits.amax(-1, keepdim=True)
    logits.sub_(largest)
    exps = logits.exp()
    total = exps.sum(-1)
    log_total = total.log()
    log_sum = largest.squeeze(-1) + log_total
    entropy = log_total - exps.mul_(logits.clamp_(min=LEAST)).sum(-1) / total
    return target - log_sum, log_sum, entropy


def _backward(
    product: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    grad_logprobs: Tensor,
    entropy: Tensor | None,
    grad_entropy: Tensor | None,
    scale: Tensor | None,
    temperature: Tensor | None,
    factor: Tensor | None,
    cap: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of `product` [n, vocabulary], in `dtype`; what `_forward` gave is `log_sum` and `entropy` [n].

    Args:
        entropy, grad_entropy: None where no gradient flows through the entropy.
        factor: scale / temperature.
    """
    logits, slope = _changed(product, scale, temperature, cap, slope=True)
    logprobs = logits.sub_(log_sum[:, None])
    grad = logprobs.exp()
    if entropy is not None and grad_entropy is not None:
        both = logprobs.clamp_(min=LEAST).add_(entropy[:, None]).mul_(grad_entropy[:, None])
        grad.mul_(both.add_(grad_logprobs[:, None]).neg_())
    else:
        grad.mul_(-grad_logprobs[:, None])
    grad = _add_at(grad, targets, grad_logprobs)
    if slope is not None:
        grad.mul_(slope)
    if factor is not None:
        grad.mul_(factor)
    return grad.to(dtype)


def _changed(
    product: Tensor, scale: Tensor | None, temperature: Tensor | None, cap: Tensor | None, slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits / temperature of a product, which they overwrite, and, with `slope`, the derivative of the cap."""
    logits = _owned(product)
    if scale is not None:
        logits.mul_(scale)
    cap_slope = None
    if cap is not None:
        logits.div_(cap).tanh_()
        if slope:
            cap_slope = 1 - logits * logits
        logits.mul_(cap)
    if temperature is not None:
        logits.div_(temperature)
    return logits, cap_slope


def _add_at(rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """`rows` with `values` [n] added in one column of each."""
    if not torch.compiler.is_compiling():
        return rows.scatter_add_(-1, columns[:, None], values[:, None])
    here = torch.arange(rows.shape[1], device=rows.device) == columns[:, None]  # part of the same pass
    return torch.where(here, rows + values[:, None], rows)


FORWARD, BACKWARD = Fused(_forward), Fused(_backward)


# ---------------------------------------------------------------------- products in fp32


def _operand(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values rounded to a type, as a product takes them: in that type, or in fp32 where it would round its results."""
    values = values.to(dtype)
    wide = dtype.itemsize >= 4 or mixed_products(values.device.type, dtype)
    return values if wide else values.float()


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[n, vocabulary] in fp32."""
    if weight.dtype.itemsize >= 4:
        return nn.functional.linear(states, weight, bias).float()
    product = _product(states, weight.T)
    return product if bias is None else product.add_(bias)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32, without a copy in a smaller type."""
    return left @ right if left.dtype.itemsize >= 4 else torch.mm(left, right, out_dtype=torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in fp32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.dtype.itemsize < 4 and mixed_sums(left.device.type, left.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += _product(left, right)


@cache
def mixed_products(device: str, dtype: torch.dtype) -> bool:
    """Whether a device multiplies matrices of a type into fp32; tried once."""
    return _works(lambda left, right, _: torch.mm(left, right, out_dtype=torch.float32), device, dtype)


@cache
def mixed_sums(device: str, dtype: torch.dtype) -> bool:
    """Whether it adds such a product to an fp32 matrix in place; tried once."""

    def added(left: Tensor, right: Tensor, total: Tensor) -> Tensor:
        return torch.addmm(total.add_(1), left, right, out_dtype=torch.float32, out=total) - 1

    return _works(added, device, dtype)


def _works(product: Callable[[Tensor, Tensor, Tensor], Tensor], device: str, dtype: torch.dtype) -> bool:
    """Whether a product of 16 x 16 matrices is what it should be: 2049, which neither bf16 nor fp16 has."""
    if device == "cpu":
        return False  # has none of them
    left, right = (torch.eye(16, device=device, dtype=dtype) for _ in range(2))
    left[:, 0] += 2048
    right[0] += 1
    try:
        found = product(left, right, torch.zeros(16, 16, device=device))
        works = torch.equal(found, left.float() @ right.float())
        why = "it gives other numbers"
    except (NotImplementedError, RuntimeError, TypeError) as error:
        if out_of_memory(error):
            raise
        works, why = False, str(error).split(". ")[0] or type(error).__name__
    if not works:
        log.warning("products of %s into fp32 on %s take longer: no call for them works (%s)", dtype, device, why)
    return works
