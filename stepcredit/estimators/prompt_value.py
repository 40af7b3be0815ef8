"""Values of prompts from samples of the reference, drawn before training: A*-PO's first stage (arXiv 2505.20686)."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.estimators.base import Context, Estimator, provider
from stepcredit.estimators.frozen import fingerprint
from stepcredit.estimators.options import PrepareOptions
from stepcredit.estimators.prepared import Prepared, Sampled, Show, check_stamp, digest, header_of, make_prepared
from stepcredit.estimators.prepared import read_prepared as read
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem
from stepcredit.growth.prefix_values import soft_mean
from stepcredit.growth.rollouts import Rollouts
from stepcredit.shaping.choose import warn_of_raw_values
from stepcredit.tasks.base import Task

log = logging.getLogger("stepcredit")

FILE = "prepared.jsonl"  # in the run's folder


class PromptValue(Estimator):
    """Adds the token column `prompt_value`: the value of each token's prompt, by `value_of`.

    Args:
        header: what samples are made with (`header_of`).
        problems: all that the run can draw.
    """

    def __init__(
        self, rollouts: Rollouts, given: PrepareOptions, header: dict[str, Any], problems: Sequence[Problem]
    ) -> None:
        super().__init__()
        self.rollouts, self.given, self.header, self.problems = rollouts, given, header, problems
        self.rows: dict[str, Sampled] = {}
        self.tokens = self.counted = 0
        if given.file is not None:
            path = Path(given.file)
            made = rollouts.ranks.on_main(lambda: read(path))
            where = f"prepare.file: {path}"
            check_stamp(where, made.header, header, "Give the run the same options, or prepare another file")
            self._take(made, where)

    def prepare(self, folder: Path, show: Show, check: Callable[[], None]) -> None:
        """Sample into the run's folder what no file was named for; the sampler still has the reference's weights."""
        if self.given.file is None and self.given.samples:
            self._take(make_prepared(folder / FILE, self.header, self.rollouts, self.problems, show, check), FILE)

    def _take(self, made: Prepared, where: str) -> None:
        self.rows, self.tokens = {row.id: row for row in made.rows}, made.tokens
        lacking = [problem for problem in self.problems if problem.id not in self.rows]
        if lacking:
            raise UserError(
                f"{where}: {len(lacking)} of {len(self.problems)} problems have no value (first: '{lacking[0].id}'); "
                "prepare it with the same --data, --seed and task options as the run has"
            )
        for problem in self.problems:
            self._value(problem)
        if self.given.all_wrong == "skip":
            wrong = {problem.id for problem in self.problems if all_wrong(self.rows[problem.id])}
            self.rollouts.task.leave_out(wrong)
            log.info("%d of %d problems are left out: no sample of theirs was rewarded", len(wrong), len(self.problems))
        log.info(
            "values of %d prompts from %d sampled tokens, mean %.3f",
            len(self.rows),
            self.tokens,
            sum(value_of(row, self.given) for row in made.rows if judged(row)) / max(1, sum(map(judged, made.rows))),
        )

    def observe(self, forest: Forest) -> Forest:
        values = torch.tensor([self._value(problem) for problem in forest.problems])
        self.metrics = {"value/prompt": float(values.mean()) if len(values) else 0.0}
        return forest.with_token(prompt_value=values[forest.token_tree])

    def _value(self, problem: Problem) -> float:
        if self.given.value == "zero":
            return 0.0
        row = self.rows.get(problem.id)
        if row is None:
            raise UserError(
                f"prepare: problem '{problem.id}' has no value; prepare it with the same --data, --seed and task "
                "options as the run has, and for as many problems as it draws"
            )
        if row.problem != digest(problem):
            raise UserError(
                f"prepare: problem '{problem.id}' is not the one that its value was made for: its question, answer or "
                "columns have changed. Prepare it again"
            )
        if not judged(row):
            raise UserError(
                f"prepare: no sample of problem '{problem.id}' was judged, so it has no value; leave the row out, or "
                "choose with --reward.on-failure what such completions get"
            )
        return value_of(row, self.given)

    def take_sampled(self) -> int:
        new, self.counted = self.tokens - self.counted, self.tokens
        return new

    def state_dict(self) -> dict[str, Any]:
        return {"counted": self.counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counted = state["counted"]


def judged(row: Sampled) -> bool:
    return any(reward is not None for reward in row.rewards)


def all_wrong(row: Sampled) -> bool:
    """No judged sample has a reward above 0, and at least one was judged."""
    return judged(row) and all(reward is None or reward <= 0 for reward in row.rewards)


def value_of(row: Sampled, given: PrepareOptions) -> float:
    """The value of a prompt from the rewards r of its judged samples.

    soft: beta log mean exp(r / beta), the value of the best policy under a KL penalty beta to the reference; with
    rewards of 0 and 1 of which a share p is 1: beta log(1 + p (exp(1 / beta) - 1)). Its limits are the mean (beta to
    infinity) and the largest (beta to 0).

    Trap: the paper's code has one number for all: there 0 is the mean, not the limit, and a negative one gives 0.

    >>> row = Sampled("a", "", [1.0, 0.0, 0.0, 0.0], 9)
    >>> round(value_of(row, PrepareOptions(beta=0.5)), 4), value_of(row, PrepareOptions(value="mean"))
    (0.4773, 0.25)
    """
    rewards = [reward for reward in row.rewards if reward is not None]
    if given.value == "soft":
        return soft_mean(rewards, 1 / given.beta)
    return {"mean": math.fsum(rewards) / len(rewards), "max": max(rewards), "zero": 0.0}[given.value]


def problems_of_run(config: Config, task: Task) -> list[Problem]:
    """Every problem that a run can draw, each once, in the order in which they come."""
    given, train = config.filter, config.train
    if config.prepare.all_wrong == "skip" or given.history:  # others move up for those that are left out
        if task.endless:
            option = "filter.history" if given.history else "prepare.all_wrong skip"
            raise UserError(
                f"{option}: {task.name} makes problems without end, so which ones would move up cannot be known "
                "beforehand; leave it out"
            )
        return task.rows()
    count = train.iterations * train.problems_per_iteration
    count = math.ceil(count * given.max_draws) if given.enabled else count
    return list({problem.id: problem for problem in task.draw(0, count)}.values())


@provider()
def prompt_value(context: Context) -> PromptValue:
    """
    Raises:
        UserError: the file that is named was made with something else, or lacks a problem.
    """
    config, rollouts = context.config, context.rollouts
    assert rollouts is not None
    given = config.prepare
    given.check()
    if not given.samples:
        return PromptValue(rollouts, given, {}, [])
    if config.growth.name != "flat":
        raise UserError(
            f"growth.name {config.growth.name}: values of prompts are those of plain completions (growth.name flat); "
            "take --prepare.value zero, or another credit"
        )
    warn_of_raw_values(config, "values of prompts")
    weights = context.placement.ranks.on_main(lambda: fingerprint(context.policy.model))
    header = header_of(config, rollouts, weights)
    return PromptValue(rollouts, given, header, problems_of_run(config, rollouts.task))
