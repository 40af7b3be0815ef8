"""Checkpoints: a folder that `from_pretrained` loads, plus `trainer_state/`. Written beside, synced, then renamed."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from stepcredit.errors import UserError
from stepcredit.policy.forward import Policy
from stepcredit.policy.loading import save_policy

STATE = "trainer_state/state.pt"


def save_checkpoint(run_dir: Path, iteration: int, policy: Policy, state: dict[str, Any], keep: int) -> Path:
    """Write `checkpoints/ITERATION`, point `latest` to it, then remove all but the newest `keep`.

    Args:
        state: whatever `load_checkpoint` should give back, tensors and plain values.
    """
    root = run_dir / "checkpoints"
    final, beside = root / f"{iteration:06d}", root / f".{iteration:06d}.part"
    shutil.rmtree(beside, ignore_errors=True)
    (beside / "trainer_state").mkdir(parents=True)
    save_policy(policy, beside)
    torch.save(state, beside / STATE)
    for file in beside.rglob("*"):
        if file.is_file():
            _sync(file)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    pointer = run_dir / ".latest.part"
    pointer.write_text(f"checkpoints/{final.name}\n", encoding="utf-8")
    _sync(pointer)
    pointer.replace(run_dir / "latest")
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    root = run_dir / "checkpoints"
    return sorted(path for path in root.glob("[0-9]*") if path.is_dir()) if root.is_dir() else []


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that the file `latest` names, None when there is none."""
    pointer = run_dir / "latest"
    if not pointer.is_file():
        return None
    folder = run_dir / pointer.read_text(encoding="utf-8").strip()
    if not (folder / STATE).is_file():
        raise UserError(f"{pointer} names {folder}, which is not a checkpoint; write the name of another one into it")
    return folder


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The state that was saved with a checkpoint."""
    if not (folder / STATE).is_file():
        raise UserError(f"--resume: {folder} is not a checkpoint (no {STATE})")
    return torch.load(folder / STATE, map_location="cpu", weights_only=True)


def load_weights(policy: Policy, folder: Path) -> None:
    """Put a checkpoint's weights into a policy of the same model."""
    saved = type(policy.model).from_pretrained(folder, dtype=torch.float32)
    policy.model.load_state_dict(saved.state_dict())


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
