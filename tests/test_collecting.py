"""Which problems a batch is made of: the window, refills, the cap, the queue."""

import pytest
import torch
from builders import flat_forest
from rich.console import Console

from stepcredit.config import resolve
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.policy.loading import load_policy
from stepcredit.run.build import build_parts
from stepcredit.run.clock import Clock
from stepcredit.run.source import Position, collect
from stepcredit.run.trainer import Trainer
from stepcredit.run.work import Work
from stepcredit.shaping.options import FilterOptions
from stepcredit.shaping.window import rejected

RIGHT = {0: 0, 1: 4, 2: 2, 3: 1, 4: 0, 5: 3}  # of four completions, by number of the problem modulo 6


class Sampling:
    """Trees whose rewards follow from the number of the problem, and what was asked for."""

    def __init__(self, right: dict[int, int] = RIGHT, truncated: tuple[int, ...] = ()) -> None:
        self.right, self.truncated = right, truncated
        self.calls: list[tuple[list[int], list[int]]] = []

    def __call__(self, numbers, places) -> Forest:
        self.calls.append((list(numbers), list(places)))
        trees = []
        for number in numbers:
            rewards = [1.0] * self.right[number % 6] + [0.0] * (4 - self.right[number % 6])
            finish = "length" if number in self.truncated else "stop"
            segments = [Segment([3, 4], reward=reward, finish=finish) for reward in rewards]
            trees.append(Tree(Problem(id=str(number)), [1], segments))
        return Forest.from_trees(trees)


def window(low: float, high: float, **options) -> FilterOptions:
    return FilterOptions(low=low, high=high, **options)


def ids(forest: Forest) -> list[int]:
    return [int(problem.id) for problem in forest.problems]


def test_without_a_window_the_next_problems():
    sampling = Sampling()
    batch = collect(Position(7, 9), 3, None, sampling)
    assert sampling.calls == [([7, 8, 9], [9, 10, 11])]
    assert batch.position == Position(10, 12) and batch.metrics == {}


def test_the_window_includes_its_ends():
    """A group of five with one or four right has 0.2 or 0.8, which fp32 does not hold exactly."""
    trees = [
        Tree(Problem(id=str(right)), [1], [Segment([3], reward=float(index < right)) for index in range(5)])
        for right in range(6)
    ]
    reasons = rejected(Forest.from_trees(trees), window(0.2, 0.8))
    assert reasons["hard"].tolist() == [True] + [False] * 5 and reasons["easy"].tolist() == [False] * 5 + [True]


def test_refills_until_the_batch_is_full():
    """0 and 1 are too hard and too easy; two more are drawn, one of them too hard; one more."""
    sampling = Sampling()
    batch = collect(Position(), 4, window(0.2, 0.8), sampling)
    assert [numbers for numbers, _ in sampling.calls] == [[0, 1, 2, 3], [4, 5], [6], [7], [8]]
    assert [place for _, places in sampling.calls for place in places] == list(range(9))
    assert ids(batch.forest) == [2, 3, 5, 8] and batch.position == Position(9, 9)
    assert batch.metrics["filter/hard"] == pytest.approx(3 / 9)
    assert batch.metrics["filter/easy"] == pytest.approx(2 / 9)
    assert batch.metrics["filter/passed"] == pytest.approx(4 / 9)
    assert batch.metrics["filter/problems"] == 9 and batch.metrics["tokens/left_out"] == 5 * 8


def test_surplus_problems_come_first_next_time_sampled_afresh():
    """Twice as many as needed: what passes beyond the batch is queued by its number, with a new seed."""
    sampling = Sampling()
    double = window(0.2, 0.8, oversample=3.0)
    batch = collect(Position(), 2, double, sampling)
    assert sampling.calls == [([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])]
    assert ids(batch.forest) == [2, 3] and batch.position == Position(6, 6, (5,))
    assert batch.metrics["filter/queued"] == 1 and batch.metrics["filter/passed"] == pytest.approx(3 / 6)
    after = collect(batch.position, 2, double, sampling)
    assert sampling.calls[1] == ([5, 6, 7, 8, 9, 10], list(range(6, 12)))
    assert ids(after.forest) == [5, 8] and after.position == Position(11, 12, (9,))


def test_at_the_cap_the_batch_is_what_passed():
    sampling = Sampling({number: int(number == 5) for number in range(6)})
    batch = collect(Position(), 4, window(0.2, 0.8, max_draws=2.0), sampling)
    assert batch.position == Position(8, 8) and ids(batch.forest) == [5]
    assert batch.forest.active.all()


def test_when_nothing_passes_nothing_is_learnt():
    """The last round, all masked: an update without weights."""
    batch = collect(Position(), 2, window(0.2, 0.8), Sampling(dict.fromkeys(range(6), 0)))
    assert batch.metrics["filter/hard"] == 1 and batch.metrics["filter/problems"] == 8
    assert not batch.forest.active.any() and batch.forest.num_trees > 0
    assert batch.metrics["tokens/left_out"] == (8 - batch.forest.num_trees) * 8


