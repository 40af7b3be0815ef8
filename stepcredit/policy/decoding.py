"""Rows of tokens that grow one token at a time, and the keys and values that they attend to.

`ForestRows` stores what rows share (a prompt, a segment of a tree) once, as a `Prefix`, and reads it once per step for
all rows that began together and continue it; the tokens that a row adds are its own part, written into memory that was
allocated in advance. The last row moves into the place of a row that ends, so that no other row is copied. `CachedRows`
does the same with a transformers cache, for models whose attention function cannot be replaced.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from stepcredit.policy.attention import ForestPlan
from stepcredit.policy.batching import cheapest_batches
from stepcredit.policy.forward import Policy
from stepcredit.policy.kernels import AttentionRule, hide, kernel_for, merge
from stepcredit.policy.packing import Packing

MAX_PREFILL = 1 << 14  # token positions of prompts that are encoded in one call
FIRST_ROOM = 256  # tokens that a row has room for at first; the room doubles when it is full


@dataclass(eq=False)
class Prefix:
    """Keys and values of a run of tokens that rows continue.

    Attributes:
        keys, values: of each layer, [kv heads, length, size].
        above: the run before it; None: it is the start of a prompt.
        logits: [vocabulary] of the token after it; None: not computed.
    """

    keys: list[Tensor]
    values: list[Tensor]
    above: "Prefix | None" = None
    logits: Tensor | None = None
    start: int = field(init=False)

    def __post_init__(self) -> None:
        self.start = 0 if self.above is None else self.above.end

    @property
    def end(self) -> int:
        """Position of the token after it."""
        return self.start + self.keys[0].shape[1]

    def path(self) -> "list[Prefix]":
        """The runs from the beginning of the prompt to this one."""
        runs, run = [], self
        while run.above is not None:
            runs.append(run)
            run = run.above
        return [run, *reversed(runs)]

    def cut(self, length: int) -> tuple["Prefix", int]:
        """The prefix of its first tokens, and the bytes that this takes: none, for both parts are stored once."""
        prefix = self
        while prefix.above is not None and prefix.start >= length:
            prefix = prefix.above
        return (prefix.split(length - prefix.start) if prefix.end > length else prefix), 0

    def split(self, length: int) -> "Prefix":
        """Split it after `length` of its tokens: returns the first part; this prefix becomes the rest."""
        first = self._part(slice(length))
        self.keys, self.values = ([one[:, length:] for one in pair] for pair in (self.keys, self.values))
        self.above, self.start = first, first.end
        return first

    def without_last(self) -> "Prefix":
        """The same without its last token, which must not be the first of the prompt."""
        if self.keys[0].shape[1] == 1:
            assert self.above is not None
            return self.above
        return self._part(slice(-1))

    def _part(self, tokens: slice) -> "Prefix":
        keys, values = ([one[:, tokens] for one in pair] for pair in (self.keys, self.values))
        return Prefix(keys, values, self.above)

    @property
    def num_bytes(self) -> int:
        """Memory of its keys and values."""
        return sum(one.nbytes for pair in (self.keys, self.values) for one in pair)

    def next_logits(self) -> Tensor:
        assert self.logits is not None, "the last token of this prefix was not encoded"
        return self.logits

    def detach(self) -> None:
        """Copy tensors that are small views of a larger batch, so that the batch can be freed."""
        for tensors in (self.keys, self.values):
            tensors[:] = [compact(tensor) for tensor in tensors]
        self.logits = None if self.logits is None else compact(self.logits)


class _PrefixBatch:
    """Prefixes of similar length, batched, and the rows that continue each of them.

    Args:
        prefixes: distinct.
        prefix_of_row: for each row the number of its prefix in this batch, or -1.
    """

    def __init__(self, prefixes: Sequence[Prefix], prefix_of_row: np.ndarray, device: torch.device) -> None:
        self.device = device
        self._stack(prefixes)
        self.assign_rows(prefix_of_row)

    def _stack(self, prefixes: Sequence[Prefix]) -> None:
        self.prefixes = list(prefixes)
        lengths = torch.tensor([prefix.keys[0].shape[1] for prefix in prefixes])
        self.start = torch.tensor([prefix.start for prefix in prefixes], device=self.device)
        self.filled = (torch.arange(int(lengths.max())) < lengths[:, None]).to(self.device)
        self.ragged = bool((lengths != lengths[0]).any())
        self.keys, self.values = (
            [_pad([getattr(prefix, name)[layer] for prefix in prefixes]) for layer in range(len(prefixes[0].keys))]
            for name in ("keys", "values")
        )
        for number, prefix in enumerate(prefixes):  # views of the batch, not a second copy
            size = int(lengths[number])
            prefix.keys = [keys[number, :, :size] for keys in self.keys]
            prefix.values = [values[number, :, :size] for values in self.values]

    def assign_rows(self, prefix_of_row: np.ndarray) -> bool:
        """Note which prefix each row continues; False when no row continues one of them."""
        rows = (prefix_of_row >= 0).nonzero()[0]
        if len(rows) == 0:
            self.prefix_of_row = prefix_of_row
            return False
        counts = np.bincount(prefix_of_row[rows], minlength=len(self.prefixes))
        used = counts > 0
        if 2 * int(used.sum()) < len(used):  # drop the prefixes that no row continues
            self._stack([self.prefixes[number] for number in used.nonzero()[0]])
            new_number = used.cumsum() - 1
            prefix_of_row = np.where(prefix_of_row >= 0, new_number[prefix_of_row], -1)
            counts = counts[used]
        self.prefix_of_row = prefix_of_row
        order = rows[np.argsort(prefix_of_row[rows], kind="stable")]
        place = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
        index = np.zeros((len(counts), int(counts.max())), dtype=np.int64)
        index[prefix_of_row[order], place] = order
        flat = prefix_of_row[order] * index.shape[1] + place
        back = np.argsort(order, kind="stable")
        self.rows = None if len(rows) == len(prefix_of_row) else torch.from_numpy(rows).to(self.device)
        self.index = torch.from_numpy(index).to(self.device)
        self.place = torch.from_numpy(flat[back]).to(self.device)
        return True

    def attend(self, layer: int, query: Tensor, rule: AttentionRule, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention of rows [rows, kv heads, group, size] to their prefix: out and lse of `self.rows`."""
        group = query.shape[2]
        queries = query[self.index].transpose(1, 2).flatten(2, 3)  # [prefixes, kv heads, rows * group, size]
        out, lse = kernel_for(queries, mask, rule)[0](queries, self.keys[layer], self.values[layer], False, mask, rule)
        out, lse = (tensor.unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1) for tensor in (out, lse))
        return out[self.place], lse[self.place]

    def mask(self, position: Tensor, window: int | None, group: int) -> Tensor | None:
        """The mask that is added to the scores, [prefixes, 1, 1 or rows * group, longest]."""
        visible = self.filled[:, None] if self.ragged else None
        if window is not None:
            key = self.start[:, None] + torch.arange(self.filled.shape[1], device=self.device)
            near = position[self.index].repeat_interleave(group, 1)[:, :, None] - key[:, None] < window
            visible = near if visible is None else near & visible
        return None if visible is None else hide(visible)[:, None]


