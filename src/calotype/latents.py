"""Pictures to latents and back: a few at a time, large ones in tiles, again in float32 where half precision overflows.

Shapes: n pictures (n, 3, H, W) in [-1, 1]; latents (n, C, h, w), scaled as the U-Net has them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor

from calotype.errors import CalotypeError
from calotype.images import to_pil
from calotype.nn.tiny_vae import AutoencoderTiny
from calotype.nn.vae import AutoencoderKL

DECODE_PIXELS = 2**20  # pixels coded at a time: the memory must not grow with the number of pictures or frames
TILE_PIXELS = 2**21  # a picture of more is coded in tiles
TILE_SIDE = 512  # pixels of a tile, at least; an autoencoder that was trained on larger pictures has larger tiles

Vae = AutoencoderKL | AutoencoderTiny
Coding = Callable[[Vae, Tensor], Tensor]  # one half of the autoencoder
Note = Callable[[str], None]  # takes a line about what goes on, but may surprise


@torch.inference_mode()
def encode(vae: Vae, pictures: Tensor, noise: Tensor | None = None, *, note: Note | None = None) -> Tensor:
    """Latents (n, C, h, w) of pictures (m, 3, H, W), float32, on the autoencoder's device.

    noise (n, C, h, w), n being m or a multiple of it: samples of the posterior, mean + std * noise (Kingma & Welling
    2013, arXiv 1312.6114, section 2.4), the pictures being repeated in turn. None: its mean, n being m. The tiny
    autoencoder has a point instead of a posterior, and noise is ignored.
    """
    config = vae.config
    height, width = pictures.shape[-2:]
    if height % config.downscale or width % config.downscale:
        raise ValueError(f"pictures of {width}x{height}: must be multiples of {config.downscale}")

    def moments(vae: Vae, x: Tensor) -> Tensor:
        mean, logvar = vae.encode(x)
        return mean if logvar is None else torch.cat([mean, logvar], dim=1)

    coding = _by_tiles(vae, moments, height * width, config.downscale, 1)
    coded = torch.cat([_finite(vae, "encoder", coding, some, note).float() for some in _few(pictures, height * width)])
    x0 = coded[:, : config.latent_channels]
    if noise is not None:
        repeats = (len(noise) // len(coded), 1, 1, 1)
        x0 = x0.repeat(repeats)
        if coded.shape[1] > config.latent_channels:
            std = torch.exp(0.5 * coded[:, config.latent_channels :])
            x0 = x0 + std.repeat(repeats) * noise.to(x0.device)
    return (x0 - config.shift_factor) * config.scaling_factor


@torch.inference_mode()
def decode(vae: Vae, x0: Tensor, *, note: Note | None = None) -> Iterator[Image.Image]:
    """The pictures of the latents x0 (n, C, h, w), each as soon as it is there. Raises CalotypeError where something is
    not a finite number.
    """
    if not torch.isfinite(x0).all():
        raise CalotypeError(
            "the latents are not finite: the U-Net overflowed, or an adapter is damaged",
            hint='load the model with dtype="float32", or leave the adapter out',
        )
    config = vae.config
    pixels = x0.shape[-2] * x0.shape[-1] * config.downscale**2
    coding = _by_tiles(vae, lambda vae, x: vae.decode(x), pixels, 1, config.downscale)
    for some in _few(x0.float() / config.scaling_factor + config.shift_factor, pixels):
        yield from to_pil(_finite(vae, "decoder", coding, some, note))


def _few(x: Tensor, pixels: int) -> tuple[Tensor, ...]:
    """The rows of x, as many at a time as have DECODE_PIXELS together, but at least one."""
    return torch.split(x, max(1, DECODE_PIXELS // pixels))


def _finite(vae: Vae, name: str, coding: Coding, x: Tensor, note: Note | None) -> Tensor:
    """coding(vae, x) in the autoencoder's dtype; rows where that overflows, in float32.

    The autoencoder itself stays as it is: what one picture needs must not change the pixels of the next.
    """
    weight = next(vae.parameters())
    out = coding(vae, x.to(weight.device, weight.dtype))
    finite = torch.isfinite(out).flatten(1).all(dim=1)
    if finite.all():
        return out
    dtype = str(weight.dtype).removeprefix("torch.")
    if weight.dtype == torch.float32:
        raise CalotypeError(
            f"the {name} gave numbers that are not finite in {dtype}",
            hint="the autoencoder's file is damaged or of another family: load it again, or another with vae=",
        )
    if note is not None:
        note(f"the {name} gave numbers that are not finite in {dtype}: those pictures are coded again in float32")
    out = out.float()
    out[~finite] = _finite(copy.deepcopy(vae).float(), name, coding, x[~finite.to(x.device)], note)
    return out


# ---- tiles ----


def _by_tiles(vae: Vae, coding: Coding, pixels: int, before: int, after: int) -> Coding:
    """The coding itself for pictures of so many pixels, or by tiles where they are too many."""
    if pixels <= TILE_PIXELS:
        return coding
    side = max(vae.config.sample_size, TILE_SIDE) // vae.config.downscale // 4 * 4
    return lambda vae, x: tiled(partial(coding, vae), x, side, before, after)


def tiled(network: Callable[[Tensor], Tensor], x: Tensor, side: int, before: int, after: int) -> Tensor:
    """network(x), computed in square tiles of which each blends into the next over a quarter of its side.

    x: (B, C, h * before, w * before); the network makes (B, C', h * after, w * after) of it. side: of a tile, in units
    of h and w, a multiple of 4. Norms and attention see one tile only, so tiles differ a little from the whole; where
    one tile suffices, it is the whole. The tiles and blends are those of diffusers' `enable_tiling`, but for its last
    row and column where they would lie within the tile before: they are left out.
    """
    step = side * 3 // 4
    tops, lefts = (range(0, max(1, size // before - side // 4), step) for size in x.shape[-2:])
    strips: list[Tensor] = []
    above: list[Tensor] = []
    for top in tops:
        row: list[Tensor] = []
        for column, left in enumerate(lefts):
            stop, end = (top + side) * before, (left + side) * before
            tile = network(x[..., top * before : stop, left * before : end])
            if above:
                tile = _blended(above[column], tile, side // 4 * after, dim=-2)
            if row:
                tile = _blended(row[-1], tile, side // 4 * after, dim=-1)
            row.append(tile)
        strips.append(_joined(row, step * after, dim=-1))
        above = row
    return _joined(strips, step * after, dim=-2)


def _blended(before: Tensor, after: Tensor, overlap: int, dim: int) -> Tensor:
    """`after`, its first rows (dim -2) or columns (-1) fading in from the last ones of `before`, on which they lie."""
    ramp = torch.arange(overlap, device=after.device, dtype=after.dtype) / overlap
    weight = ramp[:, None] if dim == -2 else ramp
    start = before.shape[dim] - overlap
    seam = torch.lerp(before.narrow(dim, start, overlap), after.narrow(dim, 0, overlap), weight)
    return torch.cat([seam, after.narrow(dim, overlap, after.shape[dim] - overlap)], dim)


def _joined(tiles: list[Tensor], step: int, dim: int) -> Tensor:
    """Tiles side by side, each but the last without what the next one covers."""
    kept = [one.narrow(dim, 0, step) for one, _ in pairwise(tiles)]
    return torch.cat([*kept, tiles[-1]], dim)
