"""Prefixes in pages: prompts encoded into them, and tokens added to them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stepcredit.policy.attention import ForestPlan
from stepcredit.policy.decoding import MAX_PREFILL, by_budget
from stepcredit.policy.forward import Policy
from stepcredit.policy.packing import Packing
from stepcredit.policy.paged import PagedPrefix, PagePool, pages_of, to_device
from stepcredit.policy.paged_attention import PagedAttention, PagedStep


class PagedRows:
    """Computes with a policy on the pages of a pool.

    Args:
        buckets: numbers of rows that are computed at once, ascending; fewer are filled up.

    Attributes:
        width: pages that a table has room for.
    """

    mixes_lengths = True

    def __init__(self, policy: Policy, pool: PagePool, buckets: Sequence[int], attention: PagedAttention) -> None:
        self.policy, self.pool, self.buckets, self.attention = policy, pool, buckets, attention
        self.width = 16

    def fit(self, pages: int) -> None:
        """Have room for paths of so many pages; doubled, because kernels and graphs are made for one width."""
        while self.width < pages:
            self.width *= 2

    def encode(self, prompts: Sequence[Sequence[int]]) -> list[PagedPrefix]:
        """Prefixes of whole prompts, each encoded once, in packed rows."""
        return [prefix for batch in by_budget(prompts, MAX_PREFILL) for prefix in self._encode(batch)]

    def _encode(self, prompts: Sequence[Sequence[int]]) -> list[PagedPrefix]:
        pool, page, device = self.pool, self.pool.page, self.pool.device
        prefixes = []
        for prompt in prompts:
            number = pages_of(len(prompt), page)
            fill = [page] * (number - 1) + [len(prompt) - page * (number - 1)]
            prefixes.append(PagedPrefix(pool, pool.take(number), fill, own=number))
        packing = Packing.of_rows(prompts, device)
        plan = ForestPlan(packing, record=True)
        states = self.policy.hidden(packing.token_ids[None], packing.position[None], plan)[0]
        ends = np.cumsum([len(prompt) for prompt in prompts])
        logits = self.policy.logits(states[to_device(ends - 1, device)])
        slots = [
            np.arange(fill) + number * page
            for prefix in prefixes
            for number, fill in zip(prefix.pages, prefix.fill, strict=True)
        ]
        where = to_device(np.concatenate(slots), device)
        assert plan.recorded is not None
        for layer, (keys, values) in plan.recorded.items():
            pool.write(layer, where, keys, values)
        for prefix, row in zip(prefixes, logits, strict=True):
            prefix.logits = row
        pool.describe(
            [number for prefix in prefixes for number in prefix.pages],
            [fill for prefix in prefixes for fill in prefix.fill],
            [page * place for prefix in prefixes for place in range(len(prefix.pages))],
        )
        return prefixes

    def extend(self, prefixes: Sequence[PagedPrefix], tokens: Sequence[int]) -> list[PagedPrefix]:
        """Prefixes with one more token each, in one call; a last page that is not full is copied."""
        pool, page = self.pool, self.pool.page
        new = pool.take(len(prefixes))
        used = [prefix.fill[-1] % page for prefix in prefixes]  # of the new pages: 0 where the last one is full
        copied = [number for number, filled in enumerate(used) if filled]
        if copied:
            pool.copy([prefixes[number].pages[-1] for number in copied], [new[number] for number in copied])
        longer = []
        for prefix, last, filled in zip(prefixes, new, used, strict=True):
            whole = len(prefix.pages) - (filled > 0)
            pool.hold(prefix.pages[:whole])
            longer.append(PagedPrefix(pool, [*prefix.pages[:whole], last], [*prefix.fill[:whole], filled + 1], own=1))
        starts = [prefix.end - prefix.fill[-1] for prefix in longer]
        pool.describe(new, [filled + 1 for filled in used], starts)
        slots = [last * page + filled for last, filled in zip(new, used, strict=True)]
        for prefix, row in zip(longer, self.logits_after(longer, tokens, slots), strict=True):
            prefix.logits = row
        return longer

    def read_last(self, prefixes: Sequence[PagedPrefix], tokens: Sequence[int]) -> None:
        """Compute the logits after prefixes, in one call; `tokens` are their last tokens."""
        for prefix, row in zip(prefixes, self.logits_after(prefixes, tokens), strict=True):
            prefix.logits = row

    def logits_after(
        self, paths: Sequence[PagedPrefix], tokens: Sequence[int], slots: Sequence[int] | None = None
    ) -> Tensor:
        """Logits [paths, vocabulary] after paths whose last tokens are given.

        Args:
            slots: where the last token's keys and values are stored; None: they have been stored before.
        """
        slots = [0] * len(paths) if slots is None else slots
        parts, most = [], self.buckets[-1]
        for first in range(0, len(paths), most):
            chosen = slice(first, first + most)
            parts.append(self._logits_after(paths[chosen], tokens[chosen], slots[chosen]))
        return torch.cat(parts)

    def _logits_after(self, paths: Sequence[PagedPrefix], tokens: Sequence[int], slots: Sequence[int]) -> Tensor:
        count = len(paths)
        self.fit(max(len(path.pages) for path in paths))
        rows = next(bucket for bucket in self.buckets if bucket >= count)
        columns = np.zeros((4 + self.width, rows), dtype=np.int64)
        columns[3] = 1
        columns[:4, :count] = tokens, slots, [path.end - 1 for path in paths], [len(path.pages) for path in paths]
        for number, path in enumerate(paths):
            columns[4 : 4 + len(path.pages), number] = path.pages
        token, slot, position, num_pages, *table = to_device(columns, self.pool.device)
        step = PagedStep(self.pool, torch.stack(table, 1).int(), num_pages.int(), slot, position, self.attention)
        return self.logits(token, step)[:count]

    def logits(self, tokens: Tensor, step: PagedStep) -> Tensor:
        """Logits [rows, vocabulary] after one token [rows] of every row."""
        return self.policy.logits(self.policy.hidden(tokens[:, None], step.position[:, None], step)[:, 0])
