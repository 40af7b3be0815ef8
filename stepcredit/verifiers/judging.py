"""Rewards for the leaves of a forest, from reward functions."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.forest import FINISH_CODE, Forest
from stepcredit.forest.types import Problem
from stepcredit.verifiers.reward import Reward, RewardFunction
from stepcredit.verifiers.workers import Failure, Outcome, RewardCall, Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("stepcredit")

CHUNK = 16  # completions in a call of a function of ours, which hardly ever fails
PROMPT_END = 32  # tokens of the prompt that a function sees as the completion saw them

OnFailure = Literal["drop", "zero", "raise"]
CallWith = Literal["row", "group", "batch"]


@dataclass(frozen=True)
class Verdict:
    """The reward of one completion (None: unjudged), its parts by function, and the functions that failed.

    A function that the row is not for has no part; where it is for none, all of them stand in `failures` as "unfit".
    """

    reward: float | None
    parts: dict[str, float | None]
    failures: dict[str, Failure]


@dataclass(frozen=True)
class GoldCheck:
    """Of so many gold answers those that were not accepted, each with the reason; and problems that have none."""

    total: int
    failed: list[tuple[Problem, str]]
    missing: list[Problem]


@dataclass(frozen=True)
class Asked:
    """Completions of problems, as functions see them.

    Attributes:
        texts: without special tokens.
        raw: with them, but for the stop token; None: the same.
        ids: token ids; None where there are only texts.
        prompt_ends: the last tokens of each prompt as text; None where they are not known.
    """

    problems: Sequence[Problem]
    texts: Sequence[str]
    raw: Sequence[str] | None = None
    ids: Sequence[Sequence[int]] | None = None
    prompt_ends: Sequence[str] | None = None

    def columns(self, rows: Sequence[int], skip_special_tokens: bool) -> dict[str, list[Any]]:
        """What a function gets of some of the completions."""
        problems = [self.problems[row] for row in rows]
        texts = self.texts if skip_special_tokens or self.raw is None else self.raw
        names = {name for problem in problems for name in problem.columns}
        columns: dict[str, list[Any]] = {name: [problem.columns.get(name) for problem in problems] for name in names}
        columns |= {
            "prompts": [problem.question for problem in problems],
            "completions": [texts[row] for row in rows],
            "answer": [problem.answer for problem in problems],
            "id": [problem.id for problem in problems],
        }
        if self.ids is not None:
            columns["completion_ids"] = [self.ids[row] for row in rows]
        if self.prompt_ends is not None:
            columns["prompt_end"] = [self.prompt_ends[row] for row in rows]
        return columns


class Judge:
    """Calls reward functions on completions and adds their weighted values.

    Args:
        rewards: the functions, in the order of the config; a bare function is called in this process.
        weights: one for each function.
        tokenizer: turns completions into text, special tokens left out; needed to judge forests.
        workers: runs the calls.
        on_failure: what a time-out or an error of a function does: "drop" leaves the completion unjudged, "zero" gives
            it 0 from that function, "raise" ends the run.
        call_with: what a call of a user's function gets: one completion ("row"), those of one problem, or all.
        skip_special_tokens: False shows them to every function, not only to those that ask for it.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward | RewardFunction],
        weights: Sequence[float],
        tokenizer: "PreTrainedTokenizerBase | None",
        workers: Workers | None = None,
        on_failure: OnFailure = "drop",
        call_with: CallWith = "row",
        skip_special_tokens: bool = True,
    ) -> None:
        self.rewards = {
            name: reward if isinstance(reward, Reward) else Reward(name, reward) for name, reward in rewards.items()
        }
        self.weights, self.tokenizer, self.workers = list(weights), tokenizer, workers or Workers()
        self.on_failure: OnFailure = on_failure
        self.call_with: CallWith = call_with
        self.skip_special_tokens = skip_special_tokens
        self._said: set[tuple[str, str]] = set()
        self._worked: set[str] = set()  # functions that have judged a completion

    def __call__(self, forest: Forest) -> Forest:
        """The forest with `reward` and `has_reward` on its leaves, and each function's value in `details`.

        Completions that go on in the next iteration are not judged. A function's None is left out of the sum; a
        completion that all functions leave out stays unjudged. Rewards inside completions become the token column
        `token_rewards`.

        Raises:
            UserError: a function that has never worked failed on all completions of several problems, or one failed on
                any under "raise".
        """
        leaves = (forest.segment["is_leaf"] & ~forest.open).nonzero().squeeze(1).tolist()
        problems = [forest.problems[int(forest.segment["tree"][leaf])] for leaf in leaves]
        ids = [completion_ids(forest, leaf) for leaf in leaves]
        ends = prompt_ends(forest, self._tokenizer)
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        raw = self._raw(forest, leaves, ids)
        trees = forest.segment["tree"][leaves].tolist()
        found = self._judged(self.rewards, Asked(problems, texts, raw, ids, [ends[tree] for tree in trees]))
        self._say_unfit(found, problems)
        reward, has_reward = torch.zeros(forest.num_segments), torch.zeros(forest.num_segments, dtype=torch.bool)
        details = list(forest.details)
        dense = TokenRewards(forest)
        for row, leaf in enumerate(leaves):
            outcomes = {name: column[row] for name, column in found.items()}
            verdict = self.combine(outcomes)
            if verdict.reward is not None:
                reward[leaf], has_reward[leaf] = verdict.reward, True
                for weight, (name, outcome) in zip(self.weights, outcomes.items(), strict=True):
                    if isinstance(outcome.value, dict):
                        where = f"reward function '{name}', problem '{problems[row].id}'"
                        dense.add(leaf, weight, outcome.value, where)
            extra = {name: value for name, value in details[leaf]["extra"].items() if name != "failures"}
            extra |= {"failures": verdict.failures} if verdict.failures else {}
            details[leaf] = {"rewards": verdict.parts, "extra": extra}
        extras = tuple(each | {"prompt_end": end} for each, end in zip(forest.tree_extra, ends, strict=True))
        forest = forest.with_segment(reward=reward, has_reward=has_reward)
        return dense.onto(replace(forest, details=tuple(details), tree_extra=extras))

    @property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        if self.tokenizer is None:
            raise ValueError("a Judge of forests needs a tokenizer")
        return self.tokenizer

    def _raw(self, forest: Forest, leaves: Sequence[int], ids: Sequence[Sequence[int]]) -> list[str] | None:
        """The completions with special tokens, but for the one that ended them; None where no function asks for it."""
        if self.skip_special_tokens and all(reward.skip_special_tokens for reward in self.rewards.values()):
            return None
        special, stop = set(self._tokenizer.all_special_ids), FINISH_CODE["stop"]
        finish = forest.segment["finish"][leaves].tolist()
        shown = [
            list(row[:-1]) if code == stop and row[-1] in special else list(row)
            for row, code in zip(ids, finish, strict=True)
        ]
        return [str(text) for text in self._tokenizer.batch_decode(shown, skip_special_tokens=False)]

    def combine(self, outcomes: Mapping[str, Outcome]) -> "Verdict":
        """What the outcomes of all functions on one completion come to."""
        fitting = {name: outcome for name, outcome in outcomes.items() if outcome.failure != "unfit"}
        if not fitting:
            return Verdict(None, dict.fromkeys(outcomes), dict.fromkeys(outcomes, "unfit"))
        failures = {name: outcome.failure for name, outcome in fitting.items() if outcome.failure}
        parts = {name: outcome_reward(outcome) for name, outcome in fitting.items()}
        if self.on_failure == "zero":
            parts |= dict.fromkeys(failures, 0.0)
        weights = dict(zip(self.rewards, self.weights, strict=True))
        judged = [weights[name] * part for name, part in parts.items() if part is not None]
        unjudged = not judged or (failures and self.on_failure == "drop")
        return Verdict(None if unjudged else sum(judged), parts, failures)

    def judge(
        self, problems: Sequence[Problem], completions: Sequence[str], ids: Sequence[Sequence[int]] | None = None
    ) -> dict[str, list[Outcome]]:
        """What each function says of each completion; those of one problem stand together.

        Raises:
            UserError: as `__call__`.
        """
        return self.judge_asked(Asked(problems, completions, None, ids))

    def judge_asked(self, asked: Asked) -> dict[str, list[Outcome]]:
        """As `judge`, with all that is known of the completions."""
        found = self._judged(self.rewards, asked)
        self._say_unfit(found, asked.problems)
        return found

    def check_gold(self, problems: Sequence[Problem]) -> "dict[str, GoldCheck]":
        """Per function that knows gold completions, of the problems that it judges: those whose gold gets less than 1.

        Raises:
            UserError: a function went wrong on all.
        """
        checks: dict[str, GoldCheck] = {}
        for name, reward in self.rewards.items():
            if reward.gold is None:
                continue
            known: list[tuple[Problem, str]] = []
            failed: list[tuple[Problem, str]] = []
            missing: list[Problem] = []
            for problem in problems:
                if reward.unfit(problem) is not None:
                    continue
                try:
                    text = reward.gold(problem)
                except UserError as error:
                    failed.append((problem, str(error)))
                    continue
                if text is None:
                    missing.append(problem)
                else:
                    known.append((problem, text))
            total = len(known) + len(failed)
            asked = Asked([problem for problem, _ in known], [text for _, text in known])
            found = self._judged({name: reward}, asked)
            failed += [
                (problem, outcome.message or f"the gold answer gets {outcome_reward(outcome)}: {text!r:.80}")
                for (problem, text), outcome in zip(known, found[name], strict=True)
                if not is_right(outcome)
            ]
            checks[name] = GoldCheck(total, failed, missing)
        return checks

    def unfit(self, problems: Sequence[Problem]) -> list[tuple[Problem, str]]:
        """The problems that no function judges, each with the reasons."""
        found = []
        for problem in problems:
            reasons = {name: reward.unfit(problem) for name, reward in self.rewards.items()}
            if all(reasons.values()):
                found.append((problem, "; ".join(f"{name}: {why}" for name, why in reasons.items())))
        return found

    def _judged(self, rewards: Mapping[str, Reward], asked: Asked) -> dict[str, list[Outcome]]:
        problems = asked.problems
        found: dict[str, list[Outcome]] = {}
        calls: dict[str, list[RewardCall]] = {}
        for name, reward in rewards.items():
            reasons = {id(problem): reward.unfit(problem) for problem in problems}
            found[name] = [
                Outcome() if (why := reasons[id(problem)]) is None else Outcome(None, "unfit", why)
                for problem in problems
            ]
            rows = [row for row, outcome in enumerate(found[name]) if outcome.failure is None]
            columns = asked.columns(rows, reward.skip_special_tokens and self.skip_special_tokens)
            calls[name] = self._calls(reward, columns, [problems[row] for row in rows]) if rows else []
        made = iter(self.workers.run([call for part in calls.values() for call in part]))
        for name, part in calls.items():
            rows = [row for row, outcome in enumerate(found[name]) if outcome.failure is None]
            outcomes = [outcome for _ in part for outcome in next(made)]
            for row, outcome in zip(rows, outcomes, strict=True):
                found[name][row] = outcome
            self._say(name, outcomes, [problems[row] for row in rows])
        return found

    def _say_unfit(self, found: Mapping[str, Sequence[Outcome]], problems: Sequence[Problem]) -> None:
        """Log the first completion that no function is for."""
        for problem, outcomes in zip(problems, zip(*found.values(), strict=True), strict=True):
            if ("", "unfit") not in self._said and all(outcome.failure == "unfit" for outcome in outcomes):
                self._said.add(("", "unfit"))
                why = "; ".join(f"{name}: {each.message}" for name, each in zip(found, outcomes, strict=True))
                log.warning(
                    "problem '%s' is for no reward function (%s); left unjudged, counted as reward/unfit",
                    problem.id,
                    why,
                )

    def start(self) -> None:
        """Start worker processes early."""
        self.workers.start(self.rewards.values())

    def close(self) -> None:
        self.workers.close()

    def _calls(self, reward: Reward, columns: dict[str, list[Any]], problems: Sequence[Problem]) -> list[RewardCall]:
        whole = RewardCall(reward, reward.select(columns), len(problems))
        alone = self.call_with == "row" or not reward.own
        if not problems or reward.path is None or (self.call_with == "batch" and not alone):
            return [whole]
        if not alone:
            sizes = [len(list(group)) for _, group in groupby(problems, key=id)]
            return whole.split(sizes)
        if inspect.iscoroutinefunction(reward.function):
            return [replace(whole, together=True, separable=True)]
        if reward.own or reward.keeps_s:
            return whole.rows()
        sizes = [CHUNK] * (whole.size // CHUNK) + [whole.size % CHUNK] * bool(whole.size % CHUNK)
        return replace(whole, separable=True).split(sizes)

    def _say(self, name: str, outcomes: Sequence[Outcome], problems: Sequence[Problem]) -> None:
        """Log the first failure of each kind; stop where failures are not to be lived with."""
        failed = [(outcome, problem) for outcome, problem in zip(outcomes, problems, strict=True) if outcome.failure]
        if len(failed) < len(outcomes):
            self._worked.add(name)
        several = len({problem.id for problem in problems}) > 1  # a single one may be the one row that is broken
        useless = several and name not in self._worked and {outcome.failure for outcome, _ in failed} == {"error"}
        for outcome, problem in failed:
            text = f"reward function '{name}', problem '{problem.id}': {outcome.message}"
            if self.on_failure == "raise":
                raise UserError(f"{text} (reward.on_failure is raise)")
            if useless:
                raise UserError(f"{text}; it failed on all {len(outcomes)} completions of the batch")
            kind = (name, outcome.message.partition(":")[0])
            if kind not in self._said:
                self._said.add(kind)
                then = "left unjudged" if self.on_failure == "drop" else "counted as 0"
                log.warning("%s (%s; the like is counted in the metrics and not said again)", text, then)


class TokenRewards:
    """Rewards inside completions, gathered into a token column.

    Where completions share a token its reward is the mean over those that were given any.
    """

    def __init__(self, forest: Forest) -> None:
        self.forest = forest
        self.total, self.count = torch.zeros(forest.num_tokens), torch.zeros(forest.num_tokens)
        self.leaves: set[int] = set()

    def add(self, leaf: int, weight: float, value: Mapping[str, Any], where: str) -> None:
        """The rewards of one completion.

        Raises:
            UserError: they do not fit its tokens.
        """
        tokens = completion_tokens(self.forest, leaf)
        rewards = torch.zeros(len(tokens))
        if "token" in value:
            if len(value["token"]) != len(tokens):
                raise UserError(f"{where}: {len(value['token'])} token rewards for {len(tokens)} tokens")
            rewards += torch.tensor(value["token"])
        else:
            ends = [int(end) for end in value["ends"]]
            if len(ends) != len(value["step"]):
                raise UserError(f"{where}: {len(value['step'])} step rewards with {len(ends)} ends")
            if ends != sorted(set(ends)) or (ends and not 0 <= ends[0] <= ends[-1] < len(tokens)):
                raise UserError(
                    f"{where}: ends {ends} must rise and lie within 0 and {len(tokens) - 1}; each is the index of the "
                    "last token of a step"
                )
            rewards[ends] = torch.tensor(value["step"])
        self.total[tokens] += weight * rewards
        if leaf not in self.leaves:  # several functions add up, several completions are averaged
            self.leaves.add(leaf)
            self.count[tokens] += 1

    def onto(self, forest: Forest) -> Forest:
        return forest.with_token(token_rewards=self.total / self.count.clamp(min=1)) if self.leaves else forest


def completion_tokens(forest: Forest, leaf: int) -> Tensor:
    """Rows of the token table that make up the completion that ends in this leaf."""
    spans = []
    for segment in forest.completion_segments(leaf):
        start = int(forest.segment["start"][segment])
        spans.append(torch.arange(start, start + int(forest.segment["length"][segment])))
    return torch.cat(spans)


def completion_ids(forest: Forest, leaf: int) -> list[int]:
    """Token ids of the completion that ends in this leaf."""
    return forest.token["token_ids"][completion_tokens(forest, leaf)].tolist()


def outcome_reward(outcome: Outcome) -> float | None:
    """What an outcome adds to the reward of its completion; rewards inside it alone add 0."""
    if isinstance(outcome.value, dict):
        return 0.0 if outcome.value["reward"] is None else outcome.value["reward"]
    return outcome.value


def fitting(outcomes: Mapping[str, Outcome]) -> Mapping[str, Outcome]:
    """The outcomes of functions that the row is for; all of them where it is for none."""
    return {name: outcome for name, outcome in outcomes.items() if outcome.failure != "unfit"} or outcomes


def is_right(outcome: Outcome) -> bool:
    """Whether a completion counts as solved: it got 1 or more."""
    reward = outcome_reward(outcome)
    return reward is not None and reward >= 1


def prompt_ends(forest: Forest, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """[num_trees] The last tokens of each prompt as text, special tokens included: what a completion goes on from."""
    starts, lengths = forest.tree["prompt_start"].tolist(), forest.tree["prompt_length"].tolist()
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    tails = [
        forest.prompt_ids[max(start, end - PROMPT_END) : end].tolist() for start, end in zip(starts, ends, strict=True)
    ]
    return [str(text) for text in tokenizer.batch_decode(tails, skip_special_tokens=False)]
