"""Sampling with a transformers model: a decode loop of our own.

Every prompt is encoded once for its group, and its keys and values are read once per token for all rows of the group
(`ForestRows`). Finished rows are replaced by waiting prompts while others are still being decoded. Each completion has
random numbers of its own, drawn from its problem's seed, so its tokens do not depend on the rest of the batch.
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.forest.types import Segment
from stepcredit.learn.placement import Placement, copy_weights
from stepcredit.policy.decoding import CachedRows, ForestRows, Prefix
from stepcredit.policy.forward import Policy
from stepcredit.policy.head import LEAST
from stepcredit.samplers.base import sampler
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.prefix_cache import PrefixCache
from stepcredit.seeds import generator

DROP_SHARE = 16  # finished rows are dropped once they are more than 1/16 of the batch
JOIN_SHARE = 4  # prompts join once a quarter of the rows is free
CHECK_EVERY = {"cpu": 1}  # steps between checks of which rows have ended: elsewhere a check waits for the device
CHECK_EVERY_ELSEWHERE = 8


class TransformersSampler:
    """Samples with the policy's own weights.

    Args:
        policy: the model, or an unsharded copy of a sharded one; `sync` updates the copy and clears the prefix cache.
        max_rows: completions decoded at once.
        on_progress: called with the number of completions that finished since the last call.
        keep_mb: memory of the prefix cache: keys and values that are reused by later calls.
    """

    def __init__(
        self,
        policy: Policy,
        max_rows: int = 512,
        on_progress: Callable[[int], None] | None = None,
        keep_mb: float = 4096,
    ) -> None:
        self.policy = policy
        self.max_rows = max_rows
        self.on_progress = on_progress or (lambda _: None)
        self.prefix_cache = PrefixCache(keep_mb * 2**20)
        self.metrics: dict[str, float] = {}

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The model's own."""
        return tuple(self.policy.stop_token_ids)

    def sync(self, policy: Policy) -> None:
        """Take over new weights, and clear the prefix cache, which came from the old ones."""
        if policy is not self.policy:
            copy_weights(policy, self.policy)
        self.prefix_cache.clear()

    def close(self) -> None:
        self.prefix_cache.clear()

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
        num_reusable: Callable[[list[int]], int] | None = None,
    ) -> list[list[Segment]]:
        """Draw `n` completions of each prompt.

        Args:
            prompts: token ids, none empty.
            seeds: one for each prompt, 0 or above; the same seed, prompt and weights give the same completions.
            limits: most new tokens of each prompt's completions, in place of `params.max_new_tokens`.
            num_reusable: from the token ids of a completion, how many of them (from its first on) later prompts may
                begin with, after this prompt. Their keys and values are cached until `sync`, so that such a prompt is
                not encoded again. Only with scoring form "forest"; otherwise it has no effect.

        Returns:
            For each prompt `n` segments with the stop token included, and the columns `rollout_logprobs` (of the full
            distribution at the temperature, before top-p/top-k; at temperature 0 of temperature 1) and `entropy`.
        """
        limits = [params.max_new_tokens] * len(prompts) if limits is None else limits
        prefix_cache = self.prefix_cache
        if self.policy.scoring_form != "forest":
            prefix_cache, num_reusable = PrefixCache(), None
        with self.policy.autocast_context():
            decoding = _Decoding(self.policy, prompts, n, params, seeds, limits, self.max_rows, self.on_progress)
            return decoding.run(prefix_cache, num_reusable)


