"""Shapers: `Forest -> Forest`; they change rewards or mask completions before credit is assigned."""

from collections.abc import Callable

import torch

from stepcredit.forest import FINISH_CODE, Forest
from stepcredit.forest.ops import spread_by

Shaper = Callable[[Forest], Forest]


def mask_truncated(forest: Forest) -> Forest:
    """Truncated completions are not trained on; their rewards stay in the baselines (DAPO's overlong filtering).

    A segment that several completions share is masked only if all of them are truncated.
    """
    ended = forest.segment["is_leaf"] & (forest.segment["finish"] != FINISH_CODE["length"])
    for level in forest.levels_deepest_first():
        ended[forest.segment["parent"][level[ended[level]]]] = True
    return forest.with_segment(mask=forest.segment["mask"] & ended)


def drop_uniform(forest: Forest) -> Forest:
    """Groups of equal rewards are masked: they are left out of the denominators too, so they do not shrink the step.

    Rewards are equal when they differ by no more than rounding (`spread_by`).
    """
    judged = forest.segment["has_reward"] & forest.segment["is_leaf"]
    spread = spread_by(forest.segment["reward"], forest.segment["tree"], where=judged)
    return forest.with_segment(mask=forest.segment["mask"] & (spread > 0))


def shuffle_rewards(forest: Forest) -> Forest:
    """A control experiment: rewards are shuffled among all judged completions of the batch and carry no signal."""
    judged = (forest.segment["has_reward"] & forest.segment["is_leaf"]).nonzero().squeeze(1)
    reward = forest.segment["reward"].clone()
    generator = torch.Generator().manual_seed(
        int(forest.token["token_ids"].sum())
    )  # a seed from the batch, so that it is reproducible
    reward[judged] = reward[judged][torch.randperm(len(judged), generator=generator)]
    return forest.with_segment(reward=reward)


SHAPERS: dict[str, Shaper] = {
    "mask_truncated": mask_truncated,
    "drop_uniform": drop_uniform,
    "shuffle_rewards": shuffle_rewards,
}
