"""Regression of log-ratios: by pencil, all pairs of a group, its limits, cut into any parts, and what a config says."""

import itertools

import pytest
import torch
from builders import flat_forest, is_near, objective_of, random_forest, run
from test_losses import gradient_of, moved, summed, value_of, whole
from tiny_models import fresh
from torch import Tensor

from stepcredit.config import resolve
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.ops import TokenScores
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.learn.learner import Learner
from stepcredit.learn.options import AdamWOptions, OptimOptions
from stepcredit.learn.placement import UNSHARDED
from stepcredit.learn.update import PolicyUpdate
from stepcredit.losses.choose import build_objective
from stepcredit.losses.objective import Objective
from stepcredit.losses.options import ObjectiveOptions
from stepcredit.losses.squared import squared
from stepcredit.policy.batching import split_into_parts
from stepcredit.section import check_options

close = torch.testing.assert_close
ANCHORS = ("old", "reference")


def regression(**options) -> Objective:
    check_options("loss", "squared", squared, options)
    return Objective(squared, options, ObjectiveOptions(aggregate="seq_mean_token_mean"))


def ready(log_ratios: list[list[list[float]]], advantages: list[list[float]], objective: Objective, anchor: str):
    """Groups of completions whose tokens have these log-ratios to the anchor, and whose advantages are these."""
    lengths = [[len(row) for row in group] for group in log_ratios]
    column = "old_logprobs" if anchor == "old" else "ref_logprobs"
    base = [[[-1.0 - 0.25 * place for place in range(len(row))] for row in group] for group in log_ratios]
    forest = flat_forest(lengths, [[1.0] * len(group) for group in log_ratios], **{column: base})
    flat = [value for group in log_ratios for row in group for value in row]
    logprobs = (forest.token[column].double() + torch.tensor(flat, dtype=torch.float64)).requires_grad_()
    given = [a for group, sizes in zip(advantages, lengths, strict=True) for a, n in zip(group, sizes, strict=True)]
    sizes = torch.tensor([size for group in lengths for size in group])
    forest = forest.with_token(advantages=torch.tensor(given).repeat_interleave(sizes))
    return forest.with_token(weights=objective.weights(forest)), logprobs


# ---------------------------------------------------------------------- by pencil


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize(
    "unit, expected, slopes",
    [
        # D = 0.75 and -0.5, x = 2 D - A = 0.5 and -2; mean of the squares 2.125; slope 2 x 2 / 2 for each token
        ("completion", 2.125, [1.0, 1.0, -4.0]),
        # each token: 2 * 0.5 - 1 = 0, 2 * 0.25 - 1 = -0.5, 2 * -0.5 - 1 = -2; a half of each completion's mean
        ("token", (0.125 + 4.0) / 2, [0.0, -0.5, -4.0]),
        ("step", 2.125, [1.0, 1.0, -4.0]),
    ],
)
def test_by_pencil(anchor, unit, expected, slopes):
    objective = regression(unit=unit, anchor=anchor, scale=2.0)
    forest, logprobs = ready([[[0.5, 0.25], [-0.5]]], [[1.0, 1.0]], objective, anchor)
    assert value_of(objective, forest, logprobs).item() == pytest.approx(expected, abs=1e-6)
    is_near(gradient_of(objective, forest, logprobs).float(), slopes)


def test_steps_inside_a_completion_have_a_number():
    """Two steps of one and two tokens, D 0.5 and 1, A 1 and -1 (scale 2): x = 0 and 3, its tokens have 0, 9, 9."""
    objective = regression(unit="step", anchor="reference", scale=2.0)
    forest, logprobs = ready([[[0.5, 0.75, 0.25]]], [[0.0]], objective, "reference")
    forest = forest.with_token(advantages=torch.tensor([1.0, -1.0, -1.0]), step_index=torch.tensor([0.0, 1.0, 1.0]))
    assert value_of(objective, forest, logprobs).item() == pytest.approx(6.0, abs=1e-6)
    is_near(gradient_of(objective, forest, logprobs).float(), [0.0, 8.0, 8.0])  # 2 x 2 x 3, twice, over three tokens


