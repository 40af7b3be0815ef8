"""`Packing`: a forest as one row of tokens, each prompt and each segment once, with what each token may attend to.

The last token of a completion is left out: no token follows that its state could predict.

Trees come one after the other and every tree in depth-first order, so that what follows a run of tokens on any path is
one range after it. A *run* is a prompt or segment together with its only children: tokens attend causally inside their
run, and to all of every run above it. Those are two kinds of blocks of the score matrix, and no other part of it is
computed:

    square     queries [a, b)  x  keys [a, b), causal      one for each run
    rectangle  queries [b, c)  x  keys [a, b), full        one for each run that others continue in [b, c)

Example: a prompt of 3 tokens with completions of 2 and 4.

>>> from stepcredit.forest.types import Problem, Segment, Tree
>>> forest = Forest.from_trees([Tree(Problem(), [1, 2, 3], [Segment([4, 5]), Segment([6, 7, 8, 9])])])
>>> packing, before = Packing.of_forest(forest)
>>> packing.token_ids.tolist(), packing.position.tolist()
([1, 2, 3, 4, 6, 7, 8], [0, 1, 2, 3, 3, 4, 5])
>>> packing.squares, packing.rectangles, before.tolist()
([(3, 4), (0, 3), (4, 7)], [[(0, 3, 7)]], [2, 3, 2, 4, 5, 6])
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain

import torch
from torch import Tensor, nn

from stepcredit.forest import Forest
from stepcredit.policy.batching import cheapest_batches, children_of
from stepcredit.policy.flex import padded_length
from stepcredit.policy.transfer import send

UNBATCHED_SCORES = {"cpu": 1 << 14}  # scores of a block that is worth a call of its own, without copies
UNBATCHED_SCORES_ELSEWHERE = 1 << 20


@dataclass(frozen=True)
class RowIndex:
    """Which rows of tokens are the queries, or the keys, of a batch of blocks.

    One block is a slice; several are row numbers, the shorter ones padded with their first row.
    """

    index: slice | Tensor  # [blocks, longest]
    real: slice | Tensor  # [n] the rows without padding
    filled: Tensor | None = None  # [blocks, longest] False where padded; None: nothing is padded
    places: Tensor | None = None  # [n] places of the real rows in the flattened index; None: nothing is padded

    @classmethod
    def of(cls, spans: list[tuple[int, int]]) -> "RowIndex":
        if len(spans) == 1:
            return cls(slice(*spans[0]), slice(*spans[0]))
        bounds = torch.tensor(spans)
        length = bounds[:, 1] - bounds[:, 0]
        offset = torch.arange(int(length.max()))
        filled = offset < length[:, None]
        index = torch.where(filled, bounds[:, :1] + offset, bounds[:, :1])
        flat = index.flatten()
        if bool(filled.all()):
            return cls(index, flat)
        places = filled.flatten().nonzero().squeeze(1)
        return cls(index, flat[places], filled, places)

    def take(self, rows: Tensor) -> Tensor:
        """[num_positions, heads, ...] -> [blocks, heads, longest, ...]"""
        if isinstance(self.index, slice):
            return rows[self.index].transpose(0, 1)[None]
        return rows.index_select(0, self.index.flatten()).unflatten(0, self.index.shape).transpose(1, 2)

    def flat(self, values: Tensor) -> Tensor:
        """The inverse of `take`: [blocks, heads, longest, ...] -> [n, heads, ...] of the real rows."""
        if isinstance(self.index, slice):
            return values[0].transpose(0, 1)
        values = values.transpose(1, 2).flatten(0, 1)
        return values if self.places is None else values.index_select(0, self.places)

    def add(self, values: Tensor, to: Tensor) -> None:
        """Add values of the shape that `take` gives to the rows that they came from."""
        if isinstance(self.real, slice):
            to[self.real] += self.flat(values)
        else:
            to.index_add_(0, self.real, self.flat(values).to(to.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, by the names of its attributes."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Block:
    """Squares (causal) or rectangles of the score matrix that are computed in one call."""

    queries: RowIndex
    keys: RowIndex
    causal: bool
    reach: int  # the largest distance between the positions of a query and a key


class Packing:
    """Trees of tokens in one row.

    Args:
        token_ids, position: [num_positions], on the CPU; positions count from the start of the prompt.
        squares: (start, end) of the runs.
        rectangles: (start, end, last) of the runs that others continue, in lists that each hold a query once at most.
        device: that computes it.

    Attributes:
        num_positions: tokens. The row is longer where attention is one masked call (`flex.padded_length`): token 0 at
            position 0, which sees nothing and is seen by nothing.
    """

    def __init__(
        self,
        token_ids: Tensor,
        position: Tensor,
        squares: list[tuple[int, int]],
        rectangles: list[list[tuple[int, int, int]]],
        device: torch.device | str = "cpu",
    ) -> None:
        self.squares, self.rectangles, self.device = squares, rectangles, torch.device(device)
        self.num_positions = len(token_ids)
        padding = padded_length(len(token_ids), self.device) - len(token_ids)
        if padding:
            token_ids, position = (nn.functional.pad(tensor, (0, padding)) for tensor in (token_ids, position))
        self._on_cpu = token_ids, position
        self._sent: list[Tensor] = []

    def send(self, *others: Tensor) -> list[Tensor]:
        """Send token ids and positions to the device, and with them, in the same transfer, other tensors.

        Returns:
            The others, there.
        """
        sent = send([*self._on_cpu, *others], self.device)
        self._sent = sent[:2]
        return sent[2:]

    @property
    def token_ids(self) -> Tensor:
        """The row [length], on the device."""
        if not self._sent:
            self.send()
        return self._sent[0]

    @property
    def position(self) -> Tensor:
        """Positions of the row's tokens [length], on the device."""
        if not self._sent:
            self.send()
        return self._sent[1]

    @property
    def position_on_cpu(self) -> Tensor:
        """Positions of the row's tokens [length]."""
        return self._on_cpu[1]

    @cached_property
    def end(self) -> Tensor:
        """For each key the end of what continues its run: query q sees key k where k <= q < end[k].

        Returns:
            [length] int32, on the CPU; 0 for padding.
        """
        runs = {first: end for first, end in self.squares}
        length = torch.tensor([end - first for first, end in sorted(self.squares)])
        runs.update({first: last for level in self.rectangles for first, end, last in level if end > first})
        end = torch.tensor([runs[first] for first in sorted(runs)], dtype=torch.int32).repeat_interleave(length)
        return nn.functional.pad(end, (0, len(self.position_on_cpu) - len(end)))

    @cached_property
    def blocks(self) -> list[Block]:
        """The squares and rectangles, batched; squares first. Their tensors are on the device."""
        unbatched = UNBATCHED_SCORES.get(self.device.type, UNBATCHED_SCORES_ELSEWHERE)
        blocks = list(self._blocks(self.position_on_cpu, unbatched))
        rows = [rows for block in blocks for rows in (block.queries, block.keys)]
        sent = iter(send([tensor for one in rows for tensor in one.tensors().values()], self.device))
        there = iter([replace(one, **{name: next(sent) for name in one.tensors()}) for one in rows])
        return [replace(block, queries=next(there), keys=next(there)) for block in blocks]

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> "Packing":
        """Rows of tokens that do not see each other."""
        ends = list(accumulate(map(len, rows)))
        position = torch.cat([torch.arange(len(row)) for row in rows])
        squares = list(zip([0, *ends[:-1]], ends, strict=True))
        return cls(torch.tensor(list(chain.from_iterable(rows))), position, squares, [], device)

    @classmethod
    def of_forest(cls, forest: Forest, device: torch.device | str = "cpu") -> tuple["Packing", Tensor]:
        """The packing of a forest and, for each of its tokens, the position whose state predicts it.

        The second is [num_tokens], on the CPU.
        """
        children = children_of(forest)
        length, prompt_length = forest.segment["length"].tolist(), forest.tree["prompt_length"].tolist()
        squares: list[tuple[int, int]] = []
        rectangles: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        prompt_start = [0] * forest.num_trees
        start, above = [0] * forest.num_segments, [0] * forest.num_segments  # first position; last one of the parent
        open_runs: list[tuple[int, int]] = []  # on the path to the current node
        at = 0

        def close(level: int) -> None:
            """End the runs from this level on: everything after their own tokens continues them."""
            for number, (first, end) in enumerate(open_runs[level:], level):
                if end > first:
                    squares.append((first, end))
                if at > end:
                    rectangles[number].append((first, end, at))
            del open_runs[level:]

        for tree in range(forest.num_trees):
            # A prompt (-1 - tree) or segment, its level, the last position before it, and where its run began when it
            # is an only child.
            waiting: list[tuple[int, int, int, int | None]] = [(-1 - tree, 0, -1, None)]
            while waiting:
                node, level, last, run_start = waiting.pop()
                close(level)
                run_start = at if run_start is None else run_start
                if node < 0:
                    prompt_start[tree] = at
                    at += prompt_length[tree]
                else:
                    start[node], above[node] = at, last
                    at += length[node] if children[node] else length[node] - 1
                below = children[node]
                only_child = len(below) == 1
                if not only_child:
                    open_runs.append((run_start, at))
                for child in reversed(below):
                    waiting.append((child, len(open_runs), at - 1, run_start if only_child else None))
            close(0)

        of = forest.token["segment"]
        offset = torch.arange(forest.num_tokens) - forest.segment["start"][of]
        row = torch.tensor(start)[of] + offset
        before = torch.where(offset > 0, row - 1, torch.tensor(above)[of])
        prompt_lengths = forest.tree["prompt_length"]
        prompt_offset = torch.arange(len(forest.prompt_ids)) - forest.tree["prompt_start"].repeat_interleave(
            prompt_lengths
        )
        prompt_row = torch.tensor(prompt_start).repeat_interleave(prompt_lengths) + prompt_offset
        token_ids, position = torch.empty(2, at, dtype=torch.long)
        token_ids[prompt_row], position[prompt_row] = forest.prompt_ids, prompt_offset
        position_of = (prompt_lengths[forest.segment["tree"]] + forest.path_offset)[of] + offset
        read = ~forest.ends[of] | (offset + 1 < forest.segment["length"][of])
        token_ids[row[read]], position[row[read]] = forest.token["token_ids"][read], position_of[read]
        return cls(token_ids, position, squares, list(rectangles.values()), device), before

    def _blocks(self, position: Tensor, unbatched: int) -> Iterator[Block]:
        """Large blocks one by one, small ones batched with others of similar size; squares first."""
        where = position.tolist()
        groups = [[((a, b), (a, b)) for a, b in self.squares]]
        groups += [[((b, c), (a, b)) for a, b, c in level] for level in self.rectangles]
        for number, spans in enumerate(groups):
            sizes = [(q[1] - q[0], k[1] - k[0]) for q, k in spans]
            large = [index for index, (height, width) in enumerate(sizes) if height * width >= unbatched]
            small = [index for index, (height, width) in enumerate(sizes) if height * width < unbatched]
            batches = cheapest_batches([sizes[index] for index in small])
            for batch in [*([index] for index in large), *([small[index] for index in batch] for batch in batches)]:
                queries, keys = [spans[index][0] for index in batch], [spans[index][1] for index in batch]
                reach = max(max(where[slice(*q)]) - where[k[0]] for q, k in zip(queries, keys, strict=True))
                yield Block(RowIndex.of(queries), RowIndex.of(keys), number == 0, reach)
