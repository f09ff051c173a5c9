"""ControlNet: a copy of a U-Net's encoder that reads a picture, and tells the U-Net what it found there.

Zhang et al. 2023, arXiv 2302.05543, section 3. Shapes: B pictures, C channels, h and w the latent's height and width,
H and W the picture's.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from calotype.nn.unet import Conditioning, Residuals, UNetConfig, UNetEncoder, skip_channels


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """That of the U-Net whose encoder it copies (nothing here concerns the way up), and of what reads the picture."""

    hint_channels: tuple[int, ...] = (16, 32, 96, 256)  # between them the picture's sides are halved
    bgr: bool = False  # it was trained on pictures whose first channel is blue
    global_pool: bool = False  # its residuals are means over the map: what is in the picture, not where (shuffle)

    @property
    def downscale(self) -> int:
        """Pixels of the picture to one of the latent, in each direction."""
        return 1 << (len(self.hint_channels) - 1)


class HintEmbedding(nn.Module):
    """Convolutions that bring a picture (B, 3, H, W) to the latent's size and the encoder's width."""

    def __init__(self, hint_channels: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, hint_channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for here, below in pairwise(hint_channels):
            self.blocks += [nn.Conv2d(here, here, 3, padding=1), nn.Conv2d(here, below, 3, stride=2, padding=1)]
        self.conv_out = nn.Conv2d(hint_channels[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv_in, *self.blocks):
            x = F.silu(conv(x))
        out: Tensor = self.conv_out(x)
        return out


class ControlNet(UNetEncoder):
    """Evaluated beside the U-Net in every step; the picture is embedded once, by `embed_hint`."""

    config: ControlNetConfig

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config)
        self.controlnet_cond_embedding = HintEmbedding(config.hint_channels, config.channels[0])
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(c, c, 1) for c in skip_channels(config))
        self.controlnet_mid_block = nn.Conv2d(config.channels[-1], config.channels[-1], 1)

    def embed_hint(self, image: Tensor) -> Tensor:
        """The control picture (B, 3, H, W), RGB in [0, 1], as `forward` takes it: (B, channels[0], h, w)."""
        hint: Tensor = self.controlnet_cond_embedding(image.flip(1) if self.config.bgr else image)
        return hint

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning, hint: Tensor) -> Residuals:
        """What to add to the U-Net's maps for noisy latents x (B, in_channels, h, w) at timesteps t (B,), at scale 1.

        x are the latents alone, also beside an inpainting U-Net; the conditioning is the U-Net's.
        """
        temb = self.embed(t, conditioning, x.dtype)
        x, skips = self.encode(self.conv_in(x) + hint, temb, conditioning.context)
        down = tuple(conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True))
        mid = self.controlnet_mid_block(x)
        if self.config.global_pool:
            return Residuals(tuple(each.mean((2, 3), keepdim=True) for each in down), mid.mean((2, 3), keepdim=True))
        return Residuals(down, mid)
