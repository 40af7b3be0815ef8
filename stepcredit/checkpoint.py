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
    """Write `checkpoints/ITERATION`, point `latest` to it, then remove all but the `keep` last written.

    Args:
        state: whatever `load_checkpoint` should give back, tensors and plain values.
    """
    root = run_dir / "checkpoints"
    final, beside, aside = (root / f"{iteration:06d}", root / f".{iteration:06d}.part", root / f".{iteration:06d}.old")
    for rest in (beside, aside):  # of a run that was killed while it saved
        shutil.rmtree(rest, ignore_errors=True)
    (beside / "trainer_state").mkdir(parents=True)
    save_policy(policy, beside)
    torch.save(state, beside / STATE)
    for path in [*beside.rglob("*"), beside]:
        _sync(path)
    if final.exists():  # of a run that went back: out of the way, but there until the new one stands
        final.rename(aside)
    beside.rename(final)
    _sync(root)
    pointer = run_dir / ".latest.part"
    pointer.write_text(f"checkpoints/{final.name}\n", encoding="utf-8")
    _sync(pointer)
    pointer.replace(run_dir / "latest")
    _sync(run_dir)
    shutil.rmtree(aside, ignore_errors=True)
    others = sorted((path for path in checkpoints(run_dir) if path != final), key=lambda path: path.stat().st_mtime)
    for old in others[: max(0, len(others) + 1 - keep)]:
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


def _sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
