"""A stand-in for `flex_attention`, which CUDA compiles with its mask.

It reads the lists of blocks as the kernel does: blocks that are not listed are skipped, those listed as full are read
without the mask. Queries and keys of a call are seen by the counting and capturing modes as one operator.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import BlockMask

from pretend.kernels import cpu, cuda, demand

TYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Call:
    """What of a call is no tensor of its own: a captured graph keeps it."""

    mask: BlockMask
    score_mod: Any
    scale: float


CALLS: list[Call] = []
THREAD = ThreadPoolExecutor(1)


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
) -> Tensor:
    demand(block_mask is not None, "the stand-in wants a block mask")
    assert block_mask is not None
    demand(not return_lse, "the stand-in gives no log-sum-exp")
    check(query, key, value, block_mask, enable_gqa)
    CALLS.append(Call(block_mask, score_mod, query.shape[-1] ** -0.5 if scale is None else scale))
    return _Flex.apply(query, key, value, len(CALLS) - 1)


def check(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, grouped: bool) -> None:
    for tensor in (query, key, value):
        demand(tensor.is_cuda and tensor.dtype == query.dtype, f"flex_attention of {tensor.dtype} on {tensor.device}")
        demand(tensor.dim() == 4 and tensor.dtype in TYPES, f"flex_attention of {tensor.dtype}, {tensor.dim()} axes")
        demand(tensor.stride(-1) == 1, f"flex_attention with strides {tensor.stride()}")
    demand(query.shape[-1] >= 16, f"flex_attention of size {query.shape[-1]}")
    demand(key.shape[0] in (1, query.shape[0]), f"{query.shape[0]} rows of queries and {key.shape[0]} of keys")
    heads = query.shape[1] == key.shape[1] or (grouped and query.shape[1] % key.shape[1] == 0)
    demand(heads, f"{query.shape[1]} heads over {key.shape[1]}")
    demand(mask.seq_lengths == (query.shape[2], key.shape[2]), f"a mask of {mask.seq_lengths}")
    lists = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    for tensor in (one for one in lists if one is not None):
        demand(tensor.is_cuda and tensor.dtype == torch.int32, f"a mask of {tensor.dtype} on {tensor.device}")
        demand(tensor.shape[0] in (1, query.shape[0]) and tensor.shape[1] == 1, f"a mask of {tuple(tensor.shape)}")


class _Flex(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: int) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.call = call
        return torch.ops.pretend.flex_forward(query, key, value, call)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.pretend.flex_backward(grad, *ctx.saved_tensors, ctx.call), None


def flex_forward(query: Tensor, key: Tensor, value: Tensor, call: int) -> Tensor:
    return cuda(attend(cpu(query), cpu(key), cpu(value), CALLS[call]).to(query.dtype))


def flex_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, call: int) -> list[Tensor]:
    check_transposed(CALLS[call].mask)
    on_host = [cpu(tensor).float() for tensor in (query, key, value, grad)]

    def differentiate() -> tuple[Tensor, ...]:
        given = [tensor.detach().clone().requires_grad_() for tensor in on_host[:3]]
        return torch.autograd.grad(attend(*given, CALLS[call]), given, on_host[3])

    # On a thread of its own, because inside an operator autograd records nothing.
    return [cuda(one.to(query.dtype)) for one in THREAD.submit(differentiate).result()]


def attend(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    """In fp32, for each row and block of queries over the keys that are listed for it; 0 where none is visible."""
    mask, group = call.mask, query.shape[1] // key.shape[1]
    height, width = mask.BLOCK_SIZE
    rows = []
    for row in range(query.shape[0]):
        key_row, mask_row = (min(row, size - 1) for size in (len(key), len(mask.kv_num_blocks)))
        keys, values = (tensor[key_row].float().repeat_interleave(group, 0) for tensor in (key, value))
        outs = []
        for number, queries in enumerate(query[row].float().split(height, 1)):
            partial, full = listed(mask, mask_row, number, width)
            slots, first = torch.cat([partial, full]), torch.arange(queries.shape[1]) + number * height
            if not len(slots):
                outs.append(queries * 0)
                continue
            seen = visible(mask, row, first, slots, len(partial))
            scores = queries @ keys[:, slots].mT * call.scale
            if call.score_mod is not None:
                scores = modified(call, scores, row, first, slots)
            scores = scores.masked_fill(~seen, -torch.inf)
            weights = torch.where(seen.any(-1, keepdim=True), scores, 0.0).softmax(-1)
            outs.append((weights * seen) @ values[:, slots])
        rows.append(torch.cat(outs, 1))
    return torch.stack(rows)


def listed(mask: BlockMask, row: int, number: int, width: int) -> tuple[Tensor, Tensor]:
    """The keys in the blocks that are partly, and in those that are wholly, visible to a block of queries."""
    kinds = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    found = []
    for counts, indices in kinds:
        if counts is None or indices is None:
            found.append(torch.zeros(0, dtype=torch.long))
            continue
        blocks = cpu(indices)[row, 0, number, : int(cpu(counts)[row, 0, number])].long()
        found.append((blocks[:, None] * width + torch.arange(width)).flatten())
    return found[0], found[1]


def visible(mask: BlockMask, row: int, queries: Tensor, slots: Tensor, masked: int) -> Tensor:
    """[queries, slots], by the mask for the first `masked` slots."""
    here, head = torch.tensor(row), torch.tensor(0)
    seen = mask.mask_mod(*map(cuda, (here, head, queries[:, None], slots[None, :masked])))
    rest = torch.ones(len(queries), len(slots) - masked, dtype=torch.bool)
    return torch.cat([cpu(seen).expand(len(queries), masked), rest], 1)


def modified(call: Call, scores: Tensor, row: int, queries: Tensor, slots: Tensor) -> Tensor:
    head = torch.arange(len(scores))[:, None, None]
    return call.score_mod(scores, torch.tensor(row), head, queries[:, None], slots[None])


def check_transposed(mask: BlockMask) -> None:
    """The backward reads, for each block of keys, a list of blocks of queries: both must list the same pairs."""
    for kind in ("", "full_"):
        forward = [getattr(mask, f"{kind}kv_{name}") for name in ("num_blocks", "indices")]
        backward = [getattr(mask, f"{kind}q_{name}") for name in ("num_blocks", "indices")]
        if forward[0] is None:
            continue
        demand(backward[0] is not None, "a backward of a mask without its blocks of queries")
        pairs = {(query, key) for query, key in pairs_of(*forward)}
        demand(pairs == {(query, key) for key, query in pairs_of(*backward)}, f"other {kind}blocks for the backward")


def pairs_of(counts: Tensor, indices: Tensor) -> list[tuple[int, int]]:
    lists, numbers = cpu(indices)[0, 0].tolist(), cpu(counts)[0, 0].tolist()
    return [(block, other) for block, number in enumerate(numbers) for other in lists[block][:number]]


def register() -> torch.library.Library:
    """Stands for `flex_attention` as long as the library that it returns is alive."""
    library = torch.library.Library("pretend", "FRAGMENT")
    library.define("flex_forward(Tensor query, Tensor key, Tensor value, int call) -> Tensor")
    library.define("flex_backward(Tensor grad, Tensor query, Tensor key, Tensor value, int call) -> Tensor[]")
    library.impl("flex_forward", flex_forward, "CUDA")
    library.impl("flex_backward", flex_backward, "CUDA")
    flex_module.flex_attention = flex_attention
    return library
