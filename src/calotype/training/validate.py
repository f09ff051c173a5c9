"""Whether a run gets better: held-out captions, drawn by the teacher once and by the student again and again.

The measure is that of `calotype eval`, on fewer pictures. Of all readings, the one to keep is the newest that is not
measurably worse than the best (one standard error; Breiman et al. 1984, section 3.4.3): chance makes one of many
readings look best, and training rarely harms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from calotype.atomic import replacing
from calotype.images import grid, to_pil
from calotype.nn.unet import Conditioning, Residuals, UNetConfig
from calotype.parts import Parts
from calotype.sampling import grid_for
from calotype.training.distance import kid
from calotype.training.draw import Painter, draw
from calotype.training.features import features, load_features
from calotype.training.loss import Denoiser
from calotype.training.ranks import Ranks
from calotype.training.settings import Settings, TrainStep
from calotype.training.students import Student

PIECE = 8  # pictures drawn at a time
SHOWN = 8  # captions on the contact sheet
COLUMNS = 10  # readings on it
TILE = 256  # pixels, at most
STEPS = 4  # in which the student draws; a phased one has as many as phases


@dataclass(frozen=True)
class Reading:
    """One validation."""

    step: int
    distance: float
    error: float  # standard error

    def report(self, settings: Settings) -> TrainStep:
        return TrainStep(
            "validate", self.step, settings.max_train_steps, distance=self.distance, distance_error=self.error
        )

    def is_worse_than(self, other: Reading, errors: float) -> bool:
        """By more than so many standard errors of the difference."""
        return self.distance - other.distance > errors * math.hypot(self.error, other.error)


def kept(readings: Sequence[Reading]) -> Reading | None:
    """The reading whose weights are worth keeping: the newest that is not measurably worse than the best."""
    if not readings:
        return None
    best = min(readings, key=lambda reading: reading.distance)
    return next(reading for reading in reversed(readings) if not reading.is_worse_than(best, 1))


def is_hopeless(readings: Sequence[Reading], patience: int) -> bool:
    """Whether the last `patience` readings are all worse than the best by two standard errors."""
    if patience == 0 or len(readings) <= patience:
        return False
    best = min(readings, key=lambda reading: reading.distance)
    return all(reading.is_worse_than(best, 2) for reading in readings[-patience:])


class Validation:
    """The held-out captions of a run, the teacher's pictures of them, and the student's so far."""

    def __init__(
        self, parts: Parts, student: Student, prompts: Sequence[str], settings: Settings, output: Path, ranks: Ranks
    ) -> None:
        assert settings.resolution is not None
        assert settings.validation_steps
        self.every = settings.validation_steps  # updates
        self.prompts = tuple(prompts[: len(prompts) // ranks.world * ranks.world])  # as many for each process
        self._settings, self._ranks = settings, ranks
        self._folder = output / "validation"
        self._sheet = output / "contact-sheet.png"
        self._net = load_features()
        middle = 1 + (settings.w_min + settings.w_max) / 2
        # A LoRA has its guidance distilled in: on average that of the middle of the range.
        self.guidance = min(max(parts.defaults.guidance, 1 + settings.w_min), 1 + settings.w_max)
        if settings.lora:
            self.guidance = middle
        trailing = replace(parts.schedule, spacing="trailing", original_steps=settings.num_ddim_timesteps)
        defaults = replace(parts.defaults, width=settings.resolution, height=settings.resolution)
        self._parts = replace(parts, schedule=trailing, defaults=defaults)
        masked = _all_masked(self._parts) if parts.inpaints else None  # everything is to be repainted, over grey
        bf16 = settings.mixed_precision == "bf16"
        self._teacher = _painter(student.teacher, parts.unet.config, masked, bf16)
        self._student = _painter(student.result, student.config, masked, bf16)
        self._wanted: Tensor | None = None  # features of the teacher's pictures
        self._shown: dict[str, Tensor] = {}  # the first pictures of each reading, and the teacher's

    def start(self) -> Iterator[int]:
        """Draws the teacher's pictures, unless an earlier start of the run has; yields how many there are so far."""
        file = self._folder / "teacher.safetensors"
        pictures = self._ranks.broadcast(_stored(file).get("pictures"))
        if pictures is None or len(pictures) != len(self.prompts):
            drawn = []
            for piece in self._draw(self._teacher, "ddim", self._settings.teacher_steps, self.guidance):
                drawn.append(piece)
                yield sum(map(len, drawn)) * self._ranks.world
            pictures = self._ranks.all_gather(torch.cat(drawn))
            if self._ranks.first:
                _store(file, {"pictures": pictures})
        self._wanted = features(self._net, pictures)
        self._shown = {} if not self._ranks.first else _stored(self._folder / "shown.safetensors")
        self._shown["teacher"] = _tiles(pictures)

    def measure(self, step: int) -> Iterator[int | Reading]:
        """Draws the held-out captions with the student; yields how many there are so far, and at last the Reading."""
        assert self._wanted is not None
        drawn, count = [], self._settings.phases if self._settings.objective == "pcm" else STEPS
        guidance = 1.0 if self._settings.lora else self.guidance
        assert self._settings.sampler is not None
        for piece in self._draw(self._student, self._settings.sampler, count, guidance):
            drawn.append(piece)
            yield sum(map(len, drawn)) * self._ranks.world
        pictures = self._ranks.all_gather(torch.cat(drawn))
        distance = kid(features(self._net, pictures), self._wanted, paired=True)
        self._shown = {name: tiles for name, tiles in self._shown.items() if name == "teacher" or int(name) < step}
        self._shown[str(step)] = _tiles(pictures)
        if self._ranks.first:
            self._show(step, pictures)
        yield Reading(step, distance.value, distance.error)

    def _draw(self, painter: Painter, sampler: str, steps: int, guidance: float) -> Iterator[Tensor]:
        """This process' share of the pictures, piece by piece (n, 3, H, W) uint8."""
        share = len(self.prompts) // self._ranks.world
        first = self._ranks.rank * share
        timesteps = grid_for(sampler, self._parts.schedule, steps)
        for start in range(first, first + share, PIECE):
            here = range(start, min(start + PIECE, first + share))
            prompts = [self.prompts[i] for i in here]
            yield draw(self._parts, prompts, list(here), sampler, timesteps, guidance, painter)

    def _show(self, step: int, pictures: Tensor) -> None:
        """Writes this reading's pictures and the contact sheet: a caption a row, a column for each of some readings."""
        _store(self._folder / "shown.safetensors", self._shown)
        _save(grid(to_pil(_tiles(pictures, 16).float() / 127.5 - 1), 4), self._folder / f"step-{step:08d}.png")
        steps = sorted(int(name) for name in self._shown if name != "teacher")
        last = len(steps) - 1
        chosen = sorted({round(i * last / max(COLUMNS - 1, 1)) for i in range(COLUMNS)})
        names = [str(steps[i]) for i in chosen] + ["teacher"]
        columns = [to_pil(self._shown[name].float() / 127.5 - 1) for name in names]
        cells = [picture for row in zip(*columns, strict=True) for picture in row]
        titles = [f"step {name}" if name != "teacher" else name for name in names]
        _save(grid(cells, len(names), column_titles=titles, row_titles=self.prompts[:SHOWN]), self._sheet)