class _Decoding:
    """One call of `sample`."""

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seeds: Sequence[int],
        limits: Sequence[int],
        max_rows: int,
        on_progress: Callable[[int], None],
    ) -> None:
        policy.check_length(max((len(prompt) + most for prompt, most in zip(prompts, limits, strict=True)), default=0))
        self.prompts, self.n, self.params, self.seeds = prompts, n, params, seeds
        self.max_rows, self.on_progress = max_rows, on_progress
        self.device, self.longest = policy.device, max(limits, default=0)
        stop = policy.stop_token_ids if params.stop_token_ids is None else list(params.stop_token_ids)
        self.stop = torch.tensor(stop, dtype=torch.long, device=self.device)
        total = len(prompts) * n
        self.begun: dict[
            tuple[int, ...], Prefix
        ] = {}  # the last prompt that began: the rest of its group may be waiting
        self.batch: ForestRows | CachedRows = (
            ForestRows(policy, min(max_rows, total), self.longest)
            if policy.scoring_form == "forest"
            else CachedRows(policy)
        )
        self.last = torch.tensor(limits, dtype=torch.long, device=self.device).repeat_interleave(n) - 1
        shape = (total, self.longest)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(shape, device=self.device)
        self.entropy = torch.zeros(shape, device=self.device)
        self.uniform = torch.zeros(shape, device=self.device)
        self.count = torch.zeros(total, dtype=torch.long, device=self.device)
        self.stopped = torch.zeros(total, dtype=torch.bool, device=self.device)
        mixes = self.batch.mixes_lengths
        waiting = range(total) if mixes else sorted(range(total), key=lambda row: len(prompts[row // n]))
        self.waiting = deque(waiting)
        # The rows that are being decoded:
        self.row = torch.zeros(0, dtype=torch.long, device=self.device)  # number of the completion, prompt * n + sample
        self.alive = torch.zeros(0, dtype=torch.bool, device=self.device)
        self.logits: Tensor | None = None  # [rows, vocabulary] of the next token

    def run(self, prefix_cache: PrefixCache, num_reusable: Callable[[list[int]], int] | None) -> list[list[Segment]]:
        self.prefix_cache, self.num_reusable = prefix_cache, num_reusable
        for prompt in self.prompts:  # now, because a prefix that rows continue must not be split
            if prefix_cache.find(prompt) is None:
                prefix_cache.find(prompt[:-1])
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
        for prefix in prefix_cache:
            prefix.detach()
        return self._segments()

    # ------------------------------------------------------------------ rows

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
            noise = generator(self.seeds[prompt]).random((self.longest, self.n), dtype=np.float32)
            self.uniform[prompt * self.n : (prompt + 1) * self.n] = torch.from_numpy(noise).T.to(self.device)
        place = {prompt: number for number, prompt in enumerate(prompts)}
        copies = [place[row // self.n] for row in rows]
        logits = self._begin([tuple(self.prompts[prompt]) for prompt in prompts], copies)
        self.logits = logits if self.logits is None or not live else torch.cat([self.logits, logits])
        self.row = torch.cat([self.row, torch.tensor(rows, device=self.device)])
        self.alive = torch.cat([self.alive, self.alive.new_ones(len(rows))])

    def _begin(self, prompts: list[tuple[int, ...]], copies: list[int]) -> Tensor:
        """Encode the prompts that are not cached and begin rows; `copies` has the number of the prompt of each row."""
        if isinstance(self.batch, CachedRows):
            return self.batch.begin(prompts, copies)
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
            for end, longer in zip(shorter.values(), extended, strict=True):
                if end.logits is None:  # views of the longer prefix instead of a second copy
                    end.keys, end.values = ([one[:, :-1] for one in pair] for pair in (longer.keys, longer.values))
        if fresh := [prompt for prompt in missing if prompt not in shorter]:
            prefixes |= zip(fresh, self.batch.encode(fresh), strict=True)
        if self.num_reusable is not None:
            for prompt, prefix in prefixes.items():
                self.prefix_cache.add(prompt, prefix)
        self.begun = {prompts[-1]: prefixes[prompts[-1]]}
        chosen = [prefixes[prompts[copy]] for copy in copies]
        self.batch.begin(chosen)
        return torch.stack([prefix.next_logits() for prefix in chosen])

    def _cached(self, prompt: tuple[int, ...]) -> Prefix | None:
        return self.begun.get(prompt) or self.prefix_cache.get(prompt)

    def _next_rows(self, free: int, must: bool) -> list[int]:
        """Completions to start now: whole groups, so that a prompt is encoded once, unless one alone is too large."""
        rows: list[int] = []
        while self.waiting:
            prompt = self.waiting[0] // self.n
            group = (prompt + 1) * self.n - self.waiting[0]
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

    def _draw(self) -> Tensor:
        """Draw one token for every row and record it for the live ones."""
        assert self.logits is not None
        row, live = self.row, self.alive
        last = self.last[row]
        step = torch.minimum(self.count[row], last)
        token, logprobs, entropy = draw(self.logits, self.uniform[row, step], self.params)
        for record, drawn in ((self.tokens, token), (self.logprobs, logprobs), (self.entropy, entropy)):
            record[row, step] = torch.where(live, drawn, record[row, step])
        stopped = torch.isin(token, self.stop) & live
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
        """Cache the keys and values of ended rows. Those of a row's last token are not computed yet."""
        assert isinstance(self.batch, ForestRows) and self.num_reusable is not None
        rows, count = self.row.tolist(), self.count.tolist()
        for place in ended.tolist():
            row = rows[place]
            tokens = self.tokens[row, : count[row]].tolist()
            reusable = min(self.num_reusable(tokens), len(tokens) - 1)
            if reusable > 0:
                path = (*self.prompts[row // self.n], *tokens[:reusable])
                if path not in self.prefix_cache:
                    self.prefix_cache.add(path, self.batch.take(place, reusable))

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


@sampler(columns=("rollout_logprobs", "entropy"), elsewhere=False, copies_when_sharded=True)
def build(config: Config, policy: Policy, placement: Placement) -> TransformersSampler:
    """The decode loop, with the policy itself or, if that will be sharded, an unsharded copy of it."""
    given = config.sampler
    return TransformersSampler(placement.sampling_copy(policy), given.max_rows, keep_mb=given.keep_mb)


def draw(logits: Tensor, uniform: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at `uniform`.

    Args:
        logits: [rows, vocabulary]; uniform: [rows] in [0, 1).

    Returns:
        token, its log-probability under the full distribution at the temperature, and that distribution's entropy.
    """
    greedy = params.temperature == 0
    scaled = logits.float() / (1.0 if greedy else params.temperature)
    logprobs = torch.log_softmax(scaled, -1)
    probs = logprobs.exp()
    entropy = -(probs * logprobs.clamp(min=LEAST)).sum(-1)
    if greedy:
        token = logprobs.argmax(-1)
    elif params.truncates:
        kept, index = truncate(scaled, params)
        token = index.gather(-1, _invert(kept, uniform)[:, None]).squeeze(-1)
    else:
        token = _invert(probs, uniform)
    return token, logprobs.gather(-1, token[:, None]).squeeze(-1), entropy


def truncate(scaled: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """What top-k and then top-p leave: the sets of TopKLogitsWarper and TopPLogitsWarper of transformers, and of vLLM.

    Tokens that tie with the last of the top k stay. Top-p acts on what top-k left, scaled to sum to 1; of tokens that
    tie where it cuts, those with higher ids stay.

    Args:
        scaled: [rows, vocabulary] logits over the temperature.

    Returns:
        Weights of the tokens from the most likely on, 0 where left out, and their ids; both [rows, vocabulary].
    """
    ordered, index = scaled.sort(dim=-1, stable=True)
    if 0 < params.top_k < ordered.shape[-1]:
        ordered = ordered.masked_fill(ordered < ordered[:, -params.top_k, None], -torch.inf)
    weights = ordered.softmax(-1)
    if params.top_p < 1.0:
        left_out = weights.cumsum(-1) <= 1 - params.top_p
        left_out[:, -1] = False
        weights = weights.masked_fill(left_out, 0.0)
    return weights.flip(-1), index.flip(-1)


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """The index where the cumulative sum of `probs` first exceeds uniform * total: never one of probability 0."""
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    point = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)
