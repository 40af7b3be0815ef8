"""A sampler of your own: stepcredit's, whose log-probabilities are those of another engine.

stepcredit train --sampler.name noisy_sampler.noisy --sampler.options "{noise: 0.001}"
"""

import random
from collections.abc import Callable, Sequence

from stepcredit.config import Config
from stepcredit.forest.types import Segment
from stepcredit.learn.placement import Placement
from stepcredit.policy.forward import Policy
from stepcredit.samplers.base import sampler
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.transformers import TransformersSampler


class NoisySampler(TransformersSampler):
    """Rounds otherwise than the trainer does: each log-probability is off by a normal number."""

    noise = 0.0

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
        num_reusable: Callable[[list[int]], int] | None = None,
    ) -> list[list[Segment]]:
        groups = super().sample(prompts, n, params, seeds, limits, num_reusable)
        for seed, group in zip(seeds, groups, strict=True):
            chance = random.Random(seed)
            for segment in group:
                exact = segment.columns["rollout_logprobs"]
                segment.columns = {"rollout_logprobs": [value + chance.gauss(0, self.noise) for value in exact]}
        return groups


@sampler(columns=("rollout_logprobs",), elsewhere=True, copies_when_sharded=True)
def noisy(config: Config, policy: Policy, placement: Placement, noise: float = 0.0) -> NoisySampler:
    made = NoisySampler(placement.sampling_copy(policy), config.sampler.max_rows)
    made.noise = noise
    return made
