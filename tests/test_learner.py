"""What AdamW decays, beside the Trainer of transformers and beside AdamW over all parameters."""

import copy

import pytest
import torch
from tiny_models import FAMILIES, OTHERS, fresh
from transformers import Trainer

from stepcredit.learn import learner as learner_module
from stepcredit.learn.learner import Learner, parameter_groups
from stepcredit.learn.options import AdamWOptions
from stepcredit.learn.placement import UNSHARDED
from stepcredit.policy.forward import Policy
from stepcredit.policy.loading import load_policy
from stepcredit.run.checkpoint import load_learner, save_checkpoint

families = pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])


def learner(policy: Policy, **options) -> Learner:
    return Learner(policy, UNSHARDED, AdamWOptions(**{"learning_rate": 1e-2} | options), 1024)


def named(policy: Policy, decays: bool) -> set[str]:
    """Names of the weights in the group that decays, or in the other one."""
    names = {id(value): name for name, value in policy.model.named_parameters()}
    return {
        names[id(value)] for group in parameter_groups(policy) if group["decays"] is decays for value in group["params"]
    }


def give_gradients(policy: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for value in policy.parameters():
        value.grad = torch.randn(value.shape, generator=generator)


@families
def test_what_decays_is_what_the_trainer_of_transformers_decays(family):
    policy = fresh(family)
    expected = set(Trainer.get_decay_parameter_names(None, policy.model))
    assert named(policy, True) == expected & {name for name, _ in policy.model.named_parameters()}
    assert named(policy, True).isdisjoint(named(policy, False))
    assert named(policy, True) | named(policy, False) == {name for name, _ in policy.model.named_parameters()}


@families
def test_weights_that_do_not_decay_are_norms_and_biases(family):
    policy = fresh(family)
    sizes = {name: value.ndim for name, value in policy.model.named_parameters()}
    assert all(sizes[name] >= 2 for name in named(policy, True)) and len(named(policy, True)) > 4
    assert named(policy, False) and all("norm" in name or "bias" in name for name in named(policy, False))


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_steps_are_those_of_adamw_bit_for_bit(decay):
    """Over all parameters at once: with decay for matrices, without for the others; with decay 0 the same for all."""
    policies = [fresh("qwen2")]
    policies += [copy.deepcopy(policies[0]) for _ in range(2)]
    ours = learner(policies[0], weight_decay=decay, grad_clip=1e9)
    plain = [
        torch.optim.AdamW(one.parameters(), lr=1e-2, weight_decay=own)
        for one, own in zip(policies[1:], (decay, 0.0), strict=True)
    ]
    for seed in range(3):
        for policy in policies:
            give_gradients(policy, seed)
        assert ours.step()[1]
        for optimizer in plain:
            optimizer.step()
    decaying, values = named(policies[0], True), [dict(one.model.named_parameters()) for one in policies]
    for name, value in values[0].items():
        assert torch.equal(value, values[1][name] if name in decaying else values[2][name]), name
    same = [torch.equal(values[1][name], values[2][name]) for name in values[0]]
    assert all(same) if decay == 0 else not any(same)


def test_set_keeps_the_groups_apart():
    one = learner(fresh("qwen3"), weight_decay=0.1)
    one.set(lr=0.5)
    assert [(group["lr"], group["weight_decay"]) for group in one.optimizer.param_groups] == [(0.5, 0.1), (0.5, 0.0)]
    one.set(weight_decay=0.2, betas=(0.5, 0.5))
    assert [group["weight_decay"] for group in one.optimizer.param_groups] == [0.2, 0.0]
    assert [group["betas"] for group in one.optimizer.param_groups] == [(0.5, 0.5)] * 2


def test_state_is_named_by_weight():
    """Of all weights of both groups; filled in before the first step, it is that of a step not taken."""
    one, two = learner(fresh("qwen2")), learner(fresh("qwen2"))
    names = [name for name, _ in one.policy.named_parameters()]
    assert one.tensors() == {} and len(two.tensors(fill=True)) == 3 * len(names)
    for each in (one, two):
        give_gradients(each.policy, 0)
        assert each.step()[1]
    found, filled = one.tensors(), two.tensors()
    assert found.keys() == filled.keys() == {f"{n}.{kind}" for n in names for kind in ("step", "exp_avg", "exp_avg_sq")}
    assert all(torch.equal(found[name], filled[name]) for name in found)


def test_without_anything_that_does_not_decay_there_is_one_group():
    """As of adapters, which are matrices alone."""
    policy = fresh("qwen2")
    for value in policy.parameters():
        value.requires_grad_(value.ndim == 2)
    assert [group["decays"] for group in learner(policy).optimizer.param_groups] == [True]


# ---------------------------------------------------------------------- AdamW as one kernel


@pytest.fixture
def fused(monkeypatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(learner_module, "FUSED", {"cpu"})


def steps(one: Learner, seeds: range) -> None:
    for seed in seeds:
        give_gradients(one.policy, seed)
        assert one.step()[1]


def test_one_kernel_takes_the_steps_of_many(monkeypatch):
    plain = learner(fresh("qwen2"), weight_decay=0.1)
    assert not plain.fused and plain.optimizer.defaults["fused"] is None
    monkeypatch.setattr(learner_module, "FUSED", {"cpu"})
    one = learner(fresh("qwen2"), weight_decay=0.1)
    assert one.fused and all(group["fused"] for group in one.optimizer.param_groups)
    for each in (plain, one):
        each.set(lr=3e-3)
        steps(each, range(3))
    for (name, value), other in zip(one.policy.named_parameters(), plain.policy.parameters(), strict=True):
        torch.testing.assert_close(value, other, atol=1e-6, rtol=1e-5, msg=name)


def test_its_state_is_filled_as_it_would_make_it(fused):
    one, two = learner(fresh("qwen2")), learner(fresh("qwen2"))
    filled = two.tensors(fill=True)
    steps(one, range(1))
    for name, value in one.tensors().items():
        assert (filled[name].shape, filled[name].dtype, filled[name].device) == (value.shape, value.dtype, value.device)
    steps(two, range(1))
    assert all(torch.equal(value, two.tensors()[name]) for name, value in one.tensors().items())


def test_its_steps_are_counted_where_its_weights_are(fused):
    """The kernel reads the number of steps on the device; that of the plain AdamW is on the CPU."""
    one = learner(fresh("qwen2"))
    one.policy.to("meta")
    steps_of = [value for name, value in one.tensors(fill=True).items() if name.endswith(".step")]
    assert steps_of and all(value.device.type == "meta" and value.dtype == torch.float32 for value in steps_of)


def test_saved_and_loaded_it_goes_on_as_if_nothing_had_been(fused, tmp_path):
    through, first, second = (learner(load_policy("embedded", "cpu"), weight_decay=0.1) for _ in range(3))
    steps(through, range(4))
    steps(first, range(2))
    state = {"numbers": [1, 2]}
    folder = save_checkpoint(tmp_path, "000002", {"": first}, state, keep=1)
    load_learner(second, folder, "")
    steps(second, range(2, 4))
    for (name, value), other in zip(through.policy.named_parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(value, other), name
