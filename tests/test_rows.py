"""Rows of the clipped family and of shaped rewards against fresh implementations on padded tensors, from the papers."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pytest
import torch
from torch import Tensor

from stepcredit.config import resolve
from stepcredit.credit import CREDIT, assign
from stepcredit.estimators.table import Observers
from stepcredit.forest import Forest
from stepcredit.forest.ops import TokenScores
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.losses.choose import build_objective
from stepcredit.run.observing import observe
from stepcredit.shaping.base import fresh_states
from stepcredit.shaping.choose import build_shapers

LONGEST, BUFFER = 10, 2  # sampler.max_new_tokens, and a fifth of it
BINARY, SIGNED = (0.0, 1.0), (-1.0, 1.0)
GATE = {"shapers": [{"name": "outcome_gate", "outcome": "right", "think": "thought"}]}


def ragged(seed: int, values: tuple[float, float]) -> list[Tree]:
    """Groups of 1 to 5 completions of 1 to LONGEST tokens; some unjudged, some groups uniform."""
    random = Random(seed)
    trees = []
    for number in range(6):
        segments = []
        for _ in range(random.randint(1, 5) if number else 5):
            size = random.randint(1, LONGEST)
            reward = random.choice(values) if number != 3 else values[1]
            thought = random.randint(0, 8) / 8
            segments.append(
                Segment(
                    [random.randint(3, 90) for _ in range(size)],
                    reward=reward if random.random() < 0.85 else None,
                    rewards={"right": reward, "thought": thought},
                    columns={"old_logprobs": [-random.randint(1, 64) / 32 for _ in range(size)]},
                )
            )
        trees.append(Tree(Problem(id=str(number)), [1, 2], segments))
    return trees


@dataclass(frozen=True)
class Padded:
    """Judged completions as rows [n, t]; `r`, `g`, `thought` are [n]."""

    r: Tensor
    g: Tensor
    thought: Tensor
    mask: Tensor
    old: Tensor
    new: Tensor

    def groups(self, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each group its rows and their values."""
        return [(rows, values[rows]) for rows in ((self.g == one).nonzero().squeeze(1) for one in self.g.unique())]

    @property
    def length(self) -> Tensor:
        return self.mask.sum(1)

    @property
    def ratio(self) -> Tensor:
        return (self.new - self.old).exp()


def pad(trees: list[Tree], logprobs: Tensor) -> Padded:
    rows, first = [], 0
    for number, tree in enumerate(trees):
        for segment in tree.segments:
            size = len(segment.token_ids)
            if segment.reward is not None:
                rows.append((segment, number, slice(first, first + size)))
            first += size
    shape = len(rows), LONGEST
    mask, old, new = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    for row, (segment, _, place) in enumerate(rows):
        size = len(segment.token_ids)
        mask[row, :size] = 1
        old[row, :size] = torch.tensor(segment.columns["old_logprobs"], dtype=torch.float64)
        new[row, :size] = logprobs[place]
    r = torch.tensor([segment.reward for segment, _, _ in rows], dtype=torch.float64)
    thought = torch.tensor([segment.rewards["thought"] for segment, _, _ in rows], dtype=torch.float64)
    return Padded(r, torch.tensor([number for _, number, _ in rows]), thought, mask, old, new)


# ---------------------------------------------------------------------- the papers' formulas


def centred(b: Padded, r: Tensor) -> Tensor:
    a = torch.zeros_like(r)
    for rows, values in b.groups(r):
        a[rows] = values - values.mean()
    return a


def z_scored(b: Padded, r: Tensor) -> Tensor:
    a = torch.zeros_like(r)
    for rows, values in b.groups(r):
        if len(values) > 1 and float(values.max() - values.min()) > 1e-6:
            a[rows] = (values - values.mean()) / (values.std() + 1e-6)
    return a


def varied(b: Padded, r: Tensor) -> Tensor:
    found = torch.zeros(len(r), dtype=torch.bool)
    for rows, values in b.groups(r):
        found[rows] = len(values.unique()) > 1
    return found


