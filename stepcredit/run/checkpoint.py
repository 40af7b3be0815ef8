"""Checkpoints: a folder that `from_pretrained` loads, plus `trainer_state/` and a manifest of checksums.

The optimisers' state is written by torch.distributed.checkpoint in safetensors files, each process its shards, so that
a run can continue with another number of processes; everything else is written by the main process.

A checkpoint is written to a temporary folder, synced, renamed, and only then named in `latest`; older ones are removed
afterwards. So a run that is killed at any moment has a complete checkpoint, and later damage shows in the checksums.
"""

import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel

from stepcredit.errors import UserError
from stepcredit.learn.adapters import has_adapters, load_adapters
from stepcredit.learn.learner import Learner
from stepcredit.learn.placement import full_heads_state, full_state, load_full_heads, load_full_state
from stepcredit.learn.spread import load_from_main
from stepcredit.policy.heads import save_heads, saved_heads
from stepcredit.policy.loading import save_policy
from stepcredit.policy.weights import ADAPTER, Names, load_network
from stepcredit.processes.ranks import Ranks
from stepcredit.run.state import load_state, save_state

log = logging.getLogger("stepcredit")

STATE = "trainer_state/state"
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
BEST = "best"


@dataclass(frozen=True)
class Damage:
    """Why a checkpoint cannot be used."""

    folder: Path
    reason: str


def save_checkpoint(
    run_dir: Path,
    name: str,
    learners: Mapping[str, Learner],
    state: dict[str, Any],
    keep: int,
    score: float | None = None,
) -> Path:
    """Write `checkpoints/NAME`, point `latest` to it, then remove all but the `keep` last written and the best.

    All processes of a run call this; they share one file system.

    Args:
        learners: the models that are trained, by the folder inside the checkpoint; "" is the checkpoint itself.
        state: what `load_checkpoint` should return.
        score: of this model; the checkpoint with the highest one is named in `best` and kept too.

    Raises:
        UserError: it could not be written; the checkpoints before it are untouched.
    """
    root = run_dir / "checkpoints"
    final, partial, replaced = root / name, root / f".{name}.part", root / f".{name}.old"
    ranks = next(iter(learners.values())).placement.ranks

    def begin() -> None:
        _remove_leftovers(root)
        (partial / STATE).parent.mkdir(parents=True)

    def end() -> None:
        nonlocal score
        save_state(state, partial / STATE)
        if score is None and final.exists():  # written again with the same weights
            score = _score(final)
        _write_manifest(partial, score)
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        if final.exists():  # the run was resumed from an older checkpoint: removed once the new one is in place
            final.rename(replaced)
        partial.rename(final)
        _sync(root)
        _write_pointer(run_dir, "latest", final)
        if score is not None and score >= _best_score(run_dir):
            _write_pointer(run_dir, BEST, final)
        shutil.rmtree(replaced, ignore_errors=True)
        protected = {final, read_pointer(run_dir, BEST)}
        older = [path for path in checkpoints(run_dir) if path not in protected]
        older.sort(key=lambda path: path.stat().st_mtime)
        for old in older[: max(0, len(older) + 1 - keep)]:
            shutil.rmtree(old)

    with _explain_write_error(run_dir, partial, ranks):
        ranks.on_main(begin)
        for folder, learner in learners.items():
            _save_learner(learner, partial, folder)
        ranks.on_main(end)
    return final


def load_learner(learner: Learner, checkpoint: Path, folder: str) -> None:
    """Load a model and its optimiser state from a checkpoint; all processes call this.

    Args:
        folder: inside the checkpoint; "" for the policy.

    Raises:
        UserError: the checkpoint lacks weights, or has some of another size or that are not finite.
    """
    policy, model_folder = learner.policy, checkpoint / folder
    if has_adapters(policy) != (model_folder / ADAPTER).is_file():
        have, rank = ("no adapters", "--lora.rank 0") if has_adapters(policy) else ("adapters", "its --lora.rank")
        raise UserError(f"--resume: '{model_folder}' has {have}; continue with {rank}, or start a new run")
    if has_adapters(policy):
        load_adapters(policy, model_folder, "--resume")
    elif learner.placement.sharded:
        read: list[PreTrainedModel] = []  # by the main process
        ranks = learner.placement.ranks
        ranks.on_main(lambda: read.append(load_network(str(model_folder), "--resume", type(policy.model))))
        load_from_main(policy, read[0].state_dict() if read else {}, ranks)
    else:
        saved = load_network(str(model_folder), "--resume", type(policy.model))
        load_full_state(policy, saved.state_dict())
    heads = saved_heads(model_folder, "--resume")
    own = policy.heads.state_dict()
    Names.between(heads, own).check(f"--resume: the heads of '{model_folder}'", len(own), "they are of another run")
    load_full_heads(policy, heads)
    optimizer_folder = _optimizer_folder(checkpoint, folder)
    if not optimizer_folder.is_dir():
        return  # it had not taken a step
    tensors = learner.tensors(fill=True)
    with _without_warnings():
        dcp.load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(optimizer_folder)),
            no_dist=not learner.placement.ranks.distributed,
        )


