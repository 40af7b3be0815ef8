"""VinePPO: what a step changes in the chance of success, by rollouts from its two ends (arXiv 2410.01679)."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from stepcredit.credit.base import completions, credit, judged_tokens, whiten
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.ops import segment_sum


@credit("prefix_value", "step_index")
def vine(forest: Forest, whitening: bool = False, best_of: Annotated[int, Field(ge=1)] = 1) -> Tensor:
    """A = r(step) + V(after) - V(before), for every token of a step; discount and lambda are 1.

    V of a prefix is the mean return of its own rollouts, that of the prompt too (`prefix_values.start group` takes the
    group's other completions instead); after the last step it is the completion's own reward, with no noise. r(step) is
    the sum of the rewards inside the step: 0 for rewards of outcomes. A KL penalty in the reward (k1) acts within its
    step alone, because rollouts have none.

    The values come from the estimator `prefix_values`, or from saved rollouts that have them. With a prover
    (`prefix_values.model`) this is the progress of PAV (arXiv 2410.08146), which is added to outcome credit as an
    advantage: summed over a completion as rewards are, it is r - V(prompt) again.

    Args:
        best_of: above 1: values are those of the best of so many rollouts, 1 - (1 - V)^K, PAV's prover that costs
            nothing; rewards of completions and values lie in [0, 1].
        whitening: shift and scale to mean 0 and unbiased variance 1 over the batch's tokens, which the released PPO
            trainer does unless told otherwise (`whiten_advantages`); the paper's formula has no such thing.

    Degenerate: a completion of one step gets r - V(prompt), a singleton too. Where all rollouts of a group and its
    completions have the same return it is 0.

    >>> # V = 1/2, 3/4, 1/4 before three steps of a right completion: 1/4, -1/2, 3/4
    """
    rows, judged = completions(forest), judged_tokens(forest)
    leaf, step = forest.leaf[forest.token["segment"]], forest.token["step_index"].long()
    tokens = judged.nonzero().squeeze(1)  # in the order of the completions
    tokens = tokens[(leaf * (forest.num_tokens + 1) + forest.token["position"])[tokens].argsort()]
    leaf, step, value = leaf[tokens], step[tokens], forest.token["prefix_value"][tokens].double()
    outcome = torch.zeros(forest.num_segments, dtype=torch.float64)
    outcome[rows.leaf] = forest.segment["reward"][rows.leaf].double()
    if best_of > 1:
        value, outcome = (_best_of(best_of, each) for each in (value, outcome))
    goes_on, same_step = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
    goes_on[:-1] = leaf[1:] == leaf[:-1]
    same_step[:-1] = goes_on[:-1] & (step[1:] == step[:-1])
    after = torch.where(goes_on, value.roll(-1), outcome[leaf])
    change = torch.where(same_step, 0.0, after - value)
    if "token_rewards" in forest.token:
        change = change + forest.token["token_rewards"][tokens].double()
    number = (~same_step).cumsum(0) - (~same_step).long()  # of the step among all steps
    by_step = segment_sum(change, number, len(tokens))
    advantages = torch.zeros(forest.num_tokens)
    advantages[tokens] = by_step[number].float()
    return whiten(advantages, judged) if whitening else advantages


def _best_of(number: int, values: Tensor) -> Tensor:
    if len(values) and not 0 <= float(values.min()) <= float(values.max()) <= 1:
        raise UserError(
            f"best_of {number} is the chance that one of so many rollouts is right, so rewards lie in [0, 1]; here "
            f"are values from {float(values.min()):g} to {float(values.max()):g}. Leave it at 1"
        )
    return 1 - (1 - values) ** number
