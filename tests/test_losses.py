"""CISPO, GSPO and losses of one's own: by pencil, by their limits, and cut into any parts."""

import math
from pathlib import Path

import pytest
import torch
from builders import flat_forest, is_near, objective_of, random_forest
from torch import Tensor

from stepcredit.config import resolve
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.ops import TokenScores
from stepcredit.losses.base import LossParts, Tokens, loss
from stepcredit.losses.choose import build_objective
from stepcredit.losses.objective import Objective
from stepcredit.losses.options import ObjectiveOptions
from stepcredit.losses.table import LOSSES
from stepcredit.policy.batching import split_into_parts, tree_sizes

close = torch.testing.assert_close
WEIGHING = {"aggregate": "seq_mean_token_mean"}


def ready(ratios: list[list[float]], advantages: list[list[float]], objective: Objective) -> tuple[Forest, Tensor]:
    """One group of completions whose tokens have these ratios, and log-probabilities with gradient."""
    lengths, rewards = [[len(row) for row in ratios]], [[1.0] * len(ratios)]
    old = [[[-1.0 - 0.1 * place for place in range(len(row))] for row in ratios]]
    forest = flat_forest(lengths, rewards, old_logprobs=old)
    flat = torch.tensor([value for row in ratios for value in row], dtype=torch.float64)
    logprobs = (forest.token["old_logprobs"].double() + flat.log()).requires_grad_()
    given = torch.tensor([value for row in advantages for value in row])
    return forest.with_token(advantages=given, weights=objective.weights(forest)), logprobs


def value_of(objective: Objective, forest: Forest, logprobs: Tensor) -> Tensor:
    return objective.loss(TokenScores(logprobs, torch.zeros_like(logprobs)), forest)[0]


def gradient_of(objective: Objective, forest: Forest, logprobs: Tensor) -> Tensor:
    return torch.autograd.grad(value_of(objective, forest, logprobs), logprobs)[0]


# ---------------------------------------------------------------------- by pencil

CISPO = [  # ratio, A, low, high: the weight of A log pi, whether it was clipped
    (1.0, 1.0, 1.0, 4.0, 1.0, False),
    (3.0, 1.0, 1.0, 4.0, 3.0, False),
    (7.0, 1.0, 1.0, 4.0, 5.0, True),
    (7.0, -2.0, 1.0, 4.0, 5.0, True),
    (0.01, 1.0, 1.0, 4.0, 0.01, False),
    (0.5, 1.0, 0.2, 0.2, 0.8, True),
    (1.5, -1.0, 0.2, 0.2, 1.2, True),
    (1.1, -1.0, 0.2, 0.2, 1.1, False),
]


@pytest.mark.parametrize("ratio, advantage, low, high, weight, acts", CISPO)
def test_cispo_by_pencil(ratio, advantage, low, high, weight, acts):
    """Loss -weight A log pi; the gradient is -weight A also where the clip acts."""
    objective = objective_of("cispo", clip_low=low, clip_high=high)
    forest, logprobs = ready([[ratio]], [[advantage]], objective)
    found, sums = objective.loss(TokenScores(logprobs, torch.zeros(1)), forest)
    assert found.item() == pytest.approx(-weight * advantage * logprobs.item(), abs=1e-6)
    assert gradient_of(objective, forest, logprobs).item() == pytest.approx(-weight * advantage, abs=1e-6)
    assert sums.sums["policy/clip_fraction"] == float(acts)


GSPO = [  # ratios, A, bound: s, whether the completion is clipped
    ([1.0, 1.0], 1.0, 0.5, 1.0, False),
    ([4.0, 1.0], -1.0, 0.5, 2.0, False),  # a negative advantage is not clipped above
    ([4.0, 1.0], 1.0, 0.5, 2.0, True),
    ([2.0, 1.0], 1.0, 0.5, math.sqrt(2), False),
    ([0.25, 1.0], -1.0, 0.4, 0.5, True),
    ([0.25, 1.0, 1.0, 1.0], 1.0, 0.4, 0.25**0.25, False),
]


@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
@pytest.mark.parametrize("ratios, advantage, bound, s, clipped", GSPO)
def test_gspo_by_pencil(name, ratios, advantage, bound, s, clipped):
    """-min(s A, clip(s) A) with s the geometric mean; each token's gradient is -s A / T, or 0 in a clipped one."""
    objective = objective_of(name, clip_low=bound, clip_high=bound, **WEIGHING)
    forest, logprobs = ready([ratios], [[advantage] * len(ratios)], objective)
    bounded = min(max(s, 1 - bound), 1 + bound)
    expected = -min(s * advantage, bounded * advantage)
    assert value_of(objective, forest, logprobs).item() == pytest.approx(expected, abs=1e-6)
    slope = 0.0 if clipped else -s * advantage / len(ratios)
    close(gradient_of(objective, forest, logprobs), torch.full((len(ratios),), slope).double(), atol=1e-6, rtol=0)


