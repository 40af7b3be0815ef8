"""Keys and values in pages of a fixed number of tokens, allocated once: what rows share is held once and never copied.

A *page* has `PAGE` slots, one for each token, and belongs to one run of tokens; its *fill* says how many slots are in
use. A path of tokens is a list of pages: those of its prompt, of the segments above, and its own. Several paths may
list a page. Each page counts its holders and returns to the pool with the last of them. Page 0 belongs to nobody: rows
that have ended write there.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

import numpy as np
import torch
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.policy.attention import ForestPlan
from stepcredit.policy.decoding import compact
from stepcredit.policy.forward import Policy
from stepcredit.policy.packing import Packing
from stepcredit.policy.transfer import send

PAGE = 128  # tokens; a block of flex_attention
SPARE = 8  # one page more for so many that rows need
CACHED_SHARE = 4  # cached prefixes have room for so many times what rows need


@dataclass(frozen=True)
class CacheShape:
    """What a model keeps of a token: keys and values of every layer."""

    layers: int
    kv_heads: int
    size: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.size * self.dtype.itemsize

    @classmethod
    @torch.no_grad()
    def of(cls, policy: Policy) -> "CacheShape":
        """That of a policy, found by encoding one token.

        Raises:
            NotImplementedError: its layers differ in shape.
        """
        packing = Packing.of_rows([[0]], policy.device)
        plan = ForestPlan(packing, record=True)
        policy.hidden(packing.token_ids[None], packing.position[None], plan)
        assert plan.recorded is not None
        kept = {(*one.shape[1:], one.dtype) for pair in plan.recorded.values() for one in pair}
        if len(kept) > 1:
            raise NotImplementedError(f"keys and values differ in shape: {sorted(map(str, kept))}")
        ((kv_heads, size, dtype),) = kept
        return cls(len(plan.recorded), kv_heads, size, dtype)


def pages_of(tokens: int, page: int) -> int:
    """Pages that a run of so many tokens takes."""
    return ceil(tokens / page)


def pages_needed(rows: int, limit: int, prompts: int, longest_prompt: int, page: int) -> int:
    """Pages with which rows never wait for pages: each row's own tokens, each prompt once, and page 0.

    Args:
        rows: decoded at once; limit: tokens that a row may add.
        prompts: distinct ones that these rows continue; longest_prompt: in tokens.
    """
    return 1 + rows * pages_of(limit, page) + prompts * pages_of(longest_prompt, page)


def pages_wanted(least: int, cached: int) -> int:
    """Pages of a pool: what rows need, some to spare, and room for cached prefixes, `cached` pages at most."""
    return least + least // SPARE + min(cached, CACHED_SHARE * least)


def pool_bytes(shape: CacheShape, pages: int, page: int = PAGE) -> int:
    """Memory of a pool: keys and values of every slot, and two numbers for each page."""
    return pages * (page * shape.token_bytes + 8)


class OutOfPages(Exception):
    """No page is free, even after `PagePool.reclaim`."""


class PagePool:
    """All pages.

    Args:
        pages: their number, page 0 included; page: slots of each.

    Attributes:
        data: [layers, 2, kv heads, pages * page, size], keys and values; zeros at first, for masked slots are read.
        fill: [pages] slots in use; start: [pages] position of the first slot's token. Both on the device.
        reclaim: called when pages are wanting, before `OutOfPages` is raised.
    """

    def __init__(self, shape: CacheShape, pages: int, page: int, device: torch.device) -> None:
        self.shape, self.pages, self.page, self.device = shape, pages, page, device
        slots = pages * page
        self.data = torch.zeros(shape.layers, 2, shape.kv_heads, slots, shape.size, dtype=shape.dtype, device=device)
        self.fill, self.start = torch.zeros(2, pages, dtype=torch.int32, device=device)
        self.fill[:1].fill_(1)
        self.holders = np.zeros(pages, dtype=np.int64)
        self.free = list(range(pages - 1, 0, -1))
        self.reclaim: Callable[[], object] = lambda: None

    @property
    def page_bytes(self) -> int:
        return self.page * self.shape.token_bytes

    def take(self, count: int) -> list[int]:
        """Pages for one holder.

        Raises:
            OutOfPages: there are not so many.
        """
        if count > len(self.free):
            self.reclaim()
        if count > len(self.free):
            raise OutOfPages(f"{count} pages are wanted and {len(self.free)} of {self.pages} are free")
        taken = [self.free.pop() for _ in range(count)]
        self.holders[taken] = 1
        return taken

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder of each of these pages."""
        np.add.at(self.holders, np.asarray(pages, dtype=np.int64), 1)

    def release(self, pages: Sequence[int]) -> None:
        """One holder less; pages without one are free."""
        for page in pages:
            self.holders[page] -= 1
            assert self.holders[page] >= 0, "a page was released twice"
            if self.holders[page] == 0:
                self.free.append(page)

    def describe(self, pages: Sequence[int], fill: Sequence[int], start: Sequence[int] | None = None) -> None:
        """Set the fill of pages, and the position where each starts."""
        index, *values = to_device(np.array([pages, fill, *([] if start is None else [start])]), self.device)
        for target, value in zip((self.fill, self.start), values, strict=False):
            target.index_copy_(0, index, value.int())

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [tokens, kv heads, size] of a layer at slots [tokens]."""
        both = torch.stack((keys, values)).transpose(1, 2).to(self.data.dtype)
        self.data[layer].index_copy_(2, slots, both)

    def copy(self, pages: Sequence[int], new: Sequence[int]) -> None:
        """Copy the contents of pages to new ones."""
        source, target = to_device(np.array([pages, new], dtype=np.int64), self.device)
        by_page = self.data.unflatten(3, (self.pages, self.page))
        by_page.index_copy_(3, target, by_page.index_select(3, source))
        self.start.index_copy_(0, target, self.start.index_select(0, source))


class PagedPrefix:
    """A path of tokens that rows continue. It holds its pages until nobody refers to it.

    Args:
        pages: of the whole path, each held once for this prefix.
        fill: tokens of each page that are part of the path.
        own: how many of the last pages no shorter prefix had; their memory is counted as this prefix's.
        logits: [vocabulary] of the token after it; None: not computed.
    """

    def __init__(
        self, pool: PagePool, pages: Sequence[int], fill: Sequence[int], own: int, logits: Tensor | None = None
    ) -> None:
        self.pool, self.pages, self.fill, self.own, self.logits = pool, list(pages), list(fill), own, logits
        self.end = sum(fill)
        weakref.finalize(self, pool.release, self.pages).atexit = False

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values that it adds to those of shorter prefixes."""
        return self.own * self.pool.page_bytes

    def next_logits(self) -> Tensor:
        assert self.logits is not None, "the last token of this prefix was not encoded"
        return self.logits

    def cut(self, length: int) -> tuple["PagedPrefix", int]:
        """The prefix of its first tokens, and the bytes that this takes: a page that is cut is copied."""
        if length == self.end:
            return self, 0
        ends = list(accumulate(self.fill))
        whole = int(np.searchsorted(ends, length, side="right"))
        rest = length - (ends[whole - 1] if whole else 0)
        partial = self.pool.take(1 if rest else 0)
        if rest:
            self.pool.copy([self.pages[whole]], partial)
            self.pool.describe(partial, [rest])
        self.pool.hold(self.pages[:whole])
        fill = [*self.fill[:whole], *([rest] if rest else [])]
        shorter = PagedPrefix(self.pool, [*self.pages[:whole], *partial], fill, own=len(partial))
        return shorter, shorter.num_bytes

    def detach(self) -> None:
        """Copy logits that are a small view of a larger batch, so that the batch can be freed."""
        self.logits = None if self.logits is None else compact(self.logits)


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Numbers of the host on the device, sent without waiting; on a CPU the array itself."""
    return send([torch.from_numpy(values)], device)[0]


def free_bytes(device: torch.device) -> int | None:
    """Memory of a device that is not in use; None: not known."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def check_one_fits(pool: PagePool, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
    """Refuse prompts that do not fit into a pool even alone.

    Raises:
        UserError: naming the memory that one takes.
    """
    for prompt, limit in zip(prompts, limits, strict=True):
        # A cached path may end in a page of its own for every token, so the prompt is encoded anew where it must.
        pages = 1 + pages_of(len(prompt), pool.page) + pages_of(limit, pool.page)
        if pages > pool.pages:
            raise UserError(
                f"sampling: a prompt of {len(prompt)} tokens and {limit} new ones take {pages * pool.page_bytes >> 20} "
                f"MiB of keys and values, and there is room for {pool.pages * pool.page_bytes >> 20} MiB; lower "
                "--sampler.max-new-tokens or --task.max-prompt-tokens, or take a device with more memory"
            )
