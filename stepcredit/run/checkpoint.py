"""Checkpoints: a folder that `from_pretrained` loads, plus `trainer_state/` and a manifest of checksums.

The optimisers' state is written by torch.distributed.checkpoint in safetensors files, each process its shards, so that
a run can go on with another number of processes; everything else is written by the first.

A checkpoint is written beside the others, synced, renamed, and only then named in `latest`; older ones go afterwards.
So a run that is killed at any moment has a whole checkpoint, and one that was damaged later is found by its checksums.
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

from stepcredit.errors import UserError
from stepcredit.learn.adapters import has_adapters, load_adapters
from stepcredit.learn.learner import Learner
from stepcredit.learn.placement import full_state, heads_state, put_heads, put_state
from stepcredit.policy.heads import save_heads, saved_heads
from stepcredit.policy.loading import save_policy
from stepcredit.policy.weights import ADAPTER, Names, load_network
from stepcredit.processes.ranks import Ranks
from stepcredit.run.state import load_state, save_state

log = logging.getLogger("stepcredit")

STATE = "trainer_state/state"
MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
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

    All processes of a run call this; they see one file system.

    Args:
        learners: what learns, by the folder inside the checkpoint; "" is the checkpoint itself.
        state: whatever `load_checkpoint` should give back.
        score: of this model; the checkpoint with the highest one is named in `best` and kept too.

    Raises:
        UserError: it could not be written; the checkpoints before it are untouched.
    """
    root = run_dir / "checkpoints"
    final, beside, aside = root / name, root / f".{name}.part", root / f".{name}.old"
    ranks = next(iter(learners.values())).placement.ranks

    def begin() -> None:
        _tidy(root)
        (beside / STATE).parent.mkdir(parents=True)

    def end() -> None:
        nonlocal score
        save_state(state, beside / STATE)
        if score is None and final.exists():  # written anew with the same weights
            score = _score(final)
        _write_manifest(beside, score)
        for path in [*beside.rglob("*"), beside]:
            _sync(path)
        if final.exists():  # of a run that went back: out of the way, but there until the new one stands
            final.rename(aside)
        beside.rename(final)
        _sync(root)
        _point(run_dir, "latest", final)
        if score is not None and score >= _best_score(run_dir):
            _point(run_dir, BEST, final)
        shutil.rmtree(aside, ignore_errors=True)
        spared = {final, pointed(run_dir, BEST)}
        older = [path for path in checkpoints(run_dir) if path not in spared]
        older.sort(key=lambda path: path.stat().st_mtime)
        for old in older[: max(0, len(older) + 1 - keep)]:
            shutil.rmtree(old)

    with _space(run_dir, beside, ranks):
        ranks.first(begin)
        for folder, learner in learners.items():
            _save_learner(learner, beside, folder)
        ranks.first(end)
    return final


def load_learner(learner: Learner, checkpoint: Path, folder: str) -> None:
    """Bring a model and its optimiser to where a checkpoint has them; all processes call this.

    Args:
        folder: inside the checkpoint; "" for the policy.

    Raises:
        UserError: the checkpoint lacks weights, or has some of another size or that are not finite.
    """
    policy, place = learner.policy, checkpoint / folder
    if has_adapters(policy) != (place / ADAPTER).is_file():
        have, rank = ("no adapters", "--lora.rank 0") if has_adapters(policy) else ("adapters", "its --lora.rank")
        raise UserError(f"--resume: '{place}' has {have}; continue with {rank}, or start a new run")
    if has_adapters(policy):
        load_adapters(policy, place, "--resume")
    else:
        put_state(policy, load_network(str(place), "--resume", type(policy.model)).state_dict())
    heads = saved_heads(place, "--resume")
    own = policy.heads.state_dict()
    Names.between(heads, own).check(f"--resume: the heads of '{place}'", len(own), "they are of another run")
    put_heads(policy, heads)
    place = _optimizer_folder(checkpoint, folder)
    if not place.is_dir():
        return  # it had not taken a step
    wanted = learner.tensors(fill=True)
    with _quiet():
        dcp.load(
            wanted, storage_reader=HuggingFaceStorageReader(str(place)), no_dist=not learner.placement.ranks.grouped
        )