def ppo(ratio: Tensor, a: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    return -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


def token_mean(b: Padded, loss: Tensor, rows: Tensor | None = None) -> Tensor:
    mask = b.mask if rows is None else b.mask * rows[:, None]
    return (loss * mask).sum() / mask.sum()


def mean_of_means(b: Padded, loss: Tensor, rows: Tensor | None = None) -> Tensor:
    means = (loss * b.mask).sum(1) / b.length
    return means.mean() if rows is None else means[rows].mean()


def raft(b: Padded) -> Tensor:
    chosen = b.r > 0
    return -((b.new * b.mask).sum(1) * b.r)[chosen].mean()


def raft_pp(b: Padded) -> Tensor:
    return mean_of_means(b, ppo(b.ratio, b.r[:, None]), b.r > 0)


def reinforce_rej(b: Padded) -> Tensor:
    return mean_of_means(b, ppo(b.ratio, b.r[:, None]), varied(b, b.r))


def em_pg(b: Padded) -> Tensor:
    return token_mean(b, -centred(b, b.r)[:, None] * b.new)


def gpg(b: Padded) -> Tensor:
    alpha = len(b.r) / int(varied(b, b.r).sum())
    return token_mean(b, -alpha * centred(b, b.r)[:, None] * b.new)


def dapo(b: Padded) -> Tensor:
    soft = torch.zeros_like(b.r)
    for row, size in enumerate(b.length.tolist()):
        if size > LONGEST - BUFFER:
            soft[row] = (LONGEST - BUFFER - size) / BUFFER  # the paper's middle branch; nothing is longer than LONGEST
    return token_mean(b, ppo(b.ratio, z_scored(b, b.r + soft)[:, None], 0.2, 0.28))


def gspo(b: Padded) -> Tensor:
    s = (((b.new - b.old) * b.mask).sum(1) / b.length).exp()
    return ppo(s, z_scored(b, b.r), 3e-4, 4e-4).mean()


def cispo(b: Padded) -> Tensor:
    weight = b.ratio.detach().clamp(max=5.0)
    return token_mean(b, -weight * z_scored(b, b.r)[:, None] * b.new)


def unlikeliness(b: Padded) -> Tensor:
    likelihood, r = (b.old * b.mask).sum(1) / b.length, b.r.clone()
    for rows, values in b.groups(likelihood):
        for place, row in enumerate(rows.tolist()):
            likelier = int((values > values[place] + 1e-9).sum())
            same = int(((values - values[place]).abs() <= 1e-9).sum())
            rank = likelier + (same - 1) / 2
            r[row] = b.r[row] * (1 - 0.25 * (len(values) - rank) / len(values))
    return mean_of_means(b, ppo(b.ratio, z_scored(b, r)[:, None]), varied(b, b.r))


def posterior_grpo(b: Padded) -> Tensor:
    return mean_of_means(b, ppo(b.ratio, z_scored(b, b.r + b.r * b.thought)[:, None]))


REFERENCES: dict[str, tuple[Callable[[Padded], Tensor], tuple[tuple[float, float], ...]]] = {
    "raft": (raft, (BINARY, SIGNED)),
    "raft_pp": (raft_pp, (BINARY, SIGNED)),
    "reinforce_rej": (reinforce_rej, (BINARY, SIGNED)),
    "em_pg": (em_pg, (BINARY, SIGNED)),
    "gpg": (gpg, (BINARY, SIGNED)),
    "dapo": (dapo, (BINARY, SIGNED)),
    "gspo": (gspo, (BINARY, SIGNED)),
    "cispo": (cispo, (BINARY, SIGNED)),
    "unlikeliness": (unlikeliness, (BINARY,)),
    "posterior_grpo": (posterior_grpo, (BINARY,)),
}
CASES = [(name, values) for name, (_, ranges) in REFERENCES.items() for values in ranges]


def loss_of(name: str, forest: Forest, logprobs: Tensor) -> Tensor:
    """What a run of this row minimises in its first optimiser step, its groups all in the batch."""
    more = GATE if name == "posterior_grpo" else {}
    config = resolve({"algorithm": name, "model": "mine", "sampler": {"max_new_tokens": LONGEST}, **more})
    shapers = build_shapers(config)
    forest = observe(forest, shapers, fresh_states(shapers), {}, Observers({}, frozenset())).forest
    forest = assign(forest, config.credit.name, CREDIT[config.credit.name], config.credit.options)
    objective = build_objective(config, flat=True)
    forest = forest.with_token(weights=objective.weights(forest))
    return objective.loss(TokenScores(logprobs, torch.zeros_like(logprobs)), forest)[0]


@pytest.mark.parametrize("name, values", CASES, ids=str)
def test_a_row_is_its_papers_formula(name, values):
    """Loss and gradient, after the policy has moved, on ragged groups of either reward range."""
    for seed in range(6):
        trees = ragged(seed, values)
        forest = Forest.from_trees(trees)
        noise = torch.randn(forest.num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        logprobs = (forest.token["old_logprobs"].double() + 0.3 * noise).requires_grad_()
        found, expected = loss_of(name, forest, logprobs), REFERENCES[name][0](pad(trees, logprobs))
        assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-6), seed
        gradients = [torch.autograd.grad(each, logprobs)[0] for each in (found, expected)]
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)
        assert gradients[0].abs().max() > 1e-3


def test_rewards_of_0_and_of_minus_1_differ_where_there_is_no_baseline():
    """Reinforce-Rej pushes wrong answers down only where they have a reward below 0; RAFT's selection is the same."""
    losses = {}
    for name in ("raft", "reinforce_rej"):
        for values in (BINARY, SIGNED):
            forest = Forest.from_trees(ragged(0, values))
            logprobs = forest.token["old_logprobs"].double().requires_grad_()
            (gradient,) = torch.autograd.grad(loss_of(name, forest, logprobs), logprobs)
            losses[name, values] = gradient
    assert losses["raft", BINARY].equal(losses["raft", SIGNED])
    assert losses["reinforce_rej", BINARY].max() <= 0 < losses["reinforce_rej", SIGNED].max()


@pytest.mark.parametrize("values", [BINARY, SIGNED], ids=str)
def test_raft_as_released(values):
    """Advantages of the others are 0 and they stay in the denominators: rewards clipped at 0, nothing masked."""
    trees = ragged(1, values)
    forest = Forest.from_trees(trees)
    logprobs = forest.token["old_logprobs"].double() + 0.1
    given = {"algorithm": "raft_pp", "model": "mine", "shapers": [{"name": "clip_rewards", "low": 0.0}]}
    config = resolve(given)
    (clip,) = build_shapers(config)
    forest = assign(clip(forest).forest, "reward_to_go", CREDIT["reward_to_go"], config.credit.options)
    objective = build_objective(config, flat=True)
    forest = forest.with_token(weights=objective.weights(forest))
    found = objective.loss(TokenScores(logprobs, torch.zeros_like(logprobs)), forest)[0]
    b = pad(trees, logprobs)
    expected = mean_of_means(b, ppo(b.ratio, b.r.clamp(min=0)[:, None]))
    assert float(found) == pytest.approx(float(expected), abs=1e-6)
