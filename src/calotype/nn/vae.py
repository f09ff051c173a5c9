"""The autoencoder (AutoencoderKL) between pictures and latents: 8 x smaller, 4 channels (Rombach et al. 2022, 3.1).

Shapes: pictures (B, 3, H, W) in [-1, 1]; latents (B, 4, h, w), unscaled: the diffusion model's latents are
`(latents - shift_factor) * scaling_factor`, and that is the caller's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from calotype.nn.attention import Attention, Context
from calotype.nn.blocks import Downsample, ResnetBlock, Upsample

EPS = 1e-6  # of every group norm in the autoencoder; the U-Net has 1e-5


@dataclass(frozen=True)
class VAEConfig:
    """What real checkpoints vary. The defaults are Stable Diffusion 1.5."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2  # residual blocks a level in the encoder; the decoder has one more
    norm_groups: int = 32
    mid_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    force_upcast: bool = True  # overflows in float16 (SDXL): decode in float32
    sample_size: int = 512

    @property
    def downscale(self) -> int:
        """Pixels a latent pixel, each way."""
        return int(2 ** (len(self.channels) - 1))


class SpatialAttention(Attention):
    """Single-head self-attention over a feature map (B, C, h, w), residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)
        return super().forward(pixels, context).transpose(1, 2).reshape(x.shape) + x


class Level(nn.Module):
    """Residual blocks at one resolution, then perhaps a change of size."""

    def __init__(self, ins: int, out: int, layers: int, groups: int, *, down: bool = False, up: bool = False) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(ins if i == 0 else out, out, None, groups, EPS) for i in range(layers))
        self.downsamplers = nn.ModuleList([Downsample(out, asymmetric=True)]) if down else None
        self.upsamplers = nn.ModuleList([Upsample(out)]) if up else None

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for sampler in (*(self.downsamplers or ()), *(self.upsamplers or ())):
            x = sampler(x)
        return x


class Middle(nn.Module):
    """Residual, attention, residual at the lowest resolution."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, None, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups)]) if attention else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        if self.attentions is not None:
            x = self.attentions[0](x)
        out: Tensor = self.resnets[1](x)
        return out


class VAEEncoder(nn.Module):
    """Pictures (B, 3, H, W) to the mean and log-variance of latents (B, 2 * latent_channels, h, w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.channels, config.norm_groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(channels[max(i - 1, 0)], channels[i], config.layers, groups, down=i < len(channels) - 1)
            for i in range(len(channels))
        )
        self.mid_block = Middle(channels[-1], groups, config.mid_attention)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return out


class VAEDecoder(nn.Module):
    """Latents (B, latent_channels, h, w) to pictures (B, 3, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.channels[::-1], config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = Middle(channels[0], groups, config.mid_attention)
        self.up_blocks = nn.ModuleList(
            Level(channels[max(i - 1, 0)], channels[i], config.layers + 1, groups, up=i < len(channels) - 1)
            for i in range(len(channels))
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class AutoencoderKL(nn.Module):
    """Encoder and decoder around a Gaussian latent."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = VAEEncoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.post_quant_conv else None
        self.decoder = VAEDecoder(config)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, latent_channels, h, w) of the latents of images (B, 3, H, W) in [-1, 1]."""
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), roughly in [-1, 1], from unscaled latents (B, latent_channels, h, w)."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        out: Tensor = self.decoder(latents)
        return out
