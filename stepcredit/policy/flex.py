"""The attention of a packed row as one masked call, through torch's `flex_attention`.

A run of tokens is seen by what continues it and by nothing else, and in a packed row that is one range behind it. So
one number for each key, `end`, is the whole mask: query q sees key k where k <= q < end[k]. A sliding window asks
further that position[q] < position[k] + window.

flex_attention computes the mask inside its kernel and skips blocks of 128 x 128 scores in which nothing is visible.
Which these are follows from the least and the greatest `end` and position of each block; no mask of length x length
exists. Blocks where everything is visible are computed without the mask.

The call is compiled when a model is loaded (`one_mask_agrees`), once for all lengths: rows are padded to whole blocks.
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from stepcredit.policy.kernels import PLAIN, AttentionRule, hide
from stepcredit.policy.transfer import send

log = logging.getLogger("stepcredit")

DEVICES = ("cuda",)  # that compute a packed row in one masked call; the others by squares and rectangles
BLOCK = 128  # queries, and keys, of a block of scores
TILES = ("fwd_BLOCK_M", "fwd_BLOCK_N", "fwd_num_stages", "fwd_num_warps")  # torch's names of what `_tiles` gives
FEWEST_BLOCKS = 2  # of a row: torch compiles sizes of 1, and rows shorter than a block, by themselves
MAX_VARIANTS = 64  # compiled at once: head sizes, types, windows and caps of all models, with and without gradient


def padded_length(num_positions: int, device: torch.device) -> int:
    """Length of a packed row with its padding; without any on devices that need none."""
    if device.type not in DEVICES:
        return num_positions
    return max(FEWEST_BLOCKS, -(-num_positions // BLOCK)) * BLOCK


# ------------------------------------------------------------------ the mask


@dataclass(frozen=True)
class TreeMask:
    """What each query sees, on the device.

    Attributes:
        end: [length] int32, see above; 0 for padding.
        position, limit: [length] int32, for a window: a query sees keys whose limit is beyond its position. None: all.
        blocks: for each query block how many key blocks are partly visible, and which; the same of those that are
            wholly visible; and both for each key block. Counts are [1, 1, blocks], lists [1, 1, blocks, blocks], int32.
    """

    end: Tensor
    position: Tensor | None
    limit: Tensor | None
    blocks: tuple[Tensor, ...]

    @classmethod
    def of(cls, end: Tensor, position: Tensor, window: int | None, device: torch.device | str) -> "TreeMask":
        """The mask of a row, made on the CPU and sent in one transfer.

        Args:
            end, position: [length], whole blocks, on the CPU.
            window: a query sees keys less than this many positions back; None: all.
        """
        partial, full = block_kinds(end, position, window)
        lists = [tensor for kind in (partial, full, partial.T, full.T) for tensor in _listed(kind)]
        far = [] if window is None else [position.int(), position.int() + window]
        first, *rest = map(_own, send([end, *far, *lists], device))
        here, limit = rest[: len(far)] or (None, None)
        return cls(first, here, limit, tuple(rest[len(far) :]))


def _own(tensor: Tensor) -> Tensor:
    """The same memory, no longer a view of a tensor, which the compiler would look at: that differs between calls."""
    return torch.ops.aten._unsafe_view(tensor, tensor.shape)


def block_kinds(end: Tensor, position: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Which blocks of scores are partly visible and which wholly: two [query blocks, key blocks] bool, never both True.

    Without a window the first is exact; with one it may hold blocks in which nothing is visible.
    """
    ends, positions = end.view(-1, BLOCK), position.view(-1, BLOCK)
    number = torch.arange(len(ends))
    before, first = number[:, None] > number, number[:, None] * BLOCK
    visible = (before | (number[:, None] == number)) & (first < ends.amax(1))
    full = before & (first + BLOCK - 1 < ends.amin(1))
    if window is not None:
        low, high = positions.masked_fill(ends == 0, len(end)).amin(1), positions.amax(1)
        visible &= low[:, None] - high < window
        full &= high[:, None] - low < window
    return visible & ~full, full


