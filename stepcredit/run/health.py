"""Warnings about runs that go wrong without an error, and what to do about them."""

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console

WARN_AFTER = 5  # iterations in a row before a warning is given


REASONS = {  # a metric that is 1 when it is the reason: what to say
    "group/unjudged": "no completion was judged. Check the reward function: it returned None for all of them",
    "group/singleton": "each group had a single judged completion. Set --group-size to at least 2",
    "completion/masked": "every completion was masked. Check --shapers and the prompt filter (--filter.low, "
    "--filter.high, --filter.drop-truncated) against the lengths and rewards of the rollouts",
}
EQUAL_REWARDS = (
    "every group had equal rewards ({mean}). Check the reward function on a known right and a known wrong answer, "
    "the answer column and --sampler.max-new-tokens (truncated completions rarely score); easier or harder problems "
    "may be needed"
)


EQUAL_SIBLINGS = (
    "no group of siblings had values further apart than the credit asks for. Take more branches, easier or harder "
    "problems, or a smaller --credit.tau"
)


Metrics = dict[str, Any]


@dataclass(frozen=True)
class Alarm:
    """A condition that a user should know of during the run.

    Attributes:
        holds: whether the condition holds, from an iteration's metrics and the run's first ones.
        say: the warning: what is wrong and what to do.
        after: iterations in a row before the warning; it is given again only after the condition has ended.
    """

    holds: Callable[[Metrics, Metrics], bool]
    say: Callable[[Metrics, Metrics], str]
    after: int = WARN_AFTER


def _uniform(now: Metrics) -> str:
    share = _value(now, "filter/uniform")
    return f", {share:.0%} of equal rewards" if share else ""


def _value(metrics: Metrics, name: str, default: float = 0.0) -> float:
    """A metric, or the default where it is absent or was not finite."""
    value = metrics.get(name)
    return default if value is None or not math.isfinite(value) else float(value)


ALARMS: dict[str, Alarm] = {
    "no reward variance": Alarm(
        lambda now, first: now["credit/outcome_rms"] == 0.0,
        lambda now, first: (
            f"no group had two different rewards for {WARN_AFTER} iterations (mean reward {now['reward/mean']:.2f}); "
            "nothing is being learnt. Take easier or harder problems, or check the reward function"
        ),
    ),
    "no problem passed": Alarm(
        lambda now, first: _value(now, "filter/passed", 1.0) == 0.0,
        lambda now, first: (
            f"none of {_value(now, 'filter/problems'):.0f} problems passed the prompt filter "
            f"({_value(now, 'filter/hard'):.0%} too hard, {_value(now, 'filter/easy'):.0%} too easy, "
            f"{_value(now, 'filter/truncated'):.0%} truncated{_uniform(now)}), so nothing was learnt. Widen "
            "--filter.low and --filter.high, raise --filter.max-draws, or take easier or harder problems"
        ),
        after=1,
    ),
    "no siblings differ": Alarm(
        lambda now, first: _value(now, "group/kept", 1.0) == 0.0,
        lambda now, first: (
            f"no group of siblings had values further apart than the credit asks for, for {WARN_AFTER} iterations, so "
            "their updates were skipped (optim/skipped counts them). Take more branches, easier or harder problems, or "
            "a smaller --credit.tau"
        ),
    ),
    "rewards fail": Alarm(
        lambda now, first: _value(now, "reward/timeout") + _value(now, "reward/error") > 0.05,
        lambda now, first: (
            f"reward functions failed on {_value(now, 'reward/timeout'):.1%} of the completions by time-out and on "
            f"{_value(now, 'reward/error'):.1%} by an error; the first of each kind is in the log above. Repair the "
            "function, raise --reward.timeout-s, or choose with --reward.on-failure what such completions get"
        ),
        after=1,
    ),
    "step skipped": Alarm(
        lambda now, first: _value(now, "optim/nonfinite") > 0,
        lambda now, first: (
            "the loss or gradient was not finite, so the step was skipped; look at the rewards and log-probabilities "
            "of its rollouts, or lower --learning-rate"
        ),
        after=1,
    ),
    "reward model skipped": Alarm(
        lambda now, first: _value(now, "prm/nonfinite") > 0,
        lambda now, first: (
            "the gradient of the process reward model was not finite, so its step was skipped; lower "
            "--prm.learning-rate or --credit.beta"
        ),
        after=1,
    ),
    "critic skipped": Alarm(
        lambda now, first: _value(now, "critic/nonfinite") > 0,
        lambda now, first: (
            "the gradient of the critic was not finite, so its step was skipped; lower --critic.learning-rate, or look "
            "at the rewards"
        ),
        after=1,
    ),
    "process credit dominates": Alarm(
        lambda now, first: now.get("credit/process_ratio", 0.0) is None or now.get("credit/process_ratio", 0.0) > 1.0,
        lambda now, first: (
            f"process credit is larger than outcome credit (ratio {_value(now, 'credit/process_ratio', math.inf):.1f}) "
            f"for {WARN_AFTER} iterations; lower --credit.beta (spro, or set --credit.uniform drop) or "
            "--credit.process-coef (prime)"
        ),
    ),
    "entropy collapsed": Alarm(
        lambda now, first: _value(now, "policy/entropy", math.inf) < 0.1 * _value(first, "policy/entropy"),
        lambda now, first: (
            f"entropy is {_value(now, 'policy/entropy'):.3f}, less than a tenth of the {first['policy/entropy']:.3f} "
            "at first; samples of a group will be all alike. Lower --learning-rate, raise --loss.clip-high, or "
            "set --objective.entropy-coef"
        ),
    ),
    "length exploded": Alarm(
        lambda now, first: _value(now, "completion/length") > 2 * _value(first, "completion/length", math.inf),
        lambda now, first: (
            f"completions are {now['completion/length']:.0f} tokens long, more than twice the "
            f"{first['completion/length']:.0f} at first. If rewards do not rise with it, take --objective.aggregate "
            "token_mean or a KL term (--objective.kl.coef)"
        ),
    ),
    "completions truncated": Alarm(
        lambda now, first: _value(now, "completion/truncated") > 0.5,
        lambda now, first: (
            f"{now['completion/truncated']:.0%} of the completions ended at the token limit; raise "
            "--sampler.max-new-tokens, or leave them out with --shapers mask_truncated"
        ),
    ),
    "policy far from reference": Alarm(
        lambda now, first: max(_value(now, "policy/kl_ref"), _value(now, "policy/kl_ref_update")) > 1.0,
        lambda now, first: (
            f"the policy is {max(_value(now, 'policy/kl_ref'), _value(now, 'policy/kl_ref_update')):.1f} nats a token "
            "from the reference; lower --learning-rate or raise --objective.kl.coef"
        ),
    ),
    "sampler and trainer disagree": Alarm(
        lambda now, first: _value(now, "sampler/logprob_diff") > 0.5,
        lambda now, first: (
            f"the sampler's log-probability of a token differs from the trainer's by "
            f"{_value(now, 'sampler/logprob_diff'):.2f}; are their weights the same? In half precision try "
            "--train.dtype float32"
        ),
        after=1,
    ),
}


