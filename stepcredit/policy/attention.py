"""Forest attention: every query meets every key once, whatever the tree, inside an unmodified transformers model.

Registered with transformers' `AttentionInterface` under `FOREST`. A forward call that is given `plan=` (an
`AttentionPlan`) hands its queries, keys and values to the plan; without one the function is ordinary attention.

The scores of a plan are computed block by block. Each block gives an output and the log of the sum of its exponentiated
scores; two blocks of the same query merge as

    lse = log(exp(lse_1) + exp(lse_2)),     out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

and the gradient of each block follows from the *merged* output and sum alone, so that only these are saved for the
backward. Kernels that return the sum exist for the CPU and CUDA; elsewhere a plain one computes it.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stepcredit.policy.packing import Block, Packing

log = logging.getLogger("stepcredit")

FOREST = "stepcredit_forest"
MASKED = -1e30  # a score with weight 0; finite, so that a query without keys stays finite
MAX_SCORES = 1 << 24  # scores that the plain kernel holds at once


class AttentionPlan(Protocol):
    """Says what each token of one forward call attends to."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: "AttentionRule") -> Tensor:
        """Attention of one layer.

        Args:
            layer: its number.
            query: [rows, heads, length, size]; key, value: [rows, kv heads, length, size].

        Returns:
            [rows, length, heads, size]
        """
        ...


class AttentionRule:
    """How a layer turns queries and keys into scores.

    Args:
        scale: of the products.
        window: a query sees keys less than this many positions back; None: all.
        cap: scores are bounded by cap * tanh(score / cap); None: they are not.
    """

    def __init__(self, scale: float, window: int | None = None, cap: float | None = None) -> None:
        self.scale, self.window, self.cap = scale, window, cap


# ------------------------------------------------------------------ kernels

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


def kernel_for(query: Tensor, mask: Tensor | None, rule: AttentionRule) -> Kernel:
    """The fastest kernel that can compute this block."""
    kind, dtype, size = query.device.type, query.dtype, query.shape[-1]
    if kind not in FUSED or rule.cap is not None:
        return PLAIN
    if kind == "cuda" and (mask is not None or dtype not in (torch.bfloat16, torch.float16) or size % 8):
        return PLAIN
    return FUSED[kind] if fused_agrees(kind, dtype, size) else PLAIN


