"""Values from rollouts: how often a completion is right when it is sampled anew from its middle, and credit from that.

stepcredit train --credit.name prefix_values.halves --estimators.middle prefix_values.prefix_values
"""

import torch
from torch import Tensor

from stepcredit.credit.base import completions, credit
from stepcredit.estimators.base import Context, Estimator, provider
from stepcredit.forest import Forest
from stepcredit.forest.ops import mean_by
from stepcredit.forest.types import Segment, Tree
from stepcredit.growth.rollouts import Rollouts
from stepcredit.seeds import mixed

STREAM = 100  # of seeds: another than those of stepcredit.seeds


class PrefixValues(Estimator):
    """Adds the segment column `middle`: the mean reward of `samples` completions from the middle of each one."""

    def __init__(self, rollouts: Rollouts, samples: int, seed: int) -> None:
        super().__init__()
        self.rollouts, self.samples, self.seed, self.calls = rollouts, samples, seed, 0

    def observe(self, forest: Forest) -> Forest:
        rollouts, trees, before = self.rollouts, [], []
        for tree in forest.to_trees():
            for segment in tree.segments:
                half = list(segment.token_ids[: max(1, len(segment.token_ids) // 2)])
                before.append((tree, half))
        self.calls += 1
        seeds = [mixed(self.seed, STREAM, self.calls, row) for row in range(len(before))]
        prompts = [[*tree.prompt_ids, *half] for tree, half in before]
        sampled = rollouts.sampler.sample(prompts, self.samples, rollouts.params, seeds)
        for (tree, half), group in zip(before, sampled, strict=True):
            start = Segment(half, finish="cut", sampled=False)
            ends = [Segment(one.token_ids, 0, one.finish) for one in group]
            trees.append(Tree(tree.problem, tree.prompt_ids, [start, *ends]))
        judged = rollouts.judge(Forest.from_trees(trees))
        leaf = judged.segment["is_leaf"] & judged.segment["has_reward"]
        mean, _ = mean_by(judged.segment["reward"], judged.segment["tree"], where=leaf)
        middle = torch.zeros(len(trees)).index_copy(0, judged.segment["tree"], mean)
        self.metrics = {"middle/mean": float(middle.mean())}
        return forest.with_segment(middle=middle)

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


@provider()
def prefix_values(context: Context, samples: int = 2) -> PrefixValues:
    assert context.rollouts is not None
    return PrefixValues(context.rollouts, samples, context.config.train.seed)


@credit("middle")
def halves(forest: Forest) -> Tensor:
    """V(middle) less the group's mean reward in the first half, r - V(middle) in the second; for single segments."""
    rows = completions(forest)
    mean, _ = mean_by(rows.returns, rows.tree)
    first, second = torch.zeros(forest.num_segments), torch.zeros(forest.num_segments)
    first[rows.leaf] = forest.segment["middle"][rows.leaf] - mean
    second[rows.leaf] = rows.returns - forest.segment["middle"][rows.leaf]
    segment = forest.token["segment"]
    early = forest.token["position"] < (forest.segment["length"] // 2).clamp(min=1)[segment]
    return torch.where(early, first[segment], second[segment])
