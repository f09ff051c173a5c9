"""Embeddings of numbers, the residual block, and the two ways to change a feature map's size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Temb = Tensor | dict[nn.Module, Tensor]  # the time embedding (B, E), or what each residual block makes of it


def sinusoids(values: Tensor, dim: int, *, cos_first: bool = True, shift: float = 0.0) -> Tensor:
    """Embeds numbers (B,) as (B, dim) float32 sines and cosines of falling frequency (Vaswani et al. 2017, 3.5).

    The frequencies are exp(-ln(10000) i / (half - shift)). Timesteps use shift 0 and cosines first in every released
    Stable Diffusion; the guidance scale of an LCM uses shift 1 and sines first.
    """
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, device=values.device, dtype=torch.float32) * (-math.log(1e4) / (half - shift))
    )
    angles = values.to(torch.float32)[:, None] * frequencies
    halves = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    return F.pad(torch.cat(halves, dim=-1), (0, dim % 2))


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """Embeds the guidance scale w (B,) of the LCM paper (4.2; diffusers' guidance_scale is w + 1) as (B, dim)."""
    return sinusoids(w.to(torch.float32) * 1000.0, dim, cos_first=False, shift=1.0)


class TimestepEmbedding(nn.Module):
    """Two linear layers over a sinusoidal embedding; `cond_proj` lets an LCM add its guidance embedding before them."""

    def __init__(self, in_dim: int, dim: int, guidance_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.cond_proj = None if guidance_dim is None else nn.Linear(guidance_dim, in_dim, bias=False)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor, guidance: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and guidance is not None:
            x = x + self.cond_proj(guidance)
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with group norms, the time embedding added between them, and a residual.

    The autoencoders have no time: they build it with `temb_dim=None`.
    """

    def __init__(self, in_channels: int, out_channels: int, temb_dim: int | None, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if temb_dim is None else nn.Linear(temb_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Temb | None = None) -> Tensor:
        if temb is None:
            return self.shifted(x, None)
        return self.shifted(x, temb[self] if isinstance(temb, dict) else self.shift(temb))

    def shift(self, temb: Tensor) -> Tensor:
        """What the time embedding (B, E) adds to every pixel, (B, out_channels)."""
        assert self.time_emb_proj is not None
        shift: Tensor = self.time_emb_proj(F.silu(temb))
        return shift

    def shifted(self, x: Tensor, shift: Tensor | None) -> Tensor:
        """The output for a time embedding that is projected already."""
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        x = self.conv1(F.silu(self.norm1(x)))
        if shift is not None:
            x = x + shift[:, :, None, None]
        x = self.conv2(F.silu(self.norm2(x))) + residual
        return x


class Downsample(nn.Module):
    """Halves height and width by a strided convolution.

    The U-Net pads both sides, the autoencoder only the right and the bottom (`asymmetric`), as each was trained.
    """

    def __init__(self, channels: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.asymmetric:
            x = F.pad(x, (0, 1, 0, 1))
        out: Tensor = self.conv(x)
        return out


class Upsample(nn.Module):
    """Nearest-neighbour enlargement, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Enlarges to `size`, or to twice the size. A size is needed where a level's height or width was odd."""
        if size is None:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            x = F.interpolate(x, size=size, mode="nearest")
        out: Tensor = self.conv(x)
        return out