def _listed(kind: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of each row are True, and their numbers, first in each row; what comes after them is 0."""
    row, column = kind.nonzero().unbind(1)
    count = kind.sum(1, dtype=torch.int32)
    place = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    listed = torch.zeros(kind.shape, dtype=torch.int32)
    listed[row, place] = column.int()
    return count[None, None], listed[None, None]


# ------------------------------------------------------------------ the call


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    end: Tensor,
    position: Tensor | None,
    limit: Tensor | None,
    blocks: tuple[Tensor, ...],
    scale: str,
    cap: str,
    tiles: str,
) -> Tensor:
    """Attention of a packed row; what is compiled.

    Args:
        query: [1, heads, length, size]; key, value: [1, kv heads, length, size].
        end, position, limit, blocks: of the `TreeMask`.
        scale, cap, tiles: numbers as text ("": none): text is a constant to the compiler, a number would be an input.

    Returns:
        [1, heads, length, size]
    """
    length = query.shape[2]
    torch._check(key.shape[2] == length and value.shape[2] == length)
    torch._check(length % BLOCK == 0)  # told to the compiler, so that the kernel need not look for the end of the row

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (k <= q) & (q < end[k])
        if position is not None and limit is not None:
            seen = seen & (position[q] < limit[k])
        return seen

    bounded = None
    if cap:
        bound = float(cap)

        def bounded(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return bound * torch.tanh(score / bound)

    kv_count, kv_list, full_kv_count, full_kv_list, q_count, q_list, full_q_count, full_q_list = blocks
    mask = BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=kv_count,
        kv_indices=kv_list,
        full_kv_num_blocks=full_kv_count,
        full_kv_indices=full_kv_list,
        q_num_blocks=q_count,
        q_indices=q_list,
        full_q_num_blocks=full_q_count,
        full_q_indices=full_q_list,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
    )
    numbers = [int(number) for number in tiles.split()]
    options: Any = dict(zip(TILES, numbers, strict=True)) if numbers else None
    return flex_attention(
        query,
        key,
        value,
        score_mod=bounded,
        block_mask=mask,
        scale=float(scale),
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=options,
    )


compiled_attention = torch.compile(masked_attention, dynamic=True, fullgraph=True)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: TreeMask, rule: AttentionRule) -> Tensor:
    """Attention of a packed row: query [1, heads, length, size], key and value [1, kv heads, length, size].

    Returns:
        [1, heads, length, size]; 0 for padding.
    """
    # DDP is not to cut the graph; more variants than the limit would be an error; and sizes that are equal when it is
    # compiled, such as a number of blocks and one of heads, are not to be taken for the same.
    settings = torch._dynamo.config.patch(optimize_ddp=False, recompile_limit=MAX_VARIANTS)
    sizes = torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    with settings, sizes, torch.autocast(query.device.type, enabled=False):
        return compiled_attention(
            _own(query),
            _own(key),
            _own(value),
            mask.end,
            mask.position,
            mask.limit,
            mask.blocks,
            repr(float(rule.scale)),
            "" if rule.cap is None else repr(float(rule.cap)),
            _tiles(query.dtype, query.shape[-1]),
        )


def _tiles(dtype: torch.dtype, size: int) -> str:
    """Queries and keys of a tile, stages and warps of the forward kernel, for head sizes that torch has no tiles for.

    torch takes 64 x 64 tiles in three stages for sizes between those of its table, which fill an H100's shared memory
    (227 KiB) or more of it from 129 on, in fp32 from 65 on. These take at most 128 KiB.
    """
    if size in (64, 128, 256):
        return ""
    if dtype == torch.float32:
        return "" if size < 64 else "32 32 2 4" if size < 128 else "32 16 2 4"
    return "" if size < 128 else "64 32 3 4" if size < 256 else "32 16 2 4"


# ------------------------------------------------------------------ whether it is right


@dataclass(frozen=True)
class Heads:
    """What of a layer's attention makes another kernel of the same call."""

    count: int
    kv_count: int
    size: int
    scale: float
    window: bool
    cap: float | None


@cache
def one_mask_agrees(device: torch.device, dtype: torch.dtype, heads: Heads) -> bool:
    """Whether the masked call gives what the plain kernel gives, forward and backward; trying it once compiles it."""
    try:
        _compare(device, dtype, heads)
    except (
        Exception
    ) as error:  # of the compiler, of its C++ and Triton compilers, of the driver: any means that it fails
        log.warning(
            "attention in one masked call cannot be used on %s (%s, %d heads of size %d, %d of keys); squares and "
            "rectangles are slower: %s",
            device,
            dtype,
            heads.count,
            heads.size,
            heads.kv_count,
            f"{type(error).__name__}: {error}".strip().splitlines()[0],
        )
        return False
    return True


def _compare(device: torch.device, dtype: torch.dtype, heads: Heads) -> None:
    """Compare both on a small tree, wherever it is called from.

    Raises:
        ArithmeticError: they differ.
    """
    window = 90 if heads.window else None
    rule = AttentionRule(heads.scale, window, heads.cap)
    generator = torch.Generator().manual_seed(0)
    counts = heads.count, heads.kv_count, heads.kv_count, heads.count
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        end, position = _small_tree()
        shapes = [(1, len(end), count * heads.size) for count in counts]
        *rows, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        mask = TreeMask.of(end, position, window, device)
        grad = _heads(grad, heads)
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in rows]
            query, key, value = (_heads(tensor, heads) for tensor in leaves)
            out = attend(query, key, value, mask, rule)
            grads = torch.autograd.grad(out, leaves, grad)
        with torch.no_grad():
            query, key, value = (_heads(tensor, heads) for tensor in rows)
            again = attend(query, key, value, mask, rule)
            expected = _expected([query, key, value], grad, end, position, rule)
        results = out.detach(), again, *(_heads(tensor, heads) for tensor in grads)
    tolerance = 2e-3 if dtype == torch.float32 else 2e-2
    names = ("output", "output without gradient", "gradient of queries", "gradient of keys", "gradient of values")
    for name, result, wanted in zip(names, results, (expected[0], *expected), strict=True):
        distance = float((result.float() - wanted).norm() / wanted.norm())
        if not distance <= tolerance:  # not a number is no agreement
            raise ArithmeticError(f"its {name} differs from the plain kernel's by {distance:.2g} of its size")
        if bool(result[:, :, int(end.max()) :].any()):
            raise ArithmeticError(f"its {name} is not 0 at the padding")


