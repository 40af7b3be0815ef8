"""The decode loop for rows in pages.

While the device computes one window of steps the host reads what the window before has drawn, gives the rows that ended
to waiting completions, and hands out pages for the next window. It never waits for a step: a row that goes on has one
token more after every step, so the host knows how many pages it may need without asking.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepcredit.forest.types import Segment
from stepcredit.policy.paged import OutOfPages, PagedPrefix, pages_of, to_device
from stepcredit.samplers.decoding import Decoding, check_finite
from stepcredit.samplers.drawing import draw
from stepcredit.samplers.machine import CHECK_EVERY, COLUMNS, UNSETTLED, PagedSteps, Window

log = logging.getLogger("stepcredit")

JOIN_SHARE = 16  # prompts join once a sixteenth of the rows is free
MAX_UNSETTLED = 0.25  # of the tokens of a window: a row that waits loses about as much as a whole sort takes
DRAWN_AT_ONCE = 64  # rows whose first token is drawn in one call


class PagedDecoding(Decoding):
    """On rows in pages.

    Attributes:
        row: [most rows] the completion in each row; -1: none.
        drawn: [most rows] tokens of each row after the windows that were started, if it goes on so long.
        count: [completions] tokens that are here.
        prefix, own: of each row, what it continues and the pages of its own tokens.
        unsettled: completions whose next token is to be drawn with a whole sort.
    """

    def __init__(self, steps: PagedSteps, *given: Any) -> None:
        super().__init__(steps.rows, *given)
        self.steps, self.pool, most = steps, steps.pool, steps.most
        self.row, self.drawn = np.full(most, -1), np.zeros(most, dtype=np.int64)
        self.prefix: list[PagedPrefix | None] = [None] * most
        self.own: list[list[int]] = [[] for _ in range(most)]
        self.slot = np.full(self.total, -1)  # the row of each completion
        shape = self.total, self.longest
        self.tokens = np.zeros(shape, dtype=np.int32)
        self.logprobs, self.entropy, self.uniform = np.zeros((3, *shape), dtype=np.float32)
        self.count = np.zeros(self.total, dtype=np.int64)
        self.is_stop = np.zeros(len(steps.is_stop), dtype=bool)
        self.is_stop[[number for number in self.stop if number < len(self.is_stop)]] = True
        self.unsettled: list[int] = []
        self.whole_sort = False  # too many rows were not settled
        self.joined = False  # rows since the last window
        self.short = False  # rows were put back for want of pages and none has ended since
        self.under_way: Window | None = None

    def _decode(self) -> None:
        while True:
            self._close_ranks()
            self._settle()
            self._join()
            before, self.under_way = self.under_way, None
            window = self._start(before)
            if before is not None:
                self._collect(before)
            self.under_way = window
            if window is None and before is None and not self.waiting and not self.unsettled:
                break

    # ------------------------------------------------------------------ beginning

    def _join(self) -> None:
        """Begin waiting completions where enough rows are free, and pages for them."""
        free, live = (self.row < 0).nonzero()[0], int((self.row >= 0).sum())
        if not self.waiting or (live and (self.short or len(free) * JOIN_SHARE < self.max_rows)):
            return
        rows = self._next_rows(len(free), must=live == 0)
        prefixes = self._prefixes_that_fit(rows, live)
        if not rows:
            return
        for prompt in {row // self.n for row in rows}:
            self.uniform[prompt * self.n : (prompt + 1) * self.n] = self._noise(prompt)
        slots = free[: len(rows)]
        self.row[slots], self.slot[rows] = rows, slots
        for slot, prefix in zip(slots, prefixes, strict=True):
            self.prefix[slot] = prefix
        self._draw_first(rows, [prefix.next_logits() for prefix in prefixes])

    def _prefixes_that_fit(self, rows: list[int], live: int) -> list[PagedPrefix]:
        """The prefix of each row, if there are pages for it and one for the row to begin in.

        Rows for which there are none go back to those that wait; one stays where no other is live.
        """
        while rows:
            prompts = [tuple(self.prompts[row // self.n]) for row in rows]
            new = [prompt for prompt in dict.fromkeys(prompts) if self._cached(prompt) is None]
            wanted = live + len(rows) + sum(pages_of(len(prompt), self.pool.page) for prompt in new)
            last = live + len(rows) == 1
            if wanted <= len(self.pool.free) or last:
                prefixes = self._prefixes(prompts)
                return [prefixes[prompt] for prompt in prompts]  # type: ignore[misc]
            if len(self.prefix_cache) or self.begun:
                self.begun = {}
                self.pool.reclaim()
            else:
                self.waiting.appendleft(rows.pop())
        return []

    def _draw_first(self, rows: list[int], logits: list[Tensor]) -> None:
        """Draw the next token of rows that are not in a step, and give them to the steps."""
        numbers, slots = np.array(rows), self.slot[rows]
        point = to_device(self.uniform[numbers, self.count[numbers]], self.device)
        parts = [
            draw(torch.stack(logits[first : first + DRAWN_AT_ONCE]), point[first : first + DRAWN_AT_ONCE], self.params)
            for first in range(0, len(rows), DRAWN_AT_ONCE)
        ]
        token, logprobs, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
        self.drawn[slots] = self.count[numbers] + 1
        self.steps.set_rows(slots, token, logprobs, entropy, self.drawn[slots] < self.limit[numbers])
        self.joined = True

    def _settle(self) -> None:
        """Draw for rows whose top-k and top-p were not settled in a step, and let them go on."""
        rows = [row for row in self.unsettled if self.slot[row] >= 0]  # others were put back
        self.unsettled = []
        if not rows:
            return
        paths = []
        for row in rows:
            slot, computed = self.slot[row], int(self.count[row])
            pages = self.own[slot][: pages_of(computed, self.pool.page)]
            paths.append(self._path(slot, pages, computed))
        logits = self.batch.logits_after(paths, [int(self.tokens[row, self.count[row] - 1]) for row in rows])
        self._draw_first(rows, list(logits))

    # ------------------------------------------------------------------ windows

    def _start(self, before: Window | None) -> Window | None:
        """Start a window; None where there is nothing to do."""
        steps = self._hand_out(before)
        most, rows = self.steps.most, self.row
        there = rows >= 0
        if not there.any() or (steps == 0 and not self.joined):
            return None
        bucket = self._bucket(int(there.nonzero()[0].max()) + 1)
        columns, tables = np.zeros((COLUMNS, most), dtype=np.int32), np.zeros((most, self.batch.width), dtype=np.int32)
        uniform = np.zeros((CHECK_EVERY, most), dtype=np.float32)
        for slot in there.nonzero()[0]:
            prefix = self.prefix[slot]
            assert prefix is not None
            above, own = len(prefix.pages), self.own[slot]
            tables[slot, :above] = prefix.pages
            tables[slot, above : above + len(own)] = own
            columns[[0, 2], slot] = prefix.end, above
            number, drawn = rows[slot], self.drawn[slot]
            noise = self.uniform[number, drawn : drawn + steps]
            uniform[: len(noise), slot] = noise
        computed = np.where(there, self.drawn - 1, 0)
        columns[0] += computed
        columns[1] = computed
        columns[3] = np.where(there, self.limit[rows] - self.drawn, 0)
        columns[4] = there
        window = self.steps.run(rows.copy(), tables, columns, uniform, bucket, steps, self.params, self.whole_sort)
        self.drawn = np.where(there, np.minimum(self.drawn + steps, self.limit[rows]), 0)
        self.joined = False
        return window

    def _hand_out(self, before: Window | None) -> int:
        """Give each row the pages that it may need in the next window; returns the steps of the window."""
        while True:
            left = np.where(self.row >= 0, self.limit[self.row] - self.drawn, 0)
            steps = min(CHECK_EVERY, int(left.max()))
            going = (left > 0).nonzero()[0]
            # A row with d tokens drawn has computed d - 1 of them before the window, and d - 1 + steps after it.
            computed = self.drawn[going] - 1 + np.minimum(steps, left[going])
            wanted = {
                slot: more
                for slot, tokens in zip(going.tolist(), computed.tolist(), strict=True)
                if (more := pages_of(tokens, self.pool.page) - len(self.own[slot])) > 0
            }
            try:
                pages = self.pool.take(sum(wanted.values()))
            except OutOfPages:
                self._put_back(before)
                continue
            for slot, more in wanted.items():
                self.own[slot] += [pages.pop() for _ in range(more)]
            both = zip(self.prefix, self.own, strict=True)
            self.batch.fit(max((len(prefix.pages) + len(own) for prefix, own in both if prefix), default=0))
            return steps

    def _put_back(self, before: Window | None) -> None:
        """Let the row with the fewest tokens wait again, from its beginning; it will draw the same tokens."""
        slots = (self.row >= 0).nonzero()[0]
        slot = int(slots[self.drawn[slots].argmin()])
        row, prefix = int(self.row[slot]), self.prefix[slot]
        assert prefix is not None
        if len(slots) == 1 and len(prefix.pages) == pages_of(prefix.end, self.pool.page):
            raise OutOfPages("one row alone, whose prompt is in as few pages as can be")  # `check_one_fits` excludes it
        if before is not None:
            before.row[before.row == row] = -1
        self._free(slot)
        self.count[row] = 0
        self.waiting.appendleft(row)
        self.begun = {}
        self.short = True

    def _close_ranks(self) -> None:
        """Once nothing waits, move rows to the first places where a smaller bucket then holds them."""
        slots = (self.row >= 0).nonzero()[0]
        if self.waiting or not len(slots) or self._bucket(len(slots)) == self._bucket(int(slots.max()) + 1):
            return
        self.steps.move_rows(slots)
        order = np.concatenate([slots, (self.row < 0).nonzero()[0]])
        self.row, self.drawn = self.row[order], self.drawn[order]
        self.prefix = [self.prefix[slot] for slot in order]
        self.own = [self.own[slot] for slot in order]
        self.slot[self.row[: len(slots)]] = np.arange(len(slots))

    def _bucket(self, rows: int) -> int:
        return next(bucket for bucket in self.batch.buckets if bucket >= rows)

    # ------------------------------------------------------------------ ending

    def _collect(self, window: Window) -> None:
        """Store what a window has drawn, and end rows."""
        token, logprobs, entropy = window.arrays()
        for step in range(len(token)):
            slots = ((token[step] >= 0) & (window.row >= 0)).nonzero()[0]
            rows = window.row[slots]
            place = rows, self.count[rows]
            for record, drawn in ((self.tokens, token), (self.logprobs, logprobs), (self.entropy, entropy)):
                record[place] = drawn[step, slots]
            self.count[rows] += 1
        rows = window.row[window.row >= 0]
        self._note_unsettled(window.row[(token == UNSETTLED).any(0) & (window.row >= 0)].tolist(), (token >= 0).sum())
        ended = rows[self._stopped(rows) | (self.count[rows] == self.limit[rows])]
        ended = ended[self.slot[ended] >= 0]  # once
        if len(ended):
            self.on_progress(len(ended))
            self.short = False
            self._end(ended.tolist())

    def _note_unsettled(self, rows: list[int], drawn: int) -> None:
        self.unsettled += rows
        if not self.whole_sort and len(rows) > MAX_UNSETTLED * drawn:
            self.whole_sort = True
            log.info("sampling: top-k and top-p keep so many tokens that the vocabulary is sorted, which takes longer")

    def _stopped(self, rows: np.ndarray) -> np.ndarray:
        count = self.count[rows]
        return (count > 0) & self.is_stop[self.tokens[rows, np.maximum(count - 1, 0)]]

    def _end(self, rows: Sequence[int]) -> None:
        """Free the rows of completions; where later prompts may go on their pages become a prefix's."""
        shorter: dict[int, int] = {}  # fill of last pages that are cut
        for row in rows:
            slot = int(self.slot[row])
            if self.num_reusable is not None:
                path = self._reusable(row, self.tokens[row, : self.count[row]].tolist())
                if path is not None:
                    prefix = self._keep(slot, len(path) - len(self.prompts[row // self.n]))
                    shorter[prefix.pages[-1]] = prefix.fill[-1]
                    self.prefix_cache.add(path, prefix)
            self._free(slot)
        if shorter:
            self.pool.describe(list(shorter), list(shorter.values()))

    def _keep(self, slot: int, count: int) -> PagedPrefix:
        """A prefix of the first tokens that an ended row has added, in the row's pages."""
        return self._path(slot, self.own[slot][: pages_of(count, self.pool.page)], count)

    def _path(self, slot: int, own: list[int], count: int) -> PagedPrefix:
        above = self.prefix[slot]
        assert above is not None
        pages, page = [*above.pages, *own], self.pool.page
        self.pool.hold(pages)
        fill = [*above.fill, *([page] * (len(own) - 1)), count - page * (len(own) - 1)]
        return PagedPrefix(self.pool, pages, fill, own=len(own))

    def _free(self, slot: int) -> None:
        self.pool.release(self.own[slot])
        self.slot[self.row[slot]] = -1
        self.row[slot], self.drawn[slot], self.prefix[slot], self.own[slot] = -1, 0, None, []

    def _segments(self) -> list[Segment]:
        there = np.arange(self.longest) < self.count[:, None]
        check_finite(bool(np.isfinite(self.logprobs[there]).all()))
        stopped = self._stopped(np.arange(self.total))
        segments = []
        for row, length in enumerate(self.count.tolist()):
            columns = self.tokens, self.logprobs, self.entropy
            tokens, logprobs, entropy = (column[row, :length].tolist() for column in columns)
            segments.append(self._segment(tokens, bool(stopped[row]), logprobs, entropy))
        return segments
