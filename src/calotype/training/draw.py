"""Pictures of many prompts at a time, and the cache of a teacher's: what `calotype eval` compares.

Shapes: pictures (n, 3, H, W) in uint8.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from calotype import atomic
from calotype.errors import OutputError
from calotype.generate import Guidance, Job, generate
from calotype.nn.call import Network
from calotype.nn.unet import UNetConfig
from calotype.parts import Parts
from calotype.prepare import condition
from calotype.sampling import draw_noise, draws_needed, grid_for, sampler_for
from calotype.training.memory import peak

SHARD = 40  # pictures a file of the cache: what an interruption can lose


# ---- drawing ----


@dataclass(frozen=True, eq=False)
class Painter:
    """A network that draws instead of the model's own: one in training, or its teacher."""

    network: Network
    config: UNetConfig
    dtype: torch.dtype  # of what it takes
    beside: Tensor | None = None  # of an inpainting network (1, 1 + C, h, w): mask, masked picture


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

    @property
    def evaluations(self) -> int:
        """How often the network is evaluated for a picture: twice a step where a guidance above 1 is not embedded."""
        embedded = self.parts.unet.config.guidance_dim is not None
        return len(self.grid) * (2 if self.guidance > 1 and not embedded else 1)

    def draw(self) -> Tensor:
        """The pictures."""
        return draw(self.parts, self.prompts, self.seeds, self.sampler, self.grid, self.guidance)


@torch.inference_mode()
def draw(
    parts: Parts,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: str,
    grid: Sequence[float],
    guidance: float,
    drawn_by: Painter | None = None,
) -> Tensor:
    """Pictures (n, 3, H, W) in uint8 of n different prompts and seeds, at the model's default size, in one batch.

    Guidance is by embedding where the network has one, else by a second evaluation on the empty prompt.
    """
    vae = parts.vae.config
    painter = Painter(parts.unet, parts.unet.config, parts.dtype) if drawn_by is None else drawn_by
    size = parts.defaults.width, parts.defaults.height
    shape = (vae.latent_channels, size[1] // vae.downscale, size[0] // vae.downscale)
    draws = draw_noise(seeds, shape, draws_needed(sampler, len(grid)))
    noise = [each.to(parts.device, painter.dtype) for each in draws]
    text, empty = condition(parts, prompts, "", guidance, size, unet=painter.config)
    job = Job(
        tuple(grid),
        partial(sampler_for, sampler, parts.schedule, grid, noise),
        text.to(parts.device, painter.dtype),
        Guidance(parts.schedule, guidance, None if empty is None else empty.to(parts.device, painter.dtype)),
        beside=None if painter.beside is None else painter.beside.expand(len(prompts), -1, -1, -1),
    )
    *_, last = generate(painter.network, job)
    latents = last.x / vae.scaling_factor + vae.shift_factor
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


@dataclass(frozen=True, eq=False)
class Piece:
    """Some pictures of a series, and what they cost when they were drawn."""

    pictures: Tensor
    seconds: float  # in all
    memory: int | None  # bytes at the peak, as calotype.training.memory counts them; None: nobody can tell


def cached(series: Series, batch: int, folder: Path | None, model: str) -> Iterator[Piece]:
    """The pictures of a series, piece by piece.

    A piece is read from `folder` if it is there, else drawn, `batch` pictures at a time, and kept there. Without a
    folder all are drawn. `model` is the fingerprint of the series' parts. OutputError if the folder can't be written.
    """
    for shard in series.shards(SHARD if folder is not None else batch):
        if folder is None:
            yield _draw_measured(shard, batch)
            continue
        facts = (model, shard.sampler, shard.steps, shard.guidance, shard.prompts, shard.seeds)
        file = folder / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.safetensors"
        piece = _read(file)
        if piece is None:
            piece = _draw_measured(shard, batch)
            _write(file, piece)
        yield piece


def _draw_measured(series: Series, batch: int) -> Piece:
    with peak(series.parts.device) as memory:
        start = time.perf_counter()
        pictures = torch.cat([piece.draw() for piece in series.shards(batch)])
        seconds = time.perf_counter() - start
    return Piece(pictures, seconds, memory.bytes)


def _read(file: Path) -> Piece | None:
    """What `_write` wrote; None where there is nothing, or nothing legible."""
    try:
        tensors = load_file(file)
        memory = tensors.get("memory")  # older files have none
        return Piece(tensors["pictures"], float(tensors["seconds"]), None if memory is None else int(memory))
    except (FileNotFoundError, SafetensorError, KeyError):
        return None


def _write(file: Path, piece: Piece) -> None:
    tensors = {"pictures": piece.pictures, "seconds": torch.tensor(piece.seconds)}
    if piece.memory is not None:
        tensors["memory"] = torch.tensor(piece.memory)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write the cache {str(file.parent)!r}: {reason}", "choose another folder") from error
    atomic.write(file, to_bytes(tensors))
