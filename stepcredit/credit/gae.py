"""Generalised advantage estimation from the values of a critic, on completions and on trees (arXiv 1506.02438)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stepcredit.credit.base import counted_tokens, credit
from stepcredit.errors import UserError
from stepcredit.forest import FINISH_CODE, Forest
from stepcredit.forest.ops import SAME, back_up, last_sampled

WHITEN_EPS = 1e-8  # in the variance, as in verl and TRL

Bootstrap = Literal["zero", "hold_last", "value"]


@dataclass(frozen=True)
class Returns:
    """What returns are made of; `gae` says what each means."""

    gamma: float = 1.0
    lam: float = 0.95
    bootstrap: Bootstrap = "zero"
    whiten_rewards: bool = False

    @property
    def reads_values(self) -> bool:
        """Whether returns depend on the values, and not on the rewards alone."""
        return self.lam != 1 or self.bootstrap != "zero"

    def of(self, forest: Forest, values: Tensor) -> Tensor:
        """[num_tokens] fp64, the lambda-return G of each judged sampled token, what a critic learns; 0 elsewhere.

        G_t = r_t + gamma ((1 - lam) V' + lam G'), with V' and G' the value and the return behind token t: those of the
        next sampled token, the means over the judged children where the tree branches, or the bootstrap behind a leaf.
        With lam 1 and no bootstrap it does not depend on the values, to the last bit.

        Args:
            values: [num_tokens] of the state before each token, read at judged sampled tokens.
        """
        counted, values, behind = self._clean(forest, values)
        following = _next(forest, values, behind)
        terms = self._rewards(forest, counted) + self.gamma * (1 - self.lam) * following
        return self._backed_up(forest, torch.where(counted, terms, 0.0), self.lam, behind)

    def advantages(self, forest: Forest, values: Tensor, lam: float | Tensor | None = None) -> Tensor:
        """[num_tokens] fp64, A_t = d_t + gamma lam A', d_t = r_t + gamma V' - V_t; `of` less the values.

        Args:
            lam: in place of `self.lam`; one for each token, perhaps.
        """
        counted, values, behind = self._clean(forest, values)
        terms = self._rewards(forest, counted) + self.gamma * _next(forest, values, behind) - values
        own = self.lam if lam is None else lam
        return self._backed_up(forest, torch.where(counted, terms, 0.0), own, torch.zeros_like(behind))

    def _clean(self, forest: Forest, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which tokens count, their values, and what stands behind the leaves."""
        counted = counted_tokens(forest)
        values = torch.where(counted, values, 0.0).double()
        return counted, values, _bootstrap(forest, values, self.bootstrap)

    def _rewards(self, forest: Forest, counted: Tensor) -> Tensor:
        rewards = step_rewards(forest)
        return _whitened(rewards, counted, shift_mean=False) if self.whiten_rewards else rewards

    def _backed_up(self, forest: Forest, terms: Tensor, lam: float | Tensor, behind: Tensor) -> Tensor:
        """y_t = x_t + gamma lam y'; a token of a tool passes on what is behind it."""
        factor = torch.where(forest.token_sampled, torch.as_tensor(self.gamma * lam, dtype=torch.float64), 1.0)
        return torch.where(counted_tokens(forest), back_up(forest, terms, factor, behind).values, 0.0)


def _next(forest: Forest, values: Tensor, behind: Tensor) -> Tensor:
    """[num_tokens] the value behind each token; tokens of tools stand between two states and change nothing."""
    return back_up(forest, values, (~forest.token_sampled).double(), behind).following


def step_rewards(forest: Forest) -> Tensor:
    """[num_tokens] fp64, token rewards, plus the outcome at the last sampled token of each judged completion.

    Where completions that share it end in tokens of a tool, it gets their mean, as `back_up` does.
    """
    passing = (~forest.token_sampled).double()
    outcome = torch.where(forest.judged, forest.segment["reward"], 0.0)  # 0 for what goes on
    rewards = back_up(forest, torch.zeros(forest.num_tokens), passing, outcome).following
    if "token_rewards" in forest.token:
        rewards = rewards + forest.token["token_rewards"]
    return torch.where(counted_tokens(forest), rewards, 0.0)


def cut_off(forest: Forest) -> Tensor:
    """[num_segments] True for the leaves of judged completions that ended at the token limit, and of those that go on.

    The latter have no reward yet.
    """
    at_limit = forest.judged & (forest.segment["finish"] == FINISH_CODE["length"])
    return forest.segment["is_leaf"] & (at_limit | forest.open)


