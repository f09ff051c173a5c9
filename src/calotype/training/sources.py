"""Where training pictures come from: a folder, WebDataset tars, or prompts whose pictures the teacher draws.

Nothing is extracted and no picture is decoded here: an Example knows where its bytes are. torch is not imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calotype import atomic
from calotype.errors import UsageError
from calotype.training.captions import LISTS, TEXTS, read_text, sidecar
from calotype.training.captions import prompts as in_jsonl
from calotype.training.folders import PICTURES, Left, left_alone, search, visible

COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tbz2", ".txz", ".tzst")
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
BLOCK = 512  # bytes: a tar consists of blocks, and ends with blocks of zeros
INDEX = 2  # version of the index's format

DATA = "DATA is a folder of captioned pictures, WebDataset tars (name-{000..012}.tar), or a .txt or .jsonl of prompts"


@dataclass(frozen=True, slots=True)
class Example:
    """One picture, which is read when it is needed, and the captions that fit it."""

    name: str  # for people: relative to DATA, or "shard-000.tar:00012.jpg"
    captions: tuple[str, ...]  # at least one
    file: Path
    offset: int = 0  # bytes, of a member in a tar
    length: int | None = None  # None: the whole file

    def read(self) -> bytes:
        """The picture's bytes. Raises UsageError where they cannot be read (any more)."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                data = file.read() if self.length is None else file.read(self.length)
        except OSError as error:
            raise UsageError(f"{self.name} cannot be read: {_reason(error)}") from error
        if self.length is not None and len(data) < self.length:
            raise UsageError(f"{self.name} is cut off: {len(data)} of {self.length} bytes are there")
        return data


@dataclass(frozen=True)
class Source:
    """What DATA holds: either examples or prompts."""

    path: Path
    examples: tuple[Example, ...] = ()
    prompts: tuple[str, ...] = ()  # the pictures of which the teacher is to draw
    uncaptioned: int = 0  # pictures that nothing describes: they are left out
    left: tuple[Left, ...] = ()  # other files in the folder
    differing: tuple[str, ...] = ()  # pictures that two files describe differently, and which counts
    repeats: tuple[str, ...] = ()  # folders named as kohya's are, for how often to see their pictures


def open_source(path: Path, cache: Path | None = None) -> Source:
    """All examples of DATA in a fixed order. `cache` is a folder that keeps what was found in each tar.

    Raises UsageError where there is nothing, a picture is missing, or a file is unreadable.
    """
    if path.is_dir():
        return _open_folder(path, cache)
    kind = path.suffix.lower()
    if path.name.lower().endswith(COMPRESSED):
        raise _compressed(path)
    if kind == ".tar":
        return _open_tars(path, _expanded(path), cache)
    if not path.is_file():
        raise UsageError(f"{path} is not there", hint=DATA)
    if kind in (".txt", ".jsonl"):
        prompts = tuple(_lines(path) if kind == ".txt" else in_jsonl(path))
        if not prompts:
            raise UsageError(f"{path} holds no prompts", hint="write one on each line")
        return Source(path, prompts=prompts)
    raise UsageError(f"{path} is of no known kind", hint=DATA)


# ---- folders ----


def _open_folder(folder: Path, cache: Path | None) -> Source:
    if not any((folder / name).exists() for name in LISTS[:2]):
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        if tars := [name for name in names if name.lower().endswith(".tar")]:
            source = _open_tars(folder, [folder / name for name in tars], cache)
            return replace(source, left=left_alone(name for name in visible(folder) if name not in tars))
        if packed := [name for name in names if name.lower().endswith(COMPRESSED)]:
            raise _compressed(folder / packed[0])
    found = search(folder)
    if not found.captioned:
        raise UsageError(
            f"{folder} has no captioned pictures"
            + (f", and {len(found.uncaptioned)} without a caption" if found.uncaptioned else "")
            + "".join(f"; {each}" for each in found.left),
            hint="put a metadata.jsonl there, or a .txt with the caption beside each picture",
        )
    examples = tuple(Example(name, captions, folder / name) for name, captions in found.captioned)
    return Source(folder, examples, (), len(found.uncaptioned), found.left, found.differing, found.repeats)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


# ---- tars ----


def _expanded(path: Path) -> list[Path]:
    """`name-{000..012}.tar` as thirteen paths; any other path as itself. UsageError where one is not there."""
    paths = [path] if path.exists() else [Path(each) for each in _braces(str(path))]
    missing = [each for each in paths if not each.is_file()]
    if missing:
        more = f", nor are {len(missing) - 1} others of {len(paths)}" if len(missing) > 1 else ""
        raise UsageError(f"{missing[0]} is not there{more}", hint=DATA)
    return paths


