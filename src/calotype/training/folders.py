"""A folder of pictures: which texts describe which of them, and what else lies there. No picture is decoded.

A picture's caption is the first of: what a list says (those of its own folder before those above), the text beside it,
the JSON beside it. Where others say something else, that is told.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath

from calotype.errors import UsageError
from calotype.training.captions import LISTS, TEXTS, Entry, entries, read_bytes, sidecar

PICTURES = ("png", "jpg", "jpeg", "webp")
ABSOLUTE = re.compile(r"/|[A-Za-z]:/")
REPEATS = re.compile(r"\d+_.+")  # kohya's scripts see the pictures of such a folder so many times

# Why files are left alone that people might expect to be read.
WHY = {
    **dict.fromkeys(("bmp", "gif", "avif", "jxl", "tif", "tiff", "heic", "heif"), "such pictures are not read"),
    **dict.fromkeys(("mp4", "webm", "mov", "mkv", "avi"), "films are not read"),
    **dict.fromkeys((*TEXTS, "json"), "no picture's caption"),
    "npz": "kohya's cache of latents",
    "parquet": "tables are not read; metadata.jsonl and metadata.csv are",
}

Captions = tuple[str, ...]


@dataclass(frozen=True)
class Left:
    """Files of one kind that were seen and left alone."""

    kind: str  # the ending in lower case, with its dot; the whole name of files that have none
    count: int
    example: str  # relative to DATA

    def __str__(self) -> str:
        why = WHY.get(self.kind[1:])
        return f"{self.kind} ({self.count}), such as {self.example}" + (f": {why}" if why else "")


@dataclass(frozen=True)
class Found:
    """What a folder holds. Names are relative to it."""

    captioned: tuple[tuple[str, Captions], ...]  # what lists name, in their order; then the others, sorted
    uncaptioned: tuple[str, ...]
    left: tuple[Left, ...]
    differing: tuple[str, ...]  # "a.png: a.txt counts, not a.caption"
    repeats: tuple[str, ...]  # names of folders, such as 10_cat


def search(folder: Path) -> Found:
    """Everything in a folder and below. Raises UsageError for captions that cannot be read or have no picture."""
    names = visible(folder)
    pictures = [name for name in names if kind_of(name) in PICTURES]
    source: dict[str, tuple[str, Captions]] = {}  # picture -> the file whose caption counts, and what it says
    captioned: list[tuple[str, Captions]] = []
    differing: list[str] = []
    used: set[str] = set()
    for file, name, captions in chain(_listed(folder, names, pictures), _beside(folder, names, pictures, source)):
        used.add(file)
        counts, said = source.setdefault(name, (file, captions))
        if counts == file:
            captioned.append((name, captions))
        elif said != captions:
            differing.append(f"{name}: {counts} counts, not {file}")
    folders = {part for name in pictures for part in PurePosixPath(name).parts[:-1]} | {folder.resolve().name}
    return Found(
        tuple(captioned),
        tuple(name for name in pictures if name not in source),
        left_alone(name for name in names if name not in used and name not in source and kind_of(name) not in PICTURES),
        tuple(differing),
        tuple(sorted(name for name in folders if pictures and REPEATS.fullmatch(name))),
    )


def visible(folder: Path) -> list[str]:
    """The files in a folder and below, sorted; without hidden ones, such as the ._a.png that macOS leaves."""
    below = ((path, path.relative_to(folder)) for path in sorted(folder.rglob("*")))
    return [
        name.as_posix()
        for path, name in below
        if not any(part.startswith(".") for part in name.parts) and path.is_file()
    ]


def left_alone(names: Iterable[str]) -> tuple[Left, ...]:
    """Files by kind, the most frequent first."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(f".{kind_of(name)}" if kind_of(name) else PurePosixPath(name).name, []).append(name)
    found = (Left(kind, len(same), same[0]) for kind, same in kinds.items())
    return tuple(sorted(found, key=lambda each: (-each.count, each.kind)))


def kind_of(name: str) -> str:
    """The ending in lower case, without its dot."""
    return PurePosixPath(name).suffix[1:].lower()


