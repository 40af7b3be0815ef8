"""Further outputs for metrics: TensorBoard and Weights & Biases. `metrics.jsonl` always has all of them.

A sink that fails is logged once and left out from then on; it never stops a run.
"""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from stepcredit.config import Config
from stepcredit.errors import UserError

log = logging.getLogger("stepcredit")


class Sink(Protocol):
    """Takes the metrics of each iteration, by name."""

    def write(self, iteration: int, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under `RUN/tensorboard`; a resumed run replaces the iterations that it repeats."""

    def __init__(self, config: Config, run_dir: Path, reported: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first = None if reported is None else reported + 1
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first)

    def write(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if name != "iteration" and value is not None:
                self.writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A Weights & Biases run, offline unless WANDB_MODE says otherwise; a resumed run continues its own."""

    def __init__(self, config: Config, run_dir: Path, reported: int | None) -> None:
        import wandb

        id_file = run_dir / "wandb_id"
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else None
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self.run = wandb.init(
            project=config.track.project,
            name=run_dir.name,
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
            mode=mode,
            id=run_id,
            resume="allow",
        )
        id_file.write_text(self.run.id, encoding="utf-8")

    def write(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        self.run.log(dict(metrics), step=iteration)

    def close(self) -> None:
        self.run.finish()


SINKS: dict[str, Callable[[Config, Path, int | None], Sink]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class GuardedSink:
    """A sink whose first failure is logged and closes it for good."""

    def __init__(self, name: str, sink: Sink) -> None:
        self.name, self.sink = name, sink
        self.failed = False

    def write(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        self._try(self.sink.write, iteration, metrics)

    def close(self) -> None:
        self._try(self.sink.close)

    def _try(self, method: Callable[..., None], *arguments: Any) -> None:
        if self.failed:
            return
        try:
            method(*arguments)
        except Exception as error:
            self.failed = True
            log.warning("%s failed and is left out from now on (%s); metrics.jsonl is still written", self.name, error)


def open_sinks(config: Config, run_dir: Path, reported: int | None) -> list[GuardedSink]:
    """The sinks that a config names.

    Args:
        reported: the last iteration that the run has already reported; None for a new run.

    Raises:
        UserError: the package of a sink is not installed.
    """
    sinks = []
    for name in config.track.sinks:
        try:
            sinks.append(GuardedSink(name, SINKS[name](config, run_dir, reported)))
        except ImportError as error:
            raise UserError(
                f"track.sinks: {name} is not installed ({error}); pip install 'stepcredit[track]'"
            ) from error
        except Exception as error:
            log.warning("%s could not be opened and is left out (%s); metrics.jsonl is still written", name, error)
    return sinks