def test_steps_are_segments_also_where_completions_share_them():
    """A trunk of two tokens with two ends: three steps, D 0.5, 1 and -1, A 1, 0 and 2; a third of 0.25, 1 and 9."""
    segments = [Segment([1, 2], finish="cut"), Segment([3], 0, reward=1.0), Segment([4, 5], 0, reward=0.0)]
    forest = Forest.from_trees([Tree(Problem(id="a"), [1], segments)])
    moves = torch.tensor([0.25, 0.25, 1.0, -0.5, -0.5], dtype=torch.float64)
    forest = forest.with_token(ref_logprobs=torch.full((5,), -2.0), advantages=torch.tensor([1.0, 1, 0, 2, 2]))
    objective = regression(unit="step", anchor="reference")
    forest = forest.with_token(weights=objective.weights(forest))
    assert value_of(objective, forest, moves - 2).item() == pytest.approx((0.25 + 1 + 9) / 3, abs=1e-6)


REST = [[0.5, -1.0, 2.0], [0.25], [1.5, 1.5]]  # scale D of each completion; targets below
TARGETS = [[1.0, 0.0, 0.5], [1.0], [0.0, 1.0]]


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_group_is_all_its_pairs(anchor, scale):
    """REBEL's loss of each pair of completions, autograd through both: mean over pairs, groups weighed by size.

    The completion without a partner counts in the denominator and has no loss.
    """
    objective = regression(centre="group", anchor=anchor, scale=scale)
    log_ratios = [[[value / 2, value / 2] for value in group] for group in REST]
    forest, logprobs = ready(log_ratios, TARGETS, objective, anchor)
    moved_by = (logprobs - forest.token["old_logprobs" if anchor == "old" else "ref_logprobs"]).view(-1, 2).sum(1)
    total, row = logprobs.new_zeros(()), 0
    for group, targets in zip(REST, TARGETS, strict=True):
        places = range(row, row + len(group))
        pairs = [
            (scale * (moved_by[i] - moved_by[j]) - (targets[i - row] - targets[j - row])).square()
            for i, j in itertools.combinations(places, 2)
        ]
        total = total + (len(group) * torch.stack(pairs).mean() if pairs else 0.0)
        row += len(group)
    expected = total / row
    (slopes,) = torch.autograd.grad(expected, logprobs)
    value, sums = objective.loss(TokenScores(logprobs, torch.zeros_like(logprobs)), forest)
    close(value, expected, atol=1e-6, rtol=1e-6)
    close(gradient_of(objective, forest, logprobs), slopes, atol=1e-6, rtol=1e-6)
    assert sums.sums["policy/unpaired"] == 2  # tokens of the completion that is alone


