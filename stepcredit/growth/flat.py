"""Groups: independent completions of each problem."""

from collections.abc import Callable, Sequence

from stepcredit.forest import Forest
from stepcredit.samplers.base import Sampler
from stepcredit.samplers.params import SamplingParams
from stepcredit.types import Problem, Tree


def flat(
    sampler: Sampler,
    problems: Sequence[Problem],
    encode: Callable[[Problem], list[int]],
    params: SamplingParams,
    seeds: Sequence[int],
    group_size: int,
) -> Forest:
    """`group_size` independent completions of each problem: trees of depth 1."""
    prompts = [encode(problem) for problem in problems]
    groups = sampler.sample(prompts, group_size, params, seeds)
    return Forest.from_trees(
        [Tree(problem, prompt, group) for problem, prompt, group in zip(problems, prompts, groups, strict=True)]
    )


def sampling_seed(run_seed: int, stream: int, number: int) -> int:
    """A seed for problem `number` of a stream (0 training, 1 evaluation); streams and runs do not overlap."""
    return ((run_seed * 2 + stream) * 1_000_000_007 + number) % (2**62)
