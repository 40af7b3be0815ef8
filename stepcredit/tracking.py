"""What a run writes and shows: metrics.jsonl, saved rollouts, live progress, warnings, the closing summary."""

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stepcredit.config import Config
from stepcredit.forest import Forest
from stepcredit.records import write_trees

log = logging.getLogger("stepcredit")

SHOWN = (
    ("reward/mean", "reward", "{:.2f}"),
    ("eval/accuracy", "acc", "{:.1%}"),
    ("completion/length", "length", "{:.0f}"),
    ("policy/entropy", "entropy", "{:.2f}"),
    ("tokens/per_second", "tok/s", "{:.0f}"),
)
PLAIN_EVERY = 10  # iterations between lines when the output is not a terminal
WARN_AFTER = 5  # iterations in a row before a warning is given


REASONS = {  # a metric that is 1 when it is the reason: what to say
    "group/unjudged": "no completion was judged. Check the reward function: it returned None for all of them",
    "group/singleton": "each group had a single judged completion. Set --group-size to at least 2",
    "completion/masked": "every completion was masked. Check --shapers against the lengths and rewards of the rollouts",
}
EQUAL_REWARDS = (
    "every group had equal rewards ({mean}). Check the reward function on a known right and a known wrong answer, "
    "the answer column and --sampler.max-new-tokens (truncated completions rarely score); easier or harder problems "
    "may be needed"
)


class Tracker:
    """Writes one JSON object an iteration to `metrics.jsonl` and shows progress.

    Args:
        run_dir: an existing folder.
        config: of the run.
        done: iterations that are behind it already, when it continues.
        decode: token ids of segments to their texts, for the saved rollouts.
    """

    def __init__(
        self,
        run_dir: Path,
        console: Console,
        config: Config,
        done: int,
        decode: Callable[[list[list[int]]], list[str]],
    ) -> None:
        self.decode = decode
        self.run_dir, self.console, self.last = run_dir, console, config.train.iterations
        self.rollouts = config.rollouts
        self.health = Health(console)
        self.before: dict[str, float] = {}
        self.latest_eval: dict[str, float] = {}
        self.tokens_sampled = 0.0
        self.started = time.monotonic()
        self.first = done + 1
        for row in _rows_until(run_dir / "metrics.jsonl", done if done else -1):
            self.tokens_sampled = row["tokens/total"]
            self._remember(row)
            if row["iteration"]:
                self.health.count(row)
        self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._bar = self._progress.add_task("train", total=self.last, completed=done, shown="")

    def __enter__(self) -> "Tracker":
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self._progress.stop()
        self._file.close()

    def report(self, iteration: int, metrics: dict[str, float], forest: Forest | None = None) -> None:
        """Write and show the metrics of one iteration; 0 is the state before the first."""
        self.tokens_sampled += metrics.get("tokens/sampled", 0.0)
        row = {"iteration": iteration, **metrics, "tokens/total": self.tokens_sampled}
        row["time/elapsed"] = time.monotonic() - self.started
        self._file.write(json.dumps({name: _finite(value) for name, value in row.items()}) + "\n")
        self._file.flush()
        self._remember(metrics)
        if forest is not None:
            self.health.observe(iteration, metrics)
            every = self.rollouts.every
            if every and (iteration % every == 0 or iteration in (1, self.last)):
                self._save_rollouts(iteration, forest)
        self._show(iteration, row)

    def _remember(self, metrics: dict[str, float]) -> None:
        self.latest_eval |= {name: value for name, value in metrics.items() if name.startswith("eval/")}
        self.before = self.before or dict(self.latest_eval)

    def _show(self, iteration: int, row: dict[str, Any]) -> None:
        shown = "  ".join(
            f"{label} {pattern.format(value)}"
            for name, label, pattern in SHOWN
            if (value := row.get(name, self.latest_eval.get(name))) is not None
        )
        self._progress.update(self._bar, completed=iteration, shown=shown)
        plain = not self.console.is_terminal and (iteration % PLAIN_EVERY == 0 or iteration in (1, self.last))
        if plain and iteration:
            left = row["time/elapsed"] / (iteration - self.first + 1) * (self.last - iteration)
            self.console.print(
                f"iteration {iteration}/{self.last}  {shown}  {left:.0f}s left", highlight=False, soft_wrap=True
            )

    def _save_rollouts(self, iteration: int, forest: Forest) -> None:
        folder = self.run_dir / "rollouts"
        folder.mkdir(exist_ok=True)
        few = forest.select_trees(torch.arange(min(self.rollouts.max_trees, forest.num_trees)))
        ids = few.token["token_ids"].split(few.segment["length"].tolist())
        texts = self.decode([piece.tolist() for piece in ids])
        write_trees(folder / f"{iteration:06d}.jsonl.zst", few, iteration, texts)

    def summary(self, seconds: float) -> bool:
        """Print before -> after and where everything is. False when nothing was learnt."""
        for name, label in (
            ("eval/accuracy", "held-out accuracy, sampled"),
            ("eval/accuracy_greedy", "held-out accuracy, greedy"),
        ):
            if name in self.before:
                self.console.print(
                    f"{label}: {self.before[name]:.1%} -> {self.latest_eval[name]:.1%}", highlight=False, soft_wrap=True
                )
        self.console.print(
            f"{self.tokens_sampled:,.0f} tokens sampled in {seconds:.0f}s; everything is in {self.run_dir}",
            highlight=False,
            soft_wrap=True,
        )
        return self.health.verdict()


