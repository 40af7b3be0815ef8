"""Losses over pairs: by pencil, against the formula written down once more, their limits, cut into any parts."""

import itertools
import math

import pytest
import torch
from builders import flat_forest, random_forest
from test_losses import gradient_of, moved, summed, value_of, whole
from tiny_models import fresh
from torch import Tensor

from stepcredit.config import resolve
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.ops import TokenScores
from stepcredit.learn.learner import Learner
from stepcredit.learn.options import AdamWOptions, OptimOptions
from stepcredit.learn.placement import UNSHARDED
from stepcredit.learn.update import PolicyUpdate, step_metrics
from stepcredit.losses.choose import build_objective
from stepcredit.losses.objective import Objective
from stepcredit.losses.options import ObjectiveOptions
from stepcredit.losses.table import LOSSES
from stepcredit.policy.batching import split_into_parts
from stepcredit.section import check_options

close = torch.testing.assert_close
CASES = [("dpo", {}), ("dpo", {"beta": 2.0}), ("ipo", {}), ("ipo", {"average": True}), ("hinge", {"beta": 0.5})]
cases = pytest.mark.parametrize("name, options", CASES, ids=str)


def over_pairs(name: str, **options) -> Objective:
    check_options("loss", name, LOSSES[name], options)
    return Objective(LOSSES[name], options, ObjectiveOptions(aggregate="seq_mean_token_mean"))


def ready(log_ratios: list[list[list[float]]], advantages: list[list[float]], objective: Objective):
    """Groups of completions whose tokens have these log-ratios to the reference, and whose advantages are these."""
    lengths = [[len(row) for row in group] for group in log_ratios]
    forest = flat_forest(lengths, [[1.0] * len(group) for group in log_ratios])
    flat = [value for group in log_ratios for row in group for value in row]
    reference = -1.0 - 0.25 * torch.arange(forest.num_tokens)
    sizes = torch.tensor([size for group in lengths for size in group])
    given = torch.tensor([value for group in advantages for value in group]).repeat_interleave(sizes)
    forest = forest.with_token(ref_logprobs=reference, advantages=given)
    logprobs = (reference.double() + torch.tensor(flat, dtype=torch.float64)).requires_grad_()
    return forest.with_token(weights=objective.weights(forest)), logprobs


def formula(name: str, margin: Tensor, beta: float = 0.1, average: bool = False) -> Tensor:
    """The loss of a pair, written down once more."""
    if name == "dpo":
        return (1 + (-beta * margin).exp()).log()
    return (margin - 0.5 / beta) ** 2 if name == "ipo" else torch.relu(1 - beta * margin)


# ---------------------------------------------------------------------- by pencil


@pytest.mark.parametrize(
    "name, options, margin, expected, slope",
    [
        ("dpo", {"beta": 0.5}, 2.0, math.log(1 + math.exp(-1)), -0.5 / (1 + math.exp(1))),
        ("dpo", {"beta": 0.1}, 0.0, math.log(2), -0.05),  # -beta / 2
        ("ipo", {"beta": 0.25}, 2.0, 0.0, 0.0),  # 1 / (2 beta) is what it is fitted to
        ("ipo", {"beta": 0.25}, 0.5, 2.25, -3.0),
        ("hinge", {"beta": 0.5}, 1.0, 0.5, -0.5),
        ("hinge", {"beta": 0.5}, 2.5, 0.0, 0.0),
    ],
)
def test_by_pencil(name, options, margin, expected, slope):
    """Chosen gained margin + 1/4 over two tokens, rejected 1/4: which of them stands first does not matter."""
    objective = over_pairs(name, **options)
    for first, second in ((0.5, -0.5), (-0.5, 0.5)):
        sides = [[margin, 0.25], [0.25]] if first > 0 else [[0.25], [margin, 0.25]]
        forest, logprobs = ready([sides], [[first, second]], objective)
        assert value_of(objective, forest, logprobs).item() == pytest.approx(expected, abs=1e-6)
        signs = [1, 1, -1] if first > 0 else [-1, 1, 1]
        close(gradient_of(objective, forest, logprobs), slope * torch.tensor(signs).double(), atol=1e-6, rtol=1e-6)


