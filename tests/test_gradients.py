"""Policy gradients of credits: against autograd on a row of its own, sketches, and how they are compared."""

import numpy as np
import pytest
import torch
from builders import random_forest
from tiny_models import fresh

from stepcredit.report.gradients import SIZE, Sketch, fit, gradients


def parameters(policy):
    return list(policy.model.parameters())


def test_sketches_keep_inner_products():
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 70), (70,), (SIZE + 5,)]
    one, noise = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    other = [0.6 * a + 0.8 * b for a, b in zip(one, noise, strict=True)]
    sketch = Sketch([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes])
    exact = sum(float((a * b).sum()) for a, b in zip(one, other, strict=True))
    size = sum(float(a.square().sum()) for a in one)
    assert float(sketch.of(one) @ sketch.of(other)) == pytest.approx(exact, abs=0.03 * size)
    assert float(sketch.of(one) @ sketch.of(one)) == pytest.approx(size, rel=0.03)
    assert float(sketch.of([None, one[1], None]) @ sketch.of(one)) == pytest.approx(
        float(one[1].square().sum()), abs=0.03 * size
    )


def test_sketches_are_linear():
    one = [torch.ones(4, 5), torch.arange(3.0)]
    sketch = Sketch([torch.nn.Parameter(each) for each in one])
    doubled = sketch.of([2 * each for each in one])
    torch.testing.assert_close(doubled, 2 * sketch.of(one))
    assert sketch.of(one).count_nonzero() == 22  # the 23 entries, one of them 0, each in a place of its own


@pytest.mark.parametrize("max_tokens", [16384, 40])
def test_the_gradient_is_that_of_each_tree(max_tokens):
    """sum A log pi of the tree's tokens alone, however it is cut; trees without credit are left out."""
    policy = fresh("qwen3")
    forest = random_forest(3, "flat", num_trees=3)
    credit = torch.where(forest.token_sampled, torch.arange(forest.num_tokens).float() % 5 - 2, 0.0)
    credit = torch.where(forest.token_tree == 1, 0.0, credit)
    found = gradients(policy, forest, {"a": credit, "b": -2 * credit}, 1.0, max_tokens)
    sketch = Sketch(parameters(policy))
    expected = []
    for tree in (0, 2):
        value = (credit * (forest.token_tree == tree) * policy(forest).logprobs).sum()
        expected.append(sketch.of(torch.autograd.grad(value, parameters(policy), allow_unused=True)).numpy())
    np.testing.assert_allclose(found["a"], np.stack(expected), atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(found["b"], -2 * found["a"], atol=1e-4 * np.abs(expected).max())


def test_fits_by_hand():
    """Two trees, gradients (1, 0) and (0, 1): the mean has the square 1/2, the variance is 1, the noise 2."""
    truth = np.array([[1.0, 0.0], [0.0, 1.0]])
    same = fit(truth, truth)
    assert same.cosine.value == same.cosine.low == same.cosine.high == pytest.approx(1)
    assert same.noise == pytest.approx(2)
    assert fit(-3 * truth, truth).cosine.value == pytest.approx(-1)
    half = fit(np.array([[1.0, 0.0], [0.0, -1.0]]), truth)
    assert half.cosine.value == pytest.approx(0) and half.cosine.low == pytest.approx(-1)
    assert fit(np.array([[1.0, 1.0], [1.0, 1.0]]), truth).noise == pytest.approx(0)
    nothing = fit(np.zeros((2, 2)), truth)
    assert nothing.cosine.value is None and nothing.noise is None
    assert fit(np.zeros((0, 2)), np.zeros((0, 2))).cosine.value is None
    assert fit(truth[:1], truth[:1]).noise is None
