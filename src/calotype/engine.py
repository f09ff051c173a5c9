"""The public object: a loaded model that turns requests into pictures."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from calotype.errors import UsageError
from calotype.generate import Step, decode, generate, prepare, resolve, seeds
from calotype.images import save_png
from calotype.parts import Parts
from calotype.request import Request
from calotype.weights.load import load_parts

__all__ = ["Engine", "Result", "Step", "load"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Result:
    """The pictures of a request, and what it takes to repeat them."""

    images: list[Image.Image]
    seeds: list[int]  # of each picture
    request: Request  # with every default filled in
    timings: dict[str, float]  # seconds of each stage: prepare (text and noise), denoise, decode, total
    model: dict[str, Any]  # engine.describe()

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return self.images[0]

    def metadata(self, index: int) -> dict[str, Any]:
        """What picture `index` carries in its file, enough to repeat it."""
        from calotype import __version__

        return {"calotype": __version__, "request": self.request.to_json(), "index": index, "model": self.model}

    def save(self, path: str | Path) -> list[Path]:
        """Writes the pictures as PNG with their metadata: to `path`, or several as name-1.png, name-2.png, ..."""
        path = Path(path)
        names = [path]
        if len(self.images) > 1:
            names = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(1, len(self.images) + 1)]
        return [
            save_png(image, name, self.metadata(i))
            for i, (image, name) in enumerate(zip(self.images, names, strict=True))
        ]


class Engine:
    """A model in memory. It keeps nothing of a request, so requests may be interleaved."""

    def __init__(self, parts: Parts, described: dict[str, Any]) -> None:
        self.parts = parts
        self._described = described

    def __call__(self, prompt: str | Request, **fields: Any) -> Result:
        """Draws a prompt. `fields` are those of Request: steps, guidance, seed, n, width, height, ...

        Raises UsageError for what cannot be carried out.
        """
        given = asdict(prompt) if isinstance(prompt, Request) else {"prompt": prompt}
        stream = self.stream(Request.from_json({**given, **fields}))
        while True:
            try:
                next(stream)
            except StopIteration as end:
                result: Result = end.value
                return result

    def resolve(self, request: Request) -> Request:
        """The request with this model's defaults, and a seed, where it leaves them open."""
        return resolve(self.parts, request)

    def stream(self, request: Request) -> Generator[Step, None, Result]:
        """The steps of a request as they are made; the generator's return value is the Result."""
        started = time.perf_counter()
        request = self.resolve(request)
        return self._stream(request, started)

    def _stream(self, request: Request, started: float) -> Generator[Step, None, Result]:
        job = prepare(self.parts, request)
        timings = {"prepare": time.perf_counter() - started, "denoise": 0.0}
        steps = generate(self.parts, job)
        for _ in job.grid:
            clock = time.perf_counter()
            step = next(steps)
            timings["denoise"] += time.perf_counter() - clock  # the caller's own time between steps is not ours
            yield step
        clock = time.perf_counter()
        images = decode(self.parts, step.x0)
        timings["decode"] = time.perf_counter() - clock
        timings["total"] = sum(timings.values())
        return Result(images, seeds(request), request, timings, self.describe())

    def describe(self) -> dict[str, Any]:
        """Which model this is and how it was loaded: what `load` needs to load it again."""
        return dict(self._described)


def load(
    model: str | Path | None = None,
    *,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    variant: str | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> Engine:
    """Loads a model: a folder in the diffusers layout, a Hub id[@revision], or (None) the shipped one.

    `unet` and `vae` replace those parts by another model's. `device` and `dtype` "auto" mean the GPU in float16 where
    there is one, else the CPU in float32. `offline` never asks the Hub; nor does HF_HUB_OFFLINE=1.

    Raises ModelNotFoundError, CheckpointError, UsageError.
    """
    where = _device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}: allowed are auto, {', '.join(DTYPES)}")
    name = ("float32" if where.type == "cpu" else "float16") if dtype == "auto" else dtype
    refs = {key: None if ref is None else str(ref) for key, ref in (("model", model), ("unet", unet), ("vae", vae))}
    parts = load_parts(
        refs["model"],
        unet=refs["unet"],
        vae=refs["vae"],
        variant=variant,
        revision=revision,
        offline=offline,
        device=where,
        dtype=DTYPES[name],
    )
    described = {**refs, "variant": variant, "revision": revision, "device": str(where), "dtype": name}
    return Engine(parts, {**described, "family": parts.family})


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"device is {name!r}: not usable here ({str(error).splitlines()[0]})", hint="try auto or cpu"
        ) from None
    return device
