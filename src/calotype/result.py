"""What comes of a request: its steps, then its pictures, how they are saved, and what it takes to repeat them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from calotype import stills
from calotype.description import Description
from calotype.images import grid
from calotype.latents import Vae, decode
from calotype.request import Request
from calotype.sampling import Update


@dataclass(frozen=True, eq=False)
class Step(Update):
    """One step of a request: index, t, x (latents after the update) and x0 (denoised latents), both (n F, C, h, w)."""

    total: int  # how many steps there will be
    vae: Vae

    def preview(self) -> Image.Image:
        """What the picture looks like so far: x0 decoded; several pictures as a sheet."""
        images = list(decode(self.vae, self.x0))
        return images[0] if len(images) == 1 else grid(images, columns=math.ceil(math.sqrt(len(images))))


@dataclass(frozen=True, eq=False)
class Result:
    """The pictures of a request, and what it takes to repeat them."""

    images: list[Image.Image]  # of clips: all frames, clip after clip
    seeds: list[int]  # of each picture or clip
    request: Request  # with every default filled in
    timings: dict[str, float]  # seconds of each stage: prepare, denoise, decode, total; and how many `evaluations`
    described: Description  # of the engine as it was
    notes: tuple[str, ...] = ()  # what was filled in because a few-step model or adapter likes it so

    @property
    def model(self) -> dict[str, Any]:
        """What `calotype.load_from` takes. Files are hashed for it, once: the first picture does not wait for that."""
        return self.described.to_json()

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return self.images[0]

    @property
    def frames(self) -> list[Image.Image]:
        """The frames of the first clip; of a request without frames, its first picture alone."""
        return self.clips[0]

    @property
    def clips(self) -> list[list[Image.Image]]:
        """The frames of each clip; a picture is a clip of one."""
        length = 1 if self.request.frames is None else self.request.frames
        return [self.images[i : i + length] for i in range(0, len(self.images), length)]

    def metadata(self, index: int) -> dict[str, Any]:
        """What picture or clip `index` carries in its file, enough to repeat it once its pictures are given again."""
        from calotype import __version__

        request = self.request.to_json(pictures=False)
        return {"calotype": __version__, "request": request, "index": index, "model": self.model}

    def encode(self, index: int, format: str) -> bytes:
        """Picture `index` with its metadata as a file's content: "PNG", "JPEG", "WEBP"; a clip "GIF", "WEBP", "MP4"."""
        if self.request.frames is None:
            return stills.encode(self.images[index], format, self.metadata(index))
        from calotype import video

        return video.encode(self.clips[index], format, self.request.fps, self.metadata(index))

    def save(self, path: str | Path) -> list[Path]:
        """Writes pictures as PNG, JPEG or WebP, clips as GIF, WebP or MP4: to `path`, or name-1.png, name-2.png, ..."""
        path, clips = Path(path), self.clips
        names = [path]
        if len(clips) > 1:
            names = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(1, len(clips) + 1)]
        return [self.save_one(i, name) for i, name in enumerate(names)]

    def save_one(self, index: int, path: Path) -> Path:
        """Writes picture or clip `index`."""
        if self.request.frames is None:
            return stills.save(self.images[index], path, self.metadata(index))
        from calotype import video

        return video.save(self.clips[index], path, self.request.fps, self.metadata(index))