def test_metrics_are_means_over_pairs_whatever_their_lengths():
    """Margins 1, -2 and 0 (a half): accuracy 1/2; the long completion does not count more."""
    objective = over_pairs("dpo", beta=0.5)
    log_ratios = [[[0.25] * 4, [0.0]], [[-1.0], [1.0]], [[0.5], [0.25, 0.25]]]
    forest, logprobs = ready(log_ratios, [[0.5, -0.5]] * 3, objective)
    scores = TokenScores(logprobs, torch.zeros_like(logprobs))
    parts = [forest, *(forest.select_trees(torch.tensor([number])) for number in range(3))]
    sums = [objective.loss(TokenScores(logprobs[part], scores.entropy[part]), each)[1] for each, part in _rows(parts)]
    for found in (step_metrics(sums[:1]), step_metrics(sums[1:])):
        assert found["pair/accuracy"] == pytest.approx(0.5)
        assert found["pair/margin"] == pytest.approx(0.5 * -1 / 3, abs=1e-6)
        assert found["pair/chosen_log_ratio"] == pytest.approx(0.5 / 3, abs=1e-6)
        assert found["pair/rejected_log_ratio"] == pytest.approx(1.5 / 3, abs=1e-6)


def _rows(parts: list[Forest]) -> list[tuple[Forest, Tensor]]:
    """Each part with its rows in the first, the whole."""
    ids = [each.token["ref_logprobs"] for each in parts]  # all different
    return [(each, torch.searchsorted(-ids[0], -own)) for each, own in zip(parts, ids, strict=True)]


# ---------------------------------------------------------------------- groups of samples


@cases
def test_a_group_is_its_best_against_its_worst(name, options):
    """With autograd over completions: groups of any size weigh by it; one of equal advantages has no loss."""
    objective = over_pairs(name, **options)
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randn(size, 2, generator=generator, dtype=torch.float64) for size in (2, 4, 3, 1)]
    advantages = [[0.5, -0.5], [0.0, -0.25, 0.75, -0.5], [1.0, 1.0, 1.0], [1.0]]
    forest, logprobs = ready([group.tolist() for group in groups], advantages, objective)
    moved_by = (logprobs - forest.token["ref_logprobs"]).view(-1, 2).sum(1) / (2 if options.get("average") else 1)
    pairs = [(0, 1, 2), (4, 5, 4)]  # chosen, rejected, size of the group
    losses = [formula(name, moved_by[best] - moved_by[worst], **options) * size for best, worst, size in pairs]
    expected = torch.stack(losses).sum() / 10
    close(value_of(objective, forest, logprobs), expected, atol=1e-6, rtol=1e-6)
    (slopes,) = torch.autograd.grad(expected, logprobs)
    close(gradient_of(objective, forest, logprobs), slopes, atol=1e-6, rtol=1e-6)


def test_equal_advantages_of_unequal_lengths_are_equal():
    """A mean over 3, 7 or 10 tokens rounds, which must make no preference."""
    objective = over_pairs("dpo")
    forest, logprobs = ready([[[0.1] * size for size in (3, 7, 10)]], [[0.1, 0.1, 0.1]], objective)
    assert value_of(objective, forest, logprobs).item() == 0.0


# ---------------------------------------------------------------------- whatever the data


@cases
@pytest.mark.parametrize("kind", ["flat", "chain"])
def test_finite_differences(kind, name, options):
    objective = over_pairs(name, **options)
    forest, logprobs = moved(kind, 1, objective)
    assert torch.autograd.gradcheck(lambda x: value_of(objective, forest, x), logprobs.requires_grad_())


