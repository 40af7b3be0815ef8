"""What a run writes and shows: metrics.jsonl, saved rollouts, live progress, the closing summary."""

import json
import logging
import math
import time
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from stepcredit.config import Config
from stepcredit.display.pieces import Pieces
from stepcredit.display.terminal import (
    Shading,
    Tokens,
    forgive,
    glimpse,
    is_plain,
    mark,
    numbers,
    one_line,
    signed,
    spread,
)
from stepcredit.forest import Forest
from stepcredit.forest.records import write_trees
from stepcredit.forest.types import Segment, Tree
from stepcredit.processes.ranks import Ranks
from stepcredit.run.health import Health
from stepcredit.run.sinks import open_sinks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("stepcredit")

SHOWN = (
    ("reward/mean", "reward", "{:.2f}"),
    ("eval/accuracy", "acc", "{:.1%}"),
    ("completion/length", "length", "{:.0f}"),
    ("policy/entropy", "entropy", "{:.2f}"),
    ("tokens/per_second", "tok/s", "{:.0f}"),
)
PLAIN_EVERY = 10  # iterations between lines when the output is not a terminal


class Records(Protocol):
    """What a run tells of itself.

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
    made: list[Tracker] = []

    def open_first() -> int | None:
        made.append(Tracker(run_dir, console, config, done, tokenizer))
        return made[0].reported

    reported = ranks.first(open_first)
    return made[0] if made else Silent(run_dir, reported)


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
        done: iterations that are behind it already, when it continues; None for a new run.
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
        self.tokenizer, self.pieces = tokenizer, Pieces(tokenizer)
        self.run_dir, self.console, self.last = run_dir, console, config.train.iterations
        self.rollouts = config.rollouts
        self.step_ends = "." if config.task.data == "embedded" else "\n"
        self.health = Health(console)
        self.before: dict[str, float] = {}
        self.latest_eval: dict[str, float] = {}
        self.tokens_sampled = 0.0
        self.started = time.monotonic()
        self.first = (done or 0) + 1
        self.reported: int | None = None  # the last iteration in metrics.jsonl
        self.shown: int | None = None  # the last iteration of which a completion was shown; the first one counts as 0
        for iteration in range(1, self.first):
            self._is_shown(iteration)
        _forget_after(run_dir / "rollouts", -1 if done is None else done)
        for row in _rows_until(run_dir / "metrics.jsonl", done):
            self.reported = row["iteration"]
            self.tokens_sampled = row["tokens/total"]
            self._remember(row)
            if row["iteration"]:
                self.health.count(row)
        self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self.sinks = open_sinks(config, run_dir, self.reported)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._bar = self._progress.add_task("train", total=self.last, completed=done or 0, shown="")

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
        if forest is not None and self._is_shown(iteration):
            try:
                self._show_completion(iteration, forest)
            except Exception as error:  # of a tokenizer, say; the run goes on
                log.warning("iteration %d: no completion can be shown (%r)", iteration, error)

    def _is_saved(self, iteration: int) -> bool:
        every = self.rollouts.every
        return bool(every) and (iteration % every == 0 or iteration in (1, self.last))

    def _is_shown(self, iteration: int) -> bool:
        """Whether a completion is due; from the iterations alone, so that a resumed run shows what it would have."""
        every = self.rollouts.show
        due = self._is_saved(iteration) and bool(every) and (self.shown is None or iteration - self.shown >= every)
        if due:
            self.shown = 0 if iteration == 1 else iteration
        return due

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

    def _show_completion(self, iteration: int, forest: Forest) -> None:
        """Print the completion that _telling finds, shaded by its advantages."""
        tree, path = _telling(forest, self.rollouts.max_trees)
        segments, leaf = [tree.segments[number] for number in path], tree.segments[path[-1]]
        texts = self.pieces.of([token for segment in segments for token in segment.token_ids])
        starts = [0, *(place + 1 for place, text in enumerate(texts[:-1]) if self.step_ends in text)]
        starts += accumulate(len(segment.token_ids) for segment in segments[:-1])
        tokens = Tokens(texts, [value for segment in segments for value in _advantages(segment)], starts)
        ends = spread([_advantages(segment) for segment in tree.segments]) or (0.0, 0.0)
        shading = Shading("advantage", max(map(abs, ends)), is_plain(self.console))
        facts = (
            "unjudged" if leaf.reward is None else f"reward {leaf.reward:.2f}",
            one_line(tree.problem.id),
            f"{len(texts)} tokens",
            f"advantages {' … '.join(dict.fromkeys(signed(end, shading.scale) for end in ends))}",
        )
        title = Text(no_wrap=True, overflow="ellipsis").append(f"iteration {iteration} ", "bold")
        title.append_text(mark(leaf.reward)).append(f" {' · '.join(facts)}")
        forgive(self.console)
        self.console.print(glimpse(title, _question(tree), tokens, shading, self.console))

    def save_rollouts(self, name: str, iteration: int, forest: Forest) -> Path:
        """Write some trees of a forest to `rollouts/NAME.jsonl.zst`."""
        folder = self.run_dir / "rollouts"
        folder.mkdir(exist_ok=True)
        few = forest.select_trees(torch.arange(min(self.rollouts.max_trees, forest.num_trees)))
        ids = few.token["token_ids"].split(few.segment["length"].tolist())
        texts = self.tokenizer.batch_decode([piece.tolist() for piece in ids], skip_special_tokens=True)
        path = folder / f"{name}.jsonl.zst"
        write_trees(path, few, iteration, texts)
        return path

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


def _telling(forest: Forest, most: int) -> tuple[Tree, list[int]]:
    """The saved tree whose advantages lie furthest apart, and of it the completion with the largest one."""
    values = forest.token["advantages"].nan_to_num(0.0, 0.0, 0.0)
    tree_of = forest.segment["tree"][forest.token["segment"]]
    none = values.new_zeros(forest.num_trees)
    high, low = (none.scatter_reduce(0, tree_of, values, kind, include_self=False) for kind in ("amax", "amin"))
    tree = forest.select_trees((high - low)[:most].argmax().view(1)).to_trees()[0]
    paths: list[list[int]] = []
    for number, segment in enumerate(tree.segments):
        paths.append([*(paths[segment.parent] if segment.parent >= 0 else []), number])
    parents = {segment.parent for segment in tree.segments}
    largest = [max((abs(value or 0.0) for value in _advantages(segment)), default=0.0) for segment in tree.segments]
    ends = [path for number, path in enumerate(paths) if number not in parents]
    return tree, max(ends, key=lambda path: max(largest[number] for number in path))


def _advantages(segment: Segment) -> list[float | None]:
    return numbers(None if segment.pruned else segment.columns["advantages"], len(segment.token_ids))


def _question(tree: Tree) -> str:
    question = tree.problem.question
    return question if isinstance(question, str) else str(question[-1].get("content", "")) if question else ""


def _finite(value: float) -> float | None:
    """JSON has no NaN or infinity."""
    return value if math.isfinite(value) else None


def _rows_until(path: Path, last: int | None) -> list[dict[str, Any]]:
    """The rows up to iteration `last`; later ones are cut from the file, because a resumed run writes them anew.

    A line that cannot be read (of a run that was killed while it wrote, or of a damaged disk) is left out.
    """
    if not path.is_file():
        return []
    kept: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if last is not None and row["iteration"] <= last:
                kept[row["iteration"]] = row
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    if last and len(kept) <= last:
        log.warning("%s lacks %d of the %d iterations before this one", path, last + 1 - len(kept), last + 1)
    beside = path.with_name(f".part-{path.name}")
    beside.write_text("".join(json.dumps(kept[number]) + "\n" for number in sorted(kept)), encoding="utf-8")
    beside.replace(path)
    return [kept[number] for number in sorted(kept)]


def _forget_after(folder: Path, last: int) -> None:
    """Remove saved rollouts of iterations that a resumed run does anew."""
    for path in folder.glob("*.jsonl.zst"):
        number = path.name.removeprefix("nonfinite-").split(".")[0]
        if number.isdigit() and int(number) > last:
            path.unlink()