def test_pairs_stand_together_and_an_unjudged_completion_takes_no_place():
    """Of five completions the second is unjudged: (1, 3) and (4, 5) are pairs; of three the last is alone."""
    rewards = [[1.0, None, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
    forest = flat_forest([[1] * 5, [1] * 3], rewards)
    moves = torch.tensor([1.0, 9.0, 3.0, 0.5, 0.0, 2.0, 0.0, 7.0], dtype=torch.float64)
    forest = forest.with_token(old_logprobs=torch.full((8,), -8.0), advantages=torch.zeros(8))
    objective = regression(centre="pair")
    forest = forest.with_token(weights=objective.weights(forest))
    found, sums = objective.loss(TokenScores(moves - 8, torch.zeros(8)), forest)
    assert found.item() == pytest.approx(2 * (4.0 + 0.25 + 4.0) / 7, abs=1e-6)
    assert sums.sums["policy/unpaired"] == 1


def test_groups_of_two_are_pairs():
    for seed in range(3):
        noise = torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = []
        for centre in ("pair", "group"):
            objective = regression(centre=centre)
            rows = [[[float(noise[2 * n])], [float(noise[2 * n + 1])]] for n in range(4)]
            forest, logprobs = ready(rows, [[1.0, 0.0]] * 4, objective, "old")
            found.append(gradient_of(objective, forest, logprobs))
        assert found[0].equal(found[1]) and found[0].abs().max() > 0


# ---------------------------------------------------------------------- limits


def test_at_no_log_ratio_it_is_reinforce():
    """D = 0: 2 scale times the policy gradient with the advantages; centred, 4 scale times RLOO's."""
    sizes, rewards = [[2, 1, 3], [2, 4]], [[1.0, 0.0, 1.0], [0.0, 1.0]]
    plain = objective_of("reinforce", aggregate="seq_mean_token_sum")
    forest = flat_forest(sizes, rewards)
    forest = forest.with_token(old_logprobs=torch.full((forest.num_tokens,), -1.5))
    forest = forest.with_token(ref_logprobs=forest.token["old_logprobs"])
    logprobs = forest.token["old_logprobs"].double().requires_grad_()

    def slopes(objective: Objective, advantages: Tensor) -> Tensor:
        given = forest.with_token(advantages=advantages)
        return gradient_of(objective, given.with_token(weights=objective.weights(given)), logprobs)

    for anchor in ANCHORS:
        values = run(forest, "prompt_baseline")
        objective = regression(anchor=anchor, scale=0.001)
        close(slopes(objective, values), 0.002 * slopes(plain, values), atol=1e-9, rtol=1e-6)
        objective = regression(anchor=anchor, centre="group", scale=0.5)
        expected = 2.0 * slopes(plain, run(forest, "rloo"))
        close(slopes(objective, run(forest, "dr_grpo")), expected, atol=1e-7, rtol=1e-6)
    forest = forest.without_token("old_logprobs")
    close(slopes(regression(), values), 2 * slopes(plain, values), atol=1e-9, rtol=1e-6)


def test_no_target_draws_the_policy_back():
    """A = 0: the gradient is 2 scale^2 D for every token of the completion; nothing is left out as without signal."""
    objective = regression(anchor="reference", scale=3.0)
    forest, logprobs = ready([[[0.5, 0.25]]], [[0.0]], objective, "reference")
    is_near(gradient_of(objective, forest, logprobs).float(), [2 * 9 * 0.75 / 1] * 2)
    assert objective.has_gradient(forest).all()
    assert not objective_of("clip").has_gradient(forest).any()


def test_the_log_ratio_has_no_bound():
    """Beyond 20 nats, where ratios are bounded, there is a gradient still."""
    objective = regression()
    forest, logprobs = ready([[[50.0]]], [[0.0]], objective, "old")
    is_near(gradient_of(objective, forest, logprobs).float(), [100.0])


# ---------------------------------------------------------------------- gradients, parts and orders

CASES = [
    (kind, {"unit": unit, "anchor": anchor, "centre": centre, "scale": 0.5})
    for anchor in ANCHORS
    for unit, centre, kinds in (
        ("token", "none", ("chain", "deep")),
        ("step", "none", ("chain", "deep")),
        ("completion", "none", ("flat", "chain")),
        ("completion", "pair", ("flat", "chain")),
        ("completion", "group", ("flat", "chain")),
    )
    for kind in kinds
]
cases = pytest.mark.parametrize("kind, options", CASES, ids=[f"{k}-{'-'.join(map(str, o.values()))}" for k, o in CASES])


@cases
@pytest.mark.parametrize("max_tokens", [1, 15, 40])
def test_cutting_a_step_changes_nothing(kind, options, max_tokens):
    """Where whole trees are compared, these stay whole."""
    largest, most = 0.0, 0
    for seed in range(4):
        objective = regression(**options)
        forest, logprobs = moved(kind, seed, objective)
        assert objective.has_gradient(forest).equal(forest.token["weights"] != 0)
        keep = torch.zeros(forest.num_segments, dtype=torch.bool)
        keep[forest.token["segment"][objective.has_gradient(forest)]] = True
        some = forest.select(keep)
        trees = objective.needs.unit == "tree"
        assert trees == (options["centre"] != "none")
        parts = [
            part.with_token(source=some.token["source"][part.token["source"]])
            for part in split_into_parts(some, max_tokens, whole_trees=trees)
        ]
        expected = summed(objective, whole(forest), logprobs)
        close(summed(objective, parts, logprobs), expected)
        largest, most = max(largest, float(expected.abs().max())), max(most, len(parts))
    assert largest > 0.01 and most > 1  # of some seeds no group has two completions, or one part holds all


@cases
def test_finite_differences(kind, options):
    objective = regression(**options)
    forest, logprobs = moved(kind, 1, objective)
    assert torch.autograd.gradcheck(lambda x: value_of(objective, forest, x), logprobs.requires_grad_())


@pytest.mark.parametrize("centre", ["none", "group"])
def test_one_row_for_each_completion_gives_the_same(centre):
    """Written down once more, completion by completion, with autograd: chains of segments, tools, unjudged ones."""
    for seed in range(4):
        objective = regression(centre=centre, anchor="reference", scale=0.5)
        forest, logprobs = moved("chain", seed, objective)
        logprobs.requires_grad_()
        rest: dict[int, list[Tensor]] = {}
        for leaf in (forest.segment["is_leaf"] & forest.segment["has_reward"]).nonzero().squeeze(1).tolist():
            path = torch.tensor(forest.completion_segments(leaf))
            rows = (torch.isin(forest.token["segment"], path) & forest.token_sampled).nonzero().squeeze(1)
            if len(rows):
                ratio = (logprobs[rows] - forest.token["ref_logprobs"][rows]).sum()
                target = forest.token["advantages"][rows].double().mean()
                rest.setdefault(int(forest.segment["tree"][leaf]), []).append(0.5 * ratio - target)
        total = 0.0 * logprobs.sum()
        for group in rest.values():
            values = torch.stack(group)
            if centre == "none":
                total = total + values.square().sum()
            elif len(group) > 1:
                total = total + (values[:, None] - values[None]).square().sum() / (len(group) - 1)
        expected = total / sum(map(len, rest.values()))
        close(value_of(objective, forest, logprobs), expected, atol=1e-6, rtol=1e-5)
        (slopes,) = torch.autograd.grad(expected, logprobs)
        close(gradient_of(objective, forest, logprobs), slopes, atol=1e-6, rtol=1e-5)


@cases
def test_the_order_of_trees_changes_nothing(kind, options):
    objective = regression(**options)
    forest, logprobs = moved(kind, 2, objective)
    order = torch.arange(forest.num_trees).flip(0)
    forest = forest.with_token(row=torch.arange(forest.num_tokens))
    turned = forest.in_order(order)
    found = gradient_of(objective, turned, logprobs[turned.token["row"]].requires_grad_())
    expected = gradient_of(objective, forest, logprobs.requires_grad_())
    close(found, expected[turned.token["row"]])


def test_what_does_not_count_does_not_matter():
    """Undefined numbers of tokens without weight change neither the loss nor its gradient."""
    for options in ({"centre": "group"}, {"anchor": "reference"}, {"unit": "step"}, {"unit": "token"}):
        objective = regression(**options)
        forest, logprobs = moved("chain", 3, objective)
        out = forest.token["weights"] == 0
        assert out.any()
        spoiled = forest.with_token(
            **{name: torch.where(out, torch.nan, forest.token[name]) for name in ("old_logprobs", "ref_logprobs")}
        )
        expected = gradient_of(objective, forest, logprobs.requires_grad_())
        found = gradient_of(objective, spoiled, torch.where(out, torch.nan, logprobs.detach()).requires_grad_())
        close(found, expected)


def test_the_closed_form_is_what_it_solves():
    """One prompt, three answers: with V* = beta log sum ref exp(r / beta) the loss is 0 at ref exp((r - V*) / beta)."""
    reference, rewards, beta = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 1.0, 0.5]), 0.5
    value = beta * (reference * (rewards / beta).exp()).sum().log()
    best = reference.log() + (rewards - value) / beta
    assert best.exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    objective = regression(anchor="reference", scale=beta)
    forest = flat_forest([[1, 1, 1]], [rewards.tolist()])
    forest = forest.with_token(ref_logprobs=reference.log(), advantages=rewards - value)
    forest = forest.with_token(weights=objective.weights(forest))
    assert value_of(objective, forest, best.double()).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("kind, options", [case for case in CASES if case[1]["anchor"] == "old"], ids=str)