def test_gspo_token_keeps_advantages_apart():
    """s = sqrt(2) for both tokens: the gradient of each is its own -s A / 2; in gspo their mean acts on both."""
    s, advantages = math.sqrt(2), [[1.0, -3.0]]
    for name, expected in (("gspo_token", [-s / 2, 3 * s / 2]), ("gspo", [s / 2, s / 2])):
        objective = objective_of(name, clip_low=0.9, clip_high=0.9, **WEIGHING)
        forest, logprobs = ready([[2.0, 1.0]], advantages, objective)
        is_near(gradient_of(objective, forest, logprobs).float(), expected)


# ---------------------------------------------------------------------- limits


@pytest.mark.parametrize("name", ["cispo", "gspo", "gspo_token", "clip"])
def test_on_policy_all_are_reinforce(name):
    """Ratio 1, one advantage for each completion: the gradient of the plain policy gradient."""
    objective, plain = objective_of(name, **WEIGHING), objective_of("reinforce", **WEIGHING)
    rows = [[1.0] * 3, [1.0], [1.0] * 5]
    forest, logprobs = ready(rows, [[0.7] * 3, [-1.0], [0.2] * 5], objective)
    close(gradient_of(objective, forest, logprobs), gradient_of(plain, forest, logprobs))
    forest = forest.without_token("old_logprobs")
    close(gradient_of(objective, forest, logprobs), gradient_of(plain, forest, logprobs))


@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
def test_gspo_of_single_tokens_is_clip(name):
    """A completion of one token has its own ratio."""
    bounds = {"clip_low": 0.2, "clip_high": 0.2}
    objective, clip = objective_of(name, **bounds, **WEIGHING), objective_of("clip", **bounds, **WEIGHING)
    forest, logprobs = ready([[1.5], [0.5], [1.1]], [[1.0], [-1.0], [2.0]], objective)
    close(value_of(objective, forest, logprobs), value_of(clip, forest, logprobs))
    close(gradient_of(objective, forest, logprobs), gradient_of(clip, forest, logprobs))


# ---------------------------------------------------------------------- gradients and parts


