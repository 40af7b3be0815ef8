"""Weights, surrogates and regularisers by pencil; gradients; and that cutting a step changes nothing."""

import math

import pytest
import torch
from builders import flat_forest, is_near, objective_of, random_forest
from torch import Tensor

from stepcredit.forest import Forest
from stepcredit.forest.ops import TokenScores
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.losses import base
from stepcredit.losses.base import packed, to_device, unpacked
from stepcredit.losses.clip import clipped_surrogate
from stepcredit.losses.objective import Objective, read_sums
from stepcredit.losses.weights import AGGREGATORS
from stepcredit.policy.batching import split_into_parts

close = torch.testing.assert_close


def loss_of(objective: Objective, forest: Forest, logprobs: Tensor, entropy: Tensor | None = None) -> Tensor:
    return objective.loss(TokenScores(logprobs, torch.zeros_like(logprobs) if entropy is None else entropy), forest)[0]


def prepared(kind: str, seed: int = 0, **objective) -> tuple[Objective, Forest, Tensor, Tensor]:
    """A random forest ready for its loss: objective, forest, log-probabilities and entropies of a policy that moved."""
    forest = random_forest(seed, kind, unsampled=0.2, num_trees=5)
    noise = torch.randn(4, forest.num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    choice = objective_of(**objective)
    forest = forest.with_token(advantages=noise[0].float() * forest.active, weights=choice.weights(forest))
    forest = forest.with_token(old_logprobs=forest.token["old_logprobs"] - 2, ref_logprobs=(noise[1] - 2).float())
    return choice, forest, forest.token["old_logprobs"].double() + 0.4 * noise[2], noise[3].exp()


# ---------------------------------------------------------------------- aggregators

M, S = 1 / 8, 1 / 3
WEIGHTS = {  # completions of 2, 3 (zero advantage), 4 (unjudged) and 2 (masked) tokens; then 2 + tool 3 + 1
    "token_mean": [M] * 5 + [0] * 6 + [M, M, 0, 0, 0, M],
    "seq_mean_token_mean": [1 / 6] * 2 + [1 / 9] * 3 + [0] * 6 + [1 / 9, 1 / 9, 0, 0, 0, 1 / 9],
    "seq_mean_token_sum": [S] * 5 + [0] * 6 + [S, S, 0, 0, 0, S],
    "sum_over_constant": [S / 10] * 5 + [0] * 6 + [S / 10, S / 10, 0, 0, 0, S / 10],
}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_weights_by_hand(name):
    """Unjudged, masked and tool tokens are in no denominator; tokens of zero advantage are."""
    first = [Segment([1] * 2, reward=1.0), Segment([1] * 3, reward=0.0), Segment([1] * 4), Segment([1] * 2, reward=1.0)]
    second = [Segment([1] * 2), Segment([1] * 3, 0, sampled=False), Segment([1], 1, reward=1.0)]
    forest = Forest.from_trees([Tree(Problem(), [1], first), Tree(Problem(), [1], second)])
    mask = torch.ones(7, dtype=torch.bool)
    mask[3] = False
    advantages = torch.ones(forest.num_tokens)
    advantages[2:5] = 0
    forest = forest.with_segment(mask=mask).with_token(advantages=advantages)
    is_near(objective_of(aggregate=name, constant=10.0).weights(forest), WEIGHTS[name], 1e-7)


BRANCHING = {  # a root of 2 tokens, a judged leaf of 1, an unjudged of 2, a judged of 3
    "token_mean": [1 / 6, 1 / 6, 1 / 6, 0, 0, 1 / 6, 1 / 6, 1 / 6],
    "seq_mean_token_mean": [1 / 6, 1 / 6, 1 / 3, 0, 0, 1 / 9, 1 / 9, 1 / 9],
    "seq_mean_token_sum": [1 / 3, 1 / 3, 1 / 3, 0, 0, 1 / 3, 1 / 3, 1 / 3],
    "sum_over_constant": [1 / 12, 1 / 12, 1 / 12, 0, 0, 1 / 12, 1 / 12, 1 / 12],
}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_unit_of_a_branching_forest_is_the_segment(name):
    """Three segments have an active token; a shared segment counts once."""
    leaves = [Segment([1], 0, reward=1.0), Segment([1] * 2, 0), Segment([1] * 3, 0, reward=0.0)]
    forest = Forest.from_trees([Tree(Problem(), [1], [Segment([1] * 2), *leaves])])
    is_near(objective_of(aggregate=name, constant=4.0).weights(forest), BRANCHING[name], 1e-7)


@pytest.mark.parametrize("kind", ["flat", "chain", "deep"])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_weights_sum_to_what_the_name_says(kind, name):
    """1 for the means, mean length for the sum, mean length / constant for the constant; 0 off active tokens."""
    forest = random_forest(3, kind, unsampled=0.2)
    weights = objective_of(aggregate=name, constant=7.0).weights(forest)
    row = forest.token["segment"]
    units = {int(u) for u in (forest.leaf[row] if forest.is_flat else row)[forest.active]}
    mean_length = int(forest.active.sum()) / len(units)
    expected = {"seq_mean_token_sum": mean_length, "sum_over_constant": mean_length / 7}.get(name, 1.0)
    assert float(weights.sum()) == pytest.approx(expected, rel=1e-5)
    assert (weights > 0).equal(forest.active)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_step_without_active_tokens_has_zero_weights(name):
    """Nothing judged: weights are 0, not NaN."""
    weights = objective_of(aggregate=name, constant=3.0).weights(flat_forest([[2, 1]], [[None, None]]))
    assert weights.tolist() == [0.0, 0.0, 0.0]


# ---------------------------------------------------------------------- surrogates

CLIP = [  # ratio, A, low, high, dual: loss, its derivative by log pi, whether the clip acts
    (1.0, 1.0, 0.2, 0.2, 0.0, -1.0, -1.0, False),
    (1.1, 2.0, 0.2, 0.2, 0.0, -2.2, -2.2, False),
    (1.5, 1.0, 0.2, 0.2, 0.0, -1.2, 0.0, True),
    (0.5, 1.0, 0.2, 0.2, 0.0, -0.5, -0.5, False),
    (1.5, -1.0, 0.2, 0.2, 0.0, 1.5, 1.5, False),
    (0.5, -1.0, 0.2, 0.2, 0.0, 0.8, 0.0, True),
    (0.9, -2.0, 0.2, 0.2, 0.0, 1.8, 1.8, False),
    (1.5, 0.0, 0.2, 0.2, 0.0, 0.0, 0.0, False),
    (1.25, 2.0, 0.2, 0.28, 0.0, -2.5, -2.5, False),
    (1.5, 2.0, 0.2, 0.28, 0.0, -2.56, 0.0, True),
    (0.7, -2.0, 0.4, 0.2, 0.0, 1.4, 1.4, False),
    (0.5, -2.0, 0.4, 0.2, 0.0, 1.2, 0.0, True),
    (5.0, -1.0, 0.2, 0.2, 3.0, 3.0, 0.0, True),
    (2.5, -1.0, 0.2, 0.2, 3.0, 2.5, 2.5, False),
    (0.5, -1.0, 0.2, 0.2, 3.0, 0.8, 0.0, True),
    (5.0, 1.0, 0.2, 0.2, 3.0, -1.2, 0.0, True),
]


@pytest.mark.parametrize("ratio, advantage, low, high, dual, loss, slope, acts", CLIP)
def test_clipped_surrogate_by_pencil(ratio, advantage, low, high, dual, loss, slope, acts):
    """Both signs, both sides, unequal bounds, and the bound on negative advantages."""
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    found, clipped = clipped_surrogate(log_ratio, torch.tensor([advantage], dtype=torch.float64), low, high, dual)
    found.sum().backward()
    assert (found.item(), log_ratio.grad.item()) == pytest.approx((loss, slope), abs=1e-9)
    assert clipped.item() is acts


@pytest.mark.parametrize("surrogate", ["clip", "reinforce"])
@pytest.mark.parametrize("kind", ["flat", "deep"])
def test_the_on_policy_gradient_is_weight_times_advantage(surrogate, kind):
    """Without old log-probabilities the ratio is 1 and d loss / d log pi = -w A, for both surrogates."""
    objective, forest, logprobs, _ = prepared(kind, loss=surrogate)
    forest = forest.without_token("old_logprobs")
    logprobs.requires_grad_()
    loss_of(objective, forest, logprobs).backward()
    assert logprobs.grad.abs().max() > 0.01
    close(logprobs.grad, -(forest.token["weights"] * forest.token["advantages"]).double(), atol=1e-7, rtol=0)


def test_loss_and_metrics_by_pencil():
    """Ratios 1.5 and 0.9 with A 1 and -2, weights 1/2: the clip acts on one; the unjudged token is in no sum."""
    forest = flat_forest([[1, 1, 1]], [[1.0, 0.0, None]], old_logprobs=[[[-1.0], [-1.0], [-9.0]]])
    objective = objective_of()
    forest = forest.with_token(advantages=torch.tensor([1.0, -2.0, 5.0]), weights=objective.weights(forest))
    logprobs = torch.tensor([math.log(1.5) - 1, math.log(0.9) - 1, -1.0])
    loss, sums = objective.loss(TokenScores(logprobs, torch.zeros(3)), forest)
    assert float(loss) == pytest.approx(0.5 * -1.2 + 0.5 * 1.8, abs=1e-6)
    k3 = (1.5 - 1 - math.log(1.5)) + (0.9 - 1 - math.log(0.9))
    assert sums.sums == pytest.approx({"policy/clip_fraction": 1.0, "policy/kl_old": k3}, abs=1e-6)
    assert sums.largest == pytest.approx({"policy/ratio_max": 1.5}, abs=1e-6) and sums.count == 2


def test_numbers_stay_on_the_device_until_the_step_is_over():
    """A part's sums are tensors, which `read_sums` makes the same numbers of as `float` does, in one transfer."""
    objective, forest, logprobs, entropy = prepared("flat", kl_coef=0.2, kl_estimator="k3", entropy_coef=0.1)
    parts = []
    for seed in range(3):
        noise = torch.randn(forest.num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        parts.append(objective.loss(TokenScores(logprobs + noise, entropy), forest)[1])
        parts[-1].sums["optim/loss"], parts[-1].sums["tokens/computed"] = torch.tensor(float(seed)).sqrt(), 7.0
    names = {"policy/clip_fraction", "policy/kl_old", "policy/kl_ref_update", "optim/loss", "tokens/computed"}
    for one, two in zip(parts, read_sums(parts), strict=True):
        assert one.sums.keys() == two.sums.keys() == names and one.count == two.count == int(forest.active.sum())
        assert all(isinstance(value, Tensor) for name, value in one.sums.items() if name != "tokens/computed")
        assert two.sums == {name: float(value) for name, value in one.sums.items()}
        assert two.largest == {name: float(value) for name, value in one.largest.items()}
        assert all(type(value) is float for value in (*two.sums.values(), *two.largest.values()))
    assert read_sums([]) == []


def test_columns_that_travel_together_arrive_as_they_were():
    columns = {
        "floats": torch.tensor([0.0, -0.0, math.nan, math.inf, -1e-45, 3.4e38]),
        "rows": torch.tensor([0, 1, 2**31 - 1, -(2**31), 5, 6]),
        "flags": torch.tensor([True, False, True, True, False, False]),
    }
    found = unpacked(packed(columns), columns)
    assert packed(columns).dtype == torch.int32 and found.keys() == columns.keys()
    for name, values in columns.items():
        assert found[name].dtype == values.dtype and found[name].equal(values) == (name != "floats")
    assert found["floats"].view(torch.int32).equal(columns["floats"].view(torch.int32))


def test_columns_that_32_bits_do_not_hold_travel_alone():
    columns = {
        "double": torch.tensor([0.1, 0.2], dtype=torch.float64),
        "long": torch.tensor([2**31, 0]),
        "float": torch.tensor([1.0, 2.0]),
    }
    found = to_device(columns, torch.device("meta"))
    assert {name: (value.dtype, value.shape) for name, value in found.items()} == {
        name: (value.dtype, value.shape) for name, value in columns.items()
    }
    assert [name for name, values in columns.items() if base._fits_in_32_bits(values)] == ["float"]
    assert to_device(columns, torch.device("cpu")) == columns


# ---------------------------------------------------------------------- regularisers


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_term_by_hand(estimator):
    """k2 adds w c (log pi - log ref) to the gradient, k3 w c (1 - ref / pi); k1 acts in the reward, not here."""
    objective, forest, logprobs, _ = prepared("chain", kl_estimator=estimator, kl_coef=0.3)
    forest = forest.with_token(advantages=torch.zeros(forest.num_tokens))
    logprobs.requires_grad_()
    loss = loss_of(objective, forest, logprobs)
    (found,) = torch.autograd.grad(loss, logprobs)
    x = logprobs.detach() - forest.token["ref_logprobs"]
    value, slope = {"k1": (0 * x, 0 * x), "k2": (x * x / 2, x), "k3": ((-x).exp() - 1 + x, 1 - (-x).exp())}[estimator]
    weights = 0.3 * forest.token["weights"].double()
    close(loss.detach(), (weights * value).sum())
    close(found, weights * slope, atol=1e-9, rtol=0)
    assert objective.needs_reference and objective.kl_in_loss == (estimator != "k1") != objective.kl_in_reward


def test_the_entropy_term_by_hand():
    """The loss falls by w c for each unit of entropy; log-probabilities are not touched."""
    objective, forest, logprobs, entropy = prepared("flat", entropy_coef=0.5)
    entropy.requires_grad_()
    with_term = loss_of(objective, forest, logprobs, entropy)
    without = loss_of(objective_of(), forest, logprobs, entropy)
    weights = 0.5 * forest.token["weights"].double()
    close((with_term - without).detach(), -(weights * entropy.detach()).sum())
    close(torch.autograd.grad(with_term, entropy)[0], -weights)


EVERYTHING = [
    {},
    {"loss": "reinforce"},
    {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.4, "aggregate": "seq_mean_token_mean"},
    {"kl_coef": 0.2, "kl_estimator": "k3", "entropy_coef": 0.1, "aggregate": "seq_mean_token_sum"},
    {"kl_coef": 0.2, "kl_estimator": "k2", "loss": "reinforce", "aggregate": "sum_over_constant"},
]
everything = pytest.mark.parametrize("options", EVERYTHING)


@everything
def test_gradients_equal_finite_differences(options):
    """By log-probabilities and entropies, clipped tokens included."""
    objective, forest, logprobs, entropy = prepared("chain", seed=2, **options)
    inputs = (logprobs.requires_grad_(), entropy.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, y: loss_of(objective, forest, x, y), inputs, eps=1e-5, atol=1e-6)


@everything
@pytest.mark.parametrize("bad", [-math.inf, -200.0, math.nan])
def test_tokens_without_weight_cannot_spoil_the_gradient(options, bad):
    """Whatever log-probability an unjudged or tool token has, loss and gradient stay what they were."""
    objective, forest, logprobs, entropy = prepared("chain", **options)
    off = forest.token["weights"] == 0
    assert off.any()
    results = []
    for value in (-1.0, bad):
        scores = torch.where(off, value, logprobs).float().requires_grad_()
        loss = loss_of(objective, forest, scores, entropy.float())
        results.append((loss.detach(), torch.autograd.grad(loss, scores)[0]))
    close(results[1], results[0])
    assert results[1][1][off].abs().max() == 0 and results[1][1].abs().max() > 0


# ---------------------------------------------------------------------- cutting a step


def summed(objective: Objective, parts: list[Forest], logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient added up over parts, as the training loop does."""
    logprobs = logprobs.clone().requires_grad_()
    total = torch.zeros((), dtype=logprobs.dtype)
    for part in parts:
        part = part.with_token(weights=part.token["weights"] * part.token["owned"])
        rows = part.token["source"]
        total = total + loss_of(objective, part, logprobs[rows], entropy[rows])
    return total.detach(), torch.autograd.grad(total, logprobs)[0]


@everything
@pytest.mark.parametrize("kind", ["flat", "chain", "deep"])
@pytest.mark.parametrize("max_tokens", [1, 15, 40, 10_000])
def test_cutting_a_step_changes_neither_loss_nor_gradient(options, kind, max_tokens):
    """Parts of any size, with repeated ancestors owned once, add up to the whole."""
    objective, forest, logprobs, entropy = prepared(kind, seed=1, **options)
    parts = split_into_parts(forest, max_tokens)
    whole = forest.with_token(owned=torch.ones(forest.num_tokens), source=torch.arange(forest.num_tokens))
    assert (len(parts) == 1) == (max_tokens == 10_000)
    close(summed(objective, parts, logprobs, entropy), summed(objective, [whole], logprobs, entropy))


@pytest.mark.parametrize("kind", ["flat", "chain", "deep"])
@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.1}, {"entropy_coef": 0.1}])
def test_segments_without_gradient_may_be_left_out(kind, options):
    """The loop computes only segments with a gradient (and their ancestors), then cuts: the gradient is the same."""
    for seed in range(4):
        objective, forest, logprobs, entropy = prepared(kind, seed, **options)
        half = torch.rand(forest.num_segments, generator=torch.Generator().manual_seed(seed)) < 0.5
        forest = forest.with_token(advantages=forest.token["advantages"] * half[forest.token["segment"]])
        has = objective.has_gradient(forest)
        keep = torch.zeros(forest.num_segments, dtype=torch.bool)
        keep[forest.token["segment"][has]] = True
        some = forest.select(keep)
        parts = [
            part.with_token(source=some.token["source"][part.token["source"]]) for part in split_into_parts(some, 30)
        ]
        whole = forest.with_token(owned=torch.ones(forest.num_tokens), source=torch.arange(forest.num_tokens))
        expected = summed(objective, [whole], logprobs, entropy)[1]
        assert expected.abs().max() > 0
        close(summed(objective, parts, logprobs, entropy)[1], expected)


def test_has_gradient_skips_zero_advantages_only_without_regularisers():
    """Zero weight never has a gradient; zero advantage has one through a KL or entropy term in the loss."""
    forest = flat_forest([[1, 1, 1]], [[1.0, 0.0, None]]).with_token(
        advantages=torch.tensor([1.0, 0.0, 1.0]), weights=torch.tensor([0.5, 0.5, 0.0])
    )
    plain, regularised = [True, False, False], [True, True, False]
    for options, expected in (
        ({}, plain),
        ({"kl_coef": 0.1, "kl_estimator": "k1"}, plain),
        ({"kl_coef": 0.1, "kl_estimator": "k3"}, regularised),
        ({"entropy_coef": 0.1}, regularised),
    ):
        assert objective_of(**options).has_gradient(forest).tolist() == expected
