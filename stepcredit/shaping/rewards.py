"""Shapers that change rewards. Only judged completions have one; the others stay as they are."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepcredit.errors import UserError, did_you_mean
from stepcredit.forest import Forest
from stepcredit.forest.ops import SAME, segment_sum
from stepcredit.shaping.base import (
    Shaped,
    check_not_negative,
    judged_leaves,
    path_sum,
    path_tokens,
    shaper,
)

TIE = 1e-5  # nats; mean log-probabilities that are closer differ by rounding


@shaper()
def shuffle_rewards(forest: Forest) -> Forest:
    """A control experiment: rewards are shuffled among all judged completions of the batch and carry no signal."""
    judged = judged_leaves(forest).nonzero().squeeze(1)
    reward = forest.segment["reward"].clone()
    generator = torch.Generator().manual_seed(
        int(forest.token["token_ids"].sum())
    )  # a seed from the batch, so that it is reproducible
    reward[judged] = reward[judged][torch.randperm(len(judged), generator=generator)]
    return forest.with_segment(reward=reward)


@shaper()
def clip_rewards(forest: Forest, low: float = -10.0, high: float = 10.0) -> Forest:
    """r_i <- min(max(r_i, low), high) (PPO-max, arXiv 2307.04964). With low 0: RAFT's rewards as released."""
    if low > high:
        raise UserError(f"shaper 'clip_rewards': low ({low:g}) is above high ({high:g})")
    reward = forest.segment["reward"]
    return forest.with_segment(reward=torch.where(judged_leaves(forest), reward.clamp(low, high), reward))


@shaper(state=True)
def running_scale(forest: Forest, state: Mapping[str, float], center: bool = False) -> Shaped:
    """r_i <- r_i / std, the unbiased standard deviation of all rewards of the run so far, this batch's included.

    Reward scaling of PPO-max (arXiv 2307.04964). The mean stays in, so that a reward of 0 stays 0; its released code
    has both forms and enables this one. As long as all rewards were equal they are not divided.

    Args:
        center: (r_i - mean) / std, the mean of the run so far too.
    """
    judged = judged_leaves(forest)
    reward = forest.segment["reward"]
    count, mean, squares = _with_batch(state, reward[judged].double())
    std = (squares / (count - 1)) ** 0.5 if count > 1 else 0.0
    std = std if std > SAME * max(1.0, abs(mean)) else 1.0
    scaled = ((reward.double() - mean * center) / std).float()
    forest = forest.with_segment(reward=torch.where(judged, scaled, reward))
    return Shaped(forest, {"count": count, "mean": mean, "squares": squares}, {"reward/running_std": std})


def _with_batch(state: Mapping[str, float], values: Tensor) -> tuple[float, float, float]:
    """Count, mean, and sum of squared distances from it: of what the state has seen, and these values (Chan et al.)."""
    count, mean, squares = (state.get(name, 0.0) for name in ("count", "mean", "squares"))
    if not len(values):
        return count, mean, squares
    more, own = float(len(values)), float(values.mean())
    gap, total = own - mean, count + more
    squares += float((values - own).square().sum()) + gap * gap * count * more / total
    return total, mean + gap * more / total, squares


def _check_overlong(options: Mapping[str, Any], rewards: Mapping[str, float]) -> None:
    if "overlong" in rewards:
        raise UserError("shapers: 'overlong' is a reward function of this run already; take it from one of the two")


@shaper(check=_check_overlong)
def overlong(
    forest: Forest,
    max_tokens: int = 0,
    buffer: int = 0,
    coef: Annotated[float, Field(ge=0)] = 1.0,
) -> Forest:
    """r_i <- r_i - coef * clip((l_i - (max_tokens - buffer)) / buffer, 0, 1), l_i the sampled tokens of a completion.

    DAPO's soft punishment (arXiv 2503.14476; there max_tokens 20480 and buffer 4096). As a shaper it acts behind the
    prompt filter, which therefore sees the answers alone, as DAPO's does; the reward function of this name acts before.

    Args:
        max_tokens, buffer: 0: `sampler.max_new_tokens`, and a fifth of `max_tokens`.
        coef: 1 is the paper's, whose outcome rewards are 1 and -1; with 1 and 0 a right answer of the greatest length
            comes out like a wrong one, and 0.5 keeps the paper's proportion.
    """
    if not 0 < buffer <= max_tokens:
        raise UserError(f"shaper 'overlong': buffer ({buffer}) must be above 0 and at most max_tokens ({max_tokens})")
    over = (path_tokens(forest) - (max_tokens - buffer)).double() / buffer
    reward = forest.segment["reward"]
    punished = (reward.double() - coef * over.clamp(0, 1)).float()
    return forest.with_segment(reward=torch.where(judged_leaves(forest), punished, reward))


