"""The tiny autoencoder (TAESD layout): latents to pictures in a fraction of the time, for previews and slow machines.

It was distilled to speak the same latents as the full one, already scaled: its scaling factor is 1.
Source of the layout: madebyollin/taesd; parameters are named as in diffusers' AutoencoderTiny.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.errors import UsageError


@dataclass(frozen=True)
class TinyVAEConfig:
    """What real checkpoints vary. The defaults are TAESD and TAESDXL."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_channels: tuple[int, ...] = (64, 64, 64, 64)
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)  # none: a decoder alone
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    force_upcast: bool = False
    sample_size: int = 512

    @property
    def downscale(self) -> int:
        """Pixels a latent pixel, each way."""
        return int(2 ** (len(self.decoder_blocks) - 1))


class TinyBlock(nn.Module):
    """Three convolutions and a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] to latents (B, latent_channels, h, w)."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (channels, blocks) in enumerate(zip(config.encoder_channels, config.encoder_blocks, strict=True)):
            if i == 0:
                layers.append(nn.Conv2d(config.in_channels, channels, 3, padding=1))
            else:
                layers.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False))
            layers += [TinyBlock(channels) for _ in range(blocks)]
        layers.append(nn.Conv2d(config.encoder_channels[-1], config.latent_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers((x + 1) / 2)  # it was trained on [0, 1]
        return out


class TinyDecoder(nn.Module):
    """Latents (B, latent_channels, h, w) to pictures (B, 3, H, W) in [-1, 1]."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        channels = config.decoder_channels
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, channels[0], 3, padding=1), nn.ReLU()]
        for i, blocks in enumerate(config.decoder_blocks):
            layers += [TinyBlock(channels[i]) for _ in range(blocks)]
            if i < len(channels) - 1:
                layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(channels[i], channels[i], 3, padding=1, bias=False)]
            else:
                layers.append(nn.Conv2d(channels[i], config.out_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x / 3) * 3  # a soft clamp: latents hardly leave [-3, 3]
        out: Tensor = self.layers(x) * 2 - 1
        return out


class AutoencoderTiny(nn.Module):
    """Encoder and decoder, or a decoder alone; the latent is deterministic."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TinyEncoder(config) if config.encoder_blocks else None
        self.decoder = TinyDecoder(config)

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        """Latents (B, latent_channels, h, w) of images (B, 3, H, W) in [-1, 1], and no variance.

        Raises UsageError where there is no encoder.
        """
        if self.encoder is None:
            raise UsageError(
                "the tiny autoencoder was loaded without its encoder: it cannot read pictures",
                "put the encoder's file beside the decoder's, or give another autoencoder with vae=",
            )
        return self.encoder(images), None

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), roughly in [-1, 1], from latents (B, latent_channels, h, w)."""
        out: Tensor = self.decoder(latents)
        return out
