"""Masks: what of a picture is to be painted anew (white) and what must come back as it was (black).

A mask is a picture of any mode: grey and 1 bit are taken as they are, colours by their brightness, what is transparent
is black. Between black and white it is soft: the network sees it cut at a half, compositing blends.

torch is imported only where a tensor is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from calotype import images
from calotype.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

HALF = 128  # of 255: from here on, the network takes a pixel for white

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels; the last two are outside


def grey(mask: Image.Image) -> Image.Image:
    """The mask in 8 bits of grey (L), whatever its mode."""
    if mask.mode == "L":
        return mask
    if mask.has_transparency_data:
        rgba = mask.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return images.on_white(mask).convert("L")


def check(mask: Image.Image, feather_pixels: int = 0) -> None:
    """Raises UsageError for a mask in which there is nothing to paint, or nothing once its edge is feathered."""
    brightest = _brightest(mask)
    if brightest == 0:
        raise UsageError(
            "the mask is all black: nothing would be painted", "white in the mask is repainted", field="mask"
        )
    if brightest < HALF:
        raise UsageError(
            f"the mask's brightest value is {brightest} of 255: from {HALF} on a pixel is repainted",
            "white in the mask is repainted",
            field="mask",
        )
    if feather_pixels and _brightest(feather(mask, feather_pixels)) < HALF:
        raise UsageError(
            f"nothing is left of the mask when {feather_pixels} pixels of its edge fade",
            "feather it less, or paint a larger spot",
            field="mask_feather",
        )


def _brightest(mask: Image.Image) -> int:
    return int(np.asarray(grey(mask)).max())


def to_tensor(mask: Image.Image) -> Tensor:
    """What the network sees of the mask: float32 (1, 1, H, W), 1 where it paints and 0 elsewhere."""
    import torch

    mask = grey(mask)
    pixels = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(1, 1, mask.height, mask.width)
    return (pixels >= HALF).float()


def to_latents(hole: Tensor, downscale: int) -> Tensor:
    """The mask of `to_tensor` at the latents' size, (1, 1, H, W) -> (1, 1, h, w): each latent takes its first pixel.

    Raises UsageError where nothing is left of it.
    """
    small = hole[..., ::downscale, ::downscale]
    if not bool(small.any()):
        raise UsageError(
            f"nothing of the mask is left at the latents' size, one of {downscale}x{downscale} pixels",
            "paint a larger spot, or crop to the mask",
            field="mask",
        )
    return small


def feather(mask: Image.Image, pixels: int) -> Image.Image:
    """The mask (L) with an edge that fades over `pixels`, all of them inside: what was black in it stays black."""
    mask = grey(mask)
    if not pixels:
        return mask
    # Drawn in by half the width and blurred by a quarter, the middle of the fade lies half the width inside.
    inner = mask
    for _ in range((pixels + 1) // 2):
        inner = inner.filter(ImageFilter.MinFilter(3))
    return ImageChops.darker(mask, inner.filter(ImageFilter.GaussianBlur(pixels / 4)))


def composite(original: Image.Image, painted: Image.Image, mask: Image.Image) -> Image.Image:
    """`painted` where the mask is white, `original` where it is black, bit for bit, and a blend between.

    All are of one size. The result is in RGB: what is transparent in the original becomes white.
    """
    if not original.size == painted.size == mask.size:
        raise ValueError(f"original {original.size}, painted {painted.size}, mask {mask.size}: must be of one size")
    return Image.composite(images.on_white(painted), images.on_white(original), grey(mask))


def crop_box(mask: Image.Image, size: tuple[int, int], padding: int) -> Box:
    """The part of a picture to work on: all that is not black in the mask, `padding` pixels more on each side, and then
    in the proportions of `size` (width, height) as far as the picture allows. The same as diffusers' `get_crop_region`.
    """
    box = grey(mask).getbbox()
    if box is None:
        raise UsageError(
            "the mask is all black: there is no part to crop to", "white in the mask is repainted", field="mask"
        )
    left, top = max(box[0] - padding, 0), max(box[1] - padding, 0)
    right, bottom = min(box[2] + padding, mask.width), min(box[3] + padding, mask.height)
    aspect = size[0] / size[1]
    if (right - left) / (bottom - top) > aspect:
        top, bottom = _grown(top, bottom, int((right - left) / aspect), mask.height)
    else:
        left, right = _grown(left, right, int((bottom - top) * aspect), mask.width)
    return left, top, right, bottom


def _grown(low: int, high: int, wanted: int, limit: int) -> tuple[int, int]:
    """low..high grown evenly to the length `wanted`, moved to lie within 0..limit, cut if it is longer than that."""
    extra = wanted - (high - low)
    low, high = low - extra // 2, high + extra - extra // 2
    if high > limit:
        low, high = low - (high - limit), limit
    if low < 0:
        low, high = 0, min(high - low, limit)
    return low, high


def paste(original: Image.Image, painted: Image.Image, box: Box, mask: Image.Image) -> Image.Image:
    """`original` with what was painted for its part `box`, brought back to the box's size, where the mask is not black.

    original, mask: of one size; painted: the part at any size, with the margins that `images.resize` in the mode "pad"
    may have given it, which are cut off again.
    """
    left, top, right, bottom = box
    whole = images.on_white(original).copy()
    whole.paste(images.resize(painted, right - left, bottom - top, "crop"), (left, top))
    return composite(original, whole, mask)
