"""Advantages of the tokens with the largest entropies, and the entropy bonus that follows a target."""

import numpy as np
import pytest
import torch
from builders import random_forest

from stepcredit.config import resolve
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.losses.base import Tokens, loss
from stepcredit.losses.entropy import EntropyControl, top_entropy, with_top_entropy
from stepcredit.losses.options import ObjectiveOptions
from stepcredit.run.build import build_parts


@loss(ratio=True)
def squared(tokens: Tokens) -> torch.Tensor:
    return (tokens.log_ratio - tokens.advantages).square()


def prepared(seed: int = 0, kind: str = "chain") -> Forest:
    forest = random_forest(seed, kind, unsampled=0.2, num_trees=6)
    generator = torch.Generator().manual_seed(seed)
    columns = {name: torch.rand(forest.num_tokens, generator=generator) for name in ("entropy", "advantages")}
    return forest.with_token(**columns, process=columns["advantages"] / 2)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.8, 0.999])
@pytest.mark.parametrize("count", [1, 2, 5, 6, 11, 100])
def test_the_threshold_is_the_quantile(share, count):
    """numpy's quantile of the counted tokens alone; TRL takes torch's, which is the same."""
    values = np.random.default_rng(count).permutation(count * 2) / 7
    where = np.random.default_rng(1).permutation(count * 2) < count
    expected = where & (values >= np.quantile(values[where], 1 - share) - 1e-12)
    found = top_entropy(torch.tensor(values), torch.tensor(where), share)
    assert found.tolist() == expected.tolist()


def test_ties_come_together():
    entropy = torch.tensor([0.5, 0.5, 0.1, 0.5])
    assert top_entropy(entropy, torch.ones(4, dtype=torch.bool), 0.3).tolist() == [True, True, False, True]


@pytest.mark.parametrize("kind", ["flat", "chain", "deep"])
def test_only_advantages_of_the_top_stay(kind):
    """Denominators keep all tokens; what is not trained on is in no quantile."""
    forest = prepared(3, kind)
    found = with_top_entropy(forest, 0.2)
    active, entropy = forest.active, forest.token["entropy"]
    top = active & (entropy >= torch.quantile(entropy[active], 0.8))
    assert 0 < int(top.sum()) < int(active.sum()) * 0.3
    for name in ("advantages", "process"):
        assert found.token[name].equal(forest.token[name] * top)
    assert found.active.equal(active)
    raised = forest.with_token(entropy=torch.where(active, entropy, 99.0))
    assert with_top_entropy(raised, 0.2).token["advantages"].equal(found.token["advantages"])


def test_a_share_of_one_is_nothing():
    forest = prepared()
    assert with_top_entropy(forest, 1.0) is forest


def test_the_order_of_trees_means_nothing():
    forest = prepared()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    there = with_top_entropy(forest.in_order(order), 0.3)
    assert there.token["advantages"].equal(with_top_entropy(forest, 0.3).in_order(order).token["advantages"])


# ---------------------------------------------------------------------- the coefficient


def with_entropy(value: float) -> Forest:
    forest = prepared()
    spread = torch.where(torch.arange(forest.num_tokens) % 2 == 0, 0.01, -0.01)
    active = forest.active
    centred = spread - (spread[active].mean() if bool(active.any()) else 0.0)
    return forest.with_token(entropy=torch.where(active, value + centred, 50.0))


def test_the_coefficient_follows_the_target():
    """By pencil: rises at and below 0.3 and acts, falls above and is off; within 0 and its largest value."""
    given = ObjectiveOptions(entropy_coef=0.01, entropy_target=0.3, entropy_step=0.01, entropy_coef_max=0.025)
    control, used = EntropyControl(given), []
    for value in (0.5, 0.2, 0.2, 0.2, 0.2, 0.5, 0.5, 0.5, 0.5, 0.2, 0.2):
        used.append(control.begin(with_entropy(value))["policy/entropy_coef"])
    assert used == pytest.approx([0, 0, 0.01, 0.02, 0.025, 0, 0, 0, 0, 0, 0.01])


def test_without_a_target_it_stays():
    control = EntropyControl(ObjectiveOptions(entropy_coef=0.02))
    assert control.begin(prepared()) == {} and control.used == 0.02 and control.state_dict() == {}


def test_its_state_goes_on():
    given = ObjectiveOptions(entropy_target=0.3, entropy_step=0.01)
    whole, first = EntropyControl(given), EntropyControl(given)
    for value in (0.2, 0.1):
        whole.begin(with_entropy(value))
        first.begin(with_entropy(value))
    second = EntropyControl(given)
    second.load_state_dict(first.state_dict())
    assert (second.used, second.coef) == (whole.used, whole.coef) == (0.01, 0.02)
    second.load_state_dict({})  # a checkpoint of before
    assert second.coef == whole.coef


def test_a_batch_without_tokens_changes_nothing():
    forest = prepared()
    control = EntropyControl(ObjectiveOptions(entropy_coef=0.01, entropy_target=9.0))
    control.begin(forest.with_segment(mask=torch.zeros(forest.num_segments, dtype=torch.bool)))
    assert control.coef == 0.01


# ---------------------------------------------------------------------- the config


@pytest.mark.parametrize("option", [{"entropy_top": 0.2}, {"entropy_target": 0.3}], ids=str)
def test_entropies_are_asked_for(option):
    """A sampler that gives them, or the pass of the policy as it is at the start of the iteration."""
    assert list(build_parts(resolve({"objective": option})).observers.providers) == []
    needed = build_parts(resolve({"objective": option})).observers.needed
    assert "entropy" in needed
    elsewhere = {"objective": option, "sampler": {"name": "vllm"}}
    assert list(build_parts(resolve(elsewhere)).observers.providers) == ["old_logprobs"]


@pytest.mark.parametrize(
    "given, words",
    [
        ({"objective": {"entropy_step": 0.1}}, ["objective.entropy_step", "--objective.entropy-target"]),
        ({"objective": {"entropy_coef_max": 2.0}}, ["objective.entropy_coef_max", "--objective.entropy-target"]),
        ({"objective": {"entropy_target": 0.3, "entropy_coef": 2.0}}, ["entropy_coef (2)", "entropy_coef_max (1)"]),
        ({"objective": {"entropy_target": 0.3, "entropy_coef": -0.1}}, ["entropy_coef (-0.1)"]),
        ({"objective": {"entropy_top": 0.2}, "loss": {"name": f"{__name__}.squared"}}, ["entropy_top", "squared"]),
        ({"objective": {"entropy_top": 0.2}, "algorithm": "gspo"}, ["entropy_top", "'gspo'", "take gspo_token"]),
        ({"filter": {"enabled": True, "keep": "varied", "low": 0.1}}, ["filter.low", "--filter.keep window"]),
    ],
    ids=str,
)
def test_what_would_have_no_effect_is_refused(given, words):
    with pytest.raises(UserError) as error:
        build_parts(resolve(given))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("option", [{"entropy_top": 0.0}, {"entropy_top": 1.5}, {"entropy_step": 0}], ids=str)
def test_what_does_not_fit_is_said(option):
    with pytest.raises(UserError, match=rf"objective\.{next(iter(option))}"):
        resolve({"objective": option})
