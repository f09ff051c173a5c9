"""T2I-Adapter: a small network that turns a picture into one feature map for each level of a U-Net, once a request.

Mou et al. 2023, arXiv 2302.08453, section 3.3; its light and its SDXL variant are known by their code and weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from calotype.nn.unet import Residuals


@dataclass(frozen=True)
class T2IAdapterConfig:
    """What real adapters vary. The defaults are those for Stable Diffusion 1.x."""

    kind: Literal["full", "full_xl", "light"] = "full"
    in_channels: int = 3  # 1: it reads grey pictures
    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # light: of all maps but the last, which is like the one before
    layers: int = 2  # residual blocks of each level
    downscale: int = 8  # pixels to one of the first map, in each direction; 16 for SDXL

    def levels(self) -> Iterator[tuple[int, int, bool]]:
        """Input channels, output channels and whether the size is halved, of each level."""
        channels = self.channels
        if self.kind == "light":
            channels = (self.in_channels * self.downscale**2, *channels, channels[-1])
            yield from ((channels[i], channels[i + 1], i > 0) for i in range(len(channels) - 1))
        else:
            # SDXL's first level is halved before its map is added, the last level and the middle are of one size.
            halved = range(1, len(channels)) if self.kind == "full" else (2,)
            yield from ((channels[max(i - 1, 0)], channels[i], i in halved) for i in range(len(channels)))

    def maps(self) -> tuple[tuple[int, int], ...]:
        """Channels of each feature map, and pixels to one of it in each direction."""
        found, factor = [], self.downscale
        for _, out, halved in self.levels():
            factor *= 2 if halved else 1
            found.append((out, factor))
        return tuple(found)


class Residual(nn.Module):
    """A 3x3 convolution, another one, and a residual."""

    def __init__(self, channels: int, second_kernel: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, second_kernel, padding=second_kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block2(F.relu(self.block1(x))) + x
        return out


class Level(nn.Module):
    """Perhaps half the size, then residual blocks; in a light adapter they are a quarter as wide."""

    def __init__(self, ins: int, out: int, layers: int, *, halved: bool, light: bool) -> None:
        super().__init__()
        width = out // 4 if light else out
        self.halved = halved
        self.in_conv = nn.Conv2d(ins, width, 1) if light or ins != out else None
        self.resnets = nn.Sequential(*(Residual(width, 3 if light else 1) for _ in range(layers)))
        self.out_conv = nn.Conv2d(width, out, 1) if light else None

    def forward(self, x: Tensor) -> Tensor:
        if self.halved:
            x = F.avg_pool2d(x, 2, ceil_mode=True)  # as the U-Net, which rounds up too
        if self.in_conv is not None:
            x = self.in_conv(x)
        x = self.resnets(x)
        return x if self.out_conv is None else self.out_conv(x)


class Levels(nn.Module):
    """All that has weights, under the name that checkpoints give it."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        light = config.kind == "light"
        pixels = config.in_channels * config.downscale**2
        self.conv_in = None if light else nn.Conv2d(pixels, config.channels[0], 3, padding=1)
        self.body = nn.ModuleList(
            Level(ins, out, config.layers, halved=halved, light=light) for ins, out, halved in config.levels()
        )


class T2IAdapter(nn.Module):
    """Reads a picture; knows of no noise, no text and no timestep."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter = Levels(config)

    def forward(self, image: Tensor) -> Residuals:
        """What to add to the U-Net's levels for a picture (B, in_channels, H, W) in [0, 1], at scale 1.

        H and W are any: what is short of a multiple of `downscale` is filled up with the picture's edge.
        """
        factor = self.config.downscale
        right, bottom = -image.shape[-1] % factor, -image.shape[-2] % factor
        if right or bottom:
            image = F.pad(image, (0, right, 0, bottom), mode="replicate")
        x = F.pixel_unshuffle(image, factor)
        if self.adapter.conv_in is not None:
            x = self.adapter.conv_in(x)
        maps = []
        for level in self.adapter.body:
            x = level(x)
            maps.append(x)
        return Residuals(level=tuple(maps))
