"""Rows of tokens that grow one token at a time, and the keys and values that they attend to.

`ForestRows` keeps what rows share (a prompt, a segment of a tree) once, as a `Prefix`, and reads it once per step for
all rows that began together and go on from it; what a row adds is its own part, written into room that was made in
advance. A row that ends gives its place to the last row, so that no other row is copied. `CachedRows` does the same
work with a transformers cache, for models whose attention cannot be taken over.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from stepcredit.policy.attention import ForestPlan, Rule, hide, kernel_for, merge
from stepcredit.policy.batching import cheapest_runs
from stepcredit.policy.forward import Policy
from stepcredit.policy.packing import Packing

MAX_PREFILL = 1 << 14  # token positions of prompts that are encoded in one call
FIRST_ROOM = 256  # tokens that a row has room for at first; the room doubles when it is full


@dataclass(eq=False)
class Prefix:
    """Keys and values of a run of tokens that rows go on from.

    Attributes:
        keys, values: of each layer, [kv heads, length, size].
        above: the run before it; None: it begins a prompt.
        logits: [vocabulary] of the token after it.
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

    def split(self, length: int) -> "Prefix":
        """Cut it behind so many of its tokens: the first part, which this one, now the rest, goes on from."""
        first = self._part(slice(length))
        self.keys, self.values = ([one[:, length:] for one in pair] for pair in (self.keys, self.values))
        self.above, self.start = first, first.end
        return first

    def without_last(self) -> "Prefix":
        """The same without its last token; it must not be the first of the prompt."""
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
        """Hold these numbers alone, not the batch that they are a view of."""
        for tensors in (self.keys, self.values):
            tensors[:] = [_alone(tensor) for tensor in tensors]
        self.logits = None if self.logits is None else _alone(self.logits)