@credit("values", forests="tree", unfinished=True)
def gae(
    forest: Forest,
    gamma: float = 1.0,
    lam: float = 0.95,
    lam_policy: float = -1.0,
    length_alpha: float = 0.0,
    bootstrap: Bootstrap = "zero",
    whiten: bool = False,
    whiten_rewards: bool = False,
    clip: float = 0.0,
) -> Tensor:
    """A_t = sum over s >= t of (gamma lam)^(s-t) (r_s + gamma V_{s+1} - V_s), V_s of the state before token s.

    r has the outcome at the last sampled token and the token rewards (dense ones, and the k1 penalty). At a node of a
    tree both V_{s+1} and the sum behind it are means over the judged children. Tokens of tools are no steps: they
    neither discount nor have a value, and V_{s+1} is that of the next sampled token (verl does so, too).

    The critic learns `value_target`, which is A with lam, plus V (`Returns`); the policy may have another lambda.

    Args:
        gamma: discount, over sampled tokens.
        lam: of the critic's targets and, unless `lam_policy` says otherwise, of the advantages. 1: whole returns.
        lam_policy: of the advantages (decoupled, VC-PPO, arXiv 2503.01491: lam 1, lam_policy 0.95); below 0: as `lam`.
        length_alpha: above 0, lam_policy is 1 - 1 / (length_alpha l), l the sampled tokens of the completion, or their
            mean over the completions behind a shared token (VAPO, arXiv 2504.05118: 0.05); at least 0.
        bootstrap: the value behind a completion that was cut off at the token limit, or that goes on in the next
            iteration (sampler.window). "zero": none, as at a regular end; "hold_last": the value of its last token's
            state (EGAE of T-PPO, arXiv 2506.15050), so that at gamma 1 that token's advantage is its reward; "value":
            the critic's value of the state behind it.
        whiten: (A - mean) / sqrt(var + 1e-8) over all judged sampled tokens of the batch (with sampler.window over the
            new ones), the variance unbiased, as in verl and TRL. TRL does it in each process for itself.
        whiten_rewards: (r - mean) / sqrt(var + 1e-8) + mean, before anything else (TRL). TRL counts one more token a
            completion, behind the last, and puts the outcome there.
        clip: bounds the advantages at last, to [-clip, clip] (PPO-max, arXiv 2307.04964: 0.5); 0: not.

    Degenerate: with gamma 1 and lam 1 it is the return less V_t, so 0 for a critic that knows the outcome. A group is
    nothing here: singletons and groups of equal rewards have advantages like any other. Where all advantages of the
    batch are equal, whitening gives 0.

    Raises:
        UserError: gamma, lam or lam_policy above 1, a negative number, or "value" without the column
            `value_after` where a completion was cut off.

    >>> # values .5, .25, .75 and outcome 1, gamma 1, lam .5: -.25 + .5 (.5 + .5 * .25), .5 + .5 * .25, .25
    >>> from stepcredit.forest.types import Problem, Segment, Tree
    >>> values = {"values": [0.5, 0.25, 0.75]}
    >>> forest = Forest.from_trees([Tree(Problem(), [1], [Segment([5, 6, 7], reward=1.0, columns=values)])])
    >>> gae(forest, lam=0.5).tolist()
    [0.0625, 0.625, 0.25]
    """
    _check(gamma, lam, lam_policy, length_alpha, clip)
    policy_lam: float | Tensor = lam if lam_policy < 0 else lam_policy
    if length_alpha:
        policy_lam = (1 - 1 / (length_alpha * _lengths(forest))).clamp(min=0)
    advantages = Returns(gamma, lam, bootstrap, whiten_rewards).advantages(forest, forest.token["values"], policy_lam)
    counted = counted_tokens(forest) & ~forest.past
    if whiten:
        advantages = torch.where(counted, _whitened(advantages, counted), 0.0)
    return (advantages.clamp(-clip, clip) if clip else advantages).float()


def _check(gamma: float, lam: float, lam_policy: float, length_alpha: float, clip: float) -> None:
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= value <= 1.0:
            raise UserError(f"credit.{name} must lie in [0, 1], got {value}")
    if lam_policy > 1:
        raise UserError(f"credit.lam_policy must be at most 1 (below 0: as credit.lam), got {lam_policy}")
    if length_alpha and lam_policy >= 0:
        raise UserError("credit.length_alpha makes lam_policy from the lengths; leave credit.lam_policy out")
    for name, value in (("length_alpha", length_alpha), ("clip", clip)):
        if value < 0:
            raise UserError(f"credit.{name} must not be negative, got {value}")


def _lengths(forest: Forest) -> Tensor:
    """[num_tokens] sampled tokens of a completion through each token, the mean over those behind it; at least 1."""
    sampled = forest.token_sampled.double()
    to_go = back_up(forest, sampled, torch.ones_like(sampled), torch.zeros(forest.num_segments)).values
    return (forest.token["position"] + to_go).clamp(min=1)


def _bootstrap(forest: Forest, values: Tensor, kind: Bootstrap) -> Tensor:
    """[num_segments] fp64, the value behind leaves that were cut off; 0 elsewhere."""
    cut = cut_off(forest)
    if kind == "zero" or not bool(cut.any()):
        return torch.zeros(forest.num_segments, dtype=torch.float64)
    if kind == "value" and "value_after" not in forest.token:
        raise UserError(
            "credit.bootstrap value reads the column 'value_after', which these rollouts do not have; take hold_last"
        )
    last = forest.segment["start"] + forest.segment["length"] - 1
    by_token = last_sampled(forest, values) if kind == "hold_last" else forest.token["value_after"].double()
    return torch.where(cut, by_token[last], 0.0)


def _whitened(values: Tensor, where: Tensor, shift_mean: bool = True) -> Tensor:
    counted = values[where]
    if len(counted) < 2 or bool(counted.max() - counted.min() <= SAME * counted.abs().max()):
        return torch.zeros_like(values) if shift_mean else values
    shift = counted.mean()
    scaled = (values - shift) / (counted.var() + WHITEN_EPS).sqrt()
    return scaled if shift_mean else scaled + shift
