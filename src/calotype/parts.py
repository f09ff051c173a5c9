"""The loaded networks of one model, with what else it takes to run them."""

from __future__ import annotations

from dataclasses import dataclass

from calotype.nn.tiny_vae import AutoencoderTiny
from calotype.nn.unet import UNet
from calotype.nn.vae import AutoencoderKL
from calotype.schedule import NoiseSchedule
from calotype.text.encode import TextEncoder


@dataclass(frozen=True)
class Defaults:
    """What a request that leaves something open gets. `width` and `height` are pixels."""

    sampler: str
    steps: int
    guidance: float  # diffusers' guidance_scale: 1 is none
    width: int
    height: int
    guidance_range: tuple[float, float] | None = None  # what a guidance embedding was trained for; None: real CFG


@dataclass(frozen=True)
class Parts:
    """One model, ready to run."""

    family: str  # a name of calotype.families, or "custom"
    text: TextEncoder
    unet: UNet
    vae: AutoencoderKL | AutoencoderTiny
    schedule: NoiseSchedule
    defaults: Defaults
    zero_empty_negative: bool  # SDXL: an empty negative prompt is conditioning of zeros, not the empty text's
    source: str  # the folder it was loaded from
