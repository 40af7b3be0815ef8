"""Sampling with a transformers model: a decode loop of our own.

Every prompt is encoded once for its group and its keys and values are held once. Finished rows are replaced by waiting
prompts while others are still being decoded. Each completion has random numbers of its own, drawn from its problem's
seed, so its tokens do not depend on the rest of the batch. Two forms of the loop give the same samples: on CUDA rows
are in pages and a step has a static shape (`samplers/paged.py`), elsewhere rows grow (`samplers/decoding.py`).
"""

import logging
from collections.abc import Callable, Sequence

import torch

from stepcredit.config import Config
from stepcredit.forest.types import Segment
from stepcredit.learn.placement import Placement, copy_weights
from stepcredit.policy.decoding import CachedRows, ForestRows
from stepcredit.policy.forward import Policy
from stepcredit.samplers.base import sampler
from stepcredit.samplers.decoding import Decoding, GrowingDecoding
from stepcredit.samplers.machine import PagedMachine
from stepcredit.samplers.paged import PagedDecoding
from stepcredit.samplers.params import SamplingParams, Stream
from stepcredit.samplers.prefix_cache import PrefixCache

log = logging.getLogger("stepcredit")


def decodes_in_pages(policy: Policy) -> bool:
    """Whether rows are in pages, with a static step; elsewhere they grow, which is faster on a CPU."""
    return policy.scoring_form == "forest" and policy.device.type == "cuda"


class TransformersSampler:
    """Samples with the policy's own weights.

    Args:
        policy: the model, or an unsharded copy of a sharded one; `sync` updates the copy and clears the prefix cache.
        max_rows: completions decoded at once.
        on_progress: called with the number of completions that finished since the last call.
        keep_mb: memory of the prefix cache: keys and values that are reused by later calls.
        paged: rows are in pages (scoring form "forest" only); None: where `decodes_in_pages` says so.

    Attributes:
        encoded_tokens: tokens of prompts whose keys and values all calls so far have computed.
    """

    def __init__(
        self,
        policy: Policy,
        max_rows: int = 512,
        on_progress: Callable[[int], None] | None = None,
        keep_mb: float = 4096,
        paged: bool | None = None,
    ) -> None:
        self.policy = policy
        self.max_rows = max_rows
        self.on_progress = on_progress or (lambda _: None)
        self.prefix_cache = PrefixCache(keep_mb * 2**20)
        self.metrics: dict[str, float] = {}
        self.encoded_tokens = 0
        self.paged = paged
        self.machine: PagedMachine | None = None  # made by the first call that needs it

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The model's own."""
        return tuple(self.policy.stop_token_ids)

    def sync(self, policy: Policy) -> None:
        """Take over new weights, and clear the prefix cache, which came from the old ones."""
        if policy is not self.policy:
            copy_weights(policy, self.policy)
        self.prefix_cache.clear()

    def sleep(self) -> None:
        """Give the pages back, so that an update has the memory; the next call makes them and its graphs anew."""
        if self.machine is not None:
            self.prefix_cache.clear()
            self.machine.release()

    def close(self) -> None:
        self.prefix_cache.clear()
        self.machine = None

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
        num_reusable: Callable[[list[int]], int] | None = None,
        streams: Sequence[Stream] | None = None,
    ) -> list[list[Segment]]:
        """Draw `n` completions of each prompt.

        Args:
            prompts: token ids, none empty.
            seeds: one for each prompt, 0 or above; the same seed, prompt and weights give the same completions.
            limits: most new tokens of each prompt's completions, in place of `params.max_new_tokens`.
            num_reusable: from the token ids of a completion, how many of them (from its first on) later prompts may
                begin with, after this prompt. Their keys and values are cached until `sync`, so that such a prompt is
                not encoded again. Only with scoring form "forest"; otherwise it has no effect.
            streams: with n 1: which random numbers each completion draws from. One that ended at a limit goes on as it
                would have without, given its prompt with its tokens behind it, its seed and its place.

        Returns:
            For each prompt `n` segments with the stop token included, and the columns `rollout_logprobs` (of the full
            distribution at the temperature, before top-p/top-k; at temperature 0 of temperature 1) and `entropy`.

        Raises:
            UserError: a prompt and its completion do not fit into the model or the memory, or a log-probability is not
                finite.
        """
        if not prompts:
            return []
        limits = [params.max_new_tokens] * len(prompts) if limits is None else limits
        prefix_cache = self.prefix_cache
        if self.policy.scoring_form != "forest":
            prefix_cache, num_reusable = PrefixCache(), None
        given = (
            *(self.policy, prompts, n, params, seeds, limits, self.max_rows, self.on_progress),
            *(prefix_cache, num_reusable, streams),
        )
        with self.policy.autocast_context():
            machine = self._machine() if self.policy.scoring_form == "forest" else None
            if machine is not None:
                stop = self.policy.stop_token_ids if params.stop_token_ids is None else params.stop_token_ids
                reuse = num_reusable is not None
                with machine.prepared(prompts, n, limits, params.max_new_tokens, stop, prefix_cache, reuse) as steps:
                    return self._run(PagedDecoding(steps, *given))
            rows: ForestRows | CachedRows = (
                ForestRows(self.policy, min(self.max_rows, len(prompts) * n), max(limits))
                if self.policy.scoring_form == "forest"
                else CachedRows(self.policy)
            )
            return self._run(GrowingDecoding(rows, *given))

    def _run(self, decoding: Decoding) -> list[list[Segment]]:
        segments = decoding.run()
        self.encoded_tokens += decoding.encoded
        return segments

    def _machine(self) -> PagedMachine | None:
        """What decodes rows in pages; None: rows grow."""
        if not (decodes_in_pages(self.policy) if self.paged is None else self.paged):
            return None
        if self.machine is None:
            try:
                self.machine = PagedMachine(self.policy, self.max_rows)
            except NotImplementedError as error:
                log.warning("sampling: rows are not in pages, which is slower on a GPU: %s", error)
                self.paged = False
        return self.machine


@sampler(columns=("rollout_logprobs", "entropy"), elsewhere=False, copies_when_sharded=True, goes_on=True)
def build(config: Config, policy: Policy, placement: Placement) -> TransformersSampler:
    """The decode loop, with the policy itself or, if that will be sharded, an unsharded copy of it."""
    given = config.sampler
    return TransformersSampler(placement.sampling_copy(policy), given.max_rows, keep_mb=given.keep_mb)
