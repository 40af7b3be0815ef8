"""The KL penalty in the reward."""

import torch

from stepcredit.estimators.base import Context, Estimator, provider
from stepcredit.forest import Forest
from stepcredit.forest.ops import kl_k1


class RewardPenalty(Estimator):
    """Token rewards less coef * log(pi_old / pi_ref) of each sampled token (k1): what reads returns sees it."""

    def __init__(self, coef: float) -> None:
        super().__init__()
        self.coef = coef

    def observe(self, forest: Forest) -> Forest:
        penalty = self.coef * kl_k1(forest.token["old_logprobs"], forest.token["ref_logprobs"])
        rewards = forest.token.get("token_rewards", torch.zeros_like(penalty))
        return forest.with_token(token_rewards=rewards - penalty * forest.token_sampled)


@provider(needs=("old_logprobs", "ref_logprobs"))
def reward_penalty(context: Context) -> RewardPenalty:
    return RewardPenalty(context.config.objective.kl.coef)