@shaper("old_logprobs")
def unlikeliness(
    forest: Forest,
    beta: Annotated[float, Field(ge=0, le=1)] = 0.25,
    form: Literal["paper", "authors"] = "paper",
) -> Forest:
    """r_i <- r_i (1 - beta (G - rank_i) / G), rank_i 0 for the likeliest of the G judged completions of its group.

    What is likely anyway earns less when it is right (arXiv 2506.02355). Likelihood is the mean of log pi_old over the
    sampled tokens; completions of one likelihood share the mean of their ranks. For rewards of 0 and up: of a reward
    below 0 the likeliest would be punished least.

    Args:
        form: "authors": their released code, which takes off beta (G - 1 - rank_i) / G, so that the unlikeliest keeps
            all of its reward.
    """
    reward, judged = forest.segment["reward"], judged_leaves(forest)
    check_not_negative(forest, reward * judged, "shaper 'unlikeliness': the reward", "likely wrong answers would gain")
    rows = judged.nonzero().squeeze(1)
    own = forest.token["old_logprobs"].double() * forest.token_sampled
    total = path_sum(forest, segment_sum(own, forest.token["segment"], forest.num_segments))
    likelihood = (total / path_tokens(forest).clamp(min=1))[rows]
    before, size = ranks(likelihood, forest.segment["tree"][rows])  # likeliest last
    off = before + 1 if form == "paper" else before
    shaped = reward.clone()
    shaped[rows] = (reward[rows].double() * (1 - beta * off / size)).float()
    return forest.with_segment(reward=shaped)


def ranks(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the rows of its group with smaller values, fp64, ties halved; and the size of its group.

    >>> ranks(torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([0, 0, 0, 0]))[0].tolist()
    [3.0, 0.0, 1.5, 1.5]
    """
    order = values.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    value, group = values[order], groups[order]
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = group[1:] != group[:-1]
    apart = first.clone()
    apart[1:] |= value[1:] - value[:-1] > TIE
    place = torch.arange(len(order), dtype=torch.float64)
    number, tie = first.long().cumsum(0) - 1, apart.long().cumsum(0) - 1
    within = place - place[first][number]
    ones = torch.ones_like(within)
    mean = segment_sum(within, tie, len(order)) / segment_sum(ones, tie, len(order)).clamp(min=1)
    rank, size = torch.empty_like(within), torch.empty_like(within)
    rank[order] = mean[tie]
    size[order] = segment_sum(ones, number, len(order))[number]
    return rank, size


# ---------------------------------------------------------------------- the gate


def _check_gate(options: Mapping[str, Any], rewards: Mapping[str, float]) -> None:
    for option in ("outcome", "think"):
        name = options.get(option, "")
        if not name:
            raise UserError(
                "shaper 'outcome_gate': name the reward function of the outcome, and that of the thinking, which has "
                "weight 0: --shapers '[{name: outcome_gate, outcome: NAME, think: NAME}]', both in reward.functions"
            )
        if name not in rewards:
            raise UserError(
                f"shaper 'outcome_gate': {option} '{name}' is not among the reward functions; "
                f"{did_you_mean(name, rewards)}"
            )
    think = options["think"]
    if think == options["outcome"]:
        raise UserError(f"shaper 'outcome_gate': '{think}' cannot be outcome and thinking; name two functions")
    if rewards[think] != 0:
        raise UserError(
            f"shaper 'outcome_gate': '{think}' has reward.weights {rewards[think]:g}, so it would count whatever the "
            "outcome is; give it weight 0, the gate adds it with its own coef"
        )


@shaper(check=_check_gate)
def outcome_gate(
    forest: Forest, outcome: str = "", think: str = "", coef: Annotated[float, Field(ge=0)] = 1.0
) -> Forest:
    """r_i <- r_i + coef * R_outcome * R_think: thinking counts where the outcome is right (Posterior-GRPO,
    arXiv 2508.05170).

    With r = R_format + R_outcome, the weighted sum of the reward functions, this is the paper's reward. It tells apart
    groups that are all right, so `drop_uniform` goes behind it.

    Args:
        outcome: name of a reward function with values of 0 and up.
        think: name of another one, of weight 0, with values in [0, 1]; a completion that it leaves out gets 0.
    """
    rows = [detail["rewards"] for detail in forest.details]
    gate = _part(rows, outcome)
    check_not_negative(
        forest, gate, "shaper 'outcome_gate': the outcome reward", "good thinking would make a wrong answer worse"
    )
    reward = forest.segment["reward"]
    gated = (reward.double() + coef * gate * _part(rows, think)).float()
    return forest.with_segment(reward=torch.where(judged_leaves(forest), gated, reward))


def _part(rows: list[dict[str, float | None]], name: str) -> Tensor:
    """[num_segments] fp64, what one reward function said; 0 where it said nothing."""
    return torch.tensor([row.get(name) or 0.0 for row in rows], dtype=torch.float64)