def _heads(rows: Tensor, heads: Heads) -> Tensor:
    """[1, length, heads * size] -> [1, heads, length, size], in the layout of a layer, for which torch compiles."""
    return rows.unflatten(2, (-1, heads.size)).transpose(1, 2)


def _expected(
    given: list[Tensor], grad: Tensor, end: Tensor, position: Tensor, rule: AttentionRule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients by the plain kernel in fp32, 0 at the padding."""
    query = torch.arange(len(end))[:, None]
    visible = (query >= query.T) & (query < end)
    if rule.window is not None:
        visible &= position[:, None] - position < rule.window
    mask = hide(visible.to(grad.device))[None, None]
    real = (end > 0).to(grad.device)[:, None]
    exact = [tensor.float() for tensor in given]
    out, sums = PLAIN[0](*exact, False, mask, rule)
    out = out * real
    return out, *PLAIN[1](grad.float() * real, *exact, out, sums, False, mask, rule)


def _small_tree() -> tuple[Tensor, Tensor]:
    """`end` and `position` of a prompt with two completions, which end inside blocks, and padding behind."""
    last = 3 * BLOCK - 37
    end, position = (torch.zeros(3 * BLOCK, dtype=torch.int32) for _ in range(2))
    for first, after, reach in ((0, 150, last), (150, 290, 290), (290, last, last)):
        end[first:after] = reach
        position[first:after] = torch.arange(after - first) + min(first, 150)
    return end, position
