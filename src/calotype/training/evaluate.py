"""How far few-step pictures are from the teacher's 50-step ones: what `calotype eval` runs.

The measure is the kernel distance of calotype.training.distance on the features of calotype.training.features.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from calotype.errors import OutputError, UsageError
from calotype.generate import Guidance
from calotype.parts import Parts
from calotype.prepare import condition
from calotype.sampling import SAMPLERS, draw_noise, draws_needed, grid_for
from calotype.training.distance import Estimate, kid, paired_distance
from calotype.training.features import FeatureNet, features, load_features

TEACHER_STEPS = 50
OTHER_SEEDS = 1_000_000  # from the seeds of the teacher's pictures to those of its second set, the floor
SHARD = 40  # pictures a file of the cache: what an interruption can lose
EXAMPLES = 16  # pictures of each set that are kept to be looked at


# ---- pictures, many prompts at a time ----


@dataclass(frozen=True)
class Series:
    """One set of pictures to draw: the i-th has the i-th prompt and seed."""

    parts: Parts
    sampler: str
    steps: int
    guidance: float
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    def shards(self, size: int) -> list[Series]:
        starts = range(0, len(self.prompts), size)
        return [replace(self, prompts=self.prompts[i : i + size], seeds=self.seeds[i : i + size]) for i in starts]

    @property
    def grid(self) -> Sequence[float]:
        """The timesteps. UsageError if there are not that many."""
        return grid_for(self.sampler, self.parts.schedule, self.steps)

    def draw(self) -> Tensor:
        """The pictures (n, 3, H, W) in uint8."""
        return draw(self.parts, self.prompts, self.seeds, self.sampler, self.grid, self.guidance)


@torch.inference_mode()
def draw(
    parts: Parts, prompts: Sequence[str], seeds: Sequence[int], sampler: str, grid: Sequence[float], guidance: float
) -> Tensor:
    """Pictures (n, 3, H, W) in uint8 of n different prompts and seeds, at the model's default size, in one batch.

    Guidance is by embedding where the network has one, else by a second evaluation on the empty prompt.
    """
    weight = next(parts.unet.parameters())
    vae = parts.vae.config
    shape = (vae.latent_channels, parts.defaults.height // vae.downscale, parts.defaults.width // vae.downscale)
    noise = [each.to(weight) for each in draw_noise(seeds, shape, draws_needed(sampler, len(grid)))]
    text, empty = condition(parts, prompts, "", guidance, (parts.defaults.width, parts.defaults.height))
    guide = Guidance(parts.schedule, guidance, empty)
    steps = SAMPLERS[sampler](parts.schedule, grid, noise)
    for ev in steps:
        latents = steps.send(guide(parts.unet, ev, text)).x
    latents = latents / vae.scaling_factor + vae.shift_factor
    pixels = parts.vae.decode(latents.to(next(parts.vae.parameters()).dtype))
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8).contiguous()


# ---- the cache of the teacher's pictures ----


def fingerprint(parts: Parts) -> str:
    """A hash of all that decides a model's pictures."""
    digest = hashlib.sha256()
    for module in (*parts.text.models, parts.unet, parts.vae):
        digest.update(repr(module.config).encode())
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    schedule = parts.schedule
    rest = (schedule.prediction, schedule.spacing, schedule.set_alpha_to_one, schedule.clip_sample)
    digest.update(schedule.alpha.cpu().numpy().data)
    digest.update(repr((rest, parts.defaults.width, parts.defaults.height, parts.zero_empty_negative)).encode())
    return digest.hexdigest()


def cached(series: Series, batch: int, folder: Path | None, model: str) -> Iterator[tuple[Tensor, float]]:
    """The pictures of a series, piece by piece, each with the seconds that it took to draw.

    A piece is read from `folder` if it is there, else drawn, `batch` pictures at a time, and kept there. Without a
    folder all are drawn. `model` is the fingerprint of the series' parts. OutputError if the folder can't be written.
    """
    for shard in series.shards(SHARD if folder is not None else batch):
        if folder is None:
            yield _draw_timed(shard, batch)
            continue
        facts = (model, shard.sampler, shard.steps, shard.guidance, shard.prompts, shard.seeds)
        file = folder / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.safetensors"
        piece = _read(file)
        if piece is None:
            piece = _draw_timed(shard, batch)
            _write(file, piece)
        yield piece


def _draw_timed(series: Series, batch: int) -> tuple[Tensor, float]:
    start = time.perf_counter()
    pictures = torch.cat([piece.draw() for piece in series.shards(batch)])
    return pictures, time.perf_counter() - start


def _read(file: Path) -> tuple[Tensor, float] | None:
    """What `_write` wrote; None where there is nothing, or nothing legible."""
    try:
        tensors = load_file(file)
        return tensors["pictures"], float(tensors["seconds"])
    except (FileNotFoundError, SafetensorError, KeyError):
        return None


