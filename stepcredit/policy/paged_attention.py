"""Attention of rows to pages of keys and values, with shapes that do not depend on what the rows hold.

On CUDA it is `flex_attention`, whose decoding kernel reads the pages that a row's table lists where they lie. The query
heads that share a head of keys are laid out as queries of that head, so that their keys are read once whatever their
number is (the kernel's own grouping takes powers of two only, and Qwen2.5 has 6 and 7). Elsewhere, and as the
reference, the pages of each row are gathered and read by the plain kernel.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from stepcredit.policy.kernels import AttentionRule, hide, plain_forward
from stepcredit.policy.paged import CacheShape, PagePool

log = logging.getLogger("stepcredit")

RECOMPILE_LIMIT = 64  # shapes of one function: numbers of rows, windows, caps, ways to draw


class PagedStep:
    """The `AttentionPlan` of one token for each row.

    Args:
        table: [rows, width] int32, the pages of each row's path; num_pages: [rows] int32, how many of them it reads.
        slot: [rows] where its token is stored; position: [rows] of its token.
    """

    def __init__(
        self,
        pool: PagePool,
        table: Tensor,
        num_pages: Tensor,
        slot: Tensor,
        position: Tensor,
        attention: "PagedAttention",
    ) -> None:
        self.pool, self.table, self.num_pages, self.slot, self.position = pool, table, num_pages, slot, position
        self.attention = attention
        self.masks: dict[int | None, object] = {}  # of each window, made by the attention function

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        self.pool.write(layer, self.slot, key[:, :, 0], value[:, :, 0])
        grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1))  # [rows, kv heads, group, size]
        out = self.attention(self, layer, grouped.to(self.pool.data.dtype), rule)
        return out.flatten(1, 2)[:, None].to(query.dtype)


# From a step, a layer, queries [rows, kv heads, group, size] and a rule to the output, of the queries' shape.
PagedAttention = Callable[[PagedStep, int, Tensor, AttentionRule], Tensor]


def reference(step: PagedStep, layer: int, query: Tensor, rule: AttentionRule) -> Tensor:
    """The pages of every row gathered, and read by the plain kernel."""
    pool, table = step.pool, step.table.long()
    offset = torch.arange(pool.page, device=table.device)
    if rule.window not in step.masks:
        listed = torch.arange(table.shape[1], device=table.device) < step.num_pages[:, None]
        visible = listed[..., None] & (offset < pool.fill[table][..., None])
        if rule.window is not None:
            position = pool.start[table][..., None] + offset
            visible &= step.position[:, None, None] - position < rule.window
        step.masks[rule.window] = hide(visible.flatten(1))[:, None, None]
    mask = step.masks[rule.window]
    slots = (table[..., None] * pool.page + offset).flatten(1)
    keys, values = pool.data[layer][:, :, slots].transpose(1, 2)  # each [rows, kv heads, width * page, size]
    return plain_forward(query, keys, values, False, mask, rule)[0]  # type: ignore[arg-type]


def compile_for_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once for each shape; an error, not a slow form without a word, where that cannot be done."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(function, dynamic=False, fullgraph=True)


class FlexPages:
    """`flex_attention` over pages.

    Args:
        compiled: into one kernel for each shape; otherwise torch's own slow form, which tests compare.
    """

    def __init__(self, compiled: bool) -> None:
        self.attend = compile_for_shapes(_flex) if compiled else _flex

    def __call__(self, step: PagedStep, layer: int, query: Tensor, rule: AttentionRule) -> Tensor:
        if rule.window not in step.masks:
            step.masks[rule.window] = block_mask(step, rule.window, query.shape[2])
        keys, values = step.pool.data[layer, :, None]  # [1, kv heads, slots, size]: the same for all rows
        with torch.autocast(query.device.type, enabled=False):
            return self.attend(query, keys, values, step.masks[rule.window], _capped(rule.cap), rule.scale)  # type: ignore[arg-type]


def _flex(
    query: Tensor, keys: Tensor, values: Tensor, mask: BlockMask, score: Callable[..., Tensor] | None, scale: float
) -> Tensor:
    out = flex_attention(query, keys, values, score_mod=score, block_mask=mask, scale=scale)
    assert isinstance(out, Tensor)
    return out


@cache
def _capped(cap: float | None) -> Callable[..., Tensor] | None:
    """cap * tanh(score / cap)"""
    if cap is None:
        return None

    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def block_mask(step: PagedStep, window: int | None, queries: int) -> BlockMask:
    """The pages of each row as blocks of keys; in a page the slots in use, and in a window the near ones."""
    pool, position, page = step.pool, step.position, step.pool.page
    fill, start = pool.fill, pool.start

    def used(row: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        return slot % page < fill[slot // page]

    def near(row: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        place = start[slot // page] + slot % page
        return (slot % page < fill[slot // page]) & (position[row] - place < window)

    return BlockMask.from_kv_blocks(
        step.num_pages[:, None, None],
        step.table[:, None, None],
        BLOCK_SIZE=(128, page),
        mask_mod=used if window is None else near,
        seq_lengths=(queries, pool.pages * page),
        compute_q_blocks=False,  # for a backward
    )


@cache
@torch.no_grad()
def flex_agrees(shape: CacheShape, group: int, page: int, device: torch.device) -> bool:
    """Whether compiled `flex_attention` gives what the reference gives for heads like these; tried once."""
    pool = PagePool(shape, 9, page, device)
    generator = torch.Generator().manual_seed(0)
    pool.data.copy_(torch.randn(pool.data.shape, generator=generator))
    pool.describe(range(9), [1, page, 3, page, page, 1, 2, page, page], [0, 0, page, page, 0, 0, 0, 0, page])
    rows = (
        torch.tensor([[1, 2, 0], [1, 3, 5], [4, 6, 0]]),
        torch.tensor([2, 3, 1]),
        torch.tensor([page + 2, 2 * page, page]),
    )
    table, num_pages, position = (tensor.to(device) for tensor in rows)
    query = torch.randn(3, shape.kv_heads, group, shape.size, generator=generator).to(device, shape.dtype)
    tolerance = 1e-4 if shape.dtype == torch.float32 else 2e-2
    try:
        for rule in (AttentionRule(shape.size**-0.5), AttentionRule(0.3, window=page // 2 + 2, cap=2.0)):
            outs = []
            for attention in (FlexPages(compiled=True), reference):
                step = PagedStep(pool, table.int(), num_pages.int(), position, position, attention)
                outs.append(attention(step, 0, query, rule).float())
            torch.testing.assert_close(*outs, atol=tolerance, rtol=tolerance)
    except Exception as error:  # of the compiler, whose errors have no common base
        log.warning("flex_attention over pages cannot be used on %s: %s", device, error)
        return False
    return True


def attention_for(device: torch.device) -> PagedAttention:
    """The fastest attention function of a device."""
    return FlexPages(compiled=True) if device.type == "cuda" else reference
