"""Which problems an iteration trains on: the next ones; with a window only those neither too easy nor too hard.

What does not fit the window is replaced until the batch is full, up to a cap (PRIME's online prompt filter, arXiv
2502.01456; dynamic sampling of DAPO, arXiv 2503.14476).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepcredit.forest import FINISH_CODE, Forest
from stepcredit.forest.ops import mean_by, segment_sum
from stepcredit.run.metrics import judging_counts, judging_shares

REASONS = ("hard", "easy", "truncated", "unjudged")


@dataclass(frozen=True)
class Position:
    """Where a run is in its problems.

    Attributes:
        drawn: training problems taken from the task.
        sampled: trees grown so far; numbers their seeds.
        queue: numbers of problems that passed when a batch was full already; they come first next time, sampled afresh.
    """

    drawn: int = 0
    sampled: int = 0
    queue: tuple[int, ...] = ()


@dataclass(frozen=True)
class Window:
    """Groups to train on.

    Attributes:
        low, high: smallest and largest mean reward of a group, both included.
        drop_truncated: groups with a truncated completion do not pass.
        oversample: problems sampled for each that is missing.
        max_draws: problems sampled at most in an iteration, in multiples of the batch.
    """

    low: float = 0.0
    high: float = 1.0
    drop_truncated: bool = False
    oversample: float = 1.0
    max_draws: float = 4.0

    def refused(self, forest: Forest) -> dict[str, Tensor]:
        """[num_trees] True where a group does not pass, by the first reason that holds."""
        leaf, tree = forest.segment["is_leaf"], forest.segment["tree"]
        judged = leaf & forest.segment["has_reward"]
        mean = torch.zeros(forest.num_trees).index_copy(
            0, tree, mean_by(forest.segment["reward"], tree, where=judged)[0]
        )
        cut = leaf & (forest.segment["finish"] == FINISH_CODE["length"])
        found = {
            "unjudged": segment_sum(judged.float(), tree, forest.num_trees) == 0,
            "truncated": (segment_sum(cut.float(), tree, forest.num_trees) > 0) & self.drop_truncated,
            "hard": mean < self.low - 1e-6,
            "easy": mean > self.high + 1e-6,
        }
        before = torch.zeros(forest.num_trees, dtype=torch.bool)
        for reason, holds in found.items():
            found[reason] = holds & ~before
            before |= holds
        return found


@dataclass(frozen=True)
class Batch:
    """A judged forest to train on, where the run is after it, and numbers about all that was sampled."""

    forest: Forest
    position: Position
    metrics: dict[str, float]


Sample = Callable[[Sequence[int], Sequence[int]], Forest]  # numbers of problems, numbers of seeds -> a judged forest


def collect(position: Position, count: int, window: Window | None, sample: Sample) -> Batch:
    """A batch of `count` trees.

    Without a window these are the next problems. With one, rounds of problems, queued ones first, are sampled until
    enough pass or `max_draws` is reached; then the batch is what passed. If nothing did, it is the last round with all
    of it masked, so that nothing is learnt.
    """
    if window is None:
        after = Position(position.drawn + count, position.sampled + count, position.queue)
        forest = sample(range(position.drawn, after.drawn), range(position.sampled, after.sampled))
        return Batch(forest, after, {})
    drawn, sampled, queue = position.drawn, position.sampled, list(position.queue)
    passed: list[Forest] = []
    surplus: list[int] = []
    left_out = dict.fromkeys(REASONS, 0)
    counts: list[dict[str, float]] = []  # of the judging of each round
    tokens = trees = 0
    most = max(count, math.floor(window.max_draws * count))
    while trees < most and (missing := count - sum(forest.num_trees for forest in passed)) > 0:
        size = min(math.ceil(missing * window.oversample), most - trees)
        numbers, queue = queue[:size], queue[size:]
        fresh = size - len(numbers)
        numbers += range(drawn, drawn + fresh)
        forest = sample(numbers, range(sampled, sampled + size))
        drawn, sampled, trees = drawn + fresh, sampled + size, trees + size
        refused = window.refused(forest)
        for reason, holds in refused.items():
            left_out[reason] += int(holds.sum())
        fitting = (~torch.stack(list(refused.values())).any(0)).nonzero().squeeze(1)
        surplus += [numbers[index] for index in fitting[missing:].tolist()]
        tokens += int(forest.token_sampled.sum())
        counts.append(judging_counts(forest))
        if len(fitting):
            passed.append(forest.select_trees(fitting[:missing]))
    full = Forest.join(passed) if passed else forest.with_segment(mask=torch.zeros_like(forest.segment["mask"]))
    kept = int(full.token_sampled.sum())
    metrics = {f"filter/{reason}": number / trees for reason, number in left_out.items()}
    total = {name: sum(count[name] for count in counts) for name in counts[0]}
    metrics |= judging_shares(total)  # failures are hardly among what passed
    metrics |= {
        "filter/reward": total["reward"] / max(1.0, total["judged"]),
        "filter/passed": (sum(forest.num_trees for forest in passed) + len(surplus)) / trees,
        "filter/problems": float(trees),
        "filter/queued": float(len(queue) + len(surplus)),
        "tokens/left_out": float(tokens - kept),
    }
    return Batch(full, Position(drawn, sampled, (*queue, *surplus)), metrics)
