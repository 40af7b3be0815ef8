"""Two other forms of scoring, against which the packed form is tested and which replace it where it does not hold.

cached  level by level, each token once: children attend to their parents' keys and values in a transformers
        `DynamicCache`, which is copied for every child.
plain   one row per completion through the model's own logits, the usual way. Holds for every model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from stepcredit.forest import Forest
from stepcredit.forest.ops import TokenScores
from stepcredit.policy.batching import children_of, length_buckets
from stepcredit.policy.head import score_logits

MAX_POSITIONS = 1 << 16  # token positions of one forward call of the cached form


@dataclass
class _EncodedRows:
    """Encoded rows that children can continue: prompts, or the segments of one bucket."""

    ids: list[int]  # tree rows for prompts, segment rows otherwise
    cache: DynamicCache
    mask: Tensor  # [rows, slots] 1 where the cache holds a real token
    position: Tensor  # [rows] tokens encoded so far
    state: Tensor  # [rows, hidden] state of the last token


class CachedForm:
    """Scores a forest level by level; all levels share one model.

    Args:
        model: its attention layers must all see everything before them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = next(model.parameters()).device

    def states(self, forest: Forest, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The states that predict the wanted tokens [n, hidden], and those tokens [n]."""
        states, tokens = [], []
        for state, token in self._walk(forest):
            states.append(state[wanted[token].to(self.device)])
            tokens.append(token[wanted[token]])
        return torch.cat(states), torch.cat(tokens)

    def _walk(self, forest: Forest) -> Iterator[tuple[Tensor, Tensor]]:
        """The state that predicts each token, in batches: ([n, hidden], [n] rows of the token table)."""
        children = children_of(forest)
        start, length = forest.segment["start"].tolist(), forest.segment["length"].tolist()
        token_ids = forest.token["token_ids"]
        prompts = forest.tree["prompt_length"].tolist()
        stack = [self._encode_prompts(forest, trees) for trees in length_buckets(prompts, MAX_POSITIONS)]
        while stack:
            rows_above = stack.pop()
            pairs = [(row, child) for row, key in enumerate(rows_above.ids) for child in children[key]]
            for bucket in length_buckets([length[child] for _, child in pairs], MAX_POSITIONS):
                above = [pairs[index][0] for index in bucket]
                segments = [pairs[index][1] for index in bucket]
                ids = [token_ids[start[s] : start[s] + length[s]] for s in segments]
                rows_below, before = self._continue(rows_above, above, segments, ids)
                valid = rows_below.mask[:, -before.shape[1] :].bool()
                yield before[valid], torch.cat([torch.arange(start[s], start[s] + length[s]) for s in segments])
                if any(children[segment] for segment in segments):
                    stack.append(rows_below)

    def _encode_prompts(self, forest: Forest, trees: list[int]) -> _EncodedRows:
        lengths = forest.tree["prompt_length"][trees]
        prompts = forest.prompt_ids.split(forest.tree["prompt_length"].tolist())
        ids, mask = _pad([prompts[tree] for tree in trees], self.device)
        cache = DynamicCache()
        hidden = self._hidden(ids, mask, mask.cumsum(1) - 1, cache)
        last = lengths.to(self.device) - 1
        state = hidden[torch.arange(len(ids), device=self.device), last]
        return _EncodedRows([-1 - tree for tree in trees], cache, mask, last + 1, state)

    def _continue(
        self, rows: _EncodedRows, above: list[int], segments: list[int], ids: list[Tensor]
    ) -> tuple[_EncodedRows, Tensor]:
        """Encode one segment after each row `above`; also give the states before its tokens [rows, length, hidden]."""
        index = torch.tensor(above, device=self.device)
        slots = int(rows.mask[index].sum(0).nonzero().max()) + 1  # without the padding that these rows do not need
        cache = _select(rows.cache, index, slots)
        own_ids, own_mask = _pad(ids, self.device)
        mask = torch.cat([rows.mask[index, :slots], own_mask], 1)
        position = rows.position[index]
        hidden = self._hidden(own_ids, mask, position[:, None] + own_mask.cumsum(1) - 1, cache)
        before = torch.cat([rows.state[index][:, None], hidden[:, :-1]], 1)
        length = own_mask.sum(1)
        state = hidden[torch.arange(len(ids), device=self.device), length - 1]
        return _EncodedRows(segments, cache, mask, position + length, state), before

    def _hidden(self, ids: Tensor, mask: Tensor, position: Tensor, cache: DynamicCache) -> Tensor:
        out = self.model.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position.clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state


class PlainRows(NamedTuple):
    """A forest as one padded row for each completion, and where each wanted token is first predicted.

    Attributes:
        ids, mask, position: [rows, longest] each.
        row, column: [n] of the state before each wanted token.
        tokens: [n] the wanted tokens.
    """

    ids: Tensor
    mask: Tensor
    position: Tensor
    row: Tensor
    column: Tensor
    tokens: Tensor

    @classmethod
    def of_forest(cls, forest: Forest, wanted: Tensor, device: torch.device) -> "PlainRows":
        prompts = forest.prompt_ids.split(forest.tree["prompt_length"].tolist())
        pieces = forest.token["token_ids"].split(forest.segment["length"].tolist())
        start = forest.segment["start"].tolist()
        full, seen = [], set[int]()
        rows, columns, tokens = [], [], []
        for row, leaf in enumerate(forest.ends.nonzero().squeeze(1).tolist()):
            path = forest.completion_segments(leaf)
            prompt = prompts[int(forest.segment["tree"][leaf])]
            full.append(torch.cat([prompt, *(pieces[segment] for segment in path)]))
            for segment in path:
                if segment not in seen:
                    seen.add(segment)
                    inside = wanted[start[segment] : start[segment] + len(pieces[segment])].nonzero()[:, 0]
                    before = len(prompt) + int(forest.path_offset[segment]) - 1
                    rows.append(torch.full((len(inside),), row))
                    columns.append(before + inside)
                    tokens.append(start[segment] + inside)
        ids, mask = _pad(full, device)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        return cls(ids, mask, position, torch.cat(rows).to(device), torch.cat(columns).to(device), torch.cat(tokens))


def plain_scores(
    model: PreTrainedModel, forest: Forest, wanted: Tensor, temperature: float, entropy_grad: bool
) -> tuple[TokenScores, Tensor]:
    """Scores of the wanted tokens, each read from the first completion that has it, and those tokens [n]."""
    device = next(model.parameters()).device
    rows = PlainRows.of_forest(forest, wanted, device)
    needed, column = rows.column.unique(return_inverse=True)
    options: dict[str, Any] = {"logits_to_keep": needed}
    if "logits_to_keep" not in signature(model.forward).parameters or not len(needed):
        options, column = {}, rows.column
    logits = model(
        input_ids=rows.ids, attention_mask=rows.mask, position_ids=rows.position, use_cache=False, **options
    ).logits
    targets = forest.token["token_ids"][rows.tokens].to(device)
    return score_logits(logits[rows.row, column], targets, temperature, entropy_grad), rows.tokens


def plain_states(model: PreTrainedModel, forest: Forest, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The states before the wanted tokens [n, hidden], and those tokens [n]."""
    rows = PlainRows.of_forest(forest, wanted, next(model.parameters()).device)
    states = model.base_model(
        input_ids=rows.ids, attention_mask=rows.mask, position_ids=rows.position, use_cache=False
    ).last_hidden_state
    return states[rows.row, rows.column], rows.tokens


def _pad(rows: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids [rows, longest] and their 0/1 mask."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.cat(rows)
    return ids.to(device), mask.long().to(device)


def keys_and_values(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, [rows, heads, slots, head size]."""
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr, misc]


def _select(cache: DynamicCache, index: Tensor, slots: int) -> DynamicCache:
    """A new cache with the first `slots` entries of these rows; gradients flow through."""
    selected = DynamicCache()
    for number, (keys, values) in enumerate(keys_and_values(cache)):
        selected.update(keys[index, :, :slots], values[index, :, :slots], number)
    return selected