def test_micro_batches_of_a_model_change_nothing(kind, options):
    """The gradient of a model that has moved from the old policy, cut into parts of any size."""
    forest = random_forest(3, kind, num_trees=5, unsampled=0.2)
    found = []
    for max_tokens in (4000, 40, 1):
        policy, objective = fresh("qwen3"), regression(**options)
        learner = Learner(policy, UNSHARDED, AdamWOptions(), max_tokens)
        update = PolicyUpdate(learner, objective, OptimOptions(), 1.0, seed=0)
        with torch.no_grad():
            now = policy(forest).logprobs
        noise = torch.randn(forest.num_tokens, generator=torch.Generator().manual_seed(0))
        step = forest.with_token(old_logprobs=now + 0.3 * noise, advantages=noise.roll(1))
        update._accumulate(update.weighted(step))
        found.append(torch.cat([weight.grad.flatten() for weight in learner.trained]))
    size = float(found[0].norm())
    assert size > 0
    assert all(float((other - found[0]).norm()) < 1e-5 * size for other in found[1:])


# ---------------------------------------------------------------------- the credit against a prompt's value


def test_prompt_baseline_by_pencil():
    """Rewards 1 and 0 against 1/4, a singleton against it; tool tokens and unjudged completions get 0."""
    forest = flat_forest([[2, 1], [1, 1]], [[1.0, 0.0], [1.0, None]])
    is_near(run(forest, "prompt_baseline"), [0.75, 0.75, -0.25, 0.75, 0.0])


