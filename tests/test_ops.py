"""Sums over groups and paths against plain loops; KL estimators by pencil and by enumeration."""

import math

import pytest
import torch
from builders import random_forest, random_trees
from reference_credit import paths

from stepcredit.errors import UserError
from stepcredit.forest import Forest, ops
from stepcredit.forest.ops import (
    KL_ESTIMATORS,
    cumsum_along_path,
    kl_k1,
    kl_k2,
    kl_k3,
    mean_by,
    segment_sum,
    sum_to_end,
)
from stepcredit.forest.types import Problem, Segment, Tree

close = torch.testing.assert_close


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(3))
def test_segment_sum_against_a_loop(seed):
    """Each row holds the sum of its values, 0 where none falls, in the dtype of the values."""
    index = torch.randint(0, 6, (40,), generator=generator(seed))
    values = torch.randn(40, generator=generator(seed), dtype=torch.float64)
    expected = [sum(v for v, i in zip(values.tolist(), index.tolist(), strict=True) if i == row) for row in range(8)]
    found = segment_sum(values, index, 8)
    assert found.dtype == torch.float64 and found[6:].tolist() == [0.0, 0.0]
    close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("num_keys", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_mean_by_against_a_loop(num_keys, masked):
    """The mean over the counted rows that share all keys, given back at every row, with the number of rows."""
    keys = [torch.randint(0, 3, (50,), generator=generator(k)) * 5 for k in range(num_keys)]
    values = torch.randn(50, generator=generator(9))
    where = torch.rand(50, generator=generator(8)) < 0.4 if masked else torch.ones(50, dtype=torch.bool)
    mean, count = mean_by(values, *keys, where=where if masked else None)
    for row in range(50):
        same = [r for r in range(50) if where[r] and all(key[r] == key[row] for key in keys)]
        assert count[row] == len(same)
        assert float(mean[row]) == pytest.approx(sum(float(values[r]) for r in same) / max(len(same), 1), abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_do_not_count_cannot_spoil_a_mean(bad):
    """NaN and infinity outside `where` have no effect; a group without counted rows has mean 0."""
    values = torch.tensor([1.0, bad, 3.0, bad])
    mean, count = mean_by(values, torch.tensor([0, 0, 0, 1]), where=torch.tensor([True, False, True, False]))
    assert mean.tolist() == [2.0, 2.0, 2.0, 0.0] and count.tolist() == [2.0, 2.0, 2.0, 0.0]


def token_rows(forest: Forest, trees: list[Tree]) -> list[list[int]]:
    """The token rows of every root-to-leaf path."""
    first, found = 0, []
    for tree in trees:
        for path in paths(tree):
            spans = [(int(forest.segment["start"][first + i]), len(tree.segments[i].token_ids)) for i in path]
            found.append([row for start, size in spans for row in range(start, start + size)])
        first += len(tree.segments)
    return found


@pytest.mark.parametrize("kind", ["flat", "chain", "deep"])
@pytest.mark.parametrize("seed", range(4))
def test_cumsum_along_path_against_a_loop(kind, seed):
    """The sum from the prompt to each token, token included, along every path of branching forests too."""
    trees = random_trees(seed, kind)
    forest = Forest.from_trees(trees)
    values = torch.randn(forest.num_tokens, generator=generator(seed))
    found = cumsum_along_path(forest, values)
    for rows in token_rows(forest, trees):
        close(found[rows], values[rows].cumsum(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["flat", "chain"])
@pytest.mark.parametrize("discount", [1.0, 0.9, 0.5, 0.0])
def test_sum_to_end_against_a_loop(kind, discount):
    """G_t = x_t + discount * G_{t+1} to the end of the completion."""
    trees = random_trees(3, kind)
    forest = Forest.from_trees(trees)
    values = torch.randn(forest.num_tokens, generator=generator(1))
    found = sum_to_end(forest, values, discount)
    for rows in token_rows(forest, trees):
        running = 0.0
        for row in reversed(rows):
            running = float(values[row]) + discount * running
            assert float(found[row]) == pytest.approx(running, abs=1e-5)


def test_long_paths_are_summed_to_their_ends():
    """A path of 1000 tokens over 3 segments: prefix sums count up, suffix sums count down."""
    ids = list(range(1000))
    segments = [Segment(ids[:400]), Segment(ids[400:401], parent=0), Segment(ids[401:], parent=1)]
    forest = Forest.from_trees([Tree(Problem(), [1], segments)])
    ones = torch.ones(1000)
    assert cumsum_along_path(forest, ones).tolist() == list(range(1, 1001))
    assert sum_to_end(forest, ones).tolist() == list(range(1000, 0, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["flat", "with tools"])
def test_sums_by_shifts_are_those_by_jumps_to_the_last_bit(kind, dtype, monkeypatch):
    """Chains of neighbours are summed without indices: the same terms in the same order, signs of zeros included."""
    forests = [Forest.from_trees(random_trees(seed, "flat", columns=())) for seed in range(5)]
    if kind == "with tools":
        forests = [Forest.from_trees([with_tools(seed) for seed in range(4)])]
    values = [torch.randn(each.num_tokens, dtype=dtype, generator=generator(1)) for each in forests]
    for each in values:
        each[::4] = -0.0

    def sums():
        return [
            result
            for forest, value in zip(forests, values, strict=True)
            for result in (
                cumsum_along_path(forest, value),
                ops.last_sampled(forest, value),
                *(sum_to_end(forest, value, discount) for discount in (1.0, 0.9, 0.0)),
            )
        ]

    by_shifts = sums()
    shifted = []
    monkeypatch.setattr(ops, "_scan_neighbours", lambda *given, **how: shifted.append(given))
    sums()
    assert len(shifted) == len(by_shifts)  # nothing else was summed by jumps
    monkeypatch.undo()
    scan = ops._scan
    monkeypatch.setattr(ops, "_scan", lambda value, link, factor=None: _by_jumps(scan, value, link, factor))
    for one, other in zip(by_shifts, sums(), strict=True):
        assert torch.equal(one, other) and torch.equal(one.signbit(), other.signbit())


def with_tools(seed: int) -> Tree:
    """Completions of three segments, one behind the other, the middle one not sampled."""
    lengths = torch.randint(1, 9, (4, 3), generator=generator(seed)).tolist()
    segments = []
    for first, second, third in lengths:
        at = len(segments)
        segments += [Segment([1] * first, finish="cut"), Segment([2] * second, parent=at, sampled=False, finish="cut")]
        segments += [Segment([3] * third, parent=at + 1, reward=1.0)]
    return Tree(Problem(id=str(seed)), [1], segments)


def _by_jumps(scan, values, link, factor):
    """The same chains between two rows that link over them, so that not all links are neighbours."""
    last = len(values) + 1
    link = torch.cat([torch.tensor([last]), torch.where(link < 0, -1, link + 1), torch.tensor([-1])])
    pad = values.new_zeros(1)
    factor = None if factor is None else torch.cat([pad, factor, pad])
    return scan(torch.cat([pad, values, pad]), link, factor)[1:-1]


@pytest.mark.parametrize("low, high, size", [(0, 5, 40), (0, 10**6, 40), (-3, 5, 40), (7, 8, 3), (0, 1, 0)])
def test_keys_are_numbered_as_sorting_does(low, high, size):
    keys = torch.randint(low, high, (size,), generator=generator(2))
    unique, inverse = keys.unique(return_inverse=True)
    numbers, count = ops._group_ids((keys,))
    assert numbers.equal(inverse) and count == len(unique)


def test_path_sums_are_fp32_and_leave_their_input_alone():
    """bf16 log-ratios are added up in fp32 (256 + 1 is 256 in bf16), and the argument is not changed."""
    forest = Forest.from_trees([Tree(Problem(), [1], [Segment([1, 2, 3])])])
    values = torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16)
    for found, expected in (
        (cumsum_along_path(forest, values), [256.0, 257.0, 258.0]),
        (sum_to_end(forest, values), [258.0, 2.0, 1.0]),
    ):
        assert found.dtype == torch.float32 and found.tolist() == expected
    assert values.tolist() == [256.0, 1.0, 1.0]
    single = torch.tensor([1.0, 2.0, 3.0])
    cumsum_along_path(forest, single)
    assert single.tolist() == [1.0, 2.0, 3.0]


def test_sums_to_the_end_are_refused_for_branching_forests():
    """A token above a fork has several ends."""
    forest = random_forest(0, "deep")
    with pytest.raises(UserError, match="flat forests"):
        sum_to_end(forest, torch.zeros(forest.num_tokens))


@pytest.mark.parametrize(
    "name, twice, half",
    [
        ("k1", math.log(2), -math.log(2)),
        ("k2", math.log(2) ** 2 / 2, math.log(2) ** 2 / 2),
        ("k3", 0.5 - 1 + math.log(2), 2 - 1 - math.log(2)),
    ],
)
def test_kl_estimators_by_pencil(name, twice, half):
    """Values where the policy gives twice, half and as much probability as the reference."""
    logprobs, ref = torch.tensor([0.5, 0.25, 0.5]).log(), torch.tensor([0.25, 0.5, 0.5]).log()
    close(KL_ESTIMATORS[name](logprobs, ref), torch.tensor([twice, half, 0.0]), atol=1e-6, rtol=0)


LOGITS = torch.tensor([0.3, -1.2, 0.8, 0.0], dtype=torch.float64, requires_grad=True)
REF = torch.tensor([-0.4, 0.1, 0.2, 1.0], dtype=torch.float64).log_softmax(0)


def kl() -> torch.Tensor:
    logprobs = LOGITS.log_softmax(0)
    return (logprobs.exp() * (logprobs - REF)).sum()


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_k1_and_k3_are_unbiased(estimator):
    """Over all outcomes of a small distribution, weighted with pi, the estimator's mean is the KL; that of k2 not."""
    logprobs = LOGITS.log_softmax(0).detach()
    close((logprobs.exp() * estimator(logprobs, REF)).sum(), kl().detach())
    assert abs(float((logprobs.exp() * kl_k2(logprobs, REF)).sum() - kl().detach())) > 1e-3


def test_k3_is_never_negative():
    """k3 >= 0 on both sides, 0 only where the log-probabilities agree."""
    ratio = torch.linspace(-5, 5, 101)
    values = kl_k3(ratio, torch.zeros(101))
    assert values.min() == 0 and int(values.argmin()) == 50 and int((values == 0).sum()) == 1


def test_the_mean_gradient_of_k2_is_that_of_the_kl():
    """Under frozen samples: k2 gives grad KL(pi, ref), k1 gives 0, k3 gives grad KL(ref, pi)."""
    (exact,) = torch.autograd.grad(kl(), LOGITS)
    (reverse,) = torch.autograd.grad((REF.exp() * (REF - LOGITS.log_softmax(0))).sum(), LOGITS)
    for estimator, expected in ((kl_k2, exact), (kl_k1, torch.zeros_like(exact)), (kl_k3, reverse)):
        logprobs = LOGITS.log_softmax(0)
        (found,) = torch.autograd.grad((logprobs.exp().detach() * estimator(logprobs, REF)).sum(), LOGITS)
        close(found, expected)
    assert exact.abs().max() > 0.1 and (exact - reverse).abs().max() > 0.01
