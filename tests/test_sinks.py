"""TensorBoard and Weights & Biases beside metrics.jsonl, and trackers that fail."""

import json
from pathlib import Path

import pytest
from test_resume import train

from stepcredit.cli.main import main
from stepcredit.run import sinks

ALARM = "left out"


def scalars(run: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_tensorboard_has_what_the_file_has(tmp_path) -> None:
    """Every metric of every iteration once, also after going back and on."""
    run = tmp_path / "run"
    words = ("--track.sinks", "tensorboard", "--checkpoint.keep", "9")
    assert train(run, "--iterations", "3", *words) in (0, 1)
    assert main(["train", "--resume", str(run / "checkpoints" / "000002"), "--iterations", "4"]) in (0, 1)
    rows = {row["iteration"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    assert list(rows) == [0, 1, 2, 3, 4]
    found = scalars(run)
    assert found["reward/mean"] == pytest.approx({n: rows[n]["reward/mean"] for n in (1, 2, 3, 4)})
    assert set(found) == {name for row in rows.values() for name, value in row.items() if value is not None} - {
        "iteration"
    }


def test_weights_and_biases_is_offline_and_continues(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = tmp_path / "run"
    assert train(run, "--iterations", "1", "--track.sinks", "wandb") in (0, 1)
    identity = (run / "wandb_id").read_text()
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    assert main(["train", "--resume", str(run), "--iterations", "2"]) in (0, 1)
    assert (run / "wandb_id").read_text() == identity
    assert all(identity in path.name for path in (run / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("when", ["open", "write", "close"])
def test_a_tracker_that_fails_never_stops_a_run(tmp_path, monkeypatch, caplog, when) -> None:
    """It is named once; metrics.jsonl is whole."""

    class Broken:
        def __init__(self, *_):
            self.fail("open")

        def write(self, *_):
            self.fail("write")

        def close(self):
            self.fail("close")

        def fail(self, now):
            if now == when:
                raise ConnectionError("no route to the tracker")

    monkeypatch.setitem(sinks.SINKS, "wandb", Broken)
    assert train(tmp_path / "run", "--iterations", "2", "--track.sinks", "wandb") in (0, 1)
    assert caplog.text.count("no route to the tracker") == 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_tracker_that_is_not_installed_is_an_error(tmp_path, monkeypatch, capsys) -> None:
    def absent(*_):
        raise ModuleNotFoundError("No module named 'wandb'")

    monkeypatch.setitem(sinks.SINKS, "wandb", absent)
    assert train(tmp_path / "run", "--iterations", "1", "--track.sinks", "wandb") == 2
    assert "pip install 'stepcredit[track]'" in capsys.readouterr().err


def test_an_unknown_tracker_is_named(tmp_path, capsys) -> None:
    assert train(tmp_path / "run", "--track.sinks", "tensorbord") == 2
    assert "track.sinks" in capsys.readouterr().err