# ---------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    "given, columns, unit",
    [
        ({}, (), "completion"),
        ({"anchor": "reference"}, ("ref_logprobs",), "completion"),
        ({"centre": "group"}, (), "tree"),
        ({"unit": "token"}, (), "token"),
        ({"unit": "step", "anchor": "reference"}, ("ref_logprobs",), "token"),
    ],
)
def test_what_it_needs_follows_from_its_options(given, columns, unit):
    needs = build_objective(resolve({"loss": {"name": "squared", **given}}), flat=True).needs
    assert (needs.columns, needs.unit, needs.ratio, needs.sparse) == (columns, unit, True, False)


@pytest.mark.parametrize(
    "given, flat, words",
    [
        ({"centre": "grup"}, True, ["loss.centre", "'grup'", "none, pair, group"]),
        ({"unit": "token", "centre": "group"}, True, ["loss.centre group", "--loss.unit completion", "got token"]),
        ({"scale": 0.0}, True, ["loss.scale", "greater than 0"]),
        ({}, False, ["over completions", "share tokens"]),
        ({"centre": "pair"}, False, ["over completions", "share tokens"]),
    ],
)
def test_what_does_not_fit_is_said(given, flat, words):
    with pytest.raises(UserError) as error:
        build_objective(resolve({"loss": {"name": "squared", **given}}), flat=flat)
    assert all(word in str(error.value) for word in words), error.value


def test_steps_of_trees_are_allowed():
    given = {"algorithm": "treerpo", "loss": {"name": "squared", "unit": "step"}}
    assert build_objective(resolve(given), flat=False).needs.unit == "token"
