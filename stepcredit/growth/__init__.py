"""Growing trees with a sampler: problems in, a forest out."""

from collections.abc import Callable, Sequence

from stepcredit.forest import Forest
from stepcredit.growth.flat import flat, sampling_seed
from stepcredit.growth.steps import StepRule
from stepcredit.growth.tree import TreeShape, tree
from stepcredit.samplers.base import Sampler
from stepcredit.samplers.params import SamplingParams
from stepcredit.types import Problem

Encode = Callable[[Problem], list[int]]
Growth = Callable[[Sampler, Sequence[Problem], Encode, SamplingParams, Sequence[int]], Forest]

__all__ = ["Encode", "Growth", "StepRule", "TreeShape", "flat", "sampling_seed", "tree"]
