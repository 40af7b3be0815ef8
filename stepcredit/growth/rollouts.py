"""What sampling and judging need, the same for training, evaluation and `stepcredit look`."""

from dataclasses import dataclass

from stepcredit.growth.base import Growth
from stepcredit.processes.ranks import SINGLE_PROCESS, Ranks
from stepcredit.samplers.base import Sampler
from stepcredit.samplers.params import SamplingParams
from stepcredit.tasks.base import Task
from stepcredit.tasks.prompts import PromptFormat
from stepcredit.verifiers.judging import Judge


@dataclass(frozen=True)
class Rollouts:
    """
    Attributes:
        recorded: completions come from the data with their rewards: the sampler has none, and nothing is judged.
    """

    task: Task
    encode: PromptFormat
    sampler: Sampler
    grow: Growth
    params: SamplingParams
    judge: Judge
    ranks: Ranks = SINGLE_PROCESS
    recorded: bool = False
