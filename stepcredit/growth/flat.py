"""Groups: independent completions of each problem."""

from collections.abc import Callable, Sequence

from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Tree
from stepcredit.samplers.base import Sampler
from stepcredit.samplers.params import SamplingParams


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
