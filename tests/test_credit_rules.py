"""What every credit function keeps, and exact mean gradients over all groups of tiny policies."""

import itertools
from random import Random

import pytest
import torch
from builders import (
    LOGPROBS,
    STEPS,
    VARIANTS,
    flat_forest,
    is_near,
    random_forest,
    random_trees,
    run,
    squeezed,
    variants,
)
from torch import Tensor

from stepcredit.credit import CREDIT
from stepcredit.credit.base import completions
from stepcredit.credit.returns import rewards_by_token
from stepcredit.credit.spro import cumulative_process_reward, masked_step_advantage
from stepcredit.forest import Forest
from stepcredit.forest.ops import kl_k2, mean_by, segment_sum, spread_by
from stepcredit.forest.types import Segment, Tree

close = torch.testing.assert_close


def by_completion(forest: Forest, values: Tensor) -> list[list[float]]:
    return [part.tolist() for part in values.split(forest.segment["length"].tolist())]


# ---------------------------------------------------------------------- invariants


OUTSIDE = ("remax", "vine", "prompt_baseline")  # compare with something that is not of the group
WITH_BASELINE = [
    (name, options)
    for name, options in VARIANTS
    if name not in OUTSIDE and options.get("baseline") != "none" and options.get("estimator") != "reinforce"
]


@pytest.mark.parametrize("name, options", WITH_BASELINE)
def test_uniform_groups_get_exactly_zero(name, options):
    """Equal rewards, 0.1 and 0.7 too, whose means round: no trace is left for the std's epsilon to blow up.

    The policy and PRIME's reward model are the reference here; elsewhere the process parts of such groups are not 0.
    """
    for reward, size in itertools.product((0.1, 0.7, 1 / 3, 1.0), (1, 2, 3, 6, 7)):
        lengths = [[1 + index % 3 for index in range(size)]]
        zeros = [[[0.0] * length for length in lengths[0]]]
        forest = flat_forest(lengths, [[reward] * size], **dict.fromkeys(LOGPROBS, zeros))
        assert run(forest, name, **options).abs().max() == 0, (reward, size)


def dense_group(random: Random, size: int, total: int) -> list[list[int]]:
    """Completions whose token rewards, in tenths, add up to `total` each, in numbers and orders of their own."""
    group = []
    for _ in range(size):
        tenths = [random.randint(-4, 9) for _ in range(random.randint(1, 40))]
        rest = total - sum(tenths)
        while rest:
            step = max(-9, min(9, rest))
            tenths.append(step)
            rest -= step
        random.shuffle(tenths)
        group.append(tenths)
    return group


def dense_forest(group: list[list[int]]) -> Forest:
    """The group with an outcome reward of 0, and with a reference that is the policy."""
    columns = {"token_rewards": [[[tenth / 10 for tenth in row] for row in group]]}
    zeros = [[[0.0] * len(row) for row in group]]
    return flat_forest([[len(row) for row in group]], [[0.0] * len(group)], **columns, **dict.fromkeys(LOGPROBS, zeros))


BY_RETURN = [(name, options) for name, options in WITH_BASELINE if name not in ("reinforce_pp", "reward_to_go")]


@pytest.mark.parametrize("name, options", BY_RETURN)
def test_equal_returns_of_dense_rewards_get_exactly_zero(name, options):
    """Rewards of k/10 in 300 groups of random orders, whose sums are equal but for rounding; a tenth more is seen."""
    if CREDIT[name].needs.forests == "tree":
        options = options | {"scale": "none", "tau": 0.0} if name == "treerpo" else options
    for seed in range(300):
        random = Random(seed)
        group = dense_group(random, random.randint(2, 6), random.randint(-30, 80))
        assert run(dense_forest(group), name, **options).abs().max() == 0, seed
        if seed % 10 == 0:
            group[0].append(1)
            assert run(dense_forest(group), name, **options).abs().max() > 0.01, seed


def test_a_return_is_the_sum_of_its_rewards_in_double_precision():
    """A thousand rewards of 0.1 after one of 100,000: fp32 adds 0.0995 and 0.1006 in turn."""
    forest = flat_forest([[1001, 1]], [[0.0, 0.0]], token_rewards=[[[1e5] + [0.1] * 1000, [1e5 + 100]]])
    found = completions(forest)
    assert found.returns.tolist() == [100100.0, 100100.0] and not found.varied.any()
    assert rewards_by_token(forest).dtype == torch.float64
    assert run(forest, "reward_to_go", baseline="none")[0] == 100100.0


