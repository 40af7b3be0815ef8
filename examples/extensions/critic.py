"""A critic of your own, and the credit that reads it: an estimator that learns, with a value head.

stepcredit train --credit.name critic.gae --estimators.values critic.critic
"""

import torch
from torch import Tensor

from stepcredit.credit.base import completions, credit, to_tokens
from stepcredit.estimators.base import Context, Estimator, Load, provider
from stepcredit.forest import Forest
from stepcredit.forest.ops import sum_to_end
from stepcredit.learn.adapters import trainable_copy
from stepcredit.learn.learner import Learner, ScoreFunction
from stepcredit.learn.options import AdamWOptions
from stepcredit.policy.heads import add_head


class Critic(Estimator):
    """Adds `values`: what the state before each token is worth, learnt from the rewards by least squares."""

    def __init__(self, context: Context, learning_rate: float) -> None:
        super().__init__()
        policy = trainable_copy(context.policy, share_frozen=not context.placement.sharded)
        add_head(policy, "value")
        self.policy = context.placement.place(policy)
        options, budget = AdamWOptions(learning_rate=learning_rate), context.config.optim.max_tokens_per_micro_batch
        self.learner = self.trained = Learner(self.policy, context.placement, options, budget, " in the critic")

    def observe(self, forest: Forest) -> Forest:
        """The values are of the critic before this batch trains it."""
        rows = completions(forest)
        target = to_tokens(forest, rows, rows.returns)
        forest = forest.with_token(target=target, weights=forest.active / forest.active.sum().clamp(min=1))

        def loss(part: Forest, call: ScoreFunction) -> tuple[Tensor, Tensor]:
            values = call(part, head="value")
            weights = (part.token["weights"] * part.token["owned"]).to(values.device)
            error = (values - part.token["target"].to(values.device)).square()
            return (weights * error).sum(), values.detach()

        parts, pieces = self.learner.accumulate(forest, loss)
        values = self.policy.collect(forest, parts, pieces)
        norm, _ = self.learner.step()
        self.metrics = {"critic/grad_norm": norm, "critic/value": float(values[forest.active].mean())}
        return forest.with_token(values=values).without_token("target", "weights")


@provider(loads=lambda config, needed: [Load("critic", config.model, learns=True, adapted=True)])
def critic(context: Context, learning_rate: float = 1e-3) -> Critic:
    return Critic(context, learning_rate)


@credit("values")
def gae(forest: Forest, lam: float = 0.95) -> Tensor:
    """A_t = sum over s >= t of lam^(s-t) (r_s + V_{s+1} - V_s), the reward at the last token (arXiv 1506.02438)."""
    values = forest.token["values"] * forest.token_sampled
    following = torch.where(forest.next_token >= 0, values[forest.next_token.clamp(min=0)], 0.0)
    rewards = torch.zeros(forest.num_tokens)
    rows = completions(forest)
    last = forest.segment["start"][rows.leaf] + forest.segment["length"][rows.leaf] - 1
    rewards[last] = rows.returns
    return sum_to_end(forest, rewards + following - values, lam) * forest.active
