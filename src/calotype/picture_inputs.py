"""The pictures of a request as the networks take them: one to start from, a mask, and controls.

Shapes: n pictures of a request, or n clips of F frames: n F rows, clip by clip; latents (n F, C, h, w).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from calotype import images, latents, masks
from calotype.generate import Steering
from calotype.latents import Note
from calotype.nn.controlnet import ControlNet
from calotype.nn.unet import Residuals
from calotype.parts import Parts
from calotype.request import Control
from calotype.resolve import Resolved
from calotype.sampling import Source

CHUNK = 16  # frames whose posteriors the reference draws in one call, and that controls embed at a time


@dataclass(frozen=True, eq=False)
class Start:
    """What a request's picture is to its job; nothing where there is none."""

    source: Source | None = None  # what the sampler starts from
    beside: Tensor | None = None  # what an inpainting U-Net sees beside the latents
    finish: Callable[[int, Image.Image], Image.Image] | None = None  # puts back what was not to be painted


class PictureInputs:
    """The pictures of one request, brought to its size and encoded."""

    def __init__(self, parts: Parts, resolved: Resolved, rows: int, note: Note | None) -> None:
        self.parts, self.request, self.rows, self.note = parts, resolved.request, rows, note
        self.size = resolved.width, resolved.height
        self.region: masks.Box | None = None  # the part of the pictures to work on; None is all
        if self.request.mask is not None and self.request.mask_crop is not None:
            self.region = masks.crop_box(self.request.mask, self.size, self.request.mask_crop)

    def start(self, posterior: Tensor | None, masked: Tensor | None) -> Start:
        """Image to image, or inpainting, or neither. The arguments are draws for the posteriors of the picture, and of
        the picture with the mask's hole.
        """
        request, parts = self.request, self.parts
        if request.image is None:
            return Start()
        pictures = request.image if isinstance(request.image, tuple) else (request.image,)
        scaled = [self._fit(each) for each in pictures]
        pixels = torch.cat([images.to_tensor(each) for each in scaled])
        if request.mask is None:
            return Start(Source(self._encoded(pixels, posterior)))

        mask, noised = self._fit(request.mask), request.strength != 1  # else it begins with noise alone
        hole = masks.to_tensor(mask)  # (1, 1, H, W), 0 or 1
        small = masks.to_latents(hole, parts.vae.config.downscale).to(parts.device, parts.dtype)
        beside = None
        if parts.inpaints:
            seen = self._encoded(pixels * (hole < 0.5), masked)
            beside = torch.cat([small.expand(self.rows, -1, -1, -1), seen], dim=1)
        x0 = small.new_zeros(self.rows, parts.vae.config.latent_channels, *small.shape[-2:])
        if noised or not parts.inpaints:
            x0 = self._encoded(pixels, posterior)
        source, region = Source(x0, None if parts.inpaints else small, noised), self.region
        soft = masks.feather(mask if region is None else request.mask, request.mask_feather)
        if region is None:
            return Start(source, beside, lambda i, painted: masks.composite(scaled[i % len(scaled)], painted, soft))
        return Start(source, beside, lambda _, painted: masks.paste(pictures[0], painted, region, soft))

    def steering(self, control: Control) -> Steering:
        """A control: its picture embedded, and a T2I-Adapter evaluated."""
        network = self.parts.controls[control.name]
        weight = next(network.parameters())
        pictures = control.image if isinstance(control.image, tuple) else (control.image,)
        when, scale = (control.start, control.end), control.scale
        if isinstance(network, ControlNet):
            pixels = torch.cat([images.to_unit(self._fit(each)) for each in pictures])
            hints = [network.embed_hint(some.to(weight)) for some in torch.split(pixels, CHUNK)]
            return Steering(*when, scale, network, self._repeated(torch.cat(hints)))
        channels = network.config.in_channels
        if channels == 1:
            pictures = tuple(each.convert("L") for each in pictures)
        pixels = torch.cat([images.to_unit(self._fit(each)) for each in pictures])
        pixels = pixels[:, :channels]  # of grey, all are equal
        residuals = Residuals.cat([network(some.to(weight)) for some in torch.split(pixels, CHUNK)]).scaled(scale)
        return Steering(*when, scale, None, residuals=residuals.repeat(self.rows // len(pixels)))

    def _fit(self, picture: Image.Image) -> Image.Image:
        """A picture, or its part, as the networks see it."""
        if self.region is None:
            return images.resize(picture, *self.size, self.request.resize)
        # A part keeps its proportions whatever the mode: `masks.paste` takes the margins away again.
        return images.resize(picture.crop(self.region), *self.size, "pad")

    def _encoded(self, pixels: Tensor, posterior: Tensor | None) -> Tensor:
        x0 = latents.encode(self.parts.vae, pixels, posterior, note=self.note)
        return self._repeated(x0).to(self.parts.device, self.parts.dtype)

    def _repeated(self, x: Tensor) -> Tensor:
        """(1 or F, ...) as (n F, ...): the same for each clip."""
        return x.repeat(self.rows // len(x), *(1 for _ in x.shape[1:]))