class ForestRows:
    """Rows on forest attention. It is the `AttentionPlan` of its own steps.

    Args:
        policy: with scoring form "forest".
        capacity: rows at most.
        max_tokens: tokens that a row adds at most.
    """

    mixes_lengths = True

    def __init__(self, policy: Policy, capacity: int, max_tokens: int) -> None:
        self.policy, self.capacity, self.device = policy, capacity, policy.device
        self.max_tokens = max_tokens
        self.count = np.zeros(0, dtype=np.int64)  # own tokens of each row
        self.position = np.zeros(0, dtype=np.int64)  # of each row's next token
        self.prefix: list[Prefix] = []  # that each row continues
        self.prefix_batches: list[_PrefixBatch] = []
        self._now: Tensor | None = None  # `position` on the device; None when rows have changed
        self.uneven = False  # rows with different numbers of own tokens are read together
        self.own: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer, [capacity, kv heads, room, size]

    # ------------------------------------------------------------------ beginning and ending rows

    def encode(self, prompts: Sequence[Sequence[int]]) -> list[Prefix]:
        """Prefixes of whole prompts, each encoded once, in packed rows."""
        prefixes = []
        for batch in by_budget(prompts, MAX_PREFILL):
            packing = Packing.of_rows(batch, self.device)
            plan = ForestPlan(packing, record=True)
            states = self.policy.hidden(packing.token_ids[None], packing.position[None], plan)[0]
            ends = np.cumsum([len(prompt) for prompt in batch])
            logits = self.policy.logits(states[torch.from_numpy(ends - 1).to(self.device)])
            assert plan.recorded is not None
            layers = [plan.recorded[layer] for layer in sorted(plan.recorded)]
            for number, (prompt, end) in enumerate(zip(batch, ends.tolist(), strict=True)):
                part = slice(end - len(prompt), end)
                keys, values = ([pair[which][part].transpose(0, 1) for pair in layers] for which in (0, 1))
                prefixes.append(Prefix(keys, values, logits=logits[number]))
        return prefixes

    def extend(self, prefixes: Sequence[Prefix], tokens: Sequence[int]) -> list[Prefix]:
        """Prefixes with one more token each, in one call."""
        rows = ForestRows(self.policy, len(prefixes), 1)
        rows.begin(prefixes)
        logits = rows.step(torch.tensor(tokens, device=self.device))
        longer = []
        for number, prefix in enumerate(prefixes):
            keys, values = ([pair[which][number, :, :1].clone() for pair in rows.own] for which in (0, 1))
            if prefix.logits is None:  # its own last token was not encoded yet
                keys = [torch.cat(pair, 1) for pair in zip(prefix.keys, keys, strict=True)]
                values = [torch.cat(pair, 1) for pair in zip(prefix.values, values, strict=True)]
                longer.append(Prefix(keys, values, prefix.above, logits[number]))
                prefix.keys, prefix.values = ([one[:, :-1] for one in pair] for pair in (keys, values))  # not twice
            else:
                longer.append(Prefix(keys, values, prefix, logits[number]))
        return longer

    def read_last(self, prefixes: Sequence[Prefix], tokens: Sequence[int]) -> None:
        """Compute the logits after prefixes, in one call; `tokens` are their last tokens."""
        rows = ForestRows(self.policy, len(prefixes), 1)
        rows.begin([prefix.without_last() for prefix in prefixes])
        for prefix, logits in zip(prefixes, rows.step(torch.tensor(tokens, device=self.device)), strict=True):
            prefix.logits = logits

    def begin(self, prefixes: Sequence[Prefix]) -> None:
        """Add rows, each of which continues a prefix."""
        self._now = None
        before = len(self.count)
        if before and not self.uneven:
            self.uneven = True
            for tensor in chain.from_iterable(self.own):  # masked, but from now on read: must be finite
                tensor[before:] = 0
                tensor[:before, :, int(self.count.max()) :] = 0
        self.count = np.append(self.count, np.zeros(len(prefixes), dtype=np.int64))
        self.position = np.append(self.position, np.array([prefix.end for prefix in prefixes], dtype=np.int64))
        self.prefix += prefixes
        for shared in self.prefix_batches:
            shared.assign_rows(np.append(shared.prefix_of_row, np.full(len(prefixes), -1)))
        paths = [prefix.path() for prefix in prefixes]
        for level in range(max(map(len, paths))):
            at_level = [path[level] if level < len(path) else None for path in paths]
            distinct = list(dict.fromkeys(prefix for prefix in at_level if prefix is not None))
            num_rows = Counter(at_level)
            for batch in cheapest_batches([(num_rows[prefix], prefix.keys[0].shape[1]) for prefix in distinct]):
                number = {distinct[index]: place for place, index in enumerate(batch)}
                new_rows = [-1 if prefix is None else number.get(prefix, -1) for prefix in at_level]
                prefix_of_row = np.array([-1] * before + new_rows)
                self.prefix_batches.append(
                    _PrefixBatch([distinct[index] for index in batch], prefix_of_row, self.device)
                )

    def drop(self, alive: np.ndarray) -> np.ndarray:
        """Remove the rows that are not alive.

        Args:
            alive: [rows] bool.

        Returns:
            For each row that is left its number before.
        """
        self._now = None
        left = int(alive.sum())
        order = np.arange(left)
        holes = (~alive[:left]).nonzero()[0]
        movers = alive[left:].nonzero()[0] + left
        order[holes] = movers
        if len(holes):
            target, source = (torch.from_numpy(rows).to(self.device) for rows in (holes, movers))
            longest = int(self.count[movers].max())
            for pair in self.own:
                for tensor in pair:
                    tensor[target, :, :longest] = tensor[source, :, :longest]
        self.count, self.position = self.count[order], self.position[order]
        self.prefix = [self.prefix[row] for row in order.tolist()]
        self.prefix_batches = [
            shared for shared in self.prefix_batches if shared.assign_rows(shared.prefix_of_row[order])
        ]
        return order

    def take(self, row: int, count: int) -> Prefix:
        """A prefix of the first `count` tokens that a row has added, copied."""
        keys, values = ([pair[which][row, :, :count].clone() for pair in self.own] for which in (0, 1))
        return Prefix(keys, values, self.prefix[row])

    # ------------------------------------------------------------------ one token more

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to every row.

        Args:
            tokens: [rows].

        Returns:
            Logits of the next token [rows, vocabulary].
        """
        if self._now is None:  # rows have begun or ended
            self._now, self._last = (torch.from_numpy(rows).to(self.device) for rows in (self.position, self.count))
        self._even = bool((self.count == self.count[0]).all())
        self._masks: dict[tuple[int | None, int], list[Tensor | None]] = {}
        states = self.policy.hidden(tokens[:, None], self._now[:, None], self)[:, 0]
        # A row that has ended but was not dropped yet keeps writing at its last place.
        self.count = np.minimum(self.count + 1, self.max_tokens - 1)
        self._last = (self._last + 1).clamp(max=self.max_tokens - 1)
        self.position = self.position + 1
        self._now = self._now + 1
        return self.policy.logits(states)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """Each row's newest token attends to itself, the row's own part and all prefixes that the row continues."""
        keys, values = self._write(layer, key[:, :, 0], value[:, :, 0])
        grouped = query[:, :, 0].unflatten(1, (keys.shape[1], -1))  # [rows, kv heads, group, size]
        masks = self._step_masks(rule, grouped)
        mask = masks[-1]
        out, lse = kernel_for(grouped, mask, rule)[0](grouped, keys, values, False, mask, rule)
        out = out.float()
        for shared, mask in zip(self.prefix_batches, masks, strict=False):
            rows = slice(None) if shared.rows is None else shared.rows
            more = shared.attend(layer, grouped, rule, mask)
            out[rows], lse[rows] = merge(out[rows], lse[rows], *more)
        return out.flatten(1, 2)[:, None].to(query.dtype)

    def _write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append a token's keys and values to each row's own part: [rows, kv heads, longest, size] of both."""
        longest = int(self.count.max()) + 1
        if layer == len(self.own):
            self.own.append(tuple(self._room(new, longest) for new in (key, value)))  # type: ignore[arg-type]
        pair, rows = self.own[layer], len(self.count)
        if pair[0].shape[2] < longest:
            larger = tuple(self._room(new, 2 * old.shape[2]) for new, old in zip((key, value), pair, strict=True))
            for old, new in zip(pair, larger, strict=True):
                new[:rows, :, : longest - 1] = old[:rows, :, : longest - 1]
            pair = self.own[layer] = larger  # type: ignore[assignment]
        for room, new in zip(pair, (key, value), strict=True):
            if self._even:
                room[:rows, :, longest - 1] = new
            else:
                room[torch.arange(rows, device=self.device), :, self._last] = new
        return pair[0][:rows, :, :longest], pair[1][:rows, :, :longest]

    def _room(self, new: Tensor, slots: int) -> Tensor:
        make = new.new_zeros if self.uneven else new.new_empty
        return make((self.capacity, new.shape[1], min(max(slots, FIRST_ROOM), self.max_tokens), new.shape[2]))

    def _step_masks(self, rule: AttentionRule, grouped: Tensor) -> list[Tensor | None]:
        """The masks of the shared prefixes and, last, of the own parts; made once per step and window."""
        window = rule.window if rule.window is not None and int(self.position.max()) >= rule.window else None
        wanted = (window, grouped.shape[2])
        if wanted not in self._masks:
            assert self._now is not None
            masks = [shared.mask(self._now, window, grouped.shape[2]) for shared in self.prefix_batches]
            own = None
            if window is not None or not self._even:
                last = self._last[:, None]
                slot = torch.arange(int(self.count.max()) + 1, device=self.device)
                visible = slot <= last if window is None else (slot <= last) & (last - slot < window)
                own = hide(visible)[:, None, None]
            self._masks[wanted] = [*masks, own]
        return self._masks[wanted]