def test_spread_looks_through_rounding_only():
    """Differences up to a millionth of the largest size (or of 1) are none; above they are themselves."""
    values = torch.tensor([0.3, 0.3 + 9e-7, 0.3, 0.3 + 2e-6, 1000.0, 1000.0005, 1000.0, 1000.01], dtype=torch.float64)
    found = spread_by(values, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    close(found, torch.tensor([0, 0, 2e-6, 2e-6, 0, 0, 0.01, 0.01], dtype=torch.float64))


@pytest.mark.parametrize(
    "name", [name for name in CREDIT if name not in ("reinforce_pp", "reinforce_pp_baseline", "gae", *OUTSIDE)]
)
def test_singletons_get_exactly_zero(name):
    """A group with one judged completion says nothing, beside groups that do."""
    trees = [tree for seed in range(8) for tree in random_trees(seed, "flat", num_trees=2)]
    forest = Forest.from_trees(trees)
    judged = segment_sum(forest.segment["has_reward"].float(), forest.segment["tree"], forest.num_trees)
    alone = (judged == 1)[forest.token_tree]
    advantages = run(forest, name)
    assert alone.any() and advantages[alone].abs().max() == 0 and advantages[~alone].abs().max() > 0


@variants
def test_permuting_completions_permutes_advantages(name, options):
    """The order of the completions in a group means nothing."""
    random = Random(1)
    trees = random_trees(5, "flat")
    orders = [random.sample(range(len(tree.segments)), len(tree.segments)) for tree in trees]
    mixed = [
        Tree(tree.problem, tree.prompt_ids, [tree.segments[index] for index in order])
        for tree, order in zip(trees, orders, strict=True)
    ]
    before, after = Forest.from_trees(trees), Forest.from_trees(mixed)
    plain, moved = (by_completion(forest, run(forest, name, **options)) for forest in (before, after))
    starts = [sum(len(tree.segments) for tree in trees[:index]) for index in range(len(trees))]
    for row, origin in enumerate(start + index for start, order in zip(starts, orders, strict=True) for index in order):
        assert moved[row] == pytest.approx(plain[origin], abs=1e-5)


@variants
def test_an_unjudged_completion_changes_nothing(name, options):
    """It gets 0, and the others what they had, whatever its (even undefined) log-probabilities are."""
    trees = random_trees(2, "flat", unjudged=0.0)
    before = run(Forest.from_trees(trees), name, **options)
    for tree in trees:
        nan = dict.fromkeys((*LOGPROBS, *STEPS), [float("nan")] * 9)
        tree.segments.append(Segment([1] * 9, columns=nan))
    forest = Forest.from_trees(trees)
    after = run(forest, name, **options)
    judged = forest.judged[forest.token["segment"]]
    close(after[judged], before, atol=1e-6, rtol=0)
    assert after[~judged].abs().max() == 0


def test_opo_weighted_sum_is_zero_and_equal_lengths_give_the_mean():
    """sum_i l_i A_i = 0 in every group; with equal lengths OPO is Dr. GRPO."""
    forest = random_forest(5, "chain", unsampled=0.2)
    sums = segment_sum(run(forest, "opo"), forest.token_tree, forest.num_trees)
    assert sums.abs().max() < 1e-5 and run(forest, "opo").abs().max() > 0.1
    equal = flat_forest([[3] * 4], [[1.0, 0.0, 0.5, 0.0]])
    close(run(equal, "opo"), run(equal, "dr_grpo"))


def test_msa_is_exactly_zero_when_the_policy_is_the_reference():
    """(a) the first update of SPRO is that of GRPO, bit for bit."""
    forest = random_forest(0, "chain")
    forest = forest.with_token(ref_logprobs=forest.token["old_logprobs"])
    assert run(forest, "spro", "process").abs().max() == 0
    assert run(forest, "spro").equal(run(forest, "grpo"))


def test_msa_sums_to_zero_at_every_position_and_is_zero_where_alone():
    """(b) over the completions of a group that reach t; (c) exactly 0 where one completion alone reaches t."""
    forest = random_forest(1, "chain", unsampled=0.2)
    process, there = run(forest, "spro", "process", beta=1.0), forest.active
    mean, count = mean_by(process, forest.token_tree, forest.token["position"], where=there)
    assert mean.abs().max() < 1e-6
    assert (there & (count == 1)).any() and process[count == 1].abs().max() == 0
    assert process[count > 1].abs().max() > 0.1


def test_msa_ignores_what_a_whole_group_shares():
    """(d) a constant added to the cumulative rewards of a group (V(s_0), or one first-token ratio) cancels."""
    forest = random_forest(2, "flat")
    cpr = cumulative_process_reward(forest, 1.0)
    shifted = cpr + torch.arange(1.0, 1.0 + forest.num_trees)[forest.token_tree]
    close(masked_step_advantage(forest, shifted), masked_step_advantage(forest, cpr), atol=1e-5, rtol=0)
    first = (forest.token["position"] == 0).float()
    moved = forest.with_token(old_logprobs=forest.token["old_logprobs"] + 3 * first)
    close(run(moved, "spro", "process"), run(forest, "spro", "process"), atol=1e-5, rtol=0)


def test_msa_is_linear_in_beta_and_turns_with_sign():
    """(e) twice beta is twice the process part; sign -1 turns it; the outcome part stays."""
    forest = random_forest(3, "chain")
    process = run(forest, "spro", "process")
    close(run(forest, "spro", "process", beta=0.1), 2 * process)
    close(run(forest, "spro", "process", sign=-1.0), -process)
    close(run(forest, "spro", sign=-1.0), run(forest, "grpo") - process)
    assert process.abs().max() > 0.01


def test_msa_of_uniform_groups_is_kept_or_dropped():
    """`uniform: drop` zeroes the process part of uniform groups only; `keep` leaves it."""
    old, ref = [[[0.5, 0.25], [0.0]]] * 2, [[[0.0, 0.0], [1.0]]] * 2
    forest = flat_forest([[2, 1]] * 2, [[1.0, 1.0], [1.0, 0.0]], old_logprobs=old, ref_logprobs=ref)
    kept, dropped = run(forest, "spro", "process"), run(forest, "spro", "process", uniform="drop")
    assert kept[:3].abs().max() > 0.01 and dropped[:3].abs().max() == 0 and dropped[3:].equal(kept[3:])


def test_tool_tokens_and_what_they_carry_have_no_effect():
    """(g) undefined log-probabilities and rewards of tokens that were not sampled change nothing; they get 0."""
    trees = squeezed(random_trees(7, "chain", unsampled=0.4, columns=(*LOGPROBS, "token_rewards")))
    forest = Forest.from_trees(trees)
    tool = ~forest.token_sampled
    assert tool.any()
    spoiled = {name: torch.where(tool, torch.nan, forest.token[name]) for name in LOGPROBS}
    spoiled["token_rewards"] = torch.where(tool, 99.0, forest.token["token_rewards"])
    for name in CREDIT.keys() - {"gae"}:
        found = run(forest.with_token(**spoiled), name)
        assert found.equal(run(forest, name)) and found[tool].abs().max() == 0


# ---------------------------------------------------------------------- exact gradients, by enumeration

EOS = 2
PREFIXES = [prefix for size in range(3) for prefix in itertools.product((0, 1), repeat=size)]
ANSWERS = [(*p, a) for p in PREFIXES for a in range(3) if a == EOS or len(p) == 2]
STATE = torch.tensor([PREFIXES.index(answer[:t]) for answer in ANSWERS for t in range(len(answer))])
ACTION = torch.tensor([token for answer in ANSWERS for token in answer])
SIZES = [len(answer) for answer in ANSWERS]
THETA = torch.randn(len(PREFIXES), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
THETA.requires_grad_()
REFERENCE = torch.randn(len(PREFIXES), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(
    1
)


def tabular() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of all tokens of all answers, of the policy and the reference; probability of each answer."""
    logprobs = THETA.log_softmax(1)[STATE, ACTION]
    chance = torch.stack([part.sum() for part in logprobs.detach().split(SIZES)]).exp()
    return logprobs, REFERENCE[STATE, ACTION], chance


def kl_gradient(weight: Tensor) -> Tensor:
    """sum over states of weight(s) grad KL(pi(.|s), ref(.|s)), the weights frozen."""
    logprobs = THETA.log_softmax(1)
    return torch.autograd.grad((weight[:, None] * logprobs.exp() * (logprobs - REFERENCE)).sum(), THETA)[0]


def visits(chance: Tensor) -> Tensor:
    """The probability that each prefix is reached and followed by a token."""
    through = [[float(a[: len(p)] == p and len(a) > len(p)) for a in ANSWERS] for p in PREFIXES]
    return torch.tensor(through, dtype=torch.float64) @ chance


@pytest.mark.parametrize("cumsum", [True, False])
def test_the_prefix_of_the_process_reward_carries_no_signal(cumsum):
    """(i), (iii) of SPRO 1.9: with or without the prefix sum the mean gradient is grad KL(pi, ref); k2's is too."""
    logprobs, ref, chance = tabular()
    forest = flat_forest([SIZES], [[1.0] * len(SIZES)])
    forest = forest.with_token(old_logprobs=logprobs.detach(), ref_logprobs=ref)
    weight = chance.repeat_interleave(torch.tensor(SIZES))
    process = cumulative_process_reward(forest, 1.0, cumsum)
    expected = kl_gradient(visits(chance))
    (found,) = torch.autograd.grad((weight * process * logprobs).sum(), THETA, retain_graph=True)
    close(found, expected, atol=1e-6, rtol=0)
    (by_k2,) = torch.autograd.grad((weight * kl_k2(logprobs, ref)).sum(), THETA)
    close(by_k2, expected, atol=1e-9, rtol=0)
    assert expected.abs().max() > 0.05


def test_the_own_share_of_the_masked_mean_scales_the_gradient():
    """(ii) of SPRO 1.9, all pairs of answers: grad KL at a state of index t counts (1 - 1/2) P(length > t)."""
    logprobs, ref, chance = tabular()
    spans = list(zip(logprobs.split(SIZES), ref.split(SIZES), strict=True))
    pairs = list(itertools.product(range(len(SIZES)), repeat=2))
    forest = flat_forest([[SIZES[a], SIZES[b]] for a, b in pairs], [[1.0, 0.0]] * len(pairs))
    current, anchor = (torch.cat([spans[index][k] for pair in pairs for index in pair]) for k in (0, 1))
    forest = forest.with_token(old_logprobs=current.detach(), ref_logprobs=anchor)
    weight = torch.stack([chance[a] * chance[b] for a, b in pairs])[forest.token_tree] / 2
    (found,) = torch.autograd.grad((weight * run(forest, "spro", "process", beta=1.0) * current).sum(), THETA)
    longer = [sum(c for c, size in zip(chance, SIZES, strict=True) if size > len(prefix)) for prefix in PREFIXES]
    close(found, kl_gradient(visits(chance) * torch.stack(longer) / 2), atol=1e-6, rtol=0)


def bandit_gradient(name: str, **options) -> Tensor:
    """The exact mean gradient over all groups of 4 from 3 arms of unequal lengths and rewards 1, 0, 1."""
    chance, lengths, rewards = torch.tensor([0.5, 0.3, 0.2]), [1, 5, 2], [1.0, 0.0, 1.0]
    groups = list(itertools.product(range(3), repeat=4))
    forest = flat_forest([[lengths[a] for a in g] for g in groups], [[rewards[a] for a in g] for g in groups])
    advantages = run(forest, name, **options)[forest.segment["start"]].view(-1, 4, 1)
    arms = torch.tensor(groups)
    score = torch.eye(3)[arms] - chance
    return (chance[arms].prod(1)[:, None] * (advantages * score).mean(1)).sum(0)


@pytest.mark.parametrize(
    "name, options, factor",
    [("opo", {"leave_one_out": True}, 1.0), ("rloo", {}, 1.0), ("dr_grpo", {}, 0.75), ("reward_to_go", {}, 1.0)],
)
def test_baselines_without_bias(name, options, factor):
    """Leave-one-out baselines, OPO's too, give the true gradient p (r - E r); the own-mean one (1 - 1/G) of it."""
    is_near(bandit_gradient(name, **options) / factor, [0.15, -0.21, 0.06], 1e-6)


def test_the_paper_form_of_opo_turns_the_gradient():
    """With the own sample in the length-weighted baseline the three components shrink by unequal factors."""
    factors = bandit_gradient("opo") / torch.tensor([0.15, -0.21, 0.06])
    assert factors.max() < 1 and factors.max() - factors.min() > 0.1
