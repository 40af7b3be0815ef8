"""The static step of decoding: one token for every row, with shapes and addresses that never change.

What a step needs lies in tensors made once. A *window* is up to `CHECK_EVERY` steps: before it the host sends page
tables and random numbers in one transfer, after it the tokens come back in one, and neither is waited for. On CUDA a
step is one CUDA graph for each number of rows in `BUCKETS`; elsewhere the same function runs as it is.

A step reads the weights once and the pages of every row. For 256 rows of 1,024 tokens in bf16 that is 1.0 + 3.2 GB for
Qwen2.5-0.5B (12 KiB a token) and 3.1 + 7.5 GB for Qwen2.5-1.5B (28 KiB a token), and 0.6 to 1.6 GB of logits
(`samplers/drawing.py`).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import ceil

import numpy as np
import torch
from torch import Tensor

from stepcredit.policy import paged
from stepcredit.policy.cast_weights import CastWeights
from stepcredit.policy.forward import Policy
from stepcredit.policy.paged import (
    CacheShape,
    PagePool,
    check_one_fits,
    free_bytes,
    pages_needed,
    pages_of,
    pages_wanted,
    to_device,
)
from stepcredit.policy.paged_attention import PagedStep, attention_for, compile_for_shapes, flex_agrees
from stepcredit.policy.paged_rows import PagedRows
from stepcredit.samplers.drawing import draw, draw_at_once
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.prefix_cache import PrefixCache

log = logging.getLogger("stepcredit")

CHECK_EVERY = 8  # steps of a window
BUCKETS = (64, 128, 256, 512)  # numbers of rows that a step is made for, up to the most rows
MEMORY_SHARE = 0.5  # of the free memory that pages may take: the rest is for training
ENDED, UNSETTLED = -1, -2  # instead of a token: the row has ended; it is to be drawn with a whole sort
COLUMNS = 5  # numbers of each row that a window sends

Draw = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass
class Window:
    """Steps that were started, and the copy of what they draw that is under way.

    Attributes:
        row: [most rows] the completion in each row; -1: none.
        record: [3, steps + 1, most rows] int32 on the host: tokens, and the bits of log-probabilities and entropies.
            The first are of rows that have joined before the window.
    """

    row: np.ndarray
    record: Tensor
    copied: torch.cuda.Event | None

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, log-probabilities and entropies, once they are here."""
        if self.copied is not None:
            self.copied.synchronize()
        token, logprobs, entropy = self.record.numpy()
        return token, logprobs.view(np.float32), entropy.view(np.float32)


