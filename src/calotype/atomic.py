"""Files and folders that appear whole or not at all: written under another name beside their place, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calotype.errors import OutputError


def write(path: Path, content: bytes) -> None:
    """A file of this content. Raises OutputError."""
    if os.path.isdir(path):  # not Path.is_dir, which raises where a folder on the way may not be searched
        raise OutputError(f"{str(path)!r} is a directory", f"name a file in it: {path / 'new'}{path.suffix}")
    if not os.path.isdir(path.parent):
        raise OutputError(f"there is no folder {str(path.parent)!r}", "make it first")
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except ValueError as error:  # a zero byte in the name
        raise OutputError(f"{str(path)!r} cannot be written: {error}") from error


def user_cache(name: str) -> Path:
    """What is kept under that name in the user's cache, for this program."""
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser() / "calotype" / name


def make_folder(path: Path) -> None:
    """The folder, and those it is in, where they are not there yet. Raises OutputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be made: {error.strerror or error}", "choose another place") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file to, which takes the place of `path` in the end; where that fails, nothing is left of it.

    Raises OutputError for what the system refuses.
    """
    with _as_output_error(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:80]}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())  # its content first, then its name
            temporary.chmod(0o666 & ~_umask())  # a temporary file is its owner's alone
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `path` in the end, as `replacing` does for a file."""
    with _as_output_error(path), tempfile.TemporaryDirectory(prefix=f".{path.name[:80]}.", dir=path.parent) as name:
        temporary, before = Path(name) / "new", Path(name) / "before"
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rename(before)
        try:
            temporary.rename(path)
        except OSError:
            if before.exists():
                before.rename(path)
            raise


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{str(path)!r} cannot be written: {(error.strerror or str(error)).lower()}", "choose another place"
        ) from error


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
