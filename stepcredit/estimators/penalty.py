"""Token rewards of a run: the KL penalty in the reward, and the log-ratio of two models."""

from collections.abc import Collection, Iterator

import torch

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.estimators.base import Context, Estimator, Load, provider
from stepcredit.estimators.frozen import Frozen
from stepcredit.forest import Forest
from stepcredit.forest.ops import kl_k1
from stepcredit.learn.placement import UNSHARDED, Placement
from stepcredit.policy.forward import Policy

COLUMN = "token_rewards"


class RewardPenalty(Estimator):
    """Token rewards less coef * log(pi_old / pi_ref) of each sampled token (k1): what reads returns sees it."""

    def __init__(self, coef: float) -> None:
        super().__init__()
        self.coef = coef

    def observe(self, forest: Forest) -> Forest:
        rewards = forest.token.get(COLUMN, torch.zeros(forest.num_tokens))
        if self.coef:
            penalty = self.coef * kl_k1(forest.token["old_logprobs"], forest.token["ref_logprobs"])
            rewards = rewards - penalty * forest.token_sampled
        return forest.with_token(token_rewards=rewards)


class LogRatioRewards(Frozen):
    """Token rewards plus clamp(beta log(pi_model / pi_ref), -bound, bound) of each sampled token.

    RTO (arXiv 2404.18922): the model is one that DPO has trained from the reference, whose log-ratio is a reward of
    tokens. The released code has beta 0.05 and bound 0.05, and a penalty of 0.01; the paper has no bound.

    Args:
        model: frozen.
        bound: 0: none.
        penalty: observes behind it.
    """

    named = "estimators.token_rewards.model"
    what = "the rewards of tokens"

    def __init__(
        self,
        model: Policy,
        beta: float,
        bound: float,
        penalty: RewardPenalty,
        temperature: float = 1.0,
        max_tokens: int = 16384,
        placement: Placement = UNSHARDED,
    ) -> None:
        super().__init__(model, temperature, max_tokens, placement)
        self.beta, self.bound, self.penalty = beta, bound, penalty

    def observe(self, forest: Forest) -> Forest:
        sampled = forest.token_sampled
        ratio = torch.where(sampled, self.beta * (self.score(forest) - forest.token["ref_logprobs"]), 0.0)
        own = ratio.clamp(-self.bound, self.bound) if self.bound else ratio
        count = max(1, int(sampled.sum()))
        self.metrics = {
            "token_rewards/mean": float(own.sum()) / count,
            "token_rewards/at_bound": int((own != ratio).sum()) / count,
        }
        rewards = forest.token.get(COLUMN, torch.zeros(forest.num_tokens))
        return self.penalty.observe(forest.with_token(token_rewards=rewards + own))


@provider(needs=("old_logprobs", "ref_logprobs"))
def reward_penalty(context: Context) -> RewardPenalty:
    return RewardPenalty(context.config.objective.kl.coef)


def _needs(config: Config, needed: Collection[str]) -> Iterator[str]:
    yield "ref_logprobs"
    if _penalty(config):
        yield "old_logprobs"


def _loads(config: Config, needed: Collection[str]) -> Iterator[Load]:
    yield Load("token reward model", str(config.estimators[COLUMN].options.get("model", "")))


def _penalty(config: Config) -> float:
    return config.objective.kl.coef if config.objective.kl.estimator == "k1" else 0.0


@provider(needs=_needs, loads=_loads)
def log_ratio(context: Context, model: str = "", beta: float = 0.05, bound: float = 0.05) -> LogRatioRewards:
    """
    Raises:
        UserError: no model is named, it has another vocabulary than the policy, or a number is below 0.
    """
    config, option = context.config, f"estimators.{COLUMN}"
    if not model:
        raise UserError(f"{option}: log_ratio needs a model; name it with --{option}.model FOLDER")
    if beta <= 0 or bound < 0:
        raise UserError(f"{option}: beta ({beta:g}) must be above 0 and bound ({bound:g}) at least 0")
    own = context.load(model, f"{option}.model").requires_grad_(False)
    temperature, budget = config.sampler.temperature, config.optim.max_tokens_per_micro_batch
    return LogRatioRewards(own, beta, bound, RewardPenalty(_penalty(config)), temperature, budget, context.placement)
