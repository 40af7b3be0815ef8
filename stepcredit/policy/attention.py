"""Forest attention: every query meets every key once, whatever the tree, inside an unmodified transformers model.

Registered with transformers' `AttentionInterface` under `FOREST`. A forward call that is given `plan=` (an
`AttentionPlan`) hands its queries, keys and values to the plan; without one the function is ordinary attention.

The scores of a packed forest are computed in one of two ways (`in_one_call` decides): in one call with a mask
(`policy/flex.py`), on CUDA; or square by square and rectangle by rectangle (`policy/kernels.py`), whose outputs merge.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stepcredit.policy import flex
from stepcredit.policy.kernels import AttentionRule, hide, kernel_for, merge, plain_forward
from stepcredit.policy.packing import Block, Packing

FOREST = "stepcredit_forest"


class AttentionPlan(Protocol):
    """Says what each token of one forward call attends to."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """Attention of one layer.

        Args:
            layer: its number.
            query: [rows, heads, length, size]; key, value: [rows, kv heads, length, size].

        Returns:
            [rows, length, heads, size]
        """
        ...


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
        self.heads: set[flex.Heads] = set()  # of the layers that have attended
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._tree_masks: dict[int | None, flex.TreeMask] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        heads = flex.Heads(query.shape[1], key.shape[1], query.shape[3], rule.scale, rule.window is not None, rule.cap)
        self.heads.add(heads)
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        if self.recorded is not None:
            real = slice(self.packing.num_positions)  # without padding
            self.recorded[layer] = rows[1][real], rows[2][real]
        if in_one_call(query.device, query.dtype, heads):
            return flex.attend(query, key, value, self.tree_mask(rule.window), rule).transpose(1, 2)
        return _Blocks.apply(*rows, self, rule)[None]

    def tree_mask(self, window: int | None) -> flex.TreeMask:
        """The mask of the whole row, made once per forward call and window."""
        if window not in self._tree_masks:
            packing = self.packing
            self._tree_masks[window] = flex.TreeMask.of(packing.end, packing.position_on_cpu, window, packing.device)
        return self._tree_masks[window]

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


def in_one_call(device: torch.device, dtype: torch.dtype, heads: flex.Heads) -> bool:
    """Whether such a layer attends in one masked call there; otherwise by squares and rectangles."""
    return device.type in flex.DEVICES and flex.one_mask_agrees(device, dtype, heads)


class _Blocks(torch.autograd.Function):
    """Attention by squares and rectangles: query [length, heads, size], key and value [length, kv heads, size]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: ForestPlan, rule: AttentionRule) -> Tensor:
        out = query.new_empty(query.shape, dtype=torch.float32)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        if len(query) > plan.packing.num_positions:  # padding is in no block
            out[plan.packing.num_positions :], lse[plan.packing.num_positions :] = 0, 0
        for number, block in enumerate(plan.packing.blocks):
            part = block.queries.take(query), block.keys.take(key), block.keys.take(value)
            mask = plan.mask(number, rule)
            causal = block.causal and (mask is None)
            block_out, block_lse = kernel_for(part[0], mask, rule, part[1].shape[1])[0](*part, causal, mask, rule)
            block_out, block_lse = block.queries.flat(block_out), block.queries.flat(block_lse)
            rows = block.queries.real
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
            backward = kernel_for(part[0], mask, rule, part[1].shape[1])[1]
            taken = block.queries.take(grad), *part, block.queries.take(out), block_lse
            for rows, total, piece in zip(
                (block.queries, block.keys, block.keys), grads, backward(*taken, causal, mask, rule), strict=True
            ):
                rows.add(piece, total)
        return *(total.to(tensor.dtype) for total, tensor in zip(grads, (query, key, value), strict=True)), None, None


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
