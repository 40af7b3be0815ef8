"""Sampling from a transformers model with a decode loop of its own.

Each prompt is encoded once for all its completions, finished rows are dropped, and waiting prompts are admitted as
rows free up. One uniform number decides each token, drawn from the problem's own seed, so what a problem gets does not
depend on what it is batched with.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from stepcredit.errors import UserError
from stepcredit.policy.forward import Policy, keys_and_values
from stepcredit.policy.head import LEAST
from stepcredit.samplers.params import SamplingParams
from stepcredit.types import Segment

DROP_SHARE = 8  # finished rows are dropped once they are more than 1/8 of the batch, because dropping copies the cache


class TransformersSampler:
    """Samples with the policy's own weights.

    Args:
        policy: the model; always current, so `sync` has nothing to do.
        max_rows: completions decoded at once.
        on_progress: called with the number of completions that finished since the last call.
    """

    def __init__(self, policy: Policy, max_rows: int = 512, on_progress: Callable[[int], None] | None = None) -> None:
        self.policy = policy
        self.max_rows = max_rows
        self.on_progress = on_progress or (lambda _: None)

    def sync(self, policy: Policy) -> None:
        """Take over new weights; they are shared here."""

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[Sequence[int]], n: int, params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Segment]]:
        """Draw `n` completions of each prompt.

        Args:
            prompts: token ids, none empty.
            seeds: one for each prompt; the same seed, prompt and weights give the same completions.

        Returns:
            For each prompt `n` segments with the stop token included, and the columns `rollout_logprobs` (of the full
            distribution at the temperature, before top-p/top-k; at temperature 0 of temperature 1) and `entropy`.
        """
        with self.policy.autocast_context():
            return _Decoding(self.policy, prompts, n, params, seeds, self.max_rows, self.on_progress).run()


@dataclass
class _Batch:
    """Rows that are being decoded, padded on the left so that all of them end at the same slot."""

    cache: DynamicCache
    mask: Tensor  # [rows, slots]
    position: Tensor  # [rows] position id of the next token
    logits: Tensor  # [rows, vocabulary] of the next token
    row: Tensor  # [rows] number of the completion, prompt * n + sample
    alive: Tensor  # [rows] bool


class _Decoding:
    """One call of `sample`."""

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seeds: Sequence[int],
        max_rows: int,
        on_progress: Callable[[int], None],
    ) -> None:
        self.policy, self.prompts, self.n, self.params, self.seeds = policy, prompts, n, params, seeds
        self.max_rows, self.on_progress = max_rows, on_progress
        self.device = policy.device
        stop = policy.stop_token_ids if params.stop_token_ids is None else list(params.stop_token_ids)
        self.stop = torch.tensor(stop, dtype=torch.long, device=self.device)
        # Rows of different lengths need a cache that takes padding; other models decode equal lengths together.
        self.mixes_lengths = policy.path == "forest"
        total = len(prompts) * n
        shape = (total, params.max_new_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(shape, device=self.device)
        self.entropy = torch.zeros(shape, device=self.device)
        self.count = torch.zeros(total, dtype=torch.long, device=self.device)
        self.uniform = torch.zeros(shape, device=self.device)
        self.stopped = torch.zeros(total, dtype=torch.bool, device=self.device)
        order = sorted(range(total), key=lambda row: 0 if self.mixes_lengths else len(prompts[row // n]))
        self.waiting = deque(order)

    def run(self) -> list[list[Segment]]:
        batch: _Batch | None = None
        while batch is not None or self.waiting:
            batch = self._admit(batch)
            next_token = self._draw(batch)
            kept = self._drop(batch, next_token)
            batch = self._advance(*kept) if kept else None
        return self._segments()

    def _admit(self, batch: _Batch | None) -> _Batch:
        """Encode waiting prompts into free rows."""
        free = self.max_rows - (len(batch.row) if batch else 0)
        if not self.waiting or free <= 0 or (batch is not None and not self.mixes_lengths):
            assert batch is not None
            return batch
        rows = self._next_rows(free, must=batch is None)
        if not rows:
            assert batch is not None
            return batch
        prompts = sorted({row // self.n for row in rows})
        for prompt in prompts:
            generator = torch.Generator().manual_seed(self.seeds[prompt])
            noise = torch.rand(self.params.max_new_tokens, self.n, generator=generator)
            self.uniform[prompt * self.n : (prompt + 1) * self.n] = noise.T.to(self.device)
        lengths = torch.tensor([len(self.prompts[prompt]) for prompt in prompts])
        mask = (torch.arange(int(lengths.max()))[None] >= int(lengths.max()) - lengths[:, None]).long()
        ids = torch.zeros_like(mask)
        ids[mask.bool()] = torch.tensor([token for prompt in prompts for token in self.prompts[prompt]])
        ids, mask = ids.to(self.device), mask.to(self.device)
        layers = self.policy.model.config.get_text_config().num_hidden_layers
        cache = growing_cache([None] * layers) if self.mixes_lengths else DynamicCache(config=self.policy.model.config)
        logits = self.policy.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        place = {prompt: index for index, prompt in enumerate(prompts)}
        copies = torch.tensor([place[row // self.n] for row in rows], device=self.device)
        cache.batch_select_indices(copies)
        new = _Batch(
            cache,
            mask[copies],
            mask.sum(1)[copies],
            logits[copies],
            torch.tensor(rows, device=self.device),
            torch.ones(len(rows), dtype=torch.bool, device=self.device),
        )
        return new if batch is None else _join(batch, new)

    def _next_rows(self, free: int, must: bool) -> list[int]:
        """Completions to start now: whole groups, so that a prompt is encoded once, unless one alone is too large."""
        rows: list[int] = []
        while self.waiting:
            prompt = self.waiting[0] // self.n
            group = (prompt + 1) * self.n - self.waiting[0]
            if not self.mixes_lengths and rows and len(self.prompts[prompt]) != len(self.prompts[rows[0] // self.n]):
                break
            if group > free - len(rows):
                if rows or not must:
                    break
                group = free
            rows += [self.waiting.popleft() for _ in range(group)]
        return rows

    def _draw(self, batch: _Batch) -> Tensor:
        """Draw and record one token for every live row."""
        count = self.count[batch.row].clamp(max=self.params.max_new_tokens - 1)
        token, logprobs, entropy = draw(batch.logits, self.uniform[batch.row, count], self.params)
        live = batch.alive
        row, step = batch.row[live], count[live]
        self.tokens[row, step] = token[live]
        self.logprobs[row, step] = logprobs[live]
        self.entropy[row, step] = entropy[live]
        self.count[row] += 1
        stopped = torch.isin(token, self.stop) & live
        self.stopped[batch.row[stopped]] = True
        batch.alive = live & ~stopped & (count + 1 < self.params.max_new_tokens)
        return token

    def _drop(self, batch: _Batch, token: Tensor) -> tuple[_Batch, Tensor] | None:
        """Drop finished rows, when there are enough of them to pay for the copy."""
        num_alive = int(batch.alive.sum())
        num_rows = len(batch.row)
        if num_alive == 0:
            self.on_progress(num_rows)
            return None
        if num_alive == num_rows or (num_rows - num_alive) * DROP_SHARE < num_rows:
            return batch, token
        self.on_progress(num_rows - num_alive)
        keep = batch.alive.nonzero().squeeze(1)
        mask = batch.mask[keep]
        padding = int(mask.sum(0).ne(0).int().argmax()) if self.mixes_lengths else 0
        if padding:
            pairs = [
                (keys[keep, :, padding:], values[keep, :, padding:]) for keys, values in keys_and_values(batch.cache)
            ]
            cache = growing_cache(pairs)
        else:
            cache = batch.cache
            cache.batch_select_indices(keep)
        kept = _Batch(
            cache, mask[:, padding:], batch.position[keep], batch.logits[keep], batch.row[keep], batch.alive[keep]
        )
        return kept, token[keep]

    def _advance(self, batch: _Batch, token: Tensor) -> _Batch:
        """Encode the drawn tokens and leave the next logits in the batch."""
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(token), 1)], 1)
        batch.logits = self.policy.model(
            input_ids=token[:, None],
            attention_mask=batch.mask,
            position_ids=batch.position[:, None],
            past_key_values=batch.cache,
            use_cache=True,
        ).logits[:, -1]
        batch.position = batch.position + 1
        return batch

    def _segments(self) -> list[list[Segment]]:
        count, stopped = self.count.tolist(), self.stopped.tolist()
        if not bool(self.logprobs.isfinite().all()):
            raise UserError(
                "sampling: the model gives log-probabilities that are not finite; its weights may be damaged"
            )
        tokens, logprobs, entropy = self.tokens.cpu(), self.logprobs.cpu(), self.entropy.cpu()
        segments = [
            Segment(
                token_ids=tokens[row, : count[row]].tolist(),
                finish="stop" if stopped[row] else "length",
                columns={
                    "rollout_logprobs": logprobs[row, : count[row]].tolist(),
                    "entropy": entropy[row, : count[row]].tolist(),
                },
            )
            for row in range(len(count))
        ]
        return [segments[start : start + self.n] for start in range(0, len(segments), self.n)]


def draw(logits: Tensor, uniform: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at `uniform`.

    Args:
        logits: [rows, vocabulary]; uniform: [rows] in [0, 1).

    Returns:
        token, its log-probability under the full distribution at the temperature, and that distribution's entropy.
    """
    greedy = params.temperature == 0
    logprobs = torch.log_softmax(logits.float() / (1.0 if greedy else params.temperature), -1)
    probs = logprobs.exp()
    entropy = -(probs * logprobs.clamp(min=LEAST)).sum(-1)
    if greedy:
        token = logprobs.argmax(-1)
    elif params.truncates:
        ordered, index = probs.sort(dim=-1, descending=True, stable=True)
        ordered = ordered * (ordered.cumsum(-1) - ordered < params.top_p)
        if params.top_k > 0:
            ordered[:, params.top_k :] = 0
        token = index.gather(-1, _invert(ordered, uniform)[:, None]).squeeze(-1)
    else:
        token = _invert(probs, uniform)
    return token, logprobs.gather(-1, token[:, None]).squeeze(-1), entropy


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """The index where the cumulative sum of `probs` first exceeds uniform * total: never one of probability 0."""
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    point = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)


