"""A growth of your own: a dialogue with an environment, whose words are read but never trained on.

stepcredit train --growth.name dialogue.dialogue --growth.options "{turns: 2}"
"""

from collections.abc import Sequence

from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.growth.base import Encode
from stepcredit.samplers.base import Sampler
from stepcredit.samplers.params import SamplingParams
from stepcredit.seeds import mixed


def dialogue(
    sampler: Sampler,
    problems: Sequence[Problem],
    encode: Encode,
    params: SamplingParams,
    seeds: Sequence[int],
    turns: int = 2,
    group_size: int = 4,
) -> Forest:
    """`group_size` dialogues of each problem; the environment answers a turn by repeating its last token."""
    prompts = [encode(problem) for problem in problems]
    dialogues: list[list[Segment]] = [[] for _ in range(len(problems) * group_size)]
    for turn in range(turns):
        starts = [
            [*prompts[number // group_size], *(token for segment in one for token in segment.token_ids)]
            for number, one in enumerate(dialogues)
        ]
        own = [mixed(seeds[number // group_size], turn, number % group_size) for number in range(len(starts))]
        for one, (said,) in zip(dialogues, sampler.sample(starts, 1, params, own), strict=True):
            last = turn == turns - 1
            one.append(Segment(said.token_ids, len(one) - 1, said.finish if last else "cut", columns=said.columns))
            if not last:
                one.append(Segment([said.token_ids[-1]], len(one) - 1, "cut", sampled=False))
    trees = []
    for number, (problem, prompt) in enumerate(zip(problems, prompts, strict=True)):
        segments: list[Segment] = []
        for one in dialogues[number * group_size : (number + 1) * group_size]:
            first = len(segments)
            for segment in one:
                segment.parent = first + segment.parent if segment.parent >= 0 else -1
            segments += one
        trees.append(Tree(problem, prompt, segments))
    return Forest.from_trees(trees)
