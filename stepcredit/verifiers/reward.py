"""Reward functions: `f(prompts, completions, **columns) -> list`, sync or async, one entry for each completion.

`columns` holds `answer`, `id`, `completion_ids`, `prompt_end` and every column of the data. A value is a number, None
for unjudged, or a dictionary with rewards inside the completion (docs/judging.md). Name your own by dotted path or
file, verl's `compute_score` with `verl:` before it:
`--reward.functions my_package.my_reward,verl:my_package.compute_score`.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from stepcredit.errors import UserError, did_you_mean
from stepcredit.forest.types import Problem, look
from stepcredit.imports import by_name, located

RewardFunction = Callable[..., Any]

VERIFIERS = {
    "chain": "stepcredit.demo.chain.verify",
    "code": "stepcredit.verifiers.code.verify",
    "exact": "stepcredit.verifiers.exact.verify",
    "format_boxed": "stepcredit.verifiers.formats.boxed",
    "format_think": "stepcredit.verifiers.formats.think",
    "gym": "stepcredit.verifiers.gym.verify",
    "math": "stepcredit.verifiers.math.verify",
    "overlong": "stepcredit.verifiers.formats.overlong",
}
QUICK = {"chain", "exact", "format_boxed", "format_think", "overlong"}  # no answer can make them slow
VERL = "verl:"


@dataclass(frozen=True)
class Kinds:
    """Which functions judge which rows: by values of a column, or patterns such as `numina*`; the first that fits."""

    column: str
    functions: Mapping[str, Sequence[str]]

    def kind(self, problem: Problem) -> str | None:
        """The kind that a row is of, as the config names it; None for none of them."""
        value = str(look(problem.columns, self.column))
        if value in self.functions:
            return value
        return next((pattern for pattern in self.functions if fnmatchcase(value, pattern)), None)

    def lacks(self, problem: Problem, function: str) -> str | None:
        """Why a function does not judge a row; None where it does."""
        kind = self.kind(problem)
        if kind is not None and function in self.functions[kind]:
            return None
        return f"its {self.column} is {str(look(problem.columns, self.column))!r:.60}"


@dataclass(frozen=True)
class Reward:
    """A reward function and what is known about it.

    Attributes:
        name: as the config has it.
        function: called with lists.
        options: further arguments, from `reward.options.NAME`.
        path: dotted path by which another process finds the function; None calls it in this process.
        gold: the completion that must get the full reward for a problem; None where that is not known.
        lacks: why the function cannot judge a problem; None where it can.
        final_answer: the answer that a completion comes to, for majority votes.
        same_answer: whether two final answers are one, however they are written; None compares them as text.
        own: the user's, not one of `VERIFIERS`.
        keeps_s: seconds that the function itself makes sure to end within, where that may be more than the deadline.
        kinds: the kinds of rows that the functions of a mixed data set are for; None: this one judges all rows.
        skip_special_tokens: whether special tokens are left out of the completions that it sees.
    """

    name: str
    function: RewardFunction
    options: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None
    gold: Callable[[Problem], str | None] | None = None
    final_answer: Callable[[str], str | None] | None = None
    same_answer: Callable[[str, str], bool] | None = None
    own: bool = True
    keeps_s: float = 0.0
    lacks: Callable[[Problem], str | None] | None = None
    kinds: Kinds | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.function).parameters
        for option in self.options:
            if option not in parameters and not getattr(self.function, "takes_any", False):
                known = [name for name in parameters if parameters[name].default is not inspect.Parameter.empty]
                raise UserError(f"reward.options.{self.name}.{option}: unknown option; {did_you_mean(option, known)}")

    @property
    def needs_answer(self) -> bool:
        """Whether a row without an answer is of no use to it."""
        answer = inspect.signature(self.function).parameters.get("answer")
        return answer is not None and answer.default is answer.empty

    def unfit(self, problem: Problem) -> str | None:
        """Why the function does not judge a problem, as part of a sentence; None where it does."""
        if self.kinds is not None and (why := self.kinds.lacks(problem, self.name)):
            return why
        if self.needs_answer and problem.answer is None:
            return "it has no answer"
        return self.lacks(problem) if self.lacks is not None else None

    def select(self, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """The columns that the function takes: all of them when it has `**columns`, but for those named as its options.

        Raises:
            UserError: it asks for one that there is not.
        """
        parameters = inspect.signature(self.function).parameters.values()
        options = set(self.options)
        if only := getattr(self.function, "columns", None):
            return {name: columns[name] for name in only if name in columns}
        if not self.own:  # an argument with a default is an option of ours, unless the default stands for "no column"
            options |= {each.name for each in parameters if each.default not in (each.empty, None)}
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return {name: column for name, column in columns.items() if name not in options}
        for parameter in parameters:
            if parameter.name not in {**columns, **self.options} and parameter.default is parameter.empty:
                raise UserError(
                    f"reward function '{self.name}' asks for '{parameter.name}'; there are only "
                    f"{', '.join(sorted(columns))}"
                )
        wanted = {parameter.name for parameter in parameters} - options
        return {name: column for name, column in columns.items() if name in wanted}


def reward_function(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """The reward function of this name or dotted path.

    Raises:
        UserError: there is no such function, or it has no such option.
    """
    if name.startswith(VERL):
        from stepcredit.verifiers.verl import ComputeScore

        path = located("reward.functions", name.removeprefix(VERL))
        return Reward(name, ComputeScore(path), options or {}, VERL + path)
    function = by_name("reward.functions", name, VERIFIERS)
    place: Any = sys.modules[function.__module__] if name in VERIFIERS else function
    ends_within = getattr(place, "ends_within", None)
    return Reward(
        name,
        function,
        options or {},
        None if name in QUICK else VERIFIERS.get(name) or located("reward.functions", name),
        getattr(place, "gold", None),
        getattr(place, "final_answer", None),
        getattr(place, "same_answer", None),
        name not in VERIFIERS,
        ends_within(options or {}) if ends_within else 0.0,
        getattr(place, "unfit", None),
        skip_special_tokens=getattr(function, "skip_special_tokens", True),
    )