def moved(kind: str, seed: int, objective: Objective) -> tuple[Forest, Tensor]:
    """A random forest and a policy that has moved; some completions have no advantage."""
    forest = random_forest(seed, kind, unsampled=0.2, num_trees=5)
    noise = torch.randn(2, forest.num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    some = torch.rand(forest.num_segments, generator=torch.Generator().manual_seed(seed)) < 0.5
    advantages = noise[0].float() * forest.active * some[forest.token["segment"]]
    forest = forest.with_token(advantages=advantages, weights=objective.weights(forest))
    return forest, (forest.token["old_logprobs"].double() - 2) + 0.4 * noise[1]


def whole(forest: Forest) -> list[Forest]:
    return [forest.with_token(owned=torch.ones(forest.num_tokens), source=torch.arange(forest.num_tokens))]


def summed(objective: Objective, parts: list[Forest], logprobs: Tensor) -> Tensor:
    """The gradient added up over parts, as an update does."""
    logprobs = logprobs.clone().requires_grad_()
    for part in parts:
        part = part.with_token(weights=part.token["weights"] * part.token["owned"])
        value_of(objective, part, logprobs[part.token["source"]]).backward()
    return logprobs.grad


WIDE = {"clip_low": 0.3, "clip_high": 0.3}
KINDS = {"cispo": ("flat", "chain", "deep"), "gspo": ("flat", "chain"), "gspo_token": ("flat", "chain")}
CASES = [(name, kind) for name, kinds in KINDS.items() for kind in kinds]


@pytest.mark.parametrize("name, kind", CASES)
@pytest.mark.parametrize("max_tokens", [1, 15, 40])
def test_cutting_a_step_changes_nothing(name, kind, max_tokens):
    """Completions of one or several segments; parts of any size, after what has no gradient was left out."""
    for seed in range(4):
        objective = objective_of(name, **WIDE, **WEIGHING)
        forest, logprobs = moved(kind, seed, objective)
        keep = torch.zeros(forest.num_segments, dtype=torch.bool)
        keep[forest.token["segment"][objective.has_gradient(forest)]] = True
        some = forest.select(keep)
        parts = [
            part.with_token(source=some.token["source"][part.token["source"]])
            for part in split_into_parts(some, max_tokens)
        ]
        expected = summed(objective, whole(forest), logprobs)
        assert expected.abs().max() > 0
        assert len(parts) > 1 or max_tokens > 1
        close(summed(objective, parts, logprobs), expected)


def test_finite_differences():
    for name, kind in CASES:
        objective = objective_of(name, **(WIDE if name != "cispo" else {}), **WEIGHING)
        forest, logprobs = moved(kind, 1, objective)
        if name == "cispo":  # its weights have no gradient: on-policy, where they are 1
            forest = forest.without_token("old_logprobs")
        if name == "gspo_token":  # nor has its s, so that its value has another slope; by pencil above
            continue
        assert torch.autograd.gradcheck(lambda x, o=objective, f=forest: value_of(o, f, x), logprobs.requires_grad_())


# ---------------------------------------------------------------------- a loss of one's own


@loss("old_logprobs", unit="completion")
def squared(tokens: Tokens, scale: float = 1.0) -> Tensor:
    """(log-ratio of the completion - scale A)^2, for each of its tokens: not sparse."""
    return (tokens.mean_by_completion(tokens.log_ratio) - scale * tokens.advantages).square()


@loss(unit="tree", sparse=True)
def pairs(tokens: Tokens) -> LossParts:
    """Every token against the mean log-probability of its tree."""
    size = tokens.forest.num_trees
    counted = tokens.counted.to(tokens.logprobs.dtype)
    total = tokens.logprobs.new_zeros(size).index_add(0, tokens.tree, tokens.logprobs)
    count = tokens.logprobs.new_zeros(size).index_add(0, tokens.tree, counted)
    apart = tokens.logprobs - (total / count.clamp(min=1))[tokens.tree]
    return LossParts(-tokens.advantages * apart * apart, {"policy/apart": apart.detach()})


def test_a_loss_that_is_not_sparse_keeps_tokens_of_zero_advantage():
    objective = Objective(squared, {"scale": 2.0}, ObjectiveOptions(**WEIGHING))
    forest, logprobs = moved("chain", 2, objective)
    assert objective.has_gradient(forest).equal(forest.token["weights"] != 0)
    none = forest.token["advantages"] == 0
    found = summed(objective, whole(forest), logprobs)
    assert found[none & (forest.token["weights"] != 0)].abs().max() > 0
    close(summed(objective, split_into_parts(forest, 10), logprobs), found)


@pytest.mark.parametrize("max_tokens", [1, 30])
def test_trees_of_a_loss_over_trees_stay_whole(max_tokens):
    """Cut between trees only; cut at subtrees the gradient would be another."""
    objective = Objective(pairs, {}, ObjectiveOptions())
    forest, logprobs = moved("flat", 3, objective)
    parts = split_into_parts(forest, max_tokens, whole_trees=True)
    close(summed(objective, parts, logprobs), summed(objective, whole(forest), logprobs))
    assert sum(part.num_trees for part in parts) == forest.num_trees
    assert all(sum(tree_sizes(part)) <= max_tokens or part.num_trees == 1 for part in parts)
    other = summed(objective, split_into_parts(forest, 1), logprobs)
    assert not torch.allclose(other, summed(objective, whole(forest), logprobs))


def test_a_loss_over_trees_is_computed_where_one_token_of_the_tree_has_a_gradient():
    objective = Objective(pairs, {}, ObjectiveOptions())
    forest = flat_forest([[2, 1], [1]], [[1.0, 0.0], [1.0]])
    forest = forest.with_token(advantages=torch.tensor([0.0, 0.0, 1.0, 0.0]), weights=torch.full((4,), 0.25))
    assert objective.has_gradient(forest).tolist() == [True, True, True, False]


# ---------------------------------------------------------------------- the config


def test_a_loss_by_dotted_path(tmp_path, monkeypatch):
    Path(tmp_path / "my_losses.py").write_text(
        "from stepcredit.losses.base import loss\n\n\n"
        "@loss(ratio=True, sparse=True)\ndef plain(tokens, scale: float = 1.0):\n"
        "    return -scale * tokens.log_ratio.exp() * tokens.advantages\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    objective = build_objective(resolve({"loss": {"name": "my_losses.plain", "scale": 3.0}}), flat=True)
    assert objective.options == {"scale": 3.0} and objective.needs.ratio
    forest, logprobs = ready([[1.0]], [[1.0]], objective)
    assert value_of(objective, forest, logprobs).item() == pytest.approx(-3.0)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"name": "clp"}, ["loss.name", "'clp'", "did you mean 'clip'", "reinforce"]),
        ({"name": "gsp"}, ["loss.name", "did you mean 'gspo'"]),
        ({"name": "cispo", "clip_hihg": 1.0}, ["loss 'cispo'", "clip_hihg", "did you mean 'clip_high'"]),
        ({"name": "cispo", "clip_low": 2.0}, ["loss.clip_low", "less than or equal to 1", "2.0"]),
        ({"clip_high": -1.0}, ["loss.clip_high", "greater than or equal to 0"]),
        ({"name": "reinforce", "clip_low": 0.1}, ["loss 'reinforce'", "clip_low", "no options"]),
        ({"dual_clip": 0.5}, ["loss.dual_clip", "above 1"]),
    ],
)
def test_what_does_not_fit_is_said(given, words):
    with pytest.raises(UserError) as error:
        build_objective(resolve({"loss": given}), flat=True)
    assert all(word in str(error.value) for word in words), error.value


def test_a_loss_over_completions_is_not_for_trees():
    with pytest.raises(UserError, match=r"over completions.*share"):
        build_objective(resolve({"algorithm": "treerpo", "loss": {"name": "gspo"}}), flat=False)


def test_every_loss_says_where_it_is_from():
    for name, function in LOSSES.items():
        assert "arXiv" in function.__doc__ or "`gspo`" in function.__doc__, name