class Health:
    """Watches the metrics of a run for the conditions of `ALARMS`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.iterations = 0
        self.idle = 0  # iterations without two different rewards in a group
        self.kept = 0.0  # largest share of sibling groups that credit of trees kept
        self.rewards: set[float] = set()
        self.reason_sums: dict[str, float] = {}  # of the metrics in `REASONS`
        self.first: dict[str, float] = {}  # metrics of the first iteration that had them
        self.in_a_row = dict.fromkeys(ALARMS, 0)
        self.warned: dict[str, int] = {}  # how often

    def count(self, metrics: dict[str, Any]) -> list[str]:
        """Add an iteration; returns the names of the warnings that are due now."""
        self.iterations += 1
        for name in REASONS:
            self.reason_sums[name] = self.reason_sums.get(name, 0.0) + metrics[name]
        if len(self.rewards) < 3:
            self.rewards.add(round(metrics["reward/mean"], 6))
        if metrics["credit/outcome_rms"] == 0.0:
            self.idle += 1
        self.kept = max(self.kept, _value(metrics, "group/kept", 1.0))
        watched = ["policy/entropy"]
        if "window/rows" not in metrics:  # with a window the first completions that end are the short ones
            watched.append("completion/length")
        for name in watched:
            if metrics.get(name) is not None:
                self.first.setdefault(name, metrics[name])
        due = []
        for name, alarm in ALARMS.items():
            self.in_a_row[name] = self.in_a_row[name] + 1 if alarm.holds(metrics, self.first) else 0
            if self.in_a_row[name] == alarm.after:
                self.warned[name] = self.warned.get(name, 0) + 1
                due.append(name)
        return due

    def observe(self, iteration: int, metrics: dict[str, float]) -> None:
        """Add an iteration and print the warnings that are due."""
        for name in self.count(metrics):
            self._warn(f"iteration {iteration}: {ALARMS[name].say(metrics, self.first)}")

    def verdict(self) -> bool:
        """Print whether anything was learnt, why not, and which warnings there were; False: nothing was learnt."""
        if self.iterations and self.idle == self.iterations:
            if len(self.rewards) == 1:
                mean = f"the mean reward was {min(self.rewards):g}"
            else:
                mean = "but not all groups the same"
            always = [reason for name, reason in REASONS.items() if self.reason_sums[name] >= 0.999 * self.iterations]
            reason = always[0] if always else EQUAL_REWARDS.format(mean=mean) if self.kept else EQUAL_SIBLINGS
            self._warn(f"nothing was learnt: in all {self.iterations} iterations {reason}")
            return False
        marks = [f"{name} ({times}x)" if times > 1 else name for name, times in self.warned.items()]
        if self.idle:
            marks.append(f"{self.idle} of {self.iterations} iterations had no group with two different rewards")
        self.console.print(f"health: {'; '.join(marks) or 'nothing to remark'}", highlight=False, soft_wrap=True)
        return True

    def _warn(self, text: str) -> None:
        self.console.print(f"[bold yellow]warning:[/] {text}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Replay:
    """The warnings of a finished run.

    Attributes:
        warnings: iteration, name of the alarm, its warning.
        verdict: why nothing was learnt, "" otherwise.
        idle, iterations: the number of iterations without two different rewards in a group, and of all.
    """

    warnings: list[tuple[int, str, str]]
    verdict: str
    idle: int
    iterations: int


def replay(rows: Iterable[Metrics]) -> Replay:
    """The warnings from the lines of a metrics.jsonl; metrics that an older version lacks count as unremarkable."""
    printed = io.StringIO()
    health = Health(Console(file=printed, width=10_000))
    warnings = []
    for row in rows:
        if row.get("iteration") and "reward/mean" in row:
            numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
            defaults = dict.fromkeys(REASONS, 0.0) | {"reward/mean": 0.0, "credit/outcome_rms": 1.0}
            metrics = {name: None for name, value in row.items() if value is None} | defaults | numbers
            for name in health.count(metrics):
                warnings.append((row["iteration"], name, ALARMS[name].say(metrics, health.first)))
    verdict = ""
    if health.iterations and not health.verdict():
        verdict = printed.getvalue().partition(": ")[2].strip()
    return Replay(warnings, verdict, health.idle, health.iterations)
