"""What a run writes and shows: metrics.jsonl, saved rollouts, live progress, the closing summary."""

import json
import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from stepcredit.config import Config
from stepcredit.display.console import replace_unencodable
from stepcredit.display.example import example_view
from stepcredit.display.token_texts import TokenTexts
from stepcredit.forest import Forest
from stepcredit.forest.records import write_trees
from stepcredit.processes.ranks import Ranks
from stepcredit.run.clock import Pace
from stepcredit.run.health import Health
from stepcredit.run.sinks import open_sinks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("stepcredit")

PROGRESS = (  # metric, label and format in the progress line
    ("reward/mean", "reward", "{:.2f}"),
    ("eval/accuracy", "acc", "{:.1%}"),
    ("eval/loss", "held-out loss", "{:.3f}"),
    ("pair/accuracy", "pairs in order", "{:.0%}"),
    ("completion/length", "length", "{:.0f}"),
    ("policy/entropy", "entropy", "{:.2f}"),
    ("tokens/per_second", "tok/s", "{:.0f}"),
)
SUMMARY = (  # metric, label and format in the closing lines
    ("eval/accuracy", "held-out accuracy, sampled", "{:.1%}"),
    ("eval/accuracy_greedy", "held-out accuracy, greedy", "{:.1%}"),
)
RECORDED_SUMMARY = (
    ("eval/accuracy", "held-out pairs in the right order", "{:.1%}"),
    ("eval/loss", "held-out loss", "{:.4f}"),
)
PLAIN_EVERY = 10  # iterations between lines when the output is not a terminal


class Records(Protocol):
    """What a run writes and shows of itself.

    Attributes:
        reported: the last iteration that has been reported, by this program or one before it.
    """

    reported: int | None

    def __enter__(self) -> "Records": ...

    def __exit__(self, *error: object) -> None: ...

    def report(self, iteration: int, metrics: dict[str, float], forest: Forest | None = None) -> None: ...

    def save_rollouts(self, name: str, iteration: int, forest: Forest) -> Path: ...

    def summary(self, seconds: float) -> bool: ...


def open_tracker(
    ranks: Ranks,
    run_dir: Path,
    console: Console,
    config: Config,
    done: int | None,
    tokenizer: "PreTrainedTokenizerBase",
) -> Records:
    """The tracker of the first process; the others write and show nothing."""
    trackers: list[Tracker] = []  # one in the first process, none in the others

    def open_first() -> int | None:
        trackers.append(Tracker(run_dir, console, config, done, tokenizer))
        return trackers[0].reported

    reported = ranks.on_main(open_first)
    return trackers[0] if trackers else Silent(run_dir, reported)


class Silent:
    """Stands for the tracker in every process but the first."""

    def __init__(self, run_dir: Path, reported: int | None) -> None:
        self.run_dir, self.reported = run_dir, reported

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def report(self, iteration: int, metrics: dict[str, float], forest: Forest | None = None) -> None:
        self.reported = iteration

    def save_rollouts(self, name: str, iteration: int, forest: Forest) -> Path:
        return self.run_dir / "rollouts" / f"{name}.jsonl.zst"

    def summary(self, seconds: float) -> bool:
        raise RuntimeError("only the first process sums up")


