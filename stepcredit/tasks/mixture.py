"""What `task.data` names: files, tasks of reasoning-gym (`gym:NAME`), or a mixture of them with weights."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from itertools import cycle
from pathlib import Path

from stepcredit.config import Config
from stepcredit.errors import UserError, did_you_mean
from stepcredit.forest.types import Problem
from stepcredit.tasks.base import Task
from stepcredit.tasks.dataset import DatasetTask, called, split_held_out
from stepcredit.tasks.rewards import load_rows

GYM = "gym:"


def sources_of(data: str) -> list[str]:
    """The sources that a text names with commas between; a bare word behind a gym task is another gym task.

    >>> sources_of("a.jsonl,gym:chain_sum,gcd,b.csv")
    ['a.jsonl', 'gym:chain_sum', 'gym:gcd', 'b.csv']

    Raises:
        UserError: a gym task is named twice.
    """
    if Path(data).expanduser().exists():
        return [data]
    named: list[str] = []
    for part in (part.strip() for part in data.split(",")):
        behind_gym = bool(named) and named[-1].startswith(GYM) and part.isidentifier() and not Path(part).exists()
        if part:
            named.append(GYM + part if behind_gym else part)
    if twice := next((each for each in named if each.startswith(GYM) and named.count(each) > 1), None):
        raise UserError(f"{data}: {twice} is named twice")
    return named


class Mixture(Task):
    """Problems of several tasks, each as often as its weight says.

    The next problem is of the task that is furthest behind its share, so that every batch has about its share of each.

    Args:
        weights: one for each task, above 0.
        evaluated: whose held-out problems are taken; None: those of the tasks.
    """

    def __init__(
        self, name: str, tasks: Sequence[Task], weights: Sequence[float], evaluated: Sequence[Task] | None = None
    ) -> None:
        self.name, self.tasks, self.weights = name, list(tasks), list(weights)
        self.evaluated = self.tasks if evaluated is None else list(evaluated)
        functions = [function for task in [*tasks, *self.evaluated] for function in task.reward_functions]
        self.reward_functions = tuple(dict.fromkeys(functions))
        self._picks: list[tuple[int, int]] = []  # for each number so far the task, and the number of the problem there
        self._counts = [0] * len(self.tasks)

    def draw(self, start: int, count: int) -> list[Problem]:
        return [self.tasks[task].draw(number, 1)[0] for task, number in self._picked(start, count)]

    def name_of(self, number: int) -> str | None:
        ((task, own),) = self._picked(number, 1)
        return self.tasks[task].name_of(own)

    @property
    def endless(self) -> bool:
        return any(task.endless for task in self.tasks)

    def rows(self) -> list[Problem]:
        return [problem for task in self.tasks for problem in task.rows()]

    def leave_out(self, ids: Collection[str]) -> None:
        for task in self.tasks:
            task.leave_out(ids)

    def sources(self) -> list[str]:
        """Those of the task with the greatest weight first."""
        order = sorted(range(len(self.tasks)), key=lambda task: -self.weights[task])
        return list(dict.fromkeys(source for task in order for source in self.tasks[task].sources()))

    def held_out(self, count: int) -> list[Problem]:
        """As many of each task; where one has no more, the others make up for it."""
        most = [len(task.held_out(count)) if isinstance(task, DatasetTask) else count for task in self.evaluated]
        wanted = min(count, sum(most))
        shares = [0] * len(most)
        for task in cycle(range(len(most))):
            if sum(shares) == wanted:
                break
            shares[task] += shares[task] < most[task]
        parts = [task.held_out(share) for task, share in zip(self.evaluated, shares, strict=True)]
        return [problem for part in parts for problem in part]

    def fit(self, encode: Callable[[Problem], list[int]], long_prompts: str = "drop") -> None:
        for task in [*self.tasks, *(task for task in self.evaluated if task not in self.tasks)]:
            task.fit(encode, long_prompts)

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(task.fingerprint() for task in self.tasks).encode()).hexdigest()

    def _picked(self, start: int, count: int) -> list[tuple[int, int]]:
        total = sum(self.weights)
        while len(self._picks) < start + count:
            ahead = len(self._picks) + 1
            behind = [weight * ahead / total - own for weight, own in zip(self.weights, self._counts, strict=True)]
            task = behind.index(max(behind))
            self._picks.append((task, self._counts[task]))
            self._counts[task] += 1
        return self._picks[start : start + count]


# ---------------------------------------------------------------------- from the config


def build_data(config: Config) -> Task:
    """The task of a config whose data are not the embedded task.

    Raises:
        UserError: a source cannot be read, a gym task is unknown or refused, weights do not fit.
    """
    given, seed = config.task, config.train.seed
    named = _parts_of(given.data, bool(given.weights))
    evaluated = _parts_of(given.eval_data, False) if given.eval_data else None
    _check(config, [*named, *(evaluated or [])], len(named))

    def training(source: str, rows: list[Problem]) -> Task:
        if evaluated is not None:
            return DatasetTask(source, rows, [], seed)
        return DatasetTask(source, *split_held_out(rows, given.held_out, seed=0), seed)

    if len(named) == 1 and not any(map(is_gym, [*named, *(evaluated or [])])):
        if evaluated is None:
            return training(given.data, load_rows(config))
        held_out = load_rows(config, given.eval_data, given.eval_split)
        return DatasetTask(given.data, load_rows(config), held_out, seed)
    tasks = _tasks(config, named, given.split, training)
    others = None
    if evaluated is not None:
        others = _tasks(config, evaluated, given.eval_split, lambda source, rows: DatasetTask(source, rows, rows, seed))
    if len(tasks) == 1 and others is None:
        return tasks[0]
    return Mixture(given.data, tasks, given.weights or [1.0] * len(tasks), others)


def rows_of(config: Config, ids: Sequence[str] | None = None) -> list[Problem]:
    """All rows of `task.data`; of gym tasks those of these ids, or together `eval.num_problems` held-out problems.

    Raises:
        UserError: as `build_data`.
    """
    from stepcredit.tasks.gym.task import GymTask

    named = _parts_of(config.task.data, bool(config.task.weights))
    _check(config, named, len(named))
    if not any(map(is_gym, named)) and len(named) == 1:
        return load_rows(config)
    tasks = _tasks(config, named, config.task.split, lambda source, rows: DatasetTask(source, rows, rows, 0))
    each = math.ceil(config.eval.num_problems / max(1, sum(map(is_gym, named))))
    rows: list[Problem] = []
    for task in tasks:
        if isinstance(task, GymTask):
            rows += task.held_out(each) if ids is None else task.from_ids(ids)
        else:
            rows += task.rows()
    return rows


def is_gym(source: str) -> bool:
    """Whether a source is a task of reasoning-gym."""
    return source.startswith(GYM)


def _parts_of(data: str, weighted: bool) -> list[str]:
    """What is drawn from by itself: each gym task and each file; files alone without weights are one data set."""
    sources = sources_of(data)
    return sources if weighted or any(map(is_gym, sources)) else [data]


def _tasks(
    config: Config, sources: Sequence[str], split: str, of_rows: Callable[[str, list[Problem]], Task]
) -> list[Task]:
    """A task for each source; no two rows of different files have one id."""
    from stepcredit.tasks.gym.task import GymTask

    given, seed = config.task, config.train.seed
    files = [source for source in sources if not is_gym(source)]
    labels = dict(zip(files, called(files), strict=True))
    rows = {source: load_rows(config, source, split) for source in files}
    counts = Counter(row.id for each in rows.values() for row in each)
    for source, each in rows.items():
        clash = any(counts[row.id] > 1 for row in each)
        for row in each:
            row.source = row.source or labels[source]
            row.id = f"{labels[source]} {row.id}" if clash else row.id
    return [
        GymTask(name := source.removeprefix(GYM), given.gym.get(name, {}), given.gym_answer, seed)
        if is_gym(source)
        else of_rows(source, rows[source])
        for source in sources
    ]


def _check(config: Config, sources: Sequence[str], num_weighted: int) -> None:
    """Raise `UserError` where options do not fit the sources."""
    given = config.task
    if "embedded" in sources:
        raise UserError("task.data: embedded is a task of its own and does not go into a mixture")
    tasks = [source.removeprefix(GYM) for source in sources if is_gym(source)]
    if tasks and config.growth.recorded:
        raise UserError(f"task.data: {GYM}{tasks[0]} has no {config.growth.name} (growth.name); name files that have")
    if unused := [name for name in given.gym if name not in tasks]:
        hint = did_you_mean(unused[0], tasks) if tasks else "name it with --data gym:" + unused[0]
        raise UserError(f"task.gym.{unused[0]}: no such task in task.data; {hint}")
    if given.weights and len(given.weights) != num_weighted:
        named = ", ".join(sources[:num_weighted])
        raise UserError(f"task.weights: {len(given.weights)} weights for {num_weighted} sources ({named})")
    if any(weight <= 0 for weight in given.weights):
        raise UserError("task.weights: a weight is a number above 0; leave out the source instead")
