"""What has been encoded, in files of some hundred rows: each written whole or not at all, and read by mmap.

A picture's row may have any size; a file keeps rows of one size together. V views of a picture: it, and perhaps its
mirror image. Latents (C, h, w) are scaled, as the U-Net has them.
"""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calotype.atomic import make_folder
from calotype.errors import CalotypeWarning, CheckpointError, UsageError
from calotype.training.pictures import Size, too_many
from calotype.weights.files import read
from calotype.weights.write import Pending, write_safetensors

SHARD = 256  # rows a file: what an interruption can lose
SHOWN = 5  # names in a message

Contents = tuple[Mapping[str, Tensor], Mapping[str, str]]  # tensors, metadata
Making = Generator[int, None, Contents]  # yields how many rows are done, returns what to write


@dataclass(frozen=True, eq=False)
class Shard:
    """A file of the cache, whether it is there or not. Its name says all that decides its content."""

    path: Path
    make: Callable[[], Making]


class Cache(ABC):
    """So many rows, SHARD of them a file."""

    def __init__(self, count: int) -> None:
        self._count = count

    @abstractmethod
    def _shard(self, rows: range) -> Shard:
        """The file of these rows."""

    def paths(self) -> list[Path]:
        """All files, whether they are there or not."""
        return [self._shard(rows).path for rows in self._ranges()]

    def fill(self, rank: int = 0, world: int = 1) -> Iterator[int]:
        """Makes what is missing of every `world`-th file from `rank` on; yields how many rows this process has so far.

        A file that cannot be read is made again, with a warning. Raises OutputError.
        """
        done = 0
        for rows in self._ranges()[rank::world]:
            shard = self._shard(rows)
            if not _is_whole(shard.path):
                making = shard.make()
                while True:
                    try:
                        yield done + next(making)
                    except StopIteration as end:
                        tensors, metadata = end.value
                        break
                make_folder(shard.path.parent)
                pending = {name: Pending.of(tensor) for name, tensor in tensors.items()}
                write_safetensors(shard.path, pending, metadata)
            done += len(rows)
            yield done

    def _ranges(self) -> list[range]:
        return [range(start, min(start + SHARD, self._count)) for start in range(0, self._count, SHARD)]


def load(path: Path) -> Contents:
    """Views of the mapped file, and its metadata. CheckpointError where it cannot be read."""
    tensors = read([path])
    try:
        with safe_open(path, framework="pt") as file:
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _is_whole(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        load(path)
    except CheckpointError as error:
        warnings.warn(f"{error.message}: it is made again", CalotypeWarning, stacklevel=2)
        return False
    return True


# ---- rows ----


@dataclass(frozen=True, eq=False)
class Row:
    """One picture, encoded."""

    position: int  # among the shard's examples
    latents: Tensor  # (V, C, h, w) float16
    sizes: Tensor  # (V, 4) int32: original height, width, the crop's top, left; in pixels
    masked: Tensor | None = None  # (V, 1 + C, h, w) float16: an inpainting U-Net's mask and masked picture


@dataclass(frozen=True)
class Broken:
    """A picture that is left out."""

    position: int
    name: str
    reason: str


def contents(rows: Sequence[Row], broken: Sequence[Broken]) -> Contents:
    """What a shard of pictures holds: for each size "HxW/field" with a row for each picture of that size."""
    sizes: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.position):
        sizes.setdefault("x".join(map(str, row.latents.shape[-2:])), []).append(row)
    tensors: dict[str, Tensor] = {}
    for size, same in sizes.items():
        tensors[f"{size}/latents"] = torch.stack([row.latents for row in same])
        tensors[f"{size}/sizes"] = torch.stack([row.sizes for row in same])
        tensors[f"{size}/position"] = torch.tensor([row.position for row in same], dtype=torch.int32)
        if masked := [row.masked for row in same if row.masked is not None]:
            tensors[f"{size}/masked"] = torch.stack(masked)
    facts = [[one.position, one.name, one.reason] for one in sorted(broken, key=lambda one: one.position)]
    return tensors, {"broken": json.dumps(facts)}  # in ASCII: a tar may name its members by any bytes


class Pictures:
    """All encoded pictures of a data set. Bucket b has counts[b] of them, at latent size sizes[b]."""

    def __init__(self, paths: Sequence[Path], leave_out: Collection[int] = ()) -> None:
        """`paths` are the shards in order; `leave_out` are numbers of examples that are not to be seen.

        Raises CheckpointError for a shard that cannot be read.
        """
        self.broken: list[Broken] = []
        self._shards: list[Mapping[str, Tensor]] = []
        left_out, places = np.array(sorted(leave_out), dtype=np.int64), dict[str, list[np.ndarray]]()
        for index, path in enumerate(paths):
            tensors, metadata = load(path)
            self._shards.append(tensors)
            for position, name, reason in json.loads(metadata.get("broken", "[]")):
                self.broken.append(Broken(index * SHARD + position, name, reason))
            for name in sorted(tensors):
                size, _, field = name.partition("/")
                if field == "position":
                    examples = tensors[name].numpy().astype(np.int64) + index * SHARD
                    where = np.stack([examples, np.full_like(examples, index), np.arange(len(examples))], axis=1)
                    seen = where[~np.isin(examples, left_out)].astype(np.int32)
                    if len(seen):
                        places.setdefault(size, []).append(seen)
        named = sorted(places, key=lambda size: tuple(map(int, size.split("x"))))
        self._names = named
        self._places = [np.concatenate(places[size]) for size in named]  # (n, 3): example, shard, row
        self.sizes: tuple[Size, ...] = tuple((int(size.split("x")[0]), int(size.split("x")[1])) for size in named)
        self.counts: tuple[int, ...] = tuple(map(len, self._places))

    def example(self, bucket: int, place: int) -> int:
        """The number of the example at a place of a bucket."""
        return int(self._places[bucket][place, 0])

    def row(self, bucket: int, place: int, view: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """One view of a picture: latents (C, h, w), sizes (4,), masked (1 + C, h, w); views of mapped files.

        Where the pictures have no mirror images, view 1 is view 0.
        """
        _, shard, row = self._places[bucket][place]
        tensors, size = self._shards[shard], self._names[bucket]
        latents, masked = tensors[f"{size}/latents"][row], tensors.get(f"{size}/masked")
        view = min(view, len(latents) - 1)
        return latents[view], tensors[f"{size}/sizes"][row, view], None if masked is None else masked[row, view]


def judge(broken: Sequence[Broken], total: int) -> None:
    """Warns of broken pictures; UsageError where they are more than a stray few of the `total`."""
    if not broken:
        return
    names = "; ".join(one.reason for one in broken[:SHOWN])
    more = f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
    message = f"{len(broken)} of {total} pictures are broken: {names}{more}"
    if too_many(len(broken), total):
        raise UsageError(message, hint="remove them or save them anew; at most 1 in 100 is left out")
    warnings.warn(f"{message}: left out", CalotypeWarning, stacklevel=3)
