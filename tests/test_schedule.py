"""The learning-rate schedule beside those of transformers."""

import itertools

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from stepcredit.learn.options import OptimOptions
from stepcredit.learn.schedule import learning_rate

THEIRS = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
LENGTHS = [(warmup, iterations) for warmup, iterations in itertools.product((0, 1, 3, 10), (1, 2, 11, 100))]
longer = [(warmup, iterations) for warmup, iterations in LENGTHS if warmup < iterations]


def ours(schedule: str, warmup: int, iterations: int) -> list[float]:
    given = OptimOptions(learning_rate=0.5, schedule=schedule, warmup=warmup)
    return [learning_rate(given, iteration, iterations) for iteration in range(1, iterations + 1)]


def theirs(schedule: str, warmup: int, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = THEIRS[schedule](optimizer, warmup, steps)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", THEIRS)
@pytest.mark.parametrize("warmup, iterations", longer)
def test_behind_the_warmup_it_is_that_of_transformers(schedule, warmup, iterations):
    """All of it where there is no warm-up."""
    expected = theirs(schedule, warmup, iterations)[warmup:]
    assert ours(schedule, warmup, iterations)[warmup:] == pytest.approx(expected, rel=1e-12)
    assert expected[0] == 0.5 and min(expected) > 0


@pytest.mark.parametrize("schedule", [*THEIRS, "constant"])
@pytest.mark.parametrize("warmup, iterations", LENGTHS)
def test_the_warmup_begins_above_zero(schedule, warmup, iterations):
    """i / (warmup + 1) here, (i - 1) / warmup there."""
    found = ours(schedule, warmup, iterations)[:warmup]
    assert found == pytest.approx([0.5 * i / (warmup + 1) for i in range(1, len(found) + 1)])
    assert all(rate > 0 for rate in found)
    if schedule in THEIRS and found:
        other = theirs(schedule, warmup, iterations)[:warmup]
        assert other == pytest.approx([0.5 * (i - 1) / warmup for i in range(1, len(found) + 1)])


@pytest.mark.parametrize("iterations", [1, 2, 50])
def test_constant_without_warmup(iterations):
    assert ours("constant", 0, iterations) == [0.5] * iterations
