"""AnimateDiff's motion modules: attention over the frames of a clip, between the layers of a U-Net made for pictures.

Guo et al. 2023, arXiv 2307.04725, section 4.2. Shapes: n clips of F frames, the frames of a clip one after another in
the batch (n F rows); C channels, h and w a feature map's height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calotype.errors import CheckpointError
from calotype.nn.attention import Attention, FeedForward
from calotype.nn.blocks import sinusoids
from calotype.nn.unet import Block, UNet, UNetConfig

# Every pixel is a sequence of its own. CUDA's attention kernels take fewer than 65536 of them at a time.
MAX_SEQUENCES = 2**15


@dataclass(frozen=True)
class MotionConfig:
    """What real adapters vary. The defaults are AnimateDiff's for Stable Diffusion 1.5, version 2.

    As in all checkpoints, the way up has the same levels in reverse, each with one module more than on the way down.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # of each level
    layers: tuple[int, ...] = (2, 2, 2, 2)  # modules of each level on the way down: one after each residual block
    depths: tuple[int, ...] = (1, 1, 1, 1)  # transformer blocks in each module of a level
    mid_depth: int | None = 1  # None: no module in the middle (versions 1 and 3, SDXL)
    heads: tuple[int, ...] = (8, 8, 8, 8)  # of each level
    norm_groups: int = 32
    max_frames: int = 32  # the longest clip there are positions for; 24 in version 1


class FramePositions(nn.Module):
    """Adds to x (B, F, C) a sinusoidal embedding of each frame's number (Vaswani et al. 2017, 3.5)."""

    pe: Tensor

    def __init__(self, channels: int, max_frames: int) -> None:
        super().__init__()
        self.register_buffer("pe", frame_positions(channels, max_frames))  # checkpoints hold it

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe[:, : x.shape[1]]


def frame_positions(channels: int, frames: int) -> Tensor:
    """Embeddings (1, F, C) of the numbers 0, 1, ..., F - 1: sines in the even channels, cosines in the odd ones."""
    sin, cos = sinusoids(torch.arange(frames), channels, cos_first=False).chunk(2, dim=-1)
    return torch.stack([sin, cos], dim=-1).flatten(1)[None]


class TemporalBlock(nn.Module):
    """Twice self-attention, then feed-forward; each behind a layer norm, each residual. x (B, F, C)."""

    def __init__(self, channels: int, heads: int, max_frames: int) -> None:
        super().__init__()
        self.pos_embed = FramePositions(channels, max_frames)
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn1(self.pos_embed(self.norm1(x)))
        x = x + self.attn2(self.pos_embed(self.norm2(x)))
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class MotionModule(nn.Module):
    """Transformer blocks over the frames of each pixel; residual as a whole."""

    def __init__(self, channels: int, heads: int, depth: int, groups: int, max_frames: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(TemporalBlock(channels, heads, max_frames) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """x (n F, C, h, w), `frames` = F."""
        assert len(x) % frames == 0, f"{len(x)} rows are no clips of {frames} frames"
        _, channels, height, width = x.shape
        clips = x.view(-1, frames, channels, height, width).transpose(1, 2)  # the norm spans a clip, not a frame
        sequences = self.norm(clips).permute(0, 3, 4, 2, 1).flatten(0, 2)  # (n, C, F, h, w) -> (n h w, F, C)
        out = torch.cat([self.attend(some) for some in sequences.split(MAX_SEQUENCES)])
        out = out.view(-1, height, width, frames, channels)
        return x + out.permute(0, 3, 4, 1, 2).flatten(0, 1)  # (n, h, w, F, C) -> (n F, C, h, w)

    def attend(self, x: Tensor) -> Tensor:
        """The transformer and its projections on sequences x (B, F, C)."""
        x = self.proj_in(x)
        for block in self.transformer_blocks:
            x = block(x)
        out: Tensor = self.proj_out(x)
        return out


class MotionModules(nn.Module):
    """The modules of one level, under the name that checkpoints give them."""

    def __init__(self, config: MotionConfig, level: int, count: int, depth: int) -> None:
        super().__init__()
        channels, heads = config.channels[level], config.heads[level]
        self.motion_modules = nn.ModuleList(
            MotionModule(channels, heads, depth, config.norm_groups, config.max_frames) for _ in range(count)
        )


class MotionAdapter(nn.Module):
    """All motion modules of one checkpoint. It computes nothing by itself: `attach` puts them into a U-Net."""

    def __init__(self, config: MotionConfig) -> None:
        super().__init__()
        self.config = config
        levels = range(len(config.channels))
        self.down_blocks = nn.ModuleList(
            MotionModules(config, level, config.layers[level], config.depths[level]) for level in levels
        )
        self.mid_block = None if config.mid_depth is None else MotionModules(config, -1, 1, config.mid_depth)
        self.up_blocks = nn.ModuleList(
            MotionModules(config, level, config.layers[level] + 1, config.depths[level]) for level in reversed(levels)
        )


def attach(unet: UNet, adapter: MotionAdapter) -> None:
    """Puts an adapter's modules into a U-Net, in the place of another's: the same modules, not copies of them.

    They take part where the U-Net is told of `frames`. Raises CheckpointError where they do not fit, changing nothing.
    """
    fault = mismatch(unet.config, adapter.config)
    if fault is not None:
        raise CheckpointError(f"the motion adapter does not fit the U-Net: {fault}")
    detach(unet)
    theirs = [*adapter.down_blocks, *adapter.up_blocks]
    for block, level in zip([*unet.down_blocks, *unet.up_blocks], theirs, strict=True):
        assert isinstance(block, Block)
        assert isinstance(level, MotionModules)
        block.motion_modules = level.motion_modules
    if adapter.mid_block is not None:
        assert unet.mid_block is not None
        unet.mid_block.motion_modules = adapter.mid_block.motion_modules


def detach(unet: UNet) -> None:
    """Takes all motion modules out of a U-Net, which is then what it was before."""
    for block in [*unet.down_blocks, *unet.up_blocks]:
        assert isinstance(block, Block)
        block.motion_modules = None
    if unet.mid_block is not None:
        unet.mid_block.motion_modules = None


def mismatch(unet: UNetConfig, motion: MotionConfig) -> str | None:
    """What keeps an adapter from fitting a U-Net, as a phrase; None where it fits."""
    if motion.channels != unet.channels:
        return f"it is for levels of {listed(motion.channels)} channels, the U-Net has {listed(unet.channels)}"
    down = tuple(len(depths) for depths in unet.down_depths)
    up = tuple(len(depths) for depths in unet.up_depths)
    if (motion.layers, tuple(count + 1 for count in reversed(motion.layers))) != (down, up):
        return f"it is for levels of {listed(motion.layers)} layers, the U-Net has {listed(down)} and {listed(up)}"
    if motion.mid_depth is not None and (not unet.has_mid or unet.mid_depth is None):
        return "it has a module for the middle, where the U-Net has no attention"
    return None


def listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(str(number) for number in numbers)
