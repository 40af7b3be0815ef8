"""Shapers that leave completions out of the loss: the masked are in no denominator, their rewards in all baselines."""

from typing import Literal

from stepcredit.forest import FINISH_CODE, Forest
from stepcredit.forest.ops import SAME, spread_by
from stepcredit.shaping.base import RAW, judged_leaves, only, shaper


@shaper()
def mask_truncated(forest: Forest) -> Forest:
    """Truncated completions are not trained on (DAPO's overlong filtering, arXiv 2503.14476).

    A segment that several completions share is masked only if all of them are truncated.
    """
    return only(forest, forest.segment["is_leaf"] & (forest.segment["finish"] != FINISH_CODE["length"]))


@shaper(RAW)
def drop_uniform(
    forest: Forest, rewards: Literal["shaped", "raw"] = "shaped", how: Literal["mask", "zero"] = "mask"
) -> Forest:
    """Groups of equal rewards are left out (dynamic sampling without refill, arXiv 2503.14476; Reinforce-Rej,
    arXiv 2504.11343).

    Rewards are equal when they differ by no more than rounding (`spread_by`). A group of one is uniform.

    Args:
        rewards: "shaped": as the shapers before this one left them; "raw": as they were judged. A posterior gate
            (arXiv 2508.05170) tells apart what is all right, so that it is to be looked at shaped; the unlikeliness
            reward (arXiv 2506.02355) drops groups by their raw success.
        how: "mask": they are in no denominator, so they do not shrink the step. "zero": their rewards become 0 and they
            stay in the denominators, as in the released code of Reinforce-Rej.
    """
    judged = judged_leaves(forest)
    values = forest.segment["reward" if rewards == "shaped" else RAW]
    varied = spread_by(values, forest.segment["tree"], where=judged) > 0
    if how == "zero":
        return forest.with_segment(reward=forest.segment["reward"] * varied)
    return forest.with_segment(mask=forest.segment["mask"] & varied)


@shaper()
def positives_only(forest: Forest, above: float = 0.0) -> Forest:
    """Only completions with a reward above `above` are trained on: RAFT's selection (arXiv 2504.11343).

    Right for rewards in {0, 1} and in {-1, 1} alike. The released code sets advantages of the others to 0 and leaves
    them in the denominators: that is `clip_rewards` with low 0 in place of this, under a credit without a baseline.
    """
    return only(forest, judged_leaves(forest) & (forest.segment["reward"] > above + SAME))