def test_truncated_groups_and_unjudged_ones():
    """Each group is counted once, by the first reason."""
    sampling = Sampling(dict.fromkeys(range(6), 2), truncated=(1, 3))
    assert ids(collect(Position(), 2, window(0.2, 0.8), sampling).forest) == [0, 1]
    batch = collect(Position(), 2, window(0.2, 0.8, drop_truncated=True), sampling)
    assert ids(batch.forest) == [0, 2] and batch.metrics["filter/truncated"] == pytest.approx(1 / 3)
    trees = [Tree(Problem(id="a"), [1], [Segment([3]), Segment([4], finish="length")])]
    reasons = rejected(Forest.from_trees(trees), window(0.0, 1.0, drop_truncated=True))
    assert {reason: holds.tolist() for reason, holds in reasons.items()} == {
        "unjudged": [True],
        "truncated": [False],
        "hard": [False],
        "easy": [False],
        "uniform": [False],
    }


@pytest.mark.parametrize("values", [(0.0, 1.0), (-1.0, 1.0), (0.3, 0.3001)], ids=str)
def test_groups_that_differ_pass_whatever_their_mean(values):
    """Dynamic sampling: equal rewards, a single judged completion and rounding are out, in any range of rewards."""
    low, high = values
    rewards = [[low, high], [high, high], [low, low], [high, None], [high, high + 1e-8], [low, low, low, high]]
    forest = flat_forest([[1] * len(group) for group in rewards], rewards)
    reasons = rejected(forest, FilterOptions(enabled=True, keep="varied"))
    assert reasons["uniform"].tolist() == [False, True, True, True, True, False]
    assert not any(bool(holds.any()) for reason, holds in reasons.items() if reason != "uniform")


def test_failures_are_counted_over_all_that_was_sampled():
    """Groups that fail are left out, so what is trained on shows none; the iteration's metrics have them."""

    def sample(numbers, places) -> Forest:
        trees = []
        for number in numbers:  # 0 times out, 1 goes wrong on one of four, 2 is too easy, 3 and 4 fit
            segments = [Segment([3, 4], reward=float(index % 2 or number == 2)) for index in range(4)]
            for index, segment in enumerate(segments):
                if number == 0 or (number == 1 and index == 0):
                    segment.reward, segment.extra = None, {"failures": {"f": ["timeout", "error"][number]}}
            trees.append(Tree(Problem(id=str(number)), [1], segments))
        return Forest.from_trees(trees)

    batch = collect(Position(), 2, window(0.4, 0.6), sample)
    assert ids(batch.forest) == [3, 4] and batch.metrics["filter/problems"] == 5
    found = {name: batch.metrics[f"reward/{name}"] for name in ("timeout", "error", "judged")}
    assert found == pytest.approx({"timeout": 4 / 20, "error": 1 / 20, "judged": 15 / 20})
    assert batch.metrics["filter/reward"] == pytest.approx((2 + 4 + 2 + 2) / 15)
    clock = Clock()
    clock.seconds["time/sample"] = 1.0
    forest = batch.forest.with_token(advantages=torch.zeros(batch.forest.num_tokens))
    metrics = Work(forest, batch.position, clock, batch.metrics).metrics(resolve({}))
    assert metrics["reward/timeout"] == pytest.approx(0.2) and metrics["reward/mean"] == 0.5


def test_joined_forests_keep_their_columns():
    one, two = Sampling()([2], [0]), Sampling()([3], [1])
    one, two = (part.with_token(entropy=torch.rand(part.num_tokens)) for part in (one, two))
    joined = Forest.join([one, two])
    assert joined.token["entropy"].equal(torch.cat([one.token["entropy"], two.token["entropy"]]))
    assert joined.segment["reward"].tolist() == [1, 1, 0, 0, 1, 0, 0, 0] and ids(joined) == [2, 3]


def test_trees_carry_the_version_of_the_weights_that_they_were_sampled_with():
    """Iterations behind the weights; it stays with the trees when minibatches and joined forests are made of them."""
    config = resolve({"train": {"problems_per_iteration": 2}, "eval": {"num_problems": 0}, "growth": {"group_size": 2}})
    trainer = Trainer(config, build_parts(config), load_policy("embedded", "cpu"), Console(quiet=True))
    first = trainer.source.next()
    trainer.source.sync(trainer.policy, 3)
    trainer.source.position = first.position
    second = trainer.source.next()
    assert (first.version, second.version) == (0, 3)
    assert first.forest.tree["version"].tolist() == [0, 0] and second.forest.tree["version"].tolist() == [3, 3]
    both = Forest.join([first.forest, second.forest])
    assert both.select_trees(torch.tensor([1, 2])).tree["version"].tolist() == [0, 3]
    assert Forest.from_state(both.state_dict()).tree["version"].tolist() == [0, 0, 3, 3]
    assert second.position.drawn == 4 and len({problem.id for problem in both.problems}) == 4
