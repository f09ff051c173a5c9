"""The loaded networks of one model, with what else it takes to run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from calotype.nn.controlnet import ControlNet
from calotype.nn.motion import MotionAdapter
from calotype.nn.t2i_adapter import T2IAdapter
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
class Habit:
    """How a few-step model or adapter likes to be used: what a request that leaves it open gets.

    None: nothing is said of it.
    """

    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None  # diffusers' guidance_scale: 1 is none
    timesteps: tuple[int, ...] | None = None  # of those steps, where they are not the sampler's own
    spacing: str | None = None  # of the timesteps, where it is not the schedule's
    gamma: float | None = None  # of "tcd"
    prediction: str | None = None  # what the network predicts, whatever its model's scheduler says
    size: int | None = None  # pixels of a side, where the family's is another
    title: str = "a distilled adapter"  # for sentences


@dataclass(frozen=True)
class Motion:
    """A motion adapter, whose modules are in the U-Net, and the noise levels that it was trained with."""

    adapter: MotionAdapter
    schedule: NoiseSchedule
    habit: Habit | None = None


def without_memory(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A stand-in for a weight that is kept in another form: all of it is one NaN, which whoever reads it will notice,
    and it cannot be written to.
    """
    return torch.full((), torch.nan, device=device, dtype=dtype).expand(shape)


# Reads a network's weights once more: by our names and in our shapes, but in the files' dtype. A weight in memory was
# made of it by `.to(device, dtype)`.
Stored = Callable[[], Mapping[str, Tensor]]


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
    source: str  # the folder or file it was loaded from
    habit: Habit | None = None  # of a few-step model
    controls: Mapping[str, ControlNet | T2IAdapter] = field(default_factory=dict)  # by the names that requests use
    motion: Motion | None = None
    tiny_vae: AutoencoderTiny | None = None  # decodes previews; or results, where that is asked for
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # the config that `schedule` was read from
    stored: Mapping[str, Stored] = field(default_factory=dict)  # of "unet", "text_encoder", "text_encoder_2", "motion"

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the U-Net computes in; the autoencoder may have another."""
        return next(self.unet.parameters()).dtype

    @property
    def inpaints(self) -> bool:
        """Whether the U-Net was made for inpainting: it takes a mask and a masked picture beside the latents."""
        return self.unet.config.in_channels != self.vae.config.latent_channels