def _stem(name: str) -> str:
    return name.removesuffix(PurePosixPath(name).suffix)


# ---- texts beside pictures ----


def _beside(
    folder: Path, names: Sequence[str], pictures: Sequence[str], source: dict[str, tuple[str, Captions]]
) -> Iterator[tuple[str, str, Captions]]:
    """File, picture, captions of every text beside a picture; of a JSON only where nothing else describes the picture.

    `source` has what was found for a picture before.
    """
    texts: dict[str, dict[str, str]] = {}  # stem -> kind -> file
    for name in names:
        if kind_of(name) in (*TEXTS, "json") and PurePosixPath(name).name not in LISTS:
            texts.setdefault(_stem(name), {}).setdefault(kind_of(name), name)
    for picture in pictures:
        found = texts.get(_stem(picture), {})
        for kind in (*TEXTS, "json"):
            if kind not in found or (kind == "json" and picture in source):
                continue
            path = folder / found[kind]
            try:
                captions = sidecar(kind, read_bytes(path), str(path))
            except UsageError:
                if picture not in source:
                    raise
                continue
            if captions:
                yield found[kind], picture, captions


# ---- lists ----


def _listed(folder: Path, names: Sequence[str], pictures: Sequence[str]) -> Iterator[tuple[str, str, Captions]]:
    """File, picture, captions of every entry of every list, the lists of deeper folders first."""
    lists = [name for name in names if PurePosixPath(name).name in LISTS]
    for name in sorted(lists, key=lambda name: (-name.count("/"), LISTS.index(PurePosixPath(name).name), name)):
        said = entries(folder / name)
        known = _Known(folder, PurePosixPath(name).parent, pictures)
        located = [(entry, known.find(entry)) for entry in said]
        missing = [entry for entry, picture in located if picture is None]
        if len(missing) == len(said) > 1:
            raise UsageError(
                f"none of the {len(said)} pictures that {folder / name} names is there (the first is {said[0].name})",
                hint=f"names are relative to the folder of {PurePosixPath(name).name}",
            )
        if missing:
            others = f" ({len(missing)} pictures are missing)" if len(missing) > 1 else ""
            raise UsageError(
                f"{missing[0].where} names {missing[0].name}, which is not there{others}",
                hint="take it out of the list, or put the picture there",
            )
        yield from ((name, picture, entry.captions) for entry, picture in located if picture is not None)


class _Known:
    """The pictures that a list can name: by their paths from its folder `base` on, and by their names alone.

    An ending may be left out, as in kohya's lists.
    """

    def __init__(self, folder: Path, base: PurePosixPath, pictures: Sequence[str]) -> None:
        self._folder, self._base = folder, base
        self._by_path: dict[str, list[str]] = {}
        self._by_name: dict[str, list[str]] = {}
        for picture in pictures:
            if PurePosixPath(picture).is_relative_to(base):
                path = PurePosixPath(picture).relative_to(base)
                for key in (str(path), str(path.with_suffix(""))):
                    self._by_path.setdefault(key, []).append(picture)
                for key in (path.name, path.stem):
                    self._by_name.setdefault(key, []).append(picture)

    def find(self, entry: Entry) -> str | None:
        """The picture, relative to DATA. A path of another machine counts for as much of its end as fits here.

        Raises UsageError where several fit.
        """
        name = entry.name.replace("\\", "/")
        for each in (entry.name, name):
            if os.path.isfile(self._folder / self._base / each):  # also what lies elsewhere
                return os.path.normpath(self._base / each).replace(os.sep, "/")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        tails = ["/".join(parts[i:]) for i in range(len(parts) if ABSOLUTE.match(name) else min(len(parts), 1))]
        fitting = next((self._by_path[tail] for tail in tails if tail in self._by_path), [])
        if not fitting and ABSOLUTE.match(name):
            fitting = self._by_name.get(parts[-1] if parts else "", [])
        if len(fitting) > 1:
            raise UsageError(
                f"{entry.where} names {entry.name}, which may be {fitting[0]} or {fitting[1]}",
                hint="write the path from the list's own folder on, with its ending",
            )
        return fitting[0] if fitting else None