def _save_learner(learner: Learner, checkpoint: Path, folder: str) -> None:
    ranks = learner.placement.ranks
    state = full_state(learner.policy, collect=ranks.main)
    heads = full_heads_state(learner.policy)

    def write() -> None:
        save_policy(learner.policy, checkpoint / folder, state)
        save_heads(learner.policy, heads, checkpoint / folder)

    ranks.on_main(write)
    tensors = learner.tensors()
    if tensors:
        writer = HuggingFaceStorageWriter(str(_optimizer_folder(checkpoint, folder)), save_distributed=True)
        with _without_warnings():
            dcp.save(dict(tensors), storage_writer=writer, no_dist=not ranks.distributed)
    ranks.barrier()


def _optimizer_folder(checkpoint: Path, folder: str) -> Path:
    return (checkpoint / STATE).parent / (f"{folder}_optimizer" if folder else "optimizer")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Without warnings of torch that do not concern a user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, fewest iterations first."""
    root = run_dir / "checkpoints"
    return sorted(path for path in root.glob("[0-9]*") if path.is_dir()) if root.is_dir() else []


def read_pointer(run_dir: Path, pointer: str) -> Path | None:
    """The checkpoint that the file `latest` or `best` of a run names; None when there is none."""
    file = run_dir / pointer
    return run_dir / file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else None


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run; damaged ones are named in the log and skipped.

    Raises:
        UserError: there are checkpoints and all of them are damaged.
    """
    _remove_leftovers(run_dir / "checkpoints")
    latest = read_pointer(run_dir, "latest")
    candidates = sorted(checkpoints(run_dir), key=lambda path: (path == latest, path.stat().st_mtime), reverse=True)
    damages: list[Damage] = []
    for folder in candidates:
        damage = verify(folder)
        if damage is None:
            if damages:
                log.warning("continuing from %s instead", folder)
            return folder
        damages.append(damage)
        log.warning("checkpoint %s is damaged: %s", damage.folder, damage.reason)
    if damages:
        raise UserError(f"--resume: every checkpoint of {run_dir} is damaged ({damages[0].reason}); start a new run")
    return None


def verify(folder: Path) -> Damage | None:
    """Compare a checkpoint with its manifest, byte for byte."""
    try:
        body = (folder / MANIFEST).read_bytes()
        if (folder / MANIFEST_DIGEST).read_bytes() != _digest(body).encode():
            return Damage(folder, f"{MANIFEST} or {MANIFEST_DIGEST} has changed")
    except FileNotFoundError as error:
        return Damage(folder, f"{Path(error.filename).name} is missing")
    files = json.loads(body)["files"]
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return Damage(folder, f"{name} is missing")
        if path.stat().st_size != expected["bytes"]:
            return Damage(folder, f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}")
        if _file_digest(path) != expected["sha256"]:
            return Damage(folder, f"{name} has another checksum")
    return None


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The state that was saved with a checkpoint.

    Raises:
        UserError: it is not a checkpoint, or a damaged one.
    """
    if not folder.joinpath(STATE).with_suffix(".json").is_file():
        raise UserError(f"--resume: {folder} is not a checkpoint (no {STATE}.json)")
    damage = verify(folder)
    if damage is not None:
        raise UserError(f"--resume: {folder} is damaged: {damage.reason}; resume from another checkpoint")
    return load_state(folder / STATE)


def versions() -> dict[str, str]:
    """The versions of Python and packages with which a checkpoint is written."""
    names = ("stepcredit", "torch", "transformers", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


@contextmanager
def _explain_write_error(run_dir: Path, partial: Path, ranks: Ranks) -> Iterator[None]:
    """On a full disk or another write error remove the partial checkpoint and raise a `UserError` that says so."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        if ranks.main:
            shutil.rmtree(partial, ignore_errors=True)
        number = error.errno if isinstance(error, OSError) else None
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        latest = read_pointer(run_dir, "latest")
        stays = f"{latest.name} stays" if latest else "there is none before it"
        raise UserError(
            f"cannot write a checkpoint into {run_dir} ({'the disk is full' if full else error}); {stays}. Make room, "
            f"then continue with --run-dir {run_dir} --resume auto"
        ) from error


def _remove_leftovers(root: Path) -> None:
    """Remove what a run left that was killed while it saved."""
    for replaced in root.glob(".*.old"):
        final = root / replaced.name.removeprefix(".").removesuffix(".old")
        if not final.exists():  # it was killed between renaming the old one and renaming the new one
            replaced.rename(final)
    for rest in [*root.glob(".*.old"), *root.glob(".*.part")]:
        shutil.rmtree(rest, ignore_errors=True)


def _write_manifest(folder: Path, score: float | None) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"version": 1, "files": files, "score": score, "versions": versions()}
    body = json.dumps(manifest, indent=1).encode()
    (folder / MANIFEST).write_bytes(body)
    (folder / MANIFEST_DIGEST).write_bytes(_digest(body).encode())


def _best_score(run_dir: Path) -> float:
    best = read_pointer(run_dir, BEST)
    if best is None or not (best / MANIFEST).is_file():
        return float("-inf")
    score = _score(best)
    return float("-inf") if score is None else score


def _score(folder: Path) -> float | None:
    score = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["score"]
    return None if score is None else float(score)


def _write_pointer(run_dir: Path, name: str, folder: Path) -> None:
    """Let a pointer file name a checkpoint, atomically."""
    partial = run_dir / f".{name}.part"
    partial.write_text(f"checkpoints/{folder.name}\n", encoding="utf-8")
    _sync(partial)
    partial.replace(run_dir / name)
    _sync(run_dir)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
