"""Kernels of one block of scores, forward and backward: a plain one, and torch's fused ones for the CPU and CUDA.

Each block gives an output and the log of the sum of its exponentiated scores; two blocks of the same query merge as

    lse = log(exp(lse_1) + exp(lse_2)),     out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

and the gradient of each block follows from the *merged* output and sum alone, so that only these are saved for the
backward.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger("stepcredit")

MASKED = -1e30  # a score with weight 0; finite, so that a query without keys stays finite
MAX_SCORES = 1 << 24  # scores that the plain kernel holds at once


class AttentionRule:
    """How a layer turns queries and keys into scores.

    Args:
        scale: of the products.
        window: a query sees keys less than this many positions back; None: all.
        cap: scores are bounded by cap * tanh(score / cap); None: they are not.
    """

    def __init__(self, scale: float, window: int | None = None, cap: float | None = None) -> None:
        self.scale, self.window, self.cap = scale, window, cap


# One block: queries [b, heads, q, size], keys and values [b, kv heads, k, size], mask broadcastable to
# [b, heads, q, k] or None. Forward gives the output [b, heads, q, size] and lse [b, heads, q] in fp32.


def plain_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None, rule: AttentionRule
) -> tuple[Tensor, Tensor]:
    """Scores written out, a few queries at a time; grouped heads without repeating keys."""
    outs, sums = [], []
    for rows in _query_chunks(query, key):
        scores, _ = _scores(query, key, rows, causal, mask, rule)
        outs.append(scores.softmax(-1).to(value.dtype) @ value[:, :, None])
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs, 3).flatten(1, 2), torch.cat(sums, 3).flatten(1, 2)


def plain_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    rule: AttentionRule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block from the merged output and lse of its queries."""
    heads = key.shape[1]
    grad_query = torch.empty_like(query)
    grad_key = torch.zeros(key.shape, device=key.device)
    grad_value = torch.zeros(value.shape, device=value.device)
    for rows in _query_chunks(query, key):
        scores, slope = _scores(query, key, rows, causal, mask, rule)
        grouped_grad, grouped_out = (tensor[:, :, rows].unflatten(1, (heads, -1)).float() for tensor in (grad, out))
        probs = (scores - lse[:, :, rows].unflatten(1, (heads, -1))[..., None]).exp()
        delta = (grouped_grad * grouped_out).sum(-1, keepdim=True)
        grad_scores = probs * (grouped_grad @ value[:, :, None].float().transpose(-1, -2) - delta) * rule.scale
        if slope is not None:
            grad_scores = grad_scores * slope
        grouped_query = query[:, :, rows].unflatten(1, (heads, -1)).float()
        grad_query[:, :, rows] = (grad_scores @ key[:, :, None].float()).flatten(1, 2).to(query.dtype)
        grad_key += (grad_scores.transpose(-1, -2) @ grouped_query).sum(2)
        grad_value += (probs.transpose(-1, -2) @ grouped_grad).sum(2)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _query_chunks(query: Tensor, key: Tensor) -> list[slice]:
    step = max(1, MAX_SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    return [slice(first, first + step) for first in range(0, query.shape[2], step)]


def _scores(
    query: Tensor, key: Tensor, rows: slice, causal: bool, mask: Tensor | None, rule: AttentionRule
) -> tuple[Tensor, Tensor | None]:
    """Scores [b, kv heads, group, rows, k] of some queries in fp32, and their slope where they are capped."""
    grouped = query[:, :, rows].unflatten(1, (key.shape[1], -1))
    scores = (grouped @ key[:, :, None].transpose(-1, -2)).float() * rule.scale
    slope = None
    if rule.cap is not None:
        bounded = torch.tanh(scores / rule.cap)
        scores, slope = bounded * rule.cap, 1 - bounded * bounded
    if causal:
        first = torch.arange(rows.start, rows.start + grouped.shape[3], device=query.device)
        hidden = torch.arange(key.shape[2], device=query.device)[None] > first[:, None]
        scores = scores.masked_fill(hidden, MASKED)
    if mask is not None:
        part = mask if mask.shape[2] == 1 else mask[:, :, rows]
        scores = scores + part[:, :, None]
    return scores, slope


def fused_cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None, rule: AttentionRule
) -> tuple[Tensor, Tensor]:
    """torch's CPU flash attention; it groups heads and takes masks by itself."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=rule.scale
    )


def fused_cpu_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    rule: AttentionRule,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, causal, attn_mask=mask, scale=rule.scale
    )


def fused_cuda_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None, rule: AttentionRule
) -> tuple[Tensor, Tensor]:
    """torch's CUDA flash attention: half precision, no masks."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=rule.scale)
    return out, lse


def fused_cuda_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    rule: AttentionRule,
) -> tuple[Tensor, Tensor, Tensor]:
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad,
        query,
        key,
        value,
        out,
        lse.contiguous(),
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        causal,
        no_dropout,
        no_dropout[:0],
        scale=rule.scale,
    )


Kernel = tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor, Tensor]]]
PLAIN: Kernel = (plain_forward, plain_backward)
FUSED: dict[str, Kernel] = {
    "cpu": (fused_cpu_forward, fused_cpu_backward),
    "cuda": (fused_cuda_forward, fused_cuda_backward),
}


def kernel_for(query: Tensor, mask: Tensor | None, rule: AttentionRule, kv_heads: int | None = None) -> Kernel:
    """The fastest kernel that can compute this block.

    Args:
        kv_heads: heads of its keys; None: as many as its queries have.
    """
    kind, dtype, (heads, size) = query.device.type, query.dtype, (query.shape[1], query.shape[-1])
    if kind not in FUSED or rule.cap is not None:
        return PLAIN
    if kind == "cuda" and (mask is not None or dtype not in (torch.bfloat16, torch.float16) or size % 8):
        return PLAIN
    return FUSED[kind] if fused_agrees(kind, dtype, size, heads, kv_heads or heads) else PLAIN


@cache
@torch.no_grad()
def fused_agrees(device: str, dtype: torch.dtype, size: int, heads: int, kv_heads: int) -> bool:
    """Whether the fused kernel of a device gives what the plain one gives, forward and backward; tried once."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 9, size), (2, kv_heads, 9, size), (2, kv_heads, 9, size), (2, heads, 9, size)]
    query, key, value, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    rule = AttentionRule(size**-0.5)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    try:
        with torch.autocast(device, enabled=False):
            for causal in (True, False):
                actual, expected = (
                    kernel[0](query, key, value, causal, None, rule) for kernel in (FUSED[device], PLAIN)
                )
                merged = expected[0], expected[1] + 0.5  # as if further blocks had been merged in
                grads, expected_grads = (
                    kernel[1](grad, query, key, value, *merged, causal, None, rule) for kernel in (FUSED[device], PLAIN)
                )
                for got, want in zip((*actual, *grads), (*expected, *expected_grads), strict=True):
                    torch.testing.assert_close(got.float(), want.float(), atol=tolerance, rtol=tolerance)
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        log.warning("fused attention on %s (%s) cannot be used; the plain one is slower: %s", device, dtype, error)
        return False
    return True


def hide(visible: Tensor) -> Tensor:
    """The mask that is added to scores so that only the visible ones count; fp32."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, MASKED)


def merge(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the attention over each: out [..., size], lse [...]."""
    total = torch.logaddexp(lse, more_lse)
    return out * (lse - total).exp()[..., None] + more_out * (more_lse - total).exp()[..., None], total
