"""The Growth interface: problems in, a forest out."""

from collections.abc import Callable, Sequence

from stepcredit.forest import Forest
from stepcredit.forest.types import Problem
from stepcredit.samplers.base import Sampler
from stepcredit.samplers.params import SamplingParams

Encode = Callable[[Problem], list[int]]
Growth = Callable[[Sampler, Sequence[Problem], Encode, SamplingParams, Sequence[int]], Forest]
