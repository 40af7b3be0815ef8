"""The chunked head: log-probabilities and entropies of states, a few rows of logits at a time."""

import pytest
import torch
from torch import Tensor, nn

from stepcredit.policy.head import score_logits, score_states

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
            vocabulary=VOCABULARY,
            max_logits=limit,
        )
        assert scores.entropy.requires_grad == entropy_grad
        weight = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(1))
        (weight[0] * scores.logprobs + weight[1] * scores.entropy).sum().backward()
        return scores.logprobs, scores.entropy, states.grad, head.weight.grad

    for found, expected in zip(run(max_logits), run(ROWS * VOCABULARY), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_no_call_of_the_head_exceeds_the_limit(rows):
    """The forward and the backward never hold more than max_logits logits."""
    states, targets, head = inputs()
    seen = []

    def counting(chunk: Tensor) -> Tensor:
        seen.append(chunk.shape[0])
        return head(chunk)

    scores = score_states(states, targets, counting, 1.0, vocabulary=VOCABULARY, max_logits=rows * VOCABULARY)
    assert max(seen) == rows and sum(seen) == ROWS
    scores.logprobs.sum().backward()
    assert max(seen) == rows and sum(seen) == 2 * ROWS  # once more in the backward


def test_chunks_without_gradients():
    """Under no_grad the values are the same and nothing asks for a gradient."""
    states, targets, head = inputs()
    with torch.no_grad():
        scores = score_states(states, targets, head, 1.0, entropy_grad=True, vocabulary=VOCABULARY, max_logits=1)
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
