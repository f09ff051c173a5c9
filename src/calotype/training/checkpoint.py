"""What an interrupted run goes on from: written beside, synced, renamed, and listed with hashes.

A checkpoint is a folder `step-00000500` of safetensors shards, as torch.distributed.checkpoint writes them: what two
processes saved, one can load. `state.json` has the step and the run's history; `manifest.json` the size and SHA-256 of
every file. A folder without a manifest, or with a file that is not as listed, is none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from calotype.errors import CalotypeWarning, CheckpointError, OutputError
from calotype.training.ranks import Ranks

STATE, MANIFEST = "state.json", "manifest.json"
FILE, FILES = 16 << 20, 64  # bytes of a file, about; more, where there would be more files than that
NAME = re.compile(r"step-(\d{8})")


def write(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], ranks: Ranks) -> Path:
    """Writes the checkpoint of a step into `folder`, whole or not at all. All ranks call it. Raises OutputError."""
    path = folder / f"step-{step:08d}"
    # By a name that all ranks know, and that finds what a killed run has left: calotype.atomic has neither.
    temporary = path.with_name(f"{path.name}.part")
    problem = None
    if ranks.first:
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            problem = error.strerror or str(error)
    problem = ranks.broadcast(problem)
    if problem is None:
        try:
            writer = HuggingFaceStorageWriter(str(temporary), _files(tensors), save_distributed=True)
            with _alone(ranks):
                save(dict(tensors), storage_writer=writer, no_dist=ranks.world == 1)
            if ranks.first:
                _seal(temporary, state)
                shutil.rmtree(path, ignore_errors=True)  # of a run that went on from an older one
                temporary.rename(path)
                _sync(folder)
        except (OSError, CheckpointException) as error:
            problem = _reason(error)
    problem = ranks.broadcast(problem)
    if problem is not None:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(
            f"the checkpoint of step {step} cannot be written to {str(folder)!r}: {problem}",
            "the ones before it are as they were: make room, and go on with --resume",
        )
    return path


def read(path: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fills `tensors` in place from a checkpoint. All ranks call it. Raises CheckpointError if it is another run's."""
    try:
        with _alone(ranks):
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=ranks.world == 1)
    except (CheckpointException, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint of this run: {_reason(error)}") from None


def state_of(path: Path) -> dict[str, Any]:
    """What was saved beside the tensors."""
    found: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    return found


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None where there never was one.

    One that is damaged is named in a warning and passed over. Raises CheckpointError if that leaves none.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        damage = _damage(path)
        if damage is None:
            return path
        message = f"{path.name} is damaged ({damage}): it is passed over, and the one before it used"
        warnings.warn(message, CalotypeWarning, stacklevel=2)
    if found:
        raise CheckpointError(f"every checkpoint in {folder} is damaged", "start anew in another folder")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run by their step, whole or damaged."""
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def prune(folder: Path, limit: int, kept: int | None) -> None:
    """Removes all but the newest `limit` checkpoints and that of step `kept`."""
    for path in checkpoints(folder)[:-limit]:
        if step_of(path) != kept:
            shutil.rmtree(path)


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Which file each tensor goes to, from 1: torch holds twice a file's tensors in memory while it writes it."""
    found, size = {}, 0
    most = max(FILE, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) // FILES)
    for name, tensor in tensors.items():
        size += tensor.numel() * tensor.element_size()
        found[name] = 1 + size // most
    return found


@contextmanager
def _alone(ranks: Ranks) -> Iterator[None]:
    """Keeps torch from warning a process that knows that it is alone."""
    with warnings.catch_warnings():
        if ranks.world == 1:
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


# ---- the manifest ----


def _seal(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes the state and the list of all files, and has the system write everything to the disk."""
    (folder / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    listed = {file.name: {"bytes": file.stat().st_size, "sha256": _hash(file)} for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(listed, indent=2), encoding="utf-8")
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None: nothing."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in listed.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes of {entry['bytes']}"
            if _hash(file) != entry["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or not legible"
    return None


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """An error in one line; torch's wraps what each process met."""
    causes = list(_causes(error))
    system = next((cause for cause in causes if isinstance(cause, OSError) and cause.strerror), None)
    return str(system.strerror).lower() if system else str(causes[-1]).strip().splitlines()[-1]


def _causes(error: BaseException) -> Iterator[BaseException]:
    yield error
    if isinstance(error, CheckpointException):
        for _, (cause, _) in error.failures.items():
            yield from _causes(cause)