class PagedSteps:
    """The tensors of a step and the graphs that were captured on them.

    Attributes:
        token: [most rows] the last one of each row, which is not computed yet; alive: [most rows] rows that go on.
        now: [1] steps of this window so far.
        record: what was drawn in this window, as in `Window`.
    """

    def __init__(self, rows: PagedRows, most: int) -> None:
        self.rows, self.pool, self.most, self.device = rows, rows.pool, most, rows.pool.device
        self.token = torch.zeros(most, dtype=torch.long, device=self.device)
        self.alive = torch.zeros(most, dtype=torch.bool, device=self.device)
        self.now = torch.zeros(1, dtype=torch.long, device=self.device)
        self.record = torch.full((3, CHECK_EVERY + 1, most), ENDED, dtype=torch.int32, device=self.device)
        self.is_stop = torch.zeros(rows.policy.vocabulary, dtype=torch.bool, device=self.device)
        self.graphs: dict[tuple[int, float, int, float, bool], torch.cuda.CUDAGraph] = {}
        self.draws: dict[tuple[float, int, float, bool], Draw] = {}
        self.addresses: tuple[int, ...] = ()
        self.captures = self.device.type == "cuda"
        self.memory = torch.cuda.graph_pool_handle() if self.captures else None
        self._make_inbox()

    def _make_inbox(self) -> None:
        """One tensor that a window fills: page tables, numbers of the rows, random numbers."""
        most, width = self.most, self.rows.width
        self.inbox = torch.zeros(most * (width + COLUMNS + CHECK_EVERY), dtype=torch.int32, device=self.device)
        self.table = self.inbox[: most * width].view(most, width)
        columns = self.inbox[most * width :].view(-1, most)
        self.position, self.own, self.first_own, self.left, self.keep = columns[:COLUMNS]
        self.uniform = columns[COLUMNS:].view(torch.float32)
        self.graphs.clear()

    def begin_call(self, stop: Sequence[int], addresses: tuple[int, ...]) -> None:
        """Before any window of a call. Graphs whose weights lie elsewhere now are dropped."""
        if addresses != self.addresses:
            self.graphs.clear()
            self.addresses = addresses
        is_stop = np.zeros(len(self.is_stop), dtype=bool)
        is_stop[[number for number in stop if number < len(is_stop)]] = True
        self.is_stop.copy_(to_device(is_stop, self.device))
        self.alive.zero_()
        self.record.fill_(ENDED)

    # ------------------------------------------------------------------ rows

    def set_rows(self, slots: np.ndarray, token: Tensor, logprobs: Tensor, entropy: Tensor, more: np.ndarray) -> None:
        """Rows whose first token was drawn outside of a step; `more`: whether their limits allow another."""
        index, more_left = to_device(np.stack([slots, more.astype(np.int64)]), self.device)
        self.token.index_copy_(0, index, token)
        self.alive.index_copy_(0, index, more_left.bool() & ~self.is_stop[token])
        for target, value in zip(self.record, (token.int(), *_bits(logprobs, entropy)), strict=True):
            target[0].index_copy_(0, index, value)

    def move_rows(self, slots: np.ndarray) -> None:
        """Rows at these slots move to the first ones; only their tokens do, pages stay where they are."""
        index = to_device(slots, self.device)
        for state in (self.token, self.alive):
            state[: len(slots)].copy_(state.index_select(0, index))

    def run(
        self,
        row: np.ndarray,
        tables: np.ndarray,
        columns: np.ndarray,
        uniform: np.ndarray,
        rows: int,
        steps: int,
        params: SamplingParams,
        whole_sort: bool,
    ) -> Window:
        """Start a window.

        Args:
            tables: [most rows, width] int32; columns: [COLUMNS, most rows] int32: of each row the position of its next
                token, its own tokens so far, the place of its first own page in its table, tokens that may still be
                drawn, and whether it is there at all.
            uniform: [CHECK_EVERY, most rows] float32.
            rows: a bucket that holds all rows.
            whole_sort: for top-k and top-p sort the whole vocabulary, so that every row is settled.
        """
        if self.table.shape[1] != self.rows.width:
            self._make_inbox()
        sent = np.concatenate([tables.ravel(), columns.ravel(), uniform.view(np.int32).ravel()])
        self.inbox.copy_(to_device(sent, self.device))
        self.alive &= self.keep.bool()
        step = self._step_of(rows, params, whole_sort) if steps else None
        self.now.zero_()
        for _ in range(steps):
            assert step is not None
            step()
        if self.device.type != "cuda":
            record, copied = self.record.clone(), None
        else:
            record = torch.empty(self.record.shape, dtype=torch.int32, pin_memory=True)
            record.copy_(self.record, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.record.fill_(ENDED)
        return Window(row, record, copied)

    # ------------------------------------------------------------------ one step

    def _step(self, rows: int, draw: Draw) -> None:
        """One token more for the first rows. Nothing in it depends on values that the host would have to know."""
        alive, page, width = self.alive[:rows], self.pool.page, self.table.shape[1]
        own, position = self.own[:rows] + self.now, self.position[:rows] + self.now
        entry = (self.first_own[:rows] + own // page).clamp(max=width - 1)
        number = torch.where(alive, self.table[:rows].gather(1, entry[:, None])[:, 0], 0).long()
        offset = torch.where(alive, own % page, 0)
        self.pool.fill.scatter_(0, number, (offset + 1).int())
        self.pool.start.scatter_(0, number, (position - offset).int())
        num_pages = torch.where(alive, entry + 1, 1).int()
        slot = number * page + offset
        plan = PagedStep(self.pool, self.table[:rows], num_pages, slot, position, self.rows.attention)
        logits = self.rows.logits(self.token[:rows], plan)
        uniform = self.uniform.index_select(0, self.now)[0, :rows]
        token, logprobs, entropy, valid = draw(logits, uniform)
        goes_on = alive & valid
        drawn = torch.where(goes_on, token, torch.where(alive, UNSETTLED, ENDED)).int()
        for target, value in zip(self.record, (drawn, *_bits(logprobs, entropy)), strict=True):
            target[:, :rows].index_copy_(0, self.now + 1, value[None])
        self.token[:rows].copy_(torch.where(goes_on, token, self.token[:rows]))
        alive.copy_(goes_on & ~self.is_stop[token] & (self.left[:rows] - self.now > 1))
        self.now += 1

    def _step_of(self, rows: int, params: SamplingParams, whole_sort: bool) -> Callable[[], None]:
        """The step of a bucket: a graph where it can be captured."""
        draw = self._draw_of(params, whole_sort)
        if not self.captures:
            return lambda: self._step(rows, draw)
        key = rows, params.temperature, params.top_k, params.top_p, whole_sort
        if key not in self.graphs:
            try:
                self.graphs[key] = self._capture(rows, draw)
            except RuntimeError as error:
                log.warning("sampling: a step is not captured as a CUDA graph, which makes it slower: %s", error)
                self.captures = False
                self.graphs.clear()
                return lambda: self._step(rows, draw)
        return self.graphs[key].replay

    def _capture(self, rows: int, draw: Draw) -> torch.cuda.CUDAGraph:
        """The graph of a step. While it is made no row is alive, so that what is run writes to page 0 only."""
        alive = self.alive.clone()
        self.alive.zero_()
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(side):
                for _ in range(2):  # compiles kernels, and allocates what they keep
                    self.now.zero_()
                    self._step(rows, draw)
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as NCCL's, may go on meanwhile.
            with torch.cuda.graph(graph, pool=self.memory, capture_error_mode="thread_local"):
                self._step(rows, draw)
        finally:
            self.now.zero_()
            self.alive.copy_(alive)
        return graph

    def _draw_of(self, params: SamplingParams, whole_sort: bool) -> Draw:
        key = params.temperature, params.top_k, params.top_p, whole_sort
        if whole_sort:
            self.draws[key] = lambda logits, uniform: (*draw(logits, uniform, params), torch.ones_like(uniform).bool())
        elif key not in self.draws:
            self.draws[key] = draw_for(params, len(self.is_stop), self.device, self.device.type == "cuda")
        return self.draws[key]


def _bits(*values: Tensor) -> Iterator[Tensor]:
    return (value.float().view(torch.int32) for value in values)


def draw_for(params: SamplingParams, vocabulary: int, device: torch.device, compiles: bool) -> Draw:
    """`draw_at_once`; compiled it passes over the logits fewer times."""

    def plain(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return draw_at_once(logits, uniform, params)

    if not compiles:
        return plain
    compiled = compile_for_shapes(plain)
    generator = torch.Generator().manual_seed(0)
    logits, uniform = (torch.rand(shape, generator=generator).to(device) for shape in ((2, vocabulary), (2,)))
    try:
        torch.testing.assert_close(compiled(8 * logits, uniform)[2], plain(8 * logits, uniform)[2])
    except Exception as error:  # of the compiler, whose errors have no common base
        log.warning("sampling: drawing is not compiled, which makes it slower: %s", error)
        return plain
    return compiled


def _drop(prefix_cache: PrefixCache) -> None:
    """Give the pages of cached prefixes back."""
    if len(prefix_cache):
        log.info("sampling: %d cached prefixes are dropped, because their memory is wanted for rows", len(prefix_cache))
        prefix_cache.clear()


class PagedMachine:
    """What is kept between calls of `sample`: the pages, and the steps on them.

    Args:
        most_rows: completions decoded at once.

    Raises:
        NotImplementedError: the model cannot be decoded in pages.
    """

    def __init__(self, policy: Policy, most_rows: int) -> None:
        self.policy, self.most_rows = policy, most_rows
        self.shape = CacheShape.of(policy)
        group = int(policy.model.config.get_text_config().num_attention_heads) // self.shape.kv_heads
        if policy.device.type == "cuda" and not flex_agrees(self.shape, group, paged.PAGE, policy.device):
            raise NotImplementedError("flex_attention does not agree with the reference")
        self.buckets = [*(rows for rows in BUCKETS if rows < most_rows), most_rows]
        self.weights: CastWeights | None = None
        self.rows: PagedRows | None = None
        self.steps: PagedSteps | None = None
        self.limited = False  # by the memory

    @contextmanager
    def prepared(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        limits: Sequence[int],
        most_tokens: int,
        stop: Sequence[int],
        prefix_cache: PrefixCache,
        reuse: bool,
    ) -> Iterator[PagedSteps]:
        """Everything that one call needs.

        Args:
            most_tokens: new ones of a path, which trees come to in several calls.
            reuse: later calls go on from the completions.

        Raises:
            UserError: a prompt and its completion do not fit into the memory.
        """
        # Prompts of a growing tree hold parts of its completions: together they have at most the tokens of a path.
        path = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        limit = max(most_tokens, *limits)
        rows = self.most_rows if reuse else min(self.most_rows, len(prompts) * n)
        least = pages_needed(rows, limit, ceil(rows / n) + 1, max(path - limit, 1), paged.PAGE)
        if self.rows is None or (least > self.rows.pool.pages and not self.limited):
            cached = prefix_cache.max_bytes // (paged.PAGE * self.shape.token_bytes) if reuse else 0
            prefix_cache.clear()
            self._make_pool(pages_wanted(least, int(cached)), least)
        assert self.rows is not None and self.steps is not None
        self.rows.fit(pages_of(path, paged.PAGE) + 1)
        self.rows.pool.reclaim = partial(_drop, prefix_cache)
        check_one_fits(self.rows.pool, prompts, limits)
        try:
            self.weights = self.weights or CastWeights(self.policy)
            with self.weights.in_use():
                self.steps.begin_call(stop, self.weights.addresses())
                yield self.steps
        except BaseException:  # pages that are not free, or numbers that are not finite, must not reach later calls
            prefix_cache.clear()
            self.rows = self.steps = None
            raise

    def release(self) -> None:
        """Give back the memory: pages, graphs and copies of weights are made anew for the next call."""
        self.rows = self.steps = self.weights = None
        self.limited = False

    def _make_pool(self, pages: int, least: int) -> None:
        """Pages for the largest call so far, as far as there is memory."""
        self.rows = self.steps = None
        device, page_bytes = self.policy.device, paged.PAGE * self.shape.token_bytes
        free = free_bytes(device)
        room = pages if free is None else int(free * MEMORY_SHARE) // page_bytes
        self.limited = room < pages
        pages = max(2, min(pages, room))
        if pages < least:
            log.warning(
                "sampling: %d MiB of keys and values are wanted for %d rows and there is memory for %d MiB; fewer rows "
                "are decoded at once where completions are long",
                least * page_bytes >> 20,
                self.most_rows,
                pages * page_bytes >> 20,
            )
        log.info("sampling: %d pages of %d tokens, %d MiB", pages, paged.PAGE, pages * page_bytes >> 20)
        pool = PagePool(self.shape, pages, paged.PAGE, device)
        self.rows = PagedRows(self.policy, pool, self.buckets, attention_for(device))
        self.steps = PagedSteps(self.rows, self.most_rows)