@cache
@torch.no_grad()
def fused_agrees(device: str, dtype: torch.dtype, size: int) -> bool:
    """Whether the fused kernel of a device gives what the plain one gives, forward and backward; tried once."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 9, size), (2, 2, 9, size), (2, 2, 9, size), (2, 4, 9, size)]
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


# ------------------------------------------------------------------ a packed forest


class ForestPlan:
    """Attention inside a packing.

    Args:
        packing: the tokens of the forward call, one row.
        record: store the keys and values of every layer in `recorded`, for a sampler that continues from them.
    """

    def __init__(self, packing: Packing, record: bool = False) -> None:
        self.packing = packing
        self.recorded: dict[int, tuple[Tensor, Tensor]] | None = {} if record else None
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        if self.recorded is not None:
            self.recorded[layer] = (key, value)
        return _Attend.apply(query, key, value, self, rule)[None]

    def mask(self, number: int, rule: AttentionRule) -> Tensor | None:
        """The mask that is added to the scores of a block, made once per forward call."""
        block = self.packing.blocks[number]
        window = rule.window if rule.window is not None and block.reach >= rule.window else None
        if window is None and (block.keys.filled is None or block.causal):
            return None  # the padding of a square comes after all its queries
        wanted = (number, window)
        if wanted not in self._masks:
            visible = None if block.keys.filled is None else block.keys.filled[:, None]
            if window is not None:
                near = self._distance(block) < window
                visible = near if visible is None else near & visible
                if block.causal:
                    visible = visible & torch.ones_like(visible[0]).tril()
            assert visible is not None
            self._masks[wanted] = hide(visible)[:, None]
        return self._masks[wanted]

    def _distance(self, block: Block) -> Tensor:
        """[blocks, queries, keys] positions from a key to a query."""
        query, key = (rows.take(self.packing.position[:, None])[:, 0] for rows in (block.queries, block.keys))
        return query[:, :, None] - key[:, None]


class _Attend(torch.autograd.Function):
    """Attention of packed tokens: query [num_positions, heads, size], key and value [num_positions, kv heads, size]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: ForestPlan, rule: AttentionRule) -> Tensor:
        out = query.new_empty(query.shape, dtype=torch.float32)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        for number, block in enumerate(plan.packing.blocks):
            part = block.queries.take(query), block.keys.take(key), block.keys.take(value)
            mask = plan.mask(number, rule)
            causal = block.causal and (mask is None)
            block_out, block_lse = kernel_for(part[0], mask, rule)[0](*part, causal, mask, rule)
            block_out, block_lse = block.queries.flat(block_out), block.queries.flat(block_lse)
            rows = block.queries.index if isinstance(block.queries.index, slice) else block.queries.real
            if block.causal:  # every row is in one square, and these come first
                out[rows], lse[rows] = block_out.float(), block_lse
            else:
                out[rows], lse[rows] = merge(out[rows], lse[rows], block_out, block_lse)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.rule = plan, rule
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        plan, rule = ctx.plan, ctx.rule
        grads = [torch.zeros(tensor.shape, device=tensor.device) for tensor in (query, key, value)]
        for number, block in enumerate(plan.packing.blocks):
            mask = plan.mask(number, rule)
            causal = block.causal and (mask is None)
            block_lse = block.queries.take(lse)
            if block.queries.filled is not None:  # exp(score - inf) = 0: padding has no gradient
                block_lse = block_lse.masked_fill(~block.queries.filled[:, None], torch.inf)
            part = block.queries.take(query), block.keys.take(key), block.keys.take(value)
            backward = kernel_for(part[0], mask, rule)[1]
            taken = block.queries.take(grad), *part, block.queries.take(out), block_lse
            for rows, total, piece in zip(
                (block.queries, block.keys, block.keys), grads, backward(*taken, causal, mask, rule), strict=True
            ):
                rows.add(piece, total)
        return *(total.to(tensor.dtype) for total, tensor in zip(grads, (query, key, value), strict=True)), None, None


def hide(visible: Tensor) -> Tensor:
    """The mask that is added to scores so that only the visible ones count; fp32."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, MASKED)


def merge(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the attention over each: out [..., size], lse [...]."""
    total = torch.logaddexp(lse, more_lse)
    return out * (lse - total).exp()[..., None] + more_out * (more_lse - total).exp()[..., None], total


# ------------------------------------------------------------------ inside transformers


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: AttentionPlan | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls; ordinary attention without a plan."""
    if plan is None:
        return _ordinary(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options)
    for name in ("s_aux", "position_bias"):
        if options.get(name) is not None:
            raise NotImplementedError(f"forest attention has no '{name}'")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError("forest attention is causal")
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave queries and keys in fp32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = AttentionRule(scale, _window(module, options.get("sliding_window")), options.get("softcap"))
    return plan.attend(int(module.layer_idx), query, key, value, rule), None  # type: ignore[arg-type]


def _window(module: nn.Module, given: int | None) -> int | None:
    """The window of a layer; refuses models that apply it in their mask only."""
    config: Any = module.config
    kinds = getattr(config, "layer_types", None)
    kind = kinds[int(module.layer_idx)] if kinds else None  # type: ignore[arg-type]
    if kind not in (None, "full_attention", "sliding_attention"):
        raise NotImplementedError(f"forest attention has no '{kind}'")
    window = None if kind == "full_attention" else getattr(config, "sliding_window", None)
    if window != given:
        raise NotImplementedError(f"a layer is given a window of {given} and its config says {window}")
    return window


def _ordinary(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Ordinary attention of transformers, without a plan; with capped scores too."""
    if options.get("softcap") is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)
    rule = AttentionRule(options["scaling"], None, options["softcap"])
    causal = mask is None and query.shape[2] > 1
    return plain_forward(query, key, value, causal, None if mask is None else hide(mask), rule)[0].transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(FOREST, forest_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(FOREST, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
