"""Where the rollouts of an iteration come from.

A source samples the next problems; with a filter only those neither too easy nor too hard. What does not pass is
replaced until the batch is full, up to a cap (PRIME's online prompt filter, arXiv 2502.01456; dynamic sampling of DAPO,
arXiv 2503.14476).
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from stepcredit.forest import Forest
from stepcredit.growth.rollouts import Rollouts
from stepcredit.growth.window import Carried, to_state
from stepcredit.growth.window import from_state as carried_of
from stepcredit.policy.forward import Policy
from stepcredit.run.clock import Clock
from stepcredit.run.history import Chosen, History, accuracy, choose, from_state, is_explored, with_groups
from stepcredit.run.metrics import judging_counts, judging_shares
from stepcredit.seeds import TRAINING, sampling_seed
from stepcredit.shaping.options import FilterOptions
from stepcredit.shaping.window import REASONS, rejected

log = logging.getLogger("stepcredit")

LOOKED_AT = 64  # problems by which a task is told to make every problem once


@dataclass(frozen=True)
class Position:
    """Where a run is in its problems.

    Attributes:
        drawn: training problems taken from the task.
        sampled: trees grown so far; numbers their seeds.
        queue: numbers of problems that passed when a batch was full already; they come first next time, sampled afresh.
        history: the last groups of problems by their ids, where the filter goes by them (run/history.py).
        carried: groups whose completions have not all ended (sampler.window).
    """

    drawn: int = 0
    sampled: int = 0
    queue: tuple[int, ...] = ()
    history: History = field(default_factory=dict)
    carried: tuple[Carried, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in ("drawn", "sampled", "queue", "history")}
        return state | ({"carried": to_state(self.carried)} if self.carried else {})

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Position":
        history = from_state(state.get("history", {}))
        carried = carried_of(state["carried"]) if state.get("carried") else ()
        return cls(state["drawn"], state["sampled"], tuple(state["queue"]), history, carried)


def without_carried(position: Position) -> tuple[Position, int]:
    """A position without its carried groups, and how many completions of these had not ended."""
    return replace(position, carried=()), sum(len(group.open) for group in position.carried)


@dataclass(frozen=True)
class Batch:
    """A judged forest to train on, where the run is after it, and numbers about all that was sampled.

    Attributes:
        version: of the weights that it was sampled with, as the forest's tree column `version` has it.
        seconds: by phase.
    """

    forest: Forest
    position: Position
    metrics: dict[str, float]
    version: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


Sample = Callable[[Sequence[int], Sequence[int]], Forest]  # numbers of problems, numbers of seeds -> a judged forest


def collect(
    position: Position,
    count: int,
    window: FilterOptions | None,
    sample: Sample,
    name_of: Callable[[int], str | None] = lambda number: None,
    seed: int = 0,
) -> Batch:
    """A batch of `count` trees.

    Without a window these are the next problems. With one, rounds of problems, queued ones first, are sampled until
    enough pass or `max_draws` is reached; then the batch is what passed. If nothing did, it is the last round with all
    of it masked, so that nothing is learnt. With `window.history` problems that were all right or all wrong before are
    skipped, but for some by chance.

    Args:
        name_of: the id of a problem by its number; None where it comes only once.
        seed: of the run, for that chance.
    """
    if window is None:
        after = replace(position, drawn=position.drawn + count, sampled=position.sampled + count)
        forest = sample(range(position.drawn, after.drawn), range(position.sampled, after.sampled))
        return Batch(forest, after, {})
    drawn, sampled, queue = position.drawn, position.sampled, list(position.queue)
    history = position.history
    chosen: list[Chosen] = []

    def chance(number: int) -> bool:
        return is_explored(seed, number, window.explore)

    passed: list[Forest] = []
    surplus: list[int] = []
    left_out = dict.fromkeys(REASONS, 0)
    counts: list[dict[str, float]] = []  # of the judging of each round
    tokens = trees = 0
    most = max(count, math.floor(window.max_draws * count))
    while trees < most and (missing := count - sum(forest.num_trees for forest in passed)) > 0:
        size = min(math.ceil(missing * window.oversample), most - trees)
        numbers, queue = queue[:size], queue[size:]
        chosen.append(choose(history, window.history, drawn, size - len(numbers), name_of, chance))
        numbers += chosen[-1].numbers
        forest = sample(numbers, range(sampled, sampled + size))
        drawn, sampled, trees = chosen[-1].drawn, sampled + size, trees + size
        if window.history:
            history = with_groups(history, forest, [name_of(number) for number in numbers], window.history)
        reasons = rejected(forest, window)
        for reason, holds in reasons.items():
            left_out[reason] += int(holds.sum())
        fitting = (~torch.stack(list(reasons.values())).any(0)).nonzero().squeeze(1)
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
    if window.history:
        metrics |= _skipping(chosen, history)
    return Batch(full, Position(drawn, sampled, (*queue, *surplus), history), metrics)


def _skipping(chosen: Sequence[Chosen], history: History) -> dict[str, float]:
    """Problems that were skipped and explored, and what is known of all."""
    return {
        "filter/skipped_right": float(sum(each.right for each in chosen)),
        "filter/skipped_wrong": float(sum(each.wrong for each in chosen)),
        "filter/explored": float(sum(each.explored for each in chosen)),
        "filter/known": float(len(history)),
        "filter/accuracy": sum(map(accuracy, history.values())) / max(1, len(history)),
    }


class Source(Protocol):
    """The seam: `InStep` samples when it is asked; another may have sampled ahead, with older weights.

    Attributes:
        position: in the problems, behind the last batch that was trained on.
    """

    position: Position

    def next(self) -> Batch: ...

    def sync(self, policy: Policy, version: int) -> None: ...


class InStep:
    """Samples and judges a batch when it is asked for, with the weights of that moment; each process its share.

    Args:
        seed: of the run.
        count: problems of a batch.
        window: of the prompt filter; None: no filter.
    """

    def __init__(self, rollouts: Rollouts, seed: int, count: int, window: FilterOptions | None) -> None:
        self.rollouts, self.seed, self.count, self.window = rollouts, seed, count, window
        self.position = Position()
        self.version = 0
        task = rollouts.task
        if window is not None and window.history and all(task.name_of(number) is None for number in range(LOOKED_AT)):
            log.warning("filter.history: %s makes every problem once, so there is none to skip", task.name)

    def next(self) -> Batch:
        """The next batch; the position stays where it is until the batch is trained on."""
        clock = Clock()

        def sample(numbers: Sequence[int], places: Sequence[int]) -> Forest:
            return self._sample(clock, numbers, places)

        name_of = self.rollouts.task.name_of
        batch = collect(self.position, self.count, self.window, sample, name_of, self.seed)
        version = torch.full((batch.forest.num_trees,), self.version)
        forest = batch.forest.with_tree(version=version)
        return replace(batch, forest=forest, version=self.version, seconds=clock.seconds)

    def sync(self, policy: Policy, version: int) -> None:
        """Sample with these weights from now on."""
        self.rollouts.sampler.sync(policy)
        self.version = version

    def _sample(self, clock: Clock, numbers: Sequence[int], places: Sequence[int]) -> Forest:
        """Sample and judge these training problems, with seeds for these places in the run."""
        rollouts, ranks = self.rollouts, self.rollouts.ranks
        mine = ranks.share(list(zip(numbers, places, strict=True)))
        problems = [problem for number, _ in mine for problem in rollouts.task.draw(number, 1)]
        seeds = [sampling_seed(self.seed, TRAINING, place) for _, place in mine]
        forest = None
        if mine:
            with clock("time/sample"):
                forest = rollouts.grow(rollouts.sampler, problems, rollouts.encode, rollouts.params, seeds)
            if not rollouts.recorded:
                with clock("time/judge"):
                    forest = rollouts.judge(forest)
        with clock("time/gather"):
            return Forest.interleave([part for part in ranks.gather(forest) if part is not None])
