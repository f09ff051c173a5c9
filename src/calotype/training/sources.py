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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calotype.errors import OutputError, UsageError

PICTURES = ("png", "jpg", "jpeg", "webp")
CAPTIONS = ("txt", "caption", "text")  # a member of a tar that is a caption, the best name first; json comes after them
COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tbz2", ".txz", ".tzst")
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
BLOCK = 512  # bytes: a tar consists of blocks, and ends with blocks of zeros
INDEX = 1  # version of the index's format

DATA = "DATA is a folder of captioned pictures, WebDataset tars (name-{000..012}.tar), or a .txt or .jsonl of prompts"
LINE = 'each line looks like {"file_name": "a.png", "text": "a red apple"}'


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
        prompts = tuple(_lines(path) if kind == ".txt" else _json_prompts(path))
        if not prompts:
            raise UsageError(f"{path} holds no prompts", hint="write one on each line")
        return Source(path, prompts=prompts)
    raise UsageError(f"{path} is of no known kind", hint=DATA)


# ---- folders ----


def _open_folder(folder: Path, cache: Path | None) -> Source:
    metadata = folder / "metadata.jsonl"
    if metadata.exists():
        examples = _from_metadata(metadata)
        named = {os.path.normpath(example.file) for example in examples}
        uncaptioned = sum(os.path.normpath(picture) not in named for picture in _pictures(folder))
    else:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        if tars := [folder / name for name in names if name.lower().endswith(".tar")]:
            return _open_tars(folder, tars, cache)
        if packed := [name for name in names if name.lower().endswith(COMPRESSED)]:
            raise _compressed(folder / packed[0])
        pictures = list(_pictures(folder))
        examples = [
            Example(picture.relative_to(folder).as_posix(), (_text(caption),), picture)
            for picture in pictures
            if (caption := picture.with_suffix(".txt")).is_file()
        ]
        uncaptioned = len(pictures) - len(examples)
    if not examples:
        raise UsageError(
            f"{folder} has no captioned pictures" + (f", and {uncaptioned} without a caption" if uncaptioned else ""),
            hint="put a metadata.jsonl there, or a .txt with the caption beside each picture",
        )
    return Source(folder, tuple(examples), uncaptioned=uncaptioned)


def _pictures(folder: Path) -> Iterator[Path]:
    """The pictures in a folder and below, sorted; without hidden ones, such as the ._a.png that macOS leaves."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix[1:].lower() in PICTURES and not hidden and path.is_file():
            yield path


def _from_metadata(path: Path) -> list[Example]:
    """The examples that a metadata.jsonl names. UsageError for a line that is none, and for missing pictures."""
    examples: list[Example] = []
    missing: list[tuple[int, str]] = []
    for number, row in _rows(path, LINE):
        name, captions = row.get("file_name"), _captions(row.get("text"))
        if not isinstance(name, str) or not captions:
            raise _no_caption(path, number, json.dumps(row), LINE)
        if not (path.parent / name).is_file():
            missing.append((number, name))
        examples.append(Example(name, captions, path.parent / name))
    if not missing:
        return examples
    number, name = missing[0]
    if len(missing) == len(examples) > 1:
        raise UsageError(
            f"none of the {len(missing)} pictures that {path} names is there (the first is {name})",
            hint="file_name is relative to the folder of metadata.jsonl",
        )
    others = f" ({len(missing)} pictures are missing)" if len(missing) > 1 else ""
    raise UsageError(
        f"{path} line {number} names {name}, which is not there{others}",
        hint="take the line out, or put the picture there",
    )


# ---- prompts ----


def _json_prompts(path: Path) -> Iterator[str]:
    hint = 'each line looks like {"text": "a red apple"}'
    for number, row in _rows(path, hint):
        if "file_name" in row:
            raise UsageError(
                f"{path} line {number} names a picture: as DATA, a .jsonl holds prompts alone",
                hint="give the folder of pictures, with this file in it as metadata.jsonl",
            )
        captions = _captions(row.get("text"))
        if not captions:
            raise _no_caption(path, number, json.dumps(row), hint)
        yield from captions


def _rows(path: Path, hint: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl file and the numbers of their lines."""
    for number, line in enumerate(_text(path).split("\n"), start=1):  # not splitlines: JSON may hold U+2028 as it is
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} line {number} is not a caption: {error}", hint=hint) from error
        if not isinstance(row, dict):
            raise _no_caption(path, number, line, hint)
        yield number, row


def _no_caption(path: Path, number: int, line: str, hint: str) -> UsageError:
    return UsageError(f"{path} line {number} is not a caption: {line[:60]}", hint=hint)


def _captions(value: object) -> tuple[str, ...]:
    """A caption or a list of them, as JSON has it; empty where it is neither."""
    found = value if isinstance(value, list) else [value]
    texts = tuple(each.strip() for each in found if isinstance(each, str))
    return texts if len(texts) == len(found) else ()


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in _text(path).splitlines() if line.strip()]


def _text(path: Path) -> str:
    """A text file's content, without a byte order mark and the space around it."""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8: {error.reason}", hint="save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {_reason(error)}") from error


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
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(json.dumps(value), encoding="utf-8")
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{str(file)!r} cannot be written: {_reason(error)}", "choose another place") from error


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


def _described(tar: Path, file: int, sample: _Sample) -> tuple[str, ...]:
    """A sample's captions; empty where it has none."""
    for kind in (*CAPTIONS, "json"):
        if kind not in sample:
            continue
        member = sample[kind]
        try:
            text = os.pread(file, member.size, member.offset_data).decode("utf-8-sig").strip()
            if kind != "json":
                return (text,)
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{tar}:{member.name} is not a caption: {error}", hint="it must be UTF-8") from error
        if isinstance(row, dict):
            return _captions(row.get("text")) or _captions(row.get("caption"))
    return ()


def _compressed(path: Path) -> UsageError:
    return UsageError(f"{path} is compressed: only plain tars are read, from any place in them", hint="decompress it")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