class Health:
    """Watches for runs that look alive and learn nothing."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.iterations = self.idle = self.idle_in_a_row = self.dominated = 0
        self.rewards: set[float] = set()
        self.seen: dict[str, float] = {}  # sums of the metrics that tell why nothing is learnt

    def count(self, metrics: dict[str, float]) -> None:
        """Take an iteration into account, without a word."""
        self.iterations += 1
        for name in REASONS:
            self.seen[name] = self.seen.get(name, 0.0) + metrics[name]
        if len(self.rewards) < 3:
            self.rewards.add(round(metrics["reward/mean"], 6))
        idle = metrics["credit/outcome_rms"] == 0.0
        self.idle += idle
        self.idle_in_a_row = self.idle_in_a_row + 1 if idle else 0

    def observe(self, iteration: int, metrics: dict[str, float]) -> None:
        """Take an iteration into account and warn where a run goes wrong."""
        self.count(metrics)
        if self.idle_in_a_row == WARN_AFTER:
            self._warn(
                f"iteration {iteration}: no group had two different rewards for {WARN_AFTER} iterations (mean reward "
                f"{metrics['reward/mean']:.2f}); nothing is being learnt"
            )
        if metrics.get("optim/nonfinite"):
            self._warn(
                f"iteration {iteration}: the gradient was not finite, so the step was skipped; look at the rewards and "
                "log-probabilities of its rollouts, or lower --learning-rate"
            )
        ratio = metrics.get("credit/process_ratio") or 0.0
        self.dominated = self.dominated + 1 if ratio > 1.0 else 0
        if self.dominated == WARN_AFTER:
            self._warn(
                f"iteration {iteration}: process credit is larger than outcome credit (ratio {ratio:.1f}) for "
                f"{WARN_AFTER} iterations; lower --credit.beta, or set --credit.uniform drop"
            )

    def verdict(self) -> bool:
        """Say whether anything was learnt, and why not."""
        if self.iterations == 0 or self.idle < self.iterations:
            if self.idle:
                self.console.print(
                    f"{self.idle} of {self.iterations} iterations had no group with two different rewards",
                    highlight=False,
                    soft_wrap=True,
                )
            return True
        mean = f"the mean reward was {min(self.rewards):g}" if len(self.rewards) == 1 else "but not all groups the same"
        always = [reason for name, reason in REASONS.items() if self.seen[name] >= 0.999 * self.iterations]
        reason = always[0] if always else EQUAL_REWARDS.format(mean=mean)
        self._warn(f"nothing was learnt: in all {self.iterations} iterations {reason}")
        return False

    def _warn(self, text: str) -> None:
        self.console.print(f"[bold yellow]warning:[/] {text}", highlight=False, soft_wrap=True)


def _finite(value: float) -> float | None:
    """JSON has no NaN or infinity."""
    return value if math.isfinite(value) else None


def _rows_until(path: Path, last: int) -> list[dict[str, Any]]:
    """The rows up to iteration `last`; later ones are cut from the file, because a resumed run writes them anew."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # a run that was killed while it wrote this line
        if row["iteration"] <= last:
            kept.append(row)
    beside = path.with_name(f".part-{path.name}")
    beside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    beside.replace(path)
    return kept
