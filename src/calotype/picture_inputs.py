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
from calotype.nn.t2i_adapter import T2IAdapter
from calotype.nn.unet import Residuals
from calotype.parts import Parts
from calotype.request import Control
from calotype.resolve import Resolved
from calotype.sampling import Source

CHUNK = 16  # frames whose posteriors the reference draws in one call, and that controls embed at a time


@dataclass(frozen=True)
class Fit:
    """How a request's pictures come to its size."""

    width: int
    height: int
    resize: str  # a mode of `images.resize`
    region: masks.Box | None  # the part of them to work on; None is all

    @staticmethod
    def of(resolved: Resolved) -> Fit:
        request, width, height = resolved.request, resolved.width, resolved.height
        region = None
        if request.mask is not None and request.mask_crop is not None:
            region = masks.crop_box(request.mask, (width, height), request.mask_crop)
        return Fit(width, height, request.resize, region)

    def __call__(self, picture: Image.Image) -> Image.Image:
        """A picture, or its part, as the networks see it."""
        if self.region is None:
            return images.resize(picture, self.width, self.height, self.resize)
        # A part keeps its proportions whatever the mode: `masks.paste` takes the margins away again.
        return images.resize(picture.crop(self.region), self.width, self.height, "pad")


@dataclass(frozen=True, eq=False)
class Start:
    """What a request's picture is to its job; nothing where there is none."""

    source: Source | None = None  # what the sampler starts from
    beside: Tensor | None = None  # what an inpainting U-Net sees beside the latents
    finish: Callable[[int, Image.Image], Image.Image] | None = None  # puts back what was not to be painted


def to_start_from(
    parts: Parts, pictures: tuple[Image.Image, ...], fit: Fit, rows: int, posterior: Tensor | None, note: Note | None
) -> Start:
    """Image to image, or frames to frames."""
    pixels = torch.cat([images.to_tensor(fit(each)) for each in pictures])
    x0 = latents.encode(parts.vae, pixels, posterior, note=note)
    return Start(Source(_rows(x0, rows).to(parts.device, parts.dtype)))


def to_paint(
    parts: Parts,
    pictures: tuple[Image.Image, ...],
    mask: Image.Image,
    fit: Fit,
    feather: int,
    noised: bool,
    rows: int,
    posteriors: tuple[Tensor | None, Tensor | None],
    note: Note | None,
) -> Start:
    """Inpainting. noised: begin with the picture under noise, not with noise alone. posteriors: draws for the picture,
    and for the picture with the mask's hole.
    """
    device, dtype = parts.device, parts.dtype
    *scaled, fitted = [fit(each) for each in (*pictures, mask)]
    hole = masks.to_tensor(fitted)  # (1, 1, H, W), 0 or 1
    pixels = torch.cat([images.to_tensor(each) for each in scaled])
    small = masks.to_latents(hole, parts.vae.config.downscale).to(device, dtype)

    def encoded(pixels: Tensor, posterior: Tensor | None) -> Tensor:
        return _rows(latents.encode(parts.vae, pixels, posterior, note=note), rows).to(device, dtype)

    beside = None
    if parts.inpaints:
        beside = torch.cat([small.expand(rows, -1, -1, -1), encoded(pixels * (hole < 0.5), posteriors[1])], dim=1)
    x0 = small.new_zeros(rows, parts.vae.config.latent_channels, *small.shape[-2:])
    if noised or not parts.inpaints:
        x0 = encoded(pixels, posteriors[0])
    source = Source(x0, None if parts.inpaints else small, noised)

    if fit.region is None:
        soft = masks.feather(fitted, feather)
        return Start(source, beside, lambda i, painted: masks.composite(scaled[i % len(scaled)], painted, soft))
    soft, box = masks.feather(mask, feather), fit.region
    return Start(source, beside, lambda _, painted: masks.paste(pictures[0], painted, box, soft))


def steering(network: ControlNet | T2IAdapter, control: Control, fit: Fit, rows: int) -> Steering:
    """A control of the request: its picture embedded, and a T2I-Adapter evaluated."""
    weight = next(network.parameters())
    pictures = control.image if isinstance(control.image, tuple) else (control.image,)
    start, end, scale = control.start, control.end, control.scale
    if isinstance(network, ControlNet):
        pixels = torch.cat([images.to_unit(fit(each)) for each in pictures])
        hints = [network.embed_hint(some.to(weight)) for some in torch.split(pixels, CHUNK)]
        return Steering(start, end, scale, network, _rows(torch.cat(hints), rows))
    channels = network.config.in_channels
    if channels == 1:
        pictures = tuple(each.convert("L") for each in pictures)
    pixels = torch.cat([images.to_unit(fit(each)) for each in pictures])[:, :channels]  # of grey, all are equal
    residuals = Residuals.cat([network(some.to(weight)) for some in torch.split(pixels, CHUNK)]).scaled(scale)
    return Steering(start, end, scale, None, residuals=residuals.repeat(rows // len(pixels)))


def _rows(x: Tensor, rows: int) -> Tensor:
    """(1 or F, ...) as (n F, ...): the same for each clip."""
    return x.repeat(rows // len(x), *(1 for _ in x.shape[1:]))
