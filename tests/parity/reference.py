"""One model folder in two programs: ours and diffusers, asked the same things."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import calotype

SHIPPED = "shipped"  # the name of the model in the package, beside those of topologies.py

NETWORK = 1e-5  # relative L2 between networks
LATENTS = 1e-4  # ... between final latents
OFF = 1e-3  # share of an image's values that may differ by more than 1 of 255


@dataclass(frozen=True)
class Picture:
    """What one run ends with."""

    latents: Tensor  # (n, C, h, w)
    images: list[Image.Image]


class Pair:
    """A folder, loaded by both when first asked."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    @cached_property
    def engine(self) -> calotype.Engine:
        return calotype.load(self.folder, device="cpu", dtype="float32")

    @cached_property
    def pipeline(self) -> Any:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(self.folder).to(torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        encoder = pipeline.text_encoder
        if not hasattr(encoder, "text_model"):  # transformers 5 dropped what diffusers' clip_skip reaches through
            object.__setattr__(encoder, "text_model", encoder)
        return pipeline

    def ours(self, prompt: str, **fields: Any) -> Picture:
        """Through the public interface: stream a request, decode at its end. As diffusers, by the folder's scheduler,
        whatever our own default is.
        """
        fields.setdefault("sampler", self.engine.parts.schedule.default_sampler)
        stream = self.engine.stream(calotype.Request(prompt, **fields))
        while True:
            try:
                step = next(stream)
            except StopIteration as end:
                return Picture(step.x0, end.value.images)

    def theirs(
        self,
        prompt: str,
        *,
        steps: int,
        guidance: float,
        seed: int,
        width: int,
        height: int,
        negative_prompt: str = "",
        clip_skip: int | None = None,
        gamma: float = 0.3,
    ) -> Picture:
        """Through the pipeline that model_index.json names. Latents are those that it decodes."""
        caught: list[Tensor] = []

        def catch(pipeline: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
            caught.append(values["latents"])
            return {}

        arguments: dict[str, Any] = {"clip_skip": clip_skip}
        if isinstance(self.pipeline.scheduler, diffusers.TCDScheduler):
            arguments["eta"] = gamma  # the pipeline's default is 0, ours and the scheduler's 0.3
        if negative_prompt:  # left out, SDXL takes zeros instead of the empty text
            arguments["negative_prompt"] = negative_prompt
        result = self.pipeline(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
            width=width,
            height=height,
            callback_on_step_end=catch,
            **arguments,
        )
        assert len(caught) == steps
        return Picture(caught[-1], result.images)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == torch.float32
    return ((ours - theirs).norm() / theirs.norm()).item()


def share_off(ours: list[Image.Image], theirs: list[Image.Image]) -> float:
    """The share of 8-bit values that differ by more than 1."""
    a, b = (np.stack([np.asarray(image, np.int16) for image in images]) for images in (ours, theirs))
    assert a.shape == b.shape
    return float((np.abs(a - b) > 1).mean())


class Agreement:
    """Asserts that two results agree, and remembers the worst error of each kind and model."""

    def __init__(self, record: dict[tuple[str, str], float]) -> None:
        self.record = record

    def note(self, model: str, what: str, error: float) -> float:
        self.record[model, what] = max(error, self.record.get((model, what), 0.0))
        return error

    def tensors(self, model: str, what: str, ours: Tensor, theirs: Tensor, bound: float) -> None:
        """Relative L2 below a bound."""
        assert self.note(model, what, distance(ours, theirs)) < bound

    def pictures(self, model: str, ours: Picture, theirs: Picture) -> None:
        """The parity of DESIGN.md section 4."""
        latents = self.note(model, "latents", distance(ours.latents, theirs.latents))
        off = self.note(model, "pixels off", share_off(ours.images, theirs.images))
        assert latents < LATENTS
        assert off <= OFF
