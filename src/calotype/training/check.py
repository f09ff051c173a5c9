"""Training data looked at before hours are spent on it: what `calotype distill --check DATA` says.

torch is not imported.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from calotype.errors import UsageError
from calotype.training.folders import Left
from calotype.training.pictures import Size, enlarged, sizes_for, too_many, views
from calotype.training.sources import Example, Source, open_source

THREADS = 4
PIECE = 64  # pictures between two reports of progress
SHOWN = 10  # names in the report for people; JSON has all


@dataclass(frozen=True)
class DataReport:
    """What DATA holds. Sizes are (height, width) in pixels."""

    path: str
    resolution: int
    examples: int  # captioned pictures, broken ones included
    uncaptioned: int  # pictures without a caption, which are left out
    prompts: int  # without pictures: those the teacher will draw
    captions: int  # of all pictures, or the prompts
    empty: int  # captions without a word
    shortest: int  # words of a caption
    longest: int
    smallest: Size | None  # by area; None without a picture
    largest: Size | None
    enlarged: int  # pictures with fewer pixels than the resolution asks for
    buckets: tuple[tuple[Size, int], ...]  # what pictures are cut to, and how many to each
    duplicates: tuple[tuple[str, ...], ...]  # names of pictures with the same bytes
    broken: tuple[tuple[str, str], ...]  # name, reason
    left: tuple[Left, ...]  # files that were seen and left alone
    differing: tuple[str, ...]  # pictures that two files describe differently, and which counts
    repeats: tuple[str, ...]  # folders that are named as kohya's

    @property
    def passes(self) -> bool:
        """Whether training would begin."""
        return not too_many(len(self.broken), self.examples)

    def to_json(self) -> dict[str, object]:
        """All of it, as JSON has it."""
        plain = asdict(self)
        plain["broken"] = [{"name": name, "reason": reason} for name, reason in self.broken]
        plain["buckets"] = [{"height": h, "width": w, "pictures": count} for (h, w), count in self.buckets]
        return {**plain, "passes": self.passes}

    def lines(self) -> list[str]:
        """For people."""
        if self.prompts:
            found = [f"{self.path}: {_many(self.prompts, 'prompt')}; the teacher will draw the pictures"]
        else:
            found = [f"{self.path}: {_many(self.examples, 'captioned picture')}"]
        words = f"{self.shortest} to {self.longest} words" if self.shortest != self.longest else f"{self.longest} words"
        found.append(f"captions: {self.captions}, of {words}" + (f"; {self.empty} empty" if self.empty else ""))
        if self.uncaptioned:
            found.append(f"without a caption, and left out: {_many(self.uncaptioned, 'picture')}")
        if self.smallest and self.largest:
            found.append(f"sizes: {_size(self.smallest)} to {_size(self.largest)} (width x height)")
        if self.enlarged:
            found.append(f"too small for {self.resolution} pixels, and enlarged: {_many(self.enlarged, 'picture')}")
        most = max((count for _, count in self.buckets), default=0)
        for size, count in self.buckets:
            found.append(f"  {_size(size):>9} {count:>7} {'#' * max(1, round(30 * count / most))}")
        found += _listed("with the same bytes as another", [" = ".join(names) for names in self.duplicates])
        found += _listed("described twice, and differently", self.differing)
        if self.repeats:
            found.append(f"folders named as for kohya's scripts: {', '.join(self.repeats)}; their repeats are not read")
        found += _listed("seen and left alone, kinds of files", [str(each) for each in self.left])
        found += _listed("broken", [reason for _, reason in self.broken])
        found.append("ready to train" if self.passes else "too many are broken: at most 1 in 100 is left out")
        return found


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _size(size: Size) -> str:
    return f"{size[1]}x{size[0]}"


def _listed(title: str, entries: Sequence[str]) -> list[str]:
    if not entries:
        return []
    more = [f"  and {len(entries) - SHOWN} more"] if len(entries) > SHOWN else []
    return [f"{title}: {len(entries)}", *(f"  {entry}" for entry in entries[:SHOWN]), *more]


def checking(
    path: Path, resolution: int, unit: int = 64, buckets: bool = True, cache: Path | None = None
) -> Iterator[int | DataReport]:
    """Decodes every picture of DATA. Yields how many are looked at so far, at last the DataReport.

    unit: what the sides of a bucket are multiples of. cache: a folder for the indices of tars. Raises UsageError where
    there is nothing to train on, as training would.
    """
    sizes = sizes_for(resolution, unit, buckets)
    source = open_source(path, cache)
    seen: list[_Seen] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(source.examples), PIECE):
            seen += pool.map(lambda one: _look(one, sizes), source.examples[start : start + PIECE])
            yield len(seen)
    yield _report(source, seen, resolution)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What there is to say of one picture."""

    name: str
    digest: str | None = None  # of its bytes
    size: Size | None = None
    bucket: Size | None = None
    reason: str | None = None  # why it is broken


def _look(example: Example, sizes: Sequence[Size]) -> _Seen:
    digest = None
    try:
        data = example.read()
        digest = hashlib.sha256(data).hexdigest()
        ((picture, view),) = views(example, data, sizes)
    except UsageError as error:
        return _Seen(example.name, digest, reason=error.message)
    return _Seen(example.name, digest, view.original, (picture.height, picture.width))


def _report(source: Source, seen: Sequence[_Seen], resolution: int) -> DataReport:
    captions = source.prompts or tuple(caption for example in source.examples for caption in example.captions)
    words = [len(caption.split()) for caption in captions]
    whole = [(one.size, one.bucket) for one in seen if one.size is not None and one.bucket is not None]
    by_area = sorted((size for size, _ in whole), key=lambda size: (size[0] * size[1], size))
    same: dict[str, list[str]] = {}
    for one in seen:
        if one.digest is not None:
            same.setdefault(one.digest, []).append(one.name)
    return DataReport(
        path=str(source.path),
        resolution=resolution,
        examples=len(source.examples),
        uncaptioned=source.uncaptioned,
        prompts=len(source.prompts),
        captions=len(captions),
        empty=words.count(0),
        shortest=min(words),
        longest=max(words),
        smallest=by_area[0] if by_area else None,
        largest=by_area[-1] if by_area else None,
        enlarged=sum(enlarged(size, bucket) for size, bucket in whole),
        buckets=tuple(sorted(Counter(bucket for _, bucket in whole).items(), key=lambda each: each[0][1])),
        duplicates=tuple(tuple(names) for names in same.values() if len(names) > 1),
        broken=tuple((one.name, one.reason) for one in seen if one.reason is not None),
        left=source.left,
        differing=source.differing,
        repeats=source.repeats,
    )