class _GrowingLayer(DynamicLayer):
    """A cache layer that writes into spare room instead of copying everything at each token (inference only)."""

    keys: Tensor
    values: Tensor

    def __init__(self, pair: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.room: tuple[Tensor, Tensor] | None = None
        if pair is not None:
            self._hold(*pair)

    def _hold(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        return keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return self._hold(key_states, value_states)
        used, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        room = self.room
        if room is None or self.keys.data_ptr() != room[0].data_ptr() or room[0].shape[2] < end:
            shape = (*self.keys.shape[:2], end + end // 4 + 32)
            room = (
                self.keys.new_empty(*shape, self.keys.shape[3]),
                self.values.new_empty(*shape, self.values.shape[3]),
            )
            room[0][:, :, :used], room[1][:, :, :used] = self.keys, self.values
            self.room = room
        room[0][:, :, used:end], room[1][:, :, used:end] = key_states, value_states
        return self._hold(room[0][:, :, :end], room[1][:, :, :end])


def growing_cache(pairs: Sequence[tuple[Tensor, Tensor] | None]) -> DynamicCache:
    """A cache with spare room, holding these keys and values (None: empty) in each layer."""
    cache = DynamicCache()
    cache.layers = [_GrowingLayer(pair) for pair in pairs]
    return cache


def _join(batch: _Batch, new: _Batch) -> _Batch:
    """Put new rows under the old ones, both padded on the left to the same number of slots."""
    slots = max(batch.mask.shape[1], new.mask.shape[1])

    def pad(tensor: Tensor, dim: int) -> Tensor:
        missing = slots - tensor.shape[dim]
        if not missing:
            return tensor
        shape = list(tensor.shape)
        shape[dim] = missing
        return torch.cat([tensor.new_zeros(shape), tensor], dim)

    pairs = [
        (torch.cat([pad(keys, 2), pad(new_keys, 2)]), torch.cat([pad(values, 2), pad(new_values, 2)]))
        for (keys, values), (new_keys, new_values) in zip(
            keys_and_values(batch.cache), keys_and_values(new.cache), strict=True
        )
    ]
    return _Batch(
        growing_cache(pairs),
        torch.cat([pad(batch.mask, 1), pad(new.mask, 1)]),
        torch.cat([batch.position, new.position]),
        torch.cat([batch.logits, new.logits]),
        torch.cat([batch.row, new.row]),
        torch.cat([batch.alive, new.alive]),
    )
