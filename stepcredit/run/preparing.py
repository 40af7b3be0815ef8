"""What estimators do before training, with a progress bar once one of them has something to do."""

from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stepcredit.estimators.base import Estimator


class PreparationBar:
    """Shows how many completions there are, in a `with` block: a bar, or a line for each tenth where nobody looks."""

    def __init__(self, console: Console) -> None:
        self.console, self.tenths = console, 0
        columns = (TextColumn("prepare"), BarColumn(), MofNCompleteColumn(), TextColumn("completions"))
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._bar = self.progress.add_task("prepare", visible=False)

    def __enter__(self) -> "PreparationBar":
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress.live.is_started:
            self.progress.stop()

    def __call__(self, done: int, total: int) -> None:
        done = min(done, total)
        if self.console.is_terminal:
            if not self.progress.live.is_started:
                self.progress.start()
            self.progress.update(self._bar, completed=done, total=total, visible=True)
        elif (tenths := 10 * done // total) > self.tenths:
            self.tenths = tenths
            self.console.print(f"prepare: {done:,} of {total:,} completions", highlight=False, soft_wrap=True)


def prepare_all(estimators: Iterable[Estimator], folder: Path, console: Console, check: Callable[[], None]) -> None:
    """
    Args:
        folder: of the run.
        check: as in `Estimator.prepare`.
    """
    with PreparationBar(console) as bar:
        for estimator in estimators:
            estimator.prepare(folder, bar, check)
