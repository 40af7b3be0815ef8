"""Frozen weights in the type of the computation give what autocast gives."""

import copy

import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY, fresh, random_forest
from torch import nn

from stepcredit.estimators.frozen import fingerprint
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.learn.adapters import add_adapters, trainable_copy
from stepcredit.learn.placement import Placement
from stepcredit.policy.forward import Policy, score
from stepcredit.policy.precision import hold_in, rounded_weights
from stepcredit.processes.ranks import Ranks

FAR = 600  # a position at which rounded frequencies are off by radians


class OneOfOne(Ranks):
    """As torchrun's, without other processes."""

    distributed = True  # type: ignore[assignment]


def long_forest(length: int = FAR) -> Forest:
    ids = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    return Forest.from_trees([Tree(Problem(id="long"), ids[:4], [Segment(ids[4:])])])


def in_bf16(family: str, exact: bool = True, **changes) -> Policy:
    """A policy that computes in bf16.

    Args:
        exact: its weights are those of a checkpoint in bf16.
    """
    policy = fresh(family, max_position_embeddings=1024, **changes)
    policy.autocast = torch.bfloat16
    if exact:
        with torch.no_grad():
            for value in policy.parameters():
                value.copy_(value.bfloat16())
    return policy


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "gemma3"])
def test_held_weights_give_what_autocast_gives(family):
    """To the last bit for a checkpoint in bf16, at near positions and far ones."""
    policy, forest = in_bf16(family), random_forest(3, deep=True)
    held = copy.deepcopy(policy).requires_grad_(False)
    hold_in(held.model, torch.bfloat16)
    assert {value.dtype for _, _, value in rounded_weights(policy.model)} == {torch.float32}
    assert not list(rounded_weights(held.model))
    for one in (forest, long_forest()):
        assert score(held, one, 1.0, 4096).logprobs.equal(score(policy, one, 1.0, 4096).logprobs)


def test_experts_are_rounded_where_autocast_leaves_them():
    """Their grouped product takes the type of its weights, so this is bf16 arithmetic in place of fp32."""
    policy, forest = in_bf16("mixtral"), random_forest(3, deep=True)
    held = copy.deepcopy(policy).requires_grad_(False)
    hold_in(held.model, torch.bfloat16)
    found, mixed = (score(one, forest, 1.0, 4096).logprobs for one in (held, policy))
    policy.autocast = None
    exact = score(policy, forest, 1.0, 4096).logprobs
    assert 0 < float((found - exact).abs().mean()) < 2 * float((mixed - exact).abs().mean())


def test_tied_weights_stay_tied_and_half_the_bytes_go():
    policy = in_bf16("qwen2").requires_grad_(False)
    before = sum(value.nbytes for value in policy.parameters())
    hold_in(policy.model, torch.bfloat16)
    assert policy.model.get_output_embeddings().weight is policy.model.get_input_embeddings().weight
    after = sum(value.nbytes for value in policy.parameters())
    assert after < 0.55 * before
    norms = [value for name, value in policy.named_parameters() if "norm" in name or "bias" in name]
    assert norms and {value.dtype for value in norms} == {torch.float32}


def test_what_a_model_keeps_in_fp32_stays():
    policy = in_bf16("qwen3").requires_grad_(False)
    policy.model._keep_in_fp32_modules_strict = {"k_proj"}
    hold_in(policy.model, torch.bfloat16)
    dtypes = {name: value.dtype for name, value in policy.model.named_parameters() if "_proj" in name}
    assert {dtype for name, dtype in dtypes.items() if "k_proj" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "k_proj" not in name} == {torch.bfloat16}


@pytest.mark.parametrize("exact", [True, False])
def test_the_copy_to_sample_with_keeps_its_buffers(exact):
    """Frequencies in bf16 would turn a key at position 600 by more than a radian."""
    policy = in_bf16("qwen3", exact)
    made = Placement(OneOfOne(), "fsdp").sampling_copy(policy)
    own = dict(policy.model.named_buffers())
    assert any("inv_freq" in name for name in own)
    for name, value in made.model.named_buffers():
        assert value.dtype == own[name].dtype and value.equal(own[name])
    assert made.model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    forest = long_forest()
    expected, found = (score(one, forest, 1.0, 4096).logprobs[-50:] for one in (policy, made))
    if exact:
        assert found.equal(expected)
        buffers_too = score(copy.deepcopy(policy).to(torch.bfloat16), forest, 1.0, 4096).logprobs[-50:]
        assert float((buffers_too - expected).abs().mean()) > 0.01
    else:  # the rows of the embedding are rounded
        assert float((found - expected).abs().mean()) < 0.03


def test_adapters_learn_on_a_base_in_bf16():
    """Log-probabilities and gradients are those of an fp32 base under autocast, and no adapter is rounded."""
    forest, found = random_forest(5, deep=True), []
    for held in (True, False):
        policy = in_bf16("llama")
        if not held:
            policy.autocast = None
        add_adapters(policy, 4, 8.0, [], seed=0)
        policy.autocast = torch.bfloat16
        with torch.no_grad():
            for value in policy.parameters():
                if value.requires_grad:
                    value.add_(0.01)
        dtype = torch.bfloat16 if held else torch.float32
        assert policy.model.get_output_embeddings().weight.dtype == dtype
        scores = policy(forest)
        scores.logprobs.sum().backward()
        learning = {name: value for name, value in policy.named_parameters() if value.requires_grad}
        assert {value.dtype for value in learning.values()} == {torch.float32}
        found.append((scores.logprobs.detach(), {name: value.grad for name, value in learning.items()}))
    assert found[0][0].equal(found[1][0])
    assert all(grad.equal(found[1][1][name]) for name, grad in found[0][1].items())


def test_in_fp32_nothing_is_held_otherwise():
    policy = fresh("llama")
    add_adapters(policy, 4, 8.0, [], seed=0)
    assert {value.dtype for value in policy.parameters()} == {torch.float32}
    assert not any(module._forward_hooks for module in policy.modules() if isinstance(module, nn.Embedding))


def test_the_fingerprint_of_a_reference_stays():
    """A run that began with an fp32 base goes on with one in bf16, as long as the checkpoint was in bf16."""
    policy = in_bf16("llama")
    before = fingerprint(policy)
    add_adapters(policy, 4, 8.0, [], seed=0)
    assert fingerprint(policy) == before
    policy.model.get_input_embeddings().weight.data[0, 0] += 1
    assert fingerprint(policy) != before


def test_a_reward_model_shares_the_held_base():
    policy = in_bf16("llama")
    add_adapters(policy, 4, 8.0, [], seed=0)
    other = trainable_copy(policy, share_frozen=True)
    mine, theirs = (model.get_input_embeddings().weight for model in (policy.model, other.model))
    assert mine is theirs and mine.dtype == torch.bfloat16