class _Shared:
    """Prefixes of like length, batched, and the rows that go on from each.

    Args:
        prefixes: none twice.
        node: for each row of the batch the number of its prefix here, or -1.
    """

    def __init__(self, prefixes: Sequence[Prefix], node: np.ndarray, device: torch.device) -> None:
        self.prefixes = list(prefixes)
        lengths = torch.tensor([prefix.keys[0].shape[1] for prefix in prefixes])
        self.start = torch.tensor([prefix.start for prefix in prefixes], device=device)
        self.filled = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
        self.ragged = bool((lengths != lengths[0]).any())
        self.keys, self.values = (
            [_stack([getattr(prefix, name)[layer] for prefix in prefixes]) for layer in range(len(prefixes[0].keys))]
            for name in ("keys", "values")
        )
        for number, prefix in enumerate(prefixes):  # hold the batch, not another copy
            size = int(lengths[number])
            prefix.keys = [keys[number, :, :size] for keys in self.keys]
            prefix.values = [values[number, :, :size] for values in self.values]
        self.device = device
        self.regroup(node)

    def regroup(self, node: np.ndarray) -> bool:
        """Note which row goes on from which prefix; False when none does."""
        self.node = node
        rows = (node >= 0).nonzero()[0]
        if len(rows) == 0:
            return False
        counts = np.bincount(node[rows], minlength=len(self.filled))
        live = counts > 0
        if 2 * int(live.sum()) < len(live):  # let go of prefixes from which no row goes on
            prefixes = [self.prefixes[number] for number in live.nonzero()[0]]
            self.__init__(prefixes, np.where(node >= 0, (live.cumsum() - 1)[node], -1), self.device)  # type: ignore[misc]
            return True
        order = rows[np.argsort(node[rows], kind="stable")]
        place = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
        index = np.zeros((len(counts), int(counts.max())), dtype=np.int64)
        index[node[order], place] = order
        flat = node[order] * index.shape[1] + place
        back = np.argsort(order, kind="stable")
        self.rows = None if len(rows) == len(node) else torch.from_numpy(rows).to(self.device)
        self.index = torch.from_numpy(index).to(self.device)
        self.place = torch.from_numpy(flat[back]).to(self.device)
        return True

    def attend(self, layer: int, query: Tensor, rule: Rule, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention of rows [rows, kv heads, group, size] to their prefix: out and lse of `self.rows`."""
        group = query.shape[2]
        queries = query[self.index].transpose(1, 2).flatten(2, 3)  # [prefixes, kv heads, rows * group, size]
        out, lse = kernel_for(queries, mask, rule)[0](queries, self.keys[layer], self.values[layer], False, mask, rule)
        out, lse = (tensor.unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1) for tensor in (out, lse))
        return out[self.place], lse[self.place]

    def mask(self, position: Tensor, window: int | None, group: int) -> Tensor | None:
        """What is added to the scores, [prefixes, 1, 1 or rows * group, longest]."""
        visible = self.filled[:, None] if self.ragged else None
        if window is not None:
            key = self.start[:, None] + torch.arange(self.filled.shape[1], device=self.device)
            near = position[self.index].repeat_interleave(group, 1)[:, :, None] - key[:, None] < window
            visible = near if visible is None else near & visible
        return None if visible is None else hide(visible)[:, None]


class ForestRows:
    """Rows on forest attention. It is the `AttentionPlan` of its own steps.

    Args:
        policy: on the forest path.
        capacity: rows at most.
        max_tokens: tokens that a row adds at most.
    """

    mixes_lengths = True

    def __init__(self, policy: Policy, capacity: int, max_tokens: int) -> None:
        self.policy, self.capacity, self.device = policy, capacity, policy.device
        self.max_tokens = max_tokens
        self.count = np.zeros(0, dtype=np.int64)  # own tokens of each row
        self.position = np.zeros(0, dtype=np.int64)  # of each row's next token
        self.prefix: list[Prefix] = []  # that each row goes on from
        self.shared: list[_Shared] = []
        self._now: Tensor | None = None  # `position` on the device; None when rows have changed
        self.uneven = False  # rows of different ages are read together
        self.own: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer, [capacity, kv heads, room, size]

    # ------------------------------------------------------------------ beginning and ending rows

    def encode(self, prompts: Sequence[Sequence[int]]) -> list[Prefix]:
        """Prefixes of whole prompts, each encoded once, in packed rows."""
        prefixes = []
        for batch in _by_budget(prompts, MAX_PREFILL):
            packing = Packing.of_rows(batch, self.device)
            plan = ForestPlan(packing, keep=True)
            states = self.policy.hidden(packing.token_ids[None], packing.position[None], plan)[0]
            ends = np.cumsum([len(prompt) for prompt in batch])
            logits = self.policy.logits(states[torch.from_numpy(ends - 1).to(self.device)])
            assert plan.kept is not None
            layers = [plan.kept[layer] for layer in sorted(plan.kept)]
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
            if prefix.logits is None:  # an end that was waiting for this token
                keys = [torch.cat(pair, 1) for pair in zip(prefix.keys, keys, strict=True)]
                values = [torch.cat(pair, 1) for pair in zip(prefix.values, values, strict=True)]
                longer.append(Prefix(keys, values, prefix.above, logits[number]))
            else:
                longer.append(Prefix(keys, values, prefix, logits[number]))
        return longer

    def read_last(self, prefixes: Sequence[Prefix], tokens: Sequence[int]) -> None:
        """Give prefixes their logits, in one call; `tokens` are their last ones."""
        rows = ForestRows(self.policy, len(prefixes), 1)
        rows.begin([prefix.without_last() for prefix in prefixes])
        for prefix, logits in zip(prefixes, rows.step(torch.tensor(tokens, device=self.device)), strict=True):
            prefix.logits = logits

    def begin(self, prefixes: Sequence[Prefix]) -> None:
        """Add rows, each going on from a prefix."""
        self._now = None
        before = len(self.count)
        if before and not self.uneven:
            self.uneven = True
            for tensor in chain.from_iterable(self.own):  # what is read from now on must be numbers, if hidden ones
                tensor[before:] = 0
                tensor[:before, :, int(self.count.max()) :] = 0
        self.count = np.append(self.count, np.zeros(len(prefixes), dtype=np.int64))
        self.position = np.append(self.position, np.array([prefix.end for prefix in prefixes], dtype=np.int64))
        self.prefix += prefixes
        for shared in self.shared:
            shared.regroup(np.append(shared.node, np.full(len(prefixes), -1)))
        paths = [prefix.path() for prefix in prefixes]
        for level in range(max(map(len, paths))):
            here = [path[level] if level < len(path) else None for path in paths]
            distinct = list(dict.fromkeys(prefix for prefix in here if prefix is not None))
            rows_of = Counter(here)
            for run in cheapest_runs([(rows_of[prefix], prefix.keys[0].shape[1]) for prefix in distinct]):
                number = {distinct[index]: place for place, index in enumerate(run)}
                node = np.array([-1] * before + [number.get(prefix, -1) if prefix else -1 for prefix in here])
                self.shared.append(_Shared([distinct[index] for index in run], node, self.device))

    def drop(self, keep: np.ndarray) -> np.ndarray:
        """End the rows that are not kept.

        Args:
            keep: [rows] bool.

        Returns:
            For each row that is left its number before.
        """
        self._now = None
        left = int(keep.sum())
        order = np.arange(left)
        holes = (~keep[:left]).nonzero()[0]
        movers = keep[left:].nonzero()[0] + left
        order[holes] = movers
        if len(holes):
            target, source = (torch.from_numpy(rows).to(self.device) for rows in (holes, movers))
            longest = int(self.count[movers].max())
            for pair in self.own:
                for tensor in pair:
                    tensor[target, :, :longest] = tensor[source, :, :longest]
        self.count, self.position = self.count[order], self.position[order]
        self.prefix = [self.prefix[row] for row in order.tolist()]
        self.shared = [shared for shared in self.shared if shared.regroup(shared.node[order])]
        return order

    def take(self, row: int, count: int) -> Prefix:
        """A copy of the first `count` tokens that a row has added, to go on from."""
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
        # A row that has ended but was not dropped yet goes on writing in its last place.
        self.count = np.minimum(self.count + 1, self.max_tokens - 1)
        self._last = (self._last + 1).clamp(max=self.max_tokens - 1)
        self.position = self.position + 1
        self._now = self._now + 1
        return self.policy.logits(states)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """Each row's newest token attends to itself, the row's own part and everything the row goes on from."""
        keys, values = self._write(layer, key[:, :, 0], value[:, :, 0])
        grouped = query[:, :, 0].unflatten(1, (keys.shape[1], -1))  # [rows, kv heads, group, size]
        masks = self._step_masks(rule, grouped)
        mask = masks[-1]
        out, lse = kernel_for(grouped, mask, rule)[0](grouped, keys, values, False, mask, rule)
        out = out.float()
        for shared, mask in zip(self.shared, masks, strict=False):
            rows = slice(None) if shared.rows is None else shared.rows
            more = shared.attend(layer, grouped, rule, mask)
            out[rows], lse[rows] = merge(out[rows], lse[rows], *more)
        return out.flatten(1, 2)[:, None].to(query.dtype)

    def _write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put a token's keys and values behind each row's own part: [rows, kv heads, longest, size] of both."""
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

    def _step_masks(self, rule: Rule, grouped: Tensor) -> list[Tensor | None]:
        """The masks of the shared prefixes and, last, of the own parts; made once per step and window."""
        window = rule.window if rule.window is not None and int(self.position.max()) >= rule.window else None
        wanted = (window, grouped.shape[2])
        if wanted not in self._masks:
            assert self._now is not None
            masks = [shared.mask(self._now, window, grouped.shape[2]) for shared in self.shared]
            own = None
            if window is not None or not self._even:
                last = self._last[:, None]
                slot = torch.arange(int(self.count.max()) + 1, device=self.device)
                visible = slot <= last if window is None else (slot <= last) & (last - slot < window)
                own = hide(visible)[:, None, None]
            self._masks[wanted] = [*masks, own]
        return self._masks[wanted]


class CachedRows:
    """Rows on a transformers cache, for the other paths: they begin together, with prompts of one length."""

    mixes_lengths = False

    def __init__(self, policy: Policy) -> None:
        self.policy, self.device = policy, policy.device

    def begin(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        """Rows that go on from prompts of one length: `copies` numbers the prompt of each row."""
        self.cache = DynamicCache(config=self.policy.model.config)
        self.position = len(prompts[0])
        logits = self._call(torch.tensor(prompts, device=self.device), torch.arange(self.position, device=self.device))
        index = torch.tensor(copies, device=self.device)
        self.cache.batch_select_indices(index)
        return logits[index]

    def drop(self, keep: np.ndarray) -> np.ndarray:
        order = keep.nonzero()[0]
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


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is less than half of the memory that it holds on to."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > 2 * tensor.nbytes else tensor


def _stack(rows: list[Tensor]) -> Tensor:
    """[kv heads, length, size] of each row -> [rows, kv heads, longest, size], padded with zeros."""
    longest = max(row.shape[1] for row in rows)
    out = rows[0].new_zeros(len(rows), rows[0].shape[0], longest, rows[0].shape[2])
    for number, row in enumerate(rows):
        out[number, :, : row.shape[1]] = row
    return out


def _by_budget(prompts: Sequence[Sequence[int]], budget: int) -> Iterator[list[Sequence[int]]]:
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