class CachedRows:
    """Rows on a transformers cache, for the other scoring forms: they begin together, with prompts of one length."""

    mixes_lengths = False

    def __init__(self, policy: Policy) -> None:
        self.policy, self.device = policy, policy.device

    def begin(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        """Rows that continue prompts of one length: `copies` has the number of the prompt of each row."""
        self.cache = DynamicCache(config=self.policy.model.config)
        self.position = len(prompts[0])
        logits = self._call(torch.tensor(prompts, device=self.device), torch.arange(self.position, device=self.device))
        index = torch.tensor(copies, device=self.device)
        self.cache.batch_select_indices(index)
        return logits[index]

    def drop(self, alive: np.ndarray) -> np.ndarray:
        order = alive.nonzero()[0]
        self.cache.batch_select_indices(torch.from_numpy(order).to(self.device))
        return order

    def step(self, tokens: Tensor) -> Tensor:
        self.position += 1
        return self._call(tokens[:, None], torch.tensor([self.position - 1], device=self.device))

    def _call(self, token_ids: Tensor, position: Tensor) -> Tensor:
        return self.policy.model(
            input_ids=token_ids,
            attention_mask=torch.ones(len(token_ids), self.position, dtype=torch.long, device=self.device),
            position_ids=position.expand(len(token_ids), -1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


def compact(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where it is less than half of the storage that it is a view of."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > 2 * tensor.nbytes else tensor


def _pad(rows: list[Tensor]) -> Tensor:
    """[kv heads, length, size] of each row -> [rows, kv heads, longest, size], padded with zeros."""
    longest = max(row.shape[1] for row in rows)
    out = rows[0].new_zeros(len(rows), rows[0].shape[0], longest, rows[0].shape[2])
    for number, row in enumerate(rows):
        out[number, :, : row.shape[1]] = row
    return out


def by_budget(prompts: Sequence[Sequence[int]], budget: int) -> Iterator[list[Sequence[int]]]:
    """Prompts in batches of at most this many tokens; a longer one alone."""
    batch: list[Sequence[int]] = []
    size = 0
    for prompt in prompts:
        if batch and size + len(prompt) > budget:
            yield batch
            batch, size = [], 0
        batch.append(prompt)
        size += len(prompt)
    if batch:
        yield batch