@cases
@pytest.mark.parametrize("kind", ["flat", "chain"])
def test_parts_add_up(kind, name, options):
    objective, most, largest = over_pairs(name, **options), 0, 0.0
    for seed, max_tokens in itertools.product(range(4), (1, 30)):
        forest, logprobs = moved(kind, seed, objective)
        parts = split_into_parts(forest, max_tokens, whole_trees=True)
        expected = summed(objective, whole(forest), logprobs)
        close(summed(objective, parts, logprobs), expected)
        largest, most = max(largest, float(expected.abs().max())), max(most, len(parts))
    assert largest > 0 and most > 1


@cases
def test_the_order_of_trees_changes_nothing(name, options):
    objective = over_pairs(name, **options)
    forest, logprobs = moved("chain", 2, objective)
    forest = forest.with_token(row=torch.arange(forest.num_tokens))
    turned = forest.in_order(torch.arange(forest.num_trees).flip(0))
    found = gradient_of(objective, turned, logprobs[turned.token["row"]].requires_grad_())
    expected = gradient_of(objective, forest, logprobs.requires_grad_())
    close(found, expected[turned.token["row"]])


def test_what_does_not_count_does_not_matter():
    objective = over_pairs("dpo")
    forest, logprobs = moved("chain", 3, objective)
    out = forest.token["weights"] == 0
    assert out.any()
    spoiled = forest.with_token(ref_logprobs=torch.where(out, torch.nan, forest.token["ref_logprobs"]))
    expected = gradient_of(objective, forest, logprobs.requires_grad_())
    found = gradient_of(objective, spoiled, torch.where(out, torch.nan, logprobs.detach()).requires_grad_())
    close(found, expected)


def test_a_masked_group_leaves_nothing_undefined():
    """All of a batch may be masked by a shaper."""
    objective = over_pairs("dpo")
    forest, logprobs = ready([[[0.5], [0.25]]], [[0.5, -0.5]], objective)
    forest = forest.with_token(weights=torch.zeros(forest.num_tokens))
    assert value_of(objective, forest, logprobs).item() == 0.0
    assert float(gradient_of(objective, forest, logprobs).abs().max()) == 0.0


def test_micro_batches_of_a_model_change_nothing():
    """Loss and gradient of a model, cut into parts of any size, are those of one row for each side."""
    forest = random_forest(3, "flat", num_trees=5)
    found = []
    for max_tokens in (4000, 40, 1):
        policy, objective = fresh("qwen3"), over_pairs("dpo")
        learner = Learner(policy, UNSHARDED, AdamWOptions(), max_tokens)
        update = PolicyUpdate(learner, objective, OptimOptions(), 1.0, seed=0)
        with torch.no_grad():
            now = policy(forest).logprobs
        noise = torch.randn(forest.num_tokens, generator=torch.Generator().manual_seed(0))
        step = forest.with_token(ref_logprobs=now + 0.3 * noise, advantages=noise.roll(1))
        sums, _ = update._accumulate(update.weighted(step))
        assert step_metrics(sums)["optim/loss"] == pytest.approx(update.measure(step)["optim/loss"], rel=1e-6)
        found.append(torch.cat([weight.grad.flatten() for weight in learner.trained]))
    size = float(found[0].norm())
    assert size > 0
    assert all(float((other - found[0]).norm()) < 1e-5 * size for other in found[1:])


# ---------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    "given, pieces",
    [
        ({"algorithm": "dpo", "loss": {"beta": 0.0}}, ["loss.beta", "greater than 0"]),
        ({"algorithm": "dpo", "loss": {"label": 0.0}}, ["no option 'label'"]),
        ({"algorithm": "treerpo", "loss": {"name": "dpo"}}, ["'dpo' is over completions"]),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_named(given, pieces):
    config = resolve(given)
    with pytest.raises(UserError) as error:
        build_objective(config, flat=config.growth.name != "tree")
    assert [piece for piece in pieces if piece not in str(error.value)] == [], error.value
