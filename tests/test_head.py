"""The chunked head: log-probabilities and entropies of states, a few rows of logits at a time."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from stepcredit.policy import head as head_module
from stepcredit.policy.head import Fused, LogitRule, max_logits_on, score_logits, score_states

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


# ---------------------------------------------------------------------- products of bf16 in fp32


def exact(temperature: float) -> tuple[Tensor, ...]:
    """In fp64, of what bf16 products take: rounded states, weights, bias and gradients of logits."""
    states, targets, head = biased()

    def rounded(values: Tensor) -> Tensor:
        return values.detach().bfloat16().double()

    x, w, b = map(rounded, (states, head.weight, head.bias))
    logprobs = torch.log_softmax((x @ w.T + b) / temperature, -1)
    weight = grads_of_scores().double()
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    grad = weight[0, :, None] * (nn.functional.one_hot(targets, VOCABULARY) - logprobs.exp())
    grad = grad - weight[1, :, None] * logprobs.exp() * (logprobs + entropy[:, None])
    grad = rounded(grad / temperature)
    chosen = logprobs.gather(1, targets[:, None]).squeeze(1)
    return chosen, entropy, grad @ w, grad.T @ x, grad.sum(0)


def biased() -> tuple[Tensor, Tensor, nn.Linear]:
    states, targets, head = inputs()
    head.bias = nn.Parameter(torch.linspace(-1, 1, VOCABULARY))
    return states, targets, head


def grads_of_scores() -> Tensor:
    return torch.randn(2, ROWS, generator=torch.Generator().manual_seed(1))


def in_bf16(temperature: float = 0.7) -> tuple[Tensor, ...]:
    states, targets, head = biased()
    with torch.autocast("cpu", torch.bfloat16):
        scores = score_states(states, targets, head, temperature, entropy_grad=True, max_logits=5 * VOCABULARY)
    weight = grads_of_scores()
    (weight[0] * scores.logprobs + weight[1] * scores.entropy).sum().backward()
    return *(value.detach() for value in scores), states.grad, head.weight.grad, head.bias.grad


def near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Within 1e-5 of their norm, where bf16 is within 2e-3."""
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and (one.double() - two).norm() < 1e-5 * two.norm()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_products_of_bf16_are_not_rounded_to_bf16(temperature):
    """Forward and backward are those of fp64 with the same rounded operands."""
    near(in_bf16(temperature), exact(temperature))


@pytest.fixture(params=[True, False], ids=["sums", "products alone"])
def device_with_mixed_products(request, monkeypatch) -> list[str]:
    """As on a GPU: products of bf16 that come out in fp32, and where it has them, sums of fp32 and such products."""
    called, mm, addmm = [], torch.mm, torch.addmm

    def product(left: Tensor, right: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        if out_dtype is None:
            return mm(left, right)
        assert left.dtype == right.dtype == torch.bfloat16 and out_dtype == torch.float32
        called.append("product")
        return mm(left.float(), right.float())

    def total(base: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert left.dtype == right.dtype == torch.bfloat16 and base is out and base.dtype == out_dtype
        called.append("sum")
        return addmm(base, left.float(), right.float(), out=out)

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(torch, "addmm", total)
    monkeypatch.setattr(head_module, "mixed_products", lambda device, dtype: True)
    monkeypatch.setattr(head_module, "mixed_sums", lambda device, dtype: request.param)
    return called


def test_where_a_device_multiplies_bf16_into_fp32(device_with_mixed_products, request):
    """The operands stay bf16 in every product, and the results are the same."""
    near(in_bf16(), exact(0.7))
    sums = "products alone" not in request.node.name
    chunks = -(-ROWS // 5)
    assert device_with_mixed_products.count("sum") == (chunks if sums else 0)
    assert device_with_mixed_products.count("product") == chunks * (3 if sums else 4)


@pytest.mark.parametrize(
    ("product", "works", "said"),
    [
        (lambda left, right, _: left.float() @ right.float(), True, ""),
        (lambda left, right, _: (left @ right).float(), False, "other numbers"),
        (lambda left, right, _: torch.mm(left, right, out_dtype=torch.float32), False, "aten::mm.dtype"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_that_rounds_or_is_not_there_is_not_taken(monkeypatch, caplog, product, works, said, dtype):
    eye = torch.eye
    monkeypatch.setattr(torch, "eye", lambda n, device, dtype: eye(n, dtype=dtype))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.full(shape, 0.0))
    assert head_module._works(product, "some device", dtype) == works
    assert said in caplog.text and bool(caplog.text) != works


@pytest.mark.parametrize("adds", [True, False])
def test_a_sum_that_forgets_what_was_there_is_not_taken(device_with_mixed_products, monkeypatch, adds):
    eye, addmm = torch.eye, torch.addmm

    def forgetful(total: Tensor, left: Tensor, right: Tensor, **options) -> Tensor:
        return addmm(total if adds else total.zero_(), left, right, **options)

    monkeypatch.undo()
    monkeypatch.setattr(torch, "addmm", forgetful)
    monkeypatch.setattr(torch, "eye", lambda n, device, dtype: eye(n, dtype=dtype))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.full(shape, 0.0))
    assert head_module.mixed_sums.__wrapped__("some device", torch.bfloat16) == adds


# ---------------------------------------------------------------------- chunks and passes of a GPU


def test_chunks_are_of_the_size_that_suits_the_device():
    """Example: at a vocabulary of 152,000 a GPU's products have more than 1024 rows, a CPU's chunk is 16 MiB."""
    assert max_logits_on("cuda") // 151_936 >= 1024
    assert max_logits_on("cpu") == max_logits_on("mps") == 1 << 22


def chunk(cap: float | None) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    product, grads = torch.randn(ROWS, VOCABULARY, generator=generator) * 3, grads_of_scores()
    rule, temperature = (LogitRule(), 1.0) if cap is None else (LogitRule(0.5, cap), 0.7)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    return product, targets, grads, head_module._numbers(rule, temperature, product.device)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler g++")
@pytest.mark.parametrize("cap", [None, 5.0])
def test_compiled_passes_give_what_plain_ones_give(cap):
    """And they leave their input as it is, so that it is not written again."""
    product, targets, grads, numbers = chunk(cap)
    before = product.clone()
    found = head_module.FORWARD.compiled(product, targets, *numbers)
    assert product.equal(before)
    expected = head_module._forward(product.clone(), targets, *numbers)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    entropies = (None, None) if cap is None else (expected[2], grads[1])
    rest = (targets, expected[1], grads[0], *entropies, *numbers, torch.float32)
    gradient = head_module.BACKWARD.compiled(product, *rest)
    assert product.equal(before)
    torch.testing.assert_close(gradient, head_module._backward(product.clone(), *rest), atol=1e-5, rtol=1e-5)


def on_gpu(number: int) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device("cuda"), number=number)


def test_what_cannot_be_compiled_runs_as_it_is_and_is_said_once(caplog):
    def broken(*_: object) -> None:
        calls.append(1)
        raise RuntimeError("no compiler here\nand more")

    calls: list[int] = []
    fused = Fused(lambda values: values.number + 1)
    fused.compiled = broken
    assert [fused(on_gpu(number)) for number in (1, 2)] == [2, 3]
    assert calls == [1] and caplog.text.count("no compiler here") == 1 and "and more" not in caplog.text


def test_running_out_of_memory_is_no_fault_of_the_compiler(caplog):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    fused = Fused(lambda values: values.number)
    fused.compiled = full
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            fused(on_gpu(1))
    assert not caplog.text
