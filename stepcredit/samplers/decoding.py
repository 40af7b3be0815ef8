"""One call of `sample`: completions wait, are decoded and end.

`Decoding` is what all forms of the loop have in common; `GrowingDecoding` is the loop for rows that grow
(`policy/decoding.py`), `samplers/paged.py` has the one for rows in pages.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import count, takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.forest.types import Segment
from stepcredit.policy.decoding import CachedRows, ForestRows
from stepcredit.policy.forward import Policy
from stepcredit.policy.paged_rows import PagedRows
from stepcredit.samplers.drawing import draw
from stepcredit.samplers.params import SamplingParams, Stream
from stepcredit.samplers.prefix_cache import Prefix, PrefixCache
from stepcredit.seeds import generator

DROP_SHARE = 16  # finished rows are dropped once they are more than 1/16 of the batch
JOIN_SHARE = 4  # prompts join once a quarter of the rows is free
CHECK_EVERY = {"cpu": 1}  # steps between checks of which rows have ended: elsewhere a check waits for the device
CHECK_EVERY_ELSEWHERE = 8

Prompt = tuple[int, ...]


class Decoding(ABC):
    """Completions are numbered: prompt * n + sample.

    Args:
        rows: what computes them.
        prefix_cache: of earlier calls; num_reusable, streams: as in `sample`.

    Attributes:
        waiting: completions that have not begun.
        encoded: tokens of prompts whose keys and values were computed; what was cached is not among them.
        uniform: [completions, most tokens] the random numbers of those that have begun, in fp32 on the CPU.
    """

    def __init__(
        self,
        rows: ForestRows | CachedRows | PagedRows,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seeds: Sequence[int],
        limits: Sequence[int],
        max_rows: int,
        on_progress: Callable[[int], None],
        prefix_cache: PrefixCache,
        num_reusable: Callable[[list[int]], int] | None,
        streams: Sequence[Stream] | None = None,
    ) -> None:
        if streams is not None and n != 1:
            raise ValueError(f"streams are of single completions, and n is {n}")
        policy.check_length(max((len(prompt) + most for prompt, most in zip(prompts, limits, strict=True)), default=0))
        self.batch: Any = rows
        self.prompts, self.n, self.params, self.seeds = prompts, n, params, seeds
        self.max_rows, self.on_progress = max_rows, on_progress
        self.prefix_cache, self.num_reusable = prefix_cache, num_reusable
        self.streams = streams
        self.device, self.total, self.longest = policy.device, len(prompts) * n, max(limits, default=0)
        self.stop = policy.stop_token_ids if params.stop_token_ids is None else list(params.stop_token_ids)
        self.limit = np.repeat(np.asarray(limits, dtype=np.int64), n)  # most tokens of each completion
        self.encoded = 0
        self.begun: dict[Prompt, Prefix] = {}  # the last prompt that began: the rest of its group may be waiting
        waiting: Iterable[int] = range(self.total)
        if not rows.mixes_lengths:
            waiting = sorted(waiting, key=lambda row: len(prompts[row // n]))
        self.waiting = deque(waiting)

    def run(self) -> list[list[Segment]]:
        for prompt in self.prompts:  # now, because a prefix that rows continue must not be cut
            if self.prefix_cache.find(prompt) is None:
                self.prefix_cache.find(prompt[:-1])
        self._decode()
        for prefix in self.prefix_cache:
            prefix.detach()
        segments = self._segments()
        return [segments[start : start + self.n] for start in range(0, len(segments), self.n)]

    @abstractmethod
    def _decode(self) -> None:
        """Decode all completions."""

    @abstractmethod
    def _segments(self) -> list[Segment]:
        """All completions."""

    # ------------------------------------------------------------------ beginning

    def _noise(self, prompt: int) -> np.ndarray:
        """[n, most tokens] the uniform numbers of a prompt's completions, from its seed."""
        number, of, used = (0, self.n, 0) if self.streams is None else self.streams[prompt]
        noise = generator(self.seeds[prompt]).random((used + self.longest, of), dtype=np.float32)[used:].T
        return noise if self.streams is None else noise[number : number + 1]

    def _prefixes(self, prompts: Sequence[Prompt]) -> dict[Prompt, Prefix]:
        """The prefixes of prompts; those that are not cached are encoded."""
        distinct = list(dict.fromkeys(prompts))
        cached = {prompt: self._cached(prompt) for prompt in distinct}
        prefixes = {
            prompt: prefix
            for prompt, prefix in cached.items()
            if prefix is not None and (prefix.logits is not None or len(prompt) > 1)
        }
        unread = [prompt for prompt in prefixes if prefixes[prompt].logits is None]
        if unread:
            self.batch.read_last([prefixes[prompt] for prompt in unread], [prompt[-1] for prompt in unread])
        missing = [prompt for prompt in distinct if prompt not in prefixes]
        shorter = {prompt: end for prompt in missing if (end := self._cached(prompt[:-1])) is not None}
        if shorter:
            extended = self.batch.extend(list(shorter.values()), [prompt[-1] for prompt in shorter])
            prefixes |= zip(shorter, extended, strict=True)
        if fresh := [prompt for prompt in missing if prompt not in shorter]:
            prefixes |= zip(fresh, self.batch.encode(fresh), strict=True)
        self.encoded += len(unread) + len(shorter) + sum(map(len, fresh))
        if self.num_reusable is not None:
            for prompt, prefix in prefixes.items():
                self.prefix_cache.add(prompt, prefix)
        self.begun = {prompts[-1]: prefixes[prompts[-1]]}
        return prefixes

    def _cached(self, prompt: Prompt) -> Prefix | None:
        return self.begun.get(prompt) or self.prefix_cache.get(prompt)

    def _next_rows(self, free: int, must: bool) -> list[int]:
        """Completions to start now: whole groups, so that a prompt is encoded once, unless one alone is too large."""
        rows: list[int] = []
        while self.waiting:
            prompt = self.waiting[0] // self.n
            group = sum(1 for _ in takewhile(lambda row, of=prompt: row // self.n == of, self.waiting))  # type: ignore[misc]
            if (
                not self.batch.mixes_lengths
                and rows
                and len(self.prompts[prompt]) != len(self.prompts[rows[0] // self.n])
            ):
                break
            if group > free - len(rows):
                if rows or not must:
                    break
                group = free
            rows += [self.waiting.popleft() for _ in range(group)]
        return rows

    # ------------------------------------------------------------------ ending

    def _reusable(self, row: int, tokens: list[int]) -> Prompt | None:
        """The path up to where later prompts may continue a completion; None: nowhere, or it is cached.

        The keys and values of its last token are not computed.
        """
        assert self.num_reusable is not None
        reusable = min(self.num_reusable(tokens), len(tokens) - 1)
        path = (*self.prompts[row // self.n], *tokens[:reusable])
        return path if reusable > 0 and path not in self.prefix_cache else None

    @staticmethod
    def _segment(tokens: list[int], stopped: bool, logprobs: list[float], entropy: list[float]) -> Segment:
        return Segment(
            token_ids=tokens,
            finish="stop" if stopped else "length",
            columns={"rollout_logprobs": logprobs, "entropy": entropy},
        )


def check_finite(finite: bool) -> None:
    """Refuse log-probabilities that are not finite."""
    if not finite:
        raise UserError("sampling: the model gives log-probabilities that are not finite; its weights may be damaged")


class GrowingDecoding(Decoding):
    """On rows that grow: `ForestRows` or `CachedRows`."""

    batch: ForestRows | CachedRows

    def __init__(self, rows: ForestRows | CachedRows, *given: Any) -> None:
        super().__init__(rows, *given)
        self.stop_ids = torch.tensor(self.stop, dtype=torch.long, device=self.device)
        self.last = torch.from_numpy(self.limit).to(self.device) - 1
        shape = (self.total, self.longest)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(shape, device=self.device)
        self.entropy = torch.zeros(shape, device=self.device)
        self.uniform = torch.zeros(shape, device=self.device)
        self.count = torch.zeros(self.total, dtype=torch.long, device=self.device)
        self.stopped = torch.zeros(self.total, dtype=torch.bool, device=self.device)
        # The rows that are being decoded:
        self.row = torch.zeros(0, dtype=torch.long, device=self.device)  # number of the completion
        self.alive = torch.zeros(0, dtype=torch.bool, device=self.device)
        self.logits: Tensor | None = None  # [rows, vocabulary] of the next token

    def _decode(self) -> None:
        every = CHECK_EVERY.get(self.device.type, CHECK_EVERY_ELSEWHERE)
        for step in count(1):
            if not len(self.row) and not self.waiting:
                break
            self._join()
            token = self._draw()
            alive = self._ended() if step % every == 0 else None
            if alive is not None:
                token = token[self._drop(alive)]
            if len(self.row):
                self.logits = self.batch.step(token)

    def _join(self) -> None:
        """Begin waiting completions where enough rows are free."""
        live = len(self.row)
        free = self.max_rows - live
        if not self.waiting or (live and (not self.batch.mixes_lengths or free * JOIN_SHARE < self.max_rows)):
            return
        rows = self._next_rows(free, must=live == 0)
        if not rows:
            return
        prompts = sorted({row // self.n for row in rows})
        for prompt in prompts:
            noise = torch.from_numpy(self._noise(prompt))
            self.uniform[prompt * self.n : (prompt + 1) * self.n] = noise.to(self.device)
        place = {prompt: number for number, prompt in enumerate(prompts)}
        copies = [place[row // self.n] for row in rows]
        logits = self._begin([tuple(self.prompts[prompt]) for prompt in prompts], copies)
        self.logits = logits if self.logits is None or not live else torch.cat([self.logits, logits])
        self.row = torch.cat([self.row, torch.tensor(rows, device=self.device)])
        self.alive = torch.cat([self.alive, self.alive.new_ones(len(rows))])

    def _begin(self, prompts: list[Prompt], copies: list[int]) -> Tensor:
        """Begin rows; `copies` has the number of the prompt of each row. Returns the logits of their first tokens."""
        if isinstance(self.batch, CachedRows):
            self.encoded += sum(map(len, prompts))
            return self.batch.begin(prompts, copies)
        prefixes = self._prefixes(prompts)
        chosen = [prefixes[prompts[copy]] for copy in copies]
        self.batch.begin(chosen)  # type: ignore[arg-type]
        return torch.stack([prefix.next_logits() for prefix in chosen])

    def _draw(self) -> Tensor:
        """Draw one token for every row and record it for the live ones."""
        assert self.logits is not None
        row, live = self.row, self.alive
        last = self.last[row]
        step = torch.minimum(self.count[row], last)
        token, logprobs, entropy = draw(self.logits, self.uniform[row, step], self.params)
        for record, drawn in ((self.tokens, token), (self.logprobs, logprobs), (self.entropy, entropy)):
            record[row, step] = torch.where(live, drawn, record[row, step])
        stopped = torch.isin(token, self.stop_ids) & live
        self.count[row] += live.long()
        self.stopped[row] |= stopped
        self.alive = live & ~stopped & (step < last)
        return token

    def _ended(self) -> np.ndarray | None:
        """[rows] True for rows that go on, once enough others have ended; None before."""
        alive = self.alive.cpu().numpy()
        ended = len(alive) - int(alive.sum())
        if ended == 0 or (ended < len(alive) and ended * DROP_SHARE < len(alive)):
            return None
        self.on_progress(ended)
        return alive

    def _drop(self, alive: np.ndarray) -> Tensor:
        """Remove the ended rows; returns the old numbers of the others."""
        if self.num_reusable is not None:
            self._cache_ended((~alive).nonzero()[0])
        order = torch.from_numpy(self.batch.drop(alive)).to(self.device)
        self.row, self.alive = self.row[order], self.alive[order]
        return order

    def _cache_ended(self, ended: np.ndarray) -> None:
        """Cache the keys and values of ended rows."""
        assert isinstance(self.batch, ForestRows)
        rows, count = self.row.tolist(), self.count.tolist()
        for place in ended.tolist():
            row = rows[place]
            path = self._reusable(row, self.tokens[row, : count[row]].tolist())
            if path is not None:
                reusable = len(path) - len(self.prompts[row // self.n])
                self.prefix_cache.add(path, self.batch.take(place, reusable))

    def _segments(self) -> list[Segment]:
        count, stopped = self.count.tolist(), self.stopped.tolist()
        check_finite(bool(self.logprobs.isfinite().all()))
        columns = self.tokens.cpu(), self.logprobs.cpu(), self.entropy.cpu()
        segments = []
        for row, length in enumerate(count):
            tokens, logprobs, entropy = (column[row, :length].tolist() for column in columns)
            segments.append(self._segment(tokens, stopped[row], logprobs, entropy))
        return segments