class Tracker:
    """Writes one JSON object an iteration to `metrics.jsonl` and shows progress.

    Args:
        run_dir: an existing folder.
        config: of the run.
        done: iterations that a resumed run has done before; None for a new run.
        tokenizer: for the texts of saved rollouts and of the completions that are shown.
    """

    def __init__(
        self,
        run_dir: Path,
        console: Console,
        config: Config,
        done: int | None,
        tokenizer: "PreTrainedTokenizerBase",
    ) -> None:
        self.tokenizer, self.token_texts = tokenizer, TokenTexts(tokenizer)
        self.run_dir, self.console, self.last = run_dir, console, config.train.iterations
        self.rollouts, self.recorded = config.rollouts, config.growth.recorded
        self.step_delimiter = "." if config.task.data == "embedded" else "\n"
        self.health = Health(console)
        self.first_eval: dict[str, float] = {}
        self.latest_eval: dict[str, float] = {}
        self.tokens_sampled = 0.0
        self.started = time.monotonic()
        self._pace = Pace(config.train.iterations, config.eval.every)
        self.first = (done or 0) + 1
        self.reported: int | None = None  # the last iteration in metrics.jsonl
        self.last_example: int | None = None  # the iteration of the last example; the first one counts as 0
        for iteration in range(1, self.first):
            self._take_example_turn(iteration)
        _remove_rollouts_after(run_dir / "rollouts", -1 if done is None else done)
        for row in _rows_until(run_dir / "metrics.jsonl", done):
            self.reported = row["iteration"]
            self.tokens_sampled = row["tokens/total"]
            self._remember(row)
            if "time/eval" in row:
                self._pace.evaluations.append(row["time/eval"])
            if row["iteration"]:
                self.health.count(row)
        self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self.sinks = open_sinks(config, run_dir, self.reported)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
        )
        self._bar = self._progress.add_task("train", total=self.last, completed=done or 0, metrics="", left="")

    def __enter__(self) -> "Tracker":
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self._progress.stop()
        self._file.close()
        for sink in self.sinks:
            sink.close()

    def report(self, iteration: int, metrics: dict[str, float], forest: Forest | None = None) -> None:
        """Write and show the metrics of one iteration; 0 is the state before the first."""
        self.tokens_sampled += metrics.get("tokens/sampled", 0.0)
        row = {"iteration": iteration, **metrics, "tokens/total": self.tokens_sampled}
        row["time/elapsed"] = time.monotonic() - self.started
        self._file.write(json.dumps({name: _finite(value) for name, value in row.items()}) + "\n")
        self._file.flush()
        self.reported = iteration
        for sink in self.sinks:
            sink.write(iteration, row)
        self._remember(metrics)
        if forest is not None:
            self.health.observe(iteration, metrics)
            if self._is_saved(iteration):
                self.save_rollouts(f"{iteration:06d}", iteration, forest)
        self._show(iteration, row)
        if forest is not None and self._take_example_turn(iteration):
            try:
                self._show_completion(iteration, forest)
            except Exception as error:  # of a tokenizer, say; the run goes on
                log.warning("iteration %d: no completion can be shown (%r)", iteration, error)

    def _is_saved(self, iteration: int) -> bool:
        every = self.rollouts.every
        return bool(every) and (iteration % every == 0 or iteration in (1, self.last))

    def _take_example_turn(self, iteration: int) -> bool:
        """Whether an example is due, and if so note that it is shown.

        It depends on the iterations alone, so that a resumed run shows those that it would have shown in one go.
        """
        every, last = self.rollouts.show, self.last_example
        due = self._is_saved(iteration) and bool(every) and (last is None or iteration - last >= every)
        if due:
            self.last_example = 0 if iteration == 1 else iteration
        return due

    def _remember(self, metrics: dict[str, float]) -> None:
        self.latest_eval |= {name: value for name, value in metrics.items() if name.startswith("eval/")}
        self.first_eval = self.first_eval or dict(self.latest_eval)

    def _show(self, iteration: int, row: dict[str, Any]) -> None:
        metrics = "  ".join(
            f"{label} {pattern.format(value)}"
            for name, label, pattern in PROGRESS
            if (value := row.get(name, self.latest_eval.get(name))) is not None
        )
        self._pace.add(iteration, row["time/elapsed"], row.get("time/eval"))
        left = f"{self._pace.left(iteration):.0f}s left" if iteration >= self.first else ""
        self._progress.update(self._bar, completed=iteration, metrics=metrics, left=left)
        plain = not self.console.is_terminal and (iteration % PLAIN_EVERY == 0 or iteration in (1, self.last))
        if plain and iteration:
            self.console.print(f"iteration {iteration}/{self.last}  {metrics}  {left}", highlight=False, soft_wrap=True)

    def _show_completion(self, iteration: int, forest: Forest) -> None:
        replace_unencodable(self.console)
        num_trees, texts = self.rollouts.max_trees, self.token_texts
        self.console.print(example_view(forest, num_trees, iteration, texts, self.step_delimiter, self.console))

    def save_rollouts(self, name: str, iteration: int, forest: Forest) -> Path:
        """Write some trees of a forest to `rollouts/NAME.jsonl.zst`."""
        folder = self.run_dir / "rollouts"
        folder.mkdir(exist_ok=True)
        few = forest.select_trees(torch.arange(min(self.rollouts.max_trees, forest.num_trees)))
        ids = few.token["token_ids"].split(few.segment["length"].tolist())
        texts = self.tokenizer.batch_decode([segment.tolist() for segment in ids], skip_special_tokens=True)
        path = folder / f"{name}.jsonl.zst"
        write_trees(path, few, iteration, texts)
        return path

    def summary(self, seconds: float) -> bool:
        """Print before -> after and where everything is. False when nothing was learnt."""
        for name, label, pattern in RECORDED_SUMMARY if self.recorded else SUMMARY:
            if name in self.first_eval:
                first, latest = pattern.format(self.first_eval[name]), pattern.format(self.latest_eval[name])
                self.console.print(f"{label}: {first} -> {latest}", highlight=False, soft_wrap=True)
        whose = "of completions" if self.recorded else "sampled"
        self.console.print(
            f"{self.tokens_sampled:,.0f} tokens {whose} in {seconds:.0f}s; everything is in {self.run_dir}",
            highlight=False,
            soft_wrap=True,
        )
        return self.health.verdict()


def _finite(value: float) -> float | None:
    """JSON has no NaN or infinity."""
    return value if math.isfinite(value) else None


def _rows_until(path: Path, last: int | None) -> list[dict[str, Any]]:
    """The rows up to iteration `last`; later ones are cut from the file, because a resumed run writes them again.

    A line that cannot be read (of a run that was killed while it wrote, or of a damaged disk) is left out.
    """
    if not path.is_file():
        return []
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if last is not None and row["iteration"] <= last:
                rows[row["iteration"]] = row
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    if last and len(rows) <= last:
        log.warning("%s lacks %d of the %d iterations before this one", path, last + 1 - len(rows), last + 1)
    ordered = [rows[number] for number in sorted(rows)]
    partial = path.with_name(f".part-{path.name}")
    partial.write_text("".join(json.dumps(row) + "\n" for row in ordered), encoding="utf-8")
    partial.replace(path)
    return ordered


def _remove_rollouts_after(folder: Path, last: int) -> None:
    """Remove saved rollouts of iterations that a resumed run does again."""
    for path in folder.glob("*.jsonl.zst"):
        number = path.name.removeprefix("nonfinite-").split(".")[0]
        if number.isdigit() and int(number) > last:
            path.unlink()
