"""The chunked head: log-probabilities and entropies of states, a few rows of logits at a time."""

import pytest
import torch
from torch import Tensor, nn

from stepcredit.policy.head import LogitRule, score_logits, score_states

ROWS, HIDDEN, VOCABULARY = 23, 8, 19


def inputs() -> tuple[Tensor, Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64).float().requires_grad_()
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, HIDDEN, generator=generator))
    return states, torch.randint(0, VOCABULARY, (ROWS,), generator=generator), head


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_score_logits_is_the_formula(temperature):
    """Log-probability and entropy are those of torch's categorical distribution."""
    states, targets, head = inputs()
    logits = head(states)
    scores = score_logits(logits, targets, temperature, entropy_grad=False)
    expected = torch.distributions.Categorical(logits=logits / temperature)
    torch.testing.assert_close(scores.logprobs, expected.log_prob(targets), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.entropy, expected.entropy().detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_logits", [1, VOCABULARY, 5 * VOCABULARY + 3, ROWS * VOCABULARY - 1])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_chunks_equal_the_whole(max_logits, entropy_grad, temperature):
    """Values and gradients (states and head weight) are those of one chunk, also with less room than one row."""

    def run(limit: int) -> tuple[Tensor, ...]:
        states, targets, head = inputs()
        scores = score_states(
            states,
            targets,
            head,
            temperature,
            entropy_grad=entropy_grad,
            max_logits=limit,
        )
        assert scores.entropy.requires_grad == entropy_grad
        weight = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(1))
        (weight[0] * scores.logprobs + weight[1] * scores.entropy).sum().backward()
        return scores.logprobs, scores.entropy, states.grad, head.weight.grad

    for found, expected in zip(run(max_logits), run(ROWS * VOCABULARY), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_no_product_exceeds_the_limit(monkeypatch, rows):
    """The forward and the backward never hold more than max_logits logits."""
    states, targets, head = inputs()
    seen, linear = [], nn.functional.linear

    def counting(chunk: Tensor, *weights) -> Tensor:
        seen.append(chunk.shape[0])
        return linear(chunk, *weights)

    monkeypatch.setattr(nn.functional, "linear", counting)
    scores = score_states(states, targets, head, 1.0, max_logits=rows * VOCABULARY)
    assert max(seen) == rows and sum(seen) == ROWS
    scores.logprobs.sum().backward()
    assert max(seen) == rows and sum(seen) == 2 * ROWS  # once more in the backward


@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(0.25), LogitRule(1.0, 1.5), LogitRule(2.0, 0.7)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_values_and_gradients_are_those_of_autograd(rule, bias, temperature):
    """Scales, caps and a bias: equal to the formula written out and differentiated by torch."""
    weight = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(1))
    results = []
    for ours in (True, False):
        states, targets, head = inputs()
        if bias:
            head.bias = nn.Parameter(torch.linspace(-1, 1, VOCABULARY))
        if ours:
            scores = score_states(
                states, targets, head, temperature, rule=rule, entropy_grad=True, max_logits=5 * VOCABULARY
            )
        else:
            logits = head(states) * rule.scale
            logits = logits if rule.cap is None else rule.cap * torch.tanh(logits / rule.cap)
            scores = score_logits(logits, targets, temperature, entropy_grad=True)
        (weight[0] * scores.logprobs + weight[1] * scores.entropy).sum().backward()
        grads = [states.grad, head.weight.grad, *([head.bias.grad] if bias else [])]
        results.append((*scores, *grads))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_tokens_that_cannot_be_drawn_leave_finite_numbers():
    """A bias of minus infinity takes tokens out; entropies and gradients stay finite."""
    states, targets, head = inputs()
    head.bias = nn.Parameter(torch.zeros(VOCABULARY))
    with torch.no_grad():
        head.bias[VOCABULARY - 1] = -torch.inf
    scores = score_states(states, targets.clamp(max=VOCABULARY - 2), head, 1.0, entropy_grad=True)
    (scores.logprobs + scores.entropy).sum().backward()
    assert scores.entropy.isfinite().all() and states.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_weights_in_bf16_under_autocast_are_near():
    """Products in bf16, sums and gradients in fp32."""
    results = []
    for autocast in (False, True):
        states, targets, head = inputs()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scores = score_states(states, targets, head, 1.0, max_logits=5 * VOCABULARY)
        scores.logprobs.sum().backward()
        results.append((scores.logprobs.detach(), states.grad, head.weight.grad))
    for found, expected in zip(*results[::-1], strict=True):
        assert found.dtype == torch.float32
        assert 0 < (found - expected).norm() < 0.02 * expected.norm()


def test_another_kind_of_output_layer_is_refused():
    states, targets, head = inputs()
    with pytest.raises(NotImplementedError, match="Sequential"):
        score_states(states, targets, nn.Sequential(head), 1.0)


def test_chunks_without_gradients():
    """Under no_grad the values are the same and nothing asks for a gradient."""
    states, targets, head = inputs()
    with torch.no_grad():
        scores = score_states(states, targets, head, 1.0, entropy_grad=True, max_logits=1)
    whole = score_logits(head(states), targets, 1.0, entropy_grad=True)
    assert not scores.logprobs.requires_grad and not scores.entropy.requires_grad
    torch.testing.assert_close(scores.logprobs, whole.logprobs.detach())
    torch.testing.assert_close(scores.entropy, whole.entropy.detach())


def test_half_precision_logits_are_scored_in_fp32():
    logits = torch.tensor([[8.0, 7.0, -3.0]], dtype=torch.bfloat16)
    scores = score_logits(logits, torch.tensor([1]), 1.0, entropy_grad=False)
    expected = torch.log_softmax(torch.tensor([8.0, 7.0, -3.0]), 0)
    assert scores.logprobs.dtype == scores.entropy.dtype == torch.float32
    torch.testing.assert_close(scores.logprobs[0], expected[1])
    torch.testing.assert_close(scores.entropy[0], -(expected.exp() * expected).sum())