def _write(file: Path, piece: tuple[Tensor, float]) -> None:
    """Whole or not at all: under another name first, then renamed."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as out:
                out.write(to_bytes({"pictures": piece[0], "seconds": torch.tensor(piece[1])}))
                out.flush()
                os.fsync(out.fileno())
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write the cache {str(file.parent)!r}: {reason}", "choose another folder") from error


# ---- the procedure ----


@dataclass(frozen=True)
class Progress:
    stage: str
    done: int  # pictures
    total: int


@dataclass(frozen=True)
class Row:
    """One set of pictures against the teacher's, over the same prompts."""

    name: str
    sampler: str
    steps: int
    distance: Estimate  # kernel distance
    above_floor: Estimate  # the same less the floor's
    paired: Estimate  # mean distance of each picture to the teacher's of the same prompt and, but for the floor, seed
    seconds: float  # a picture

    def to_json(self) -> dict[str, object]:
        plain: dict[str, object] = {"name": self.name, "sampler": self.sampler, "steps": self.steps}
        for name in ("distance", "above_floor", "paired"):
            estimate: Estimate = getattr(self, name)
            plain[name] = {"value": estimate.value, "error": estimate.error}
        return {**plain, "seconds": self.seconds}


@dataclass(frozen=True, eq=False)
class Table:
    """The result: the rows, the floor among them, and the first pictures of each set."""

    rows: tuple[Row, ...]
    samples: int
    guidance: float
    teacher_steps: int  # of the pictures that all others are compared with
    teacher_seconds: float  # for one of those
    examples: dict[str, Tensor]  # by a row's name (at most EXAMPLES, 3, H, W), and "teacher, 50 steps"


@dataclass(frozen=True, eq=False)
class _Measured:
    features: Tensor
    examples: Tensor
    seconds: float


def evaluate(
    student: Parts,
    teacher: Parts,
    prompts: Sequence[str],
    *,
    steps: Sequence[int] = (1, 2, 4, 8),
    sampler: str | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch: int = 20,
    cache: Path | None = None,
) -> Iterator[Progress | Table]:
    """Draws everything and compares it; yields Progress and, last of all, the Table.

    The teacher draws `prompts` in 50 DDIM steps with seeds `seed`, `seed` + 1, ... and once more with other seeds: how
    far those two sets are apart is the floor. Then the student by `sampler` (None: its default), and the teacher by
    DDIM, draw them in each number of `steps` with the first seeds. All at the same guidance (None: the student's
    default) and size; the teacher's timesteps have trailing spacing. `cache` is a folder for the 50-step pictures; an
    interrupted run goes on from it.

    Raises UsageError for less than 3 prompts, a number of steps beyond the grid, or models of different sizes.
    """
    sizes = [f"{parts.defaults.width}x{parts.defaults.height}" for parts in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UsageError(f"the model draws {sizes[0]} and the teacher {sizes[1]} pixels: they must agree")
    if len(prompts) < 3:
        raise UsageError(f"{len(prompts)} prompts: at least 3 are needed")
    scale = student.defaults.guidance if guidance is None else guidance
    teacher = replace(teacher, schedule=replace(teacher.schedule, spacing="trailing"))
    seeds = tuple(range(seed, seed + len(prompts)))

    aim = Series(teacher, "ddim", TEACHER_STEPS, scale, tuple(prompts), seeds)
    floor = replace(aim, seeds=tuple(each + OTHER_SEEDS for each in seeds))
    own = student.defaults.sampler if sampler is None else sampler
    rivals = [replace(aim, parts=student, sampler=own, steps=n) for n in steps]
    rivals += [replace(aim, steps=n) for n in steps]
    names = [f"{who}, {n} step{'s' if n > 1 else ''}" for who in ("student", "teacher") for n in steps]
    for series in (aim, *rivals):
        assert series.grid  # every number of steps is allowed: better to know now than in half an hour

    net, model = load_features(), fingerprint(teacher)
    wanted = yield from _measure(f"teacher, {TEACHER_STEPS} steps", aim, net, batch, cache, model)
    other = yield from _measure("teacher, other seeds", floor, net, batch, cache, model)
    least = kid(other.features, wanted.features, paired=True)
    rows = [_row("teacher, other seeds", floor, other, wanted, least)]
    examples = {f"teacher, {TEACHER_STEPS} steps": wanted.examples}
    for name, series in zip(names, rivals, strict=True):
        measured = yield from _measure(name, series, net, batch, None, "")
        rows.append(_row(name, series, measured, wanted, least))
        examples[name] = measured.examples
    yield Table(tuple(rows), len(prompts), scale, aim.steps, wanted.seconds, examples)


def _measure(
    name: str, series: Series, net: FeatureNet, batch: int, cache: Path | None, model: str
) -> Generator[Progress, None, _Measured]:
    """Draws a series or reads it from the cache, and keeps its features and first pictures."""
    rows: list[Tensor] = []
    examples: list[Tensor] = []
    seconds, done, total = 0.0, 0, len(series.prompts)
    yield Progress(name, 0, total)
    for pictures, spent in cached(series, batch, cache, model):
        rows.append(features(net, pictures))
        examples.append(pictures[: max(EXAMPLES - done, 0)])
        seconds, done = seconds + spent, done + len(pictures)
        yield Progress(name, done, total)
    return _Measured(torch.cat(rows), torch.cat(examples), seconds / total)


def _row(name: str, series: Series, measured: _Measured, wanted: _Measured, floor: Estimate) -> Row:
    distance = kid(measured.features, wanted.features, paired=True)
    paired = paired_distance(measured.features, wanted.features)
    return Row(name, series.sampler, series.steps, distance, distance - floor, paired, measured.seconds)