def _painter(network: Denoiser, config: UNetConfig, masked: Tensor | None, bf16: bool) -> Painter:
    """A network in training as one that draws."""

    def drawing(
        x: Tensor, t: Tensor, conditioning: Conditioning, residuals: Residuals | None, frames: int | None
    ) -> Tensor:
        # What a network that is cut up gathers while it draws, it uses in training again: no inference tensors, then.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(x.device.type, torch.bfloat16, enabled=bf16),
        ):
            return network(x, t, conditioning).float()

    return Painter(drawing, config, torch.float32, masked)


@torch.inference_mode()
def _all_masked(parts: Parts) -> Tensor:
    """(1, 1 + C, h, w): a mask that covers everything, and the latents of the grey picture that is left."""
    config, weight = parts.vae.config, next(parts.vae.parameters())
    grey = torch.zeros(1, 3, parts.defaults.height, parts.defaults.width, device=weight.device, dtype=weight.dtype)
    latents = (parts.vae.encode(grey)[0].float() - config.shift_factor) * config.scaling_factor
    return torch.cat([torch.ones_like(latents[:, :1]), latents], dim=1)


def _tiles(pictures: Tensor, count: int = SHOWN) -> Tensor:
    """The first pictures, small enough for a sheet."""
    pictures = pictures[:count]
    factor = TILE / pictures.shape[-1]
    if factor >= 1:
        return pictures.contiguous()
    small = F.interpolate(pictures.float(), scale_factor=factor, mode="area")
    return small.round().to(torch.uint8).contiguous()


def _stored(file: Path) -> dict[str, Tensor]:
    """What `_store` wrote; nothing where there is nothing legible."""
    try:
        return load_file(file)
    except (OSError, SafetensorError):
        return {}


def _store(file: Path, tensors: dict[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_bytes(to_bytes(tensors))


def _save(picture: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        picture.save(temporary, format="PNG")
