"""Seeds of problems, streams and runs: what the generators read of them is the same by chance alone."""

import itertools

import numpy as np
import pytest
import torch
from tiny_models import tiny

from stepcredit.forest.types import Problem
from stepcredit.growth.tree import _GrowingTree
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.remote.dialect import Request
from stepcredit.samplers.remote.vllm import VLLM
from stepcredit.samplers.transformers import TransformersSampler
from stepcredit.seeds import EVALUATION, MINIBATCHES, TRAINING, generator, mixed, sampling_seed

RUNS, STREAMS, NUMBERS = (0, 1, 2, 3, 10, 42, 1234, 4907, 9814, 2**31 - 1), (TRAINING, EVALUATION, MINIBATCHES), 10_000
ALL = len(RUNS) * len(STREAMS) * NUMBERS
GROUP = 64  # completions of a request


@pytest.fixture(scope="module")
def seeds() -> np.ndarray:
    """[runs, streams, numbers]"""
    rows = [[[sampling_seed(run, stream, n) for n in range(NUMBERS)] for stream in STREAMS] for run in RUNS]
    return np.array(rows, dtype=np.int64)


def test_all_are_distinct(seeds):
    """As they are, which is what our sampler, the shuffles and a GPU read."""
    assert seeds.min() >= 0 and seeds.max() < 2**62
    assert len(np.unique(seeds)) == ALL


def test_their_lower_bits_meet_by_chance_alone(seeds):
    """torch's generator on a CPU reads 32 bits: of 300,000 random numbers so large 10.5 pairs are expected to meet.

    30 is beyond 6 standard deviations of their number.
    """
    chance = ALL**2 / 2 / 2**32
    assert ALL - len(np.unique(seeds % 2**32)) <= chance + 6 * chance**0.5


def test_runs_share_no_more_than_chance(seeds):
    """Lower 32 bits that two runs share, 0.2 expected."""
    low = (seeds % 2**32).reshape(len(RUNS), -1)
    for one, two in itertools.combinations(range(len(RUNS)), 2):
        assert len(np.intersect1d(low[one], low[two])) <= 4, (RUNS[one], RUNS[two])


def test_long_runs_share_no_more_than_chance():
    """300,000 problems of runs whose seeds were once the same to 32 bits 202,662 problems apart: 21 expected."""
    count = 300_000
    low = [np.array([sampling_seed(run, TRAINING, n) % 2**32 for n in range(count)]) for run in (0, 4907)]
    chance = count**2 / 2**32
    assert len(np.intersect1d(*low)) <= chance + 6 * chance**0.5


def test_neighbours_differ_in_half_of_their_bits():
    """The next number, the next stream and the next run."""
    base = [sampling_seed(run, TRAINING, n) for run in range(20) for n in range(100)]
    for step in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        others = [sampling_seed(run + step[0], step[1], n + step[2]) for run in range(20) for n in range(100)]
        changed = [(one ^ two).bit_count() for one, two in zip(base, others, strict=True)]
        assert sum(changed) / len(changed) == pytest.approx(31, abs=0.5) and min(changed) > 8


def test_order_and_grouping_of_numbers_matter():
    assert len({mixed(1, 23), mixed(12, 3), mixed(23, 1), mixed(123), mixed(1, 2, 3), mixed(1, -23)}) == 6


def test_requests_to_servers_stay_apart(seeds):
    """A server adds the number of the completion: no two requests come to the same seeds, nor do seeds in a row."""
    params = SamplingParams()

    def asked(seed: int) -> int:
        return VLLM().body(Request([1], 1, 1, 8, seed, (0,), params), "m")["seed"]

    for given in (seeds.ravel().tolist(), range(ALL)):
        first = np.sort(np.array([asked(seed) for seed in given], dtype=np.int64))
        assert np.diff(first).min() >= GROUP and first[0] >= 0 and first[-1] < 2**62
    low = np.unique((first[:, None] + np.arange(4)).ravel() % 2**32)
    chance = (4 * ALL) ** 2 / 2 / 2**32
    assert 4 * ALL - len(low) <= 2 * chance


def test_nodes_of_trees_stay_apart():
    """The seeds of 1,000 nodes in each of 200 trees, the first of them the tree's own."""
    found = []
    for number in range(200):
        tree = _GrowingTree(Problem(), [1], sampling_seed(0, TRAINING, number))
        nodes = [tree.next_seed() for _ in range(1000)]
        assert nodes[0] == tree.seed
        found += nodes
    assert len(set(found)) == 200_000
    assert 200_000 - len({seed % 2**32 for seed in found}) <= 25  # 4.7 expected


def test_sampler_reads_all_bits_of_a_seed():
    """Seeds that torch's generator cannot tell apart, and runs whose seeds were the same to it."""
    assert torch.equal(*(torch.rand(8, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32)))
    sampler = TransformersSampler(tiny("qwen2"))
    given = [5, 5 + 2**32, 5 + 2**61, *(sampling_seed(run, TRAINING, 0) for run in (0, 4907))]
    groups = sampler.sample([[7, 8]] * len(given), 4, SamplingParams(max_new_tokens=12, stop_token_ids=()), given)
    assert len({tuple(segment.token_ids) for group in groups for segment in group}) == 4 * len(given)


def test_uniform_numbers_of_completions_do_not_overlap(seeds):
    """Windows of 3 numbers over 64 steps of 8 completions of 300 problems, of all runs and streams."""
    windows = []
    for seed in seeds[:, :, :10].ravel().tolist():
        noise = generator(seed).random((64, 8), dtype=np.float32).T
        windows.append(np.lib.stride_tricks.sliding_window_view(noise, 3, axis=1).reshape(-1, 3))
    rows = (np.concatenate(windows) * 2**24).astype(np.uint64)
    keys = rows[:, 0] * 2**40 + rows[:, 1] * 2**16 + rows[:, 2] % 2**16  # 64 bits
    assert len(np.unique(keys)) == len(keys) == 300 * 8 * 62
