"""Files by what is in them: SHA-256, kept for the next time until the file changes, as 2 GB take seconds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from calotype import atomic
from calotype.errors import OutputError

DIGITS = 64
State = tuple[int, int]  # size in bytes, time of the last change in ns


@dataclass(frozen=True)
class File:
    """A single file on this machine that something was loaded from, as it was then. It is hashed when that is asked."""

    path: Path
    state: State

    @classmethod
    def of(cls, ref: str | Path | None, path: Path | None = None) -> File | None:
        """`path`, which `ref` led to, or `ref` itself; None for a folder and for what is on the Hub."""
        if ref is None or not os.path.exists(os.path.expanduser(ref)):
            return None
        found = Path(os.path.expanduser(ref) if path is None else path).absolute()
        return cls(found, _state(found)) if found.is_file() else None

    def to_json(self) -> dict[str, str | None]:
        """Its name and hash. The hash is None where the file is gone or was changed since: then nobody knows it."""
        return {"name": self.path.name, "sha256": sha256(self.path, self.state)}


def sha256(path: Path, state: State | None = None) -> str | None:
    """The hash of a file; None where there is none that can be read, or it is in another state."""
    try:
        now = _state(path) if path.is_file() else None
        return None if now is None or state not in (None, now) else _hash(str(path.absolute()), now)
    except (OSError, ValueError):  # it may be gone by now; and no file's name has a zero byte
        return None


def _state(path: Path) -> State:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@cache
def _hash(path: str, state: State) -> str:
    known = _kept().get(path)
    if isinstance(known, dict) and known.get("state") == [*state]:
        digits = known.get("hash")
        if isinstance(digits, str) and len(digits) == DIGITS:
            return digits
    with Path(path).open("rb") as file:
        digits = hashlib.file_digest(file, "sha256").hexdigest()
    if _state(Path(path)) != state:
        raise OSError(f"{path} was changed while it was read")
    _keep(path, {"state": state, "hash": digits})
    return digits


def _file() -> Path:
    return atomic.user_cache("hashes.json")


def _kept() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(path: str, entry: Mapping[str, Any]) -> None:
    """Whole or not at all, and without an error where there is no place for it."""
    file = _file()
    with contextlib.suppress(OSError, OutputError):
        atomic.make_folder(file.parent)
        atomic.write(file, json.dumps({**_kept(), path: entry}).encode())