def _braces(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    if int(first) > int(last):
        raise UsageError(f"{match[0]} counts downwards: must be {{first..last}}")
    head, tail = pattern[: match.start()], _braces(pattern[match.end() :])
    return [f"{head}{i:0{len(first)}}{rest}" for i in range(int(first), int(last) + 1) for rest in tail]


def _open_tars(path: Path, tars: Sequence[Path], cache: Path | None) -> Source:
    examples: list[Example] = []
    uncaptioned = 0
    for tar in tars:
        found = _indexed(tar, cache)
        uncaptioned += found["uncaptioned"]
        for name, offset, length, captions in found["pictures"]:
            examples.append(Example(f"{tar.name}:{name}", tuple(captions), tar, offset, length))
    if not examples:
        raise UsageError(
            f"{path} has no captioned pictures" + (f", and {uncaptioned} without a caption" if uncaptioned else ""),
            hint="a picture 12.jpg has its caption in 12.txt, or as text or caption in 12.json, in the same tar",
        )
    return Source(path, tuple(examples), uncaptioned=uncaptioned)


def _indexed(tar: Path, cache: Path | None) -> dict[str, Any]:
    """{"pictures": [[name, offset, length, captions], ...], "uncaptioned": n} of a tar, from the cache if it is there.

    A tar that was changed has another size or time, and so another key.
    """
    if cache is None:
        return _scan(tar)
    status = tar.stat()
    key = [INDEX, str(tar.resolve()), status.st_size, status.st_mtime_ns]
    file = cache / f"{tar.stem[:60]}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.keys() == {"pictures", "uncaptioned"}:
            return found
    found = _scan(tar)
    write_json(file, found)
    return found


def write_json(file: Path, value: object) -> None:
    """Whole or not at all, also where several processes write the same. Raises OutputError."""
    atomic.make_folder(file.parent)
    atomic.write(file, json.dumps(value).encode())


def _scan(tar: Path) -> dict[str, Any]:
    """Reads a tar's headers and captions, once from its beginning to its end."""
    try:
        with tar.open("rb") as file:
            if file.read(6).startswith(MAGIC):
                raise _compressed(tar)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                found = _pairs(tar, _samples(archive))
                end = archive.offset
            # tarfile takes a damaged header for the end.
            file.seek(end)
            if file.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError(f"no end where it should be, at byte {end}")
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{tar} is truncated, or no tar: {_reason(error)}", hint="download or copy it again"
        ) from error
    return found


class _Sample(dict[str, tarfile.TarInfo]):
    """The members that belong together, by their extension in lower case."""


def _samples(archive: tarfile.TarFile) -> list[_Sample]:
    """WebDataset's rule: the path up to the first dot in the file's name is the key, and what follows the kind.

    Members need not stand side by side, as they do in a tar that WebDataset wrote. An extension that is there already
    begins a new sample.
    """
    samples: list[_Sample] = []
    newest: dict[str, _Sample] = {}
    for member in archive:
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not member.isreg() or member.issparse() or not stem or not extension:
            continue
        key, kind = folder + slash + stem, extension.lower()
        if key not in newest or kind in newest[key]:
            newest[key] = _Sample()
            samples.append(newest[key])
        newest[key][kind] = member
    return samples


def _pairs(tar: Path, samples: Sequence[_Sample]) -> dict[str, Any]:
    """What the index keeps of the samples: pictures and their captions."""
    pictures: list[list[Any]] = []
    uncaptioned = 0
    with tar.open("rb") as file:
        for sample in samples:
            picture = next((member for kind, member in sample.items() if kind in PICTURES), None)
            if picture is None:
                continue
            captions = _described(tar, file.fileno(), sample)
            if captions:
                pictures.append([picture.name, picture.offset_data, picture.size, list(captions)])
            else:
                uncaptioned += 1
    return {"pictures": pictures, "uncaptioned": uncaptioned}


def _described(tar: Path, file: int, sample: _Sample) -> Sequence[str]:
    """A sample's captions; empty where it has none."""
    for kind in (*TEXTS, "json"):
        if kind in sample:
            member = sample[kind]
            return sidecar(kind, os.pread(file, member.size, member.offset_data), f"{tar}:{member.name}")
    return ()


def _compressed(path: Path) -> UsageError:
    return UsageError(f"{path} is compressed: only plain tars are read, from any place in them", hint="decompress it")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