def _save_learner(learner: Learner, checkpoint: Path, folder: str) -> None:
    ranks = learner.placement.ranks
    state = full_state(learner.policy, keep=ranks.main)
    heads = heads_state(learner.policy)

    def write() -> None:
        save_policy(learner.policy, checkpoint / folder, state)
        save_heads(heads, checkpoint / folder)

    ranks.first(write)
    tensors = learner.tensors()
    if tensors:
        writer = HuggingFaceStorageWriter(str(_optimizer_folder(checkpoint, folder)), save_distributed=True)
        with _quiet():
            dcp.save(dict(tensors), storage_writer=writer, no_dist=not ranks.grouped)
    ranks.wait()


def _optimizer_folder(checkpoint: Path, folder: str) -> Path:
    return (checkpoint / STATE).parent / (f"{folder}_optimizer" if folder else "optimizer")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without remarks of torch that tell a user nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, fewest iterations first."""
    root = run_dir / "checkpoints"
    return sorted(path for path in root.glob("[0-9]*") if path.is_dir()) if root.is_dir() else []


def pointed(run_dir: Path, pointer: str) -> Path | None:
    """The checkpoint that the file `latest` or `best` of a run names; None when there is none."""
    file = run_dir / pointer
    return run_dir / file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else None


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are named in the log and passed over.

    Raises:
        UserError: there are checkpoints and all of them are damaged.
    """
    _tidy(run_dir / "checkpoints")
    latest = pointed(run_dir, "latest")
    candidates = sorted(checkpoints(run_dir), key=lambda path: (path == latest, path.stat().st_mtime), reverse=True)
    damages: list[Damage] = []
    for folder in candidates:
        damage = verify(folder)
        if damage is None:
            if damages:
                log.warning("going on from %s instead", folder)
            return folder
        damages.append(damage)
        log.warning("checkpoint %s is damaged: %s", damage.folder, damage.reason)
    if damages:
        raise UserError(f"--resume: no checkpoint of {run_dir} is whole ({damages[0].reason}); start a new run")
    return None


def verify(folder: Path) -> Damage | None:
    """Compare a checkpoint with its manifest, byte for byte."""
    try:
        body = (folder / MANIFEST).read_bytes()
        if (folder / SEAL).read_bytes() != _digest(body).encode():
            return Damage(folder, f"{MANIFEST} or {SEAL} has changed")
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
        UserError: it is no checkpoint, or a damaged one.
    """
    if not folder.joinpath(STATE).with_suffix(".json").is_file():
        raise UserError(f"--resume: {folder} is not a checkpoint (no {STATE}.json)")
    damage = verify(folder)
    if damage is not None:
        raise UserError(f"--resume: {folder} is damaged: {damage.reason}; resume from another checkpoint")
    return load_state(folder / STATE)


def versions() -> dict[str, str]:
    """What a checkpoint was made with."""
    names = ("stepcredit", "torch", "transformers", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


@contextmanager
def _space(run_dir: Path, beside: Path, ranks: Ranks) -> Iterator[None]:
    """A full disk or another fault of the place leaves the run as it was, with a line that says so."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        if ranks.main:
            shutil.rmtree(beside, ignore_errors=True)
        number = error.errno if isinstance(error, OSError) else None
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        latest = pointed(run_dir, "latest")
        stays = f"{latest.name} stays" if latest else "there is none before it"
        raise UserError(
            f"cannot write a checkpoint into {run_dir} ({'the disk is full' if full else error}); {stays}. Make room, "
            f"then continue with --run-dir {run_dir} --resume auto"
        ) from error


def _tidy(root: Path) -> None:
    """Clear away what a run left behind that was killed while it saved."""
    for aside in root.glob(".*.old"):
        final = root / aside.name.removeprefix(".").removesuffix(".old")
        if not final.exists():  # it was killed between taking the old one away and putting the new one there
            aside.rename(final)
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
    (folder / SEAL).write_bytes(_digest(body).encode())


def _best_score(run_dir: Path) -> float:
    best = pointed(run_dir, BEST)
    if best is None or not (best / MANIFEST).is_file():
        return float("-inf")
    score = _score(best)
    return float("-inf") if score is None else score


def _score(folder: Path) -> float | None:
    score = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["score"]
    return None if score is None else float(score)


def _point(run_dir: Path, name: str, folder: Path) -> None:
    """Let a pointer file name a checkpoint, in one step."""
    beside = run_dir / f".{name}.part"
    beside.write_text(f"checkpoints/{folder.name}\n", encoding="utf-8")
    _sync(beside)
    beside.replace(run_dir / name)
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
