"""The U-Net of Stable Diffusion 1.x, 2.x, SDXL, SSD-1B and their latent consistency models: one class, many configs.

Shapes: B pictures, C latent channels, h and w the latent's height and width (pixels / 8), L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.nn.attention import Context, KeysValues, Transformer2D, TransformerBlock
from calotype.nn.blocks import Downsample, ResnetBlock, Temb, TimestepEmbedding, Upsample, guidance_embedding, sinusoids

Depths = tuple[tuple[int | None, ...], ...]


@dataclass(frozen=True)
class UNetConfig:
    """What real checkpoints vary. The defaults are Stable Diffusion 1.5.

    A depth is the number of transformer blocks after one residual block; None means no attention there at all, which is
    not the same as an attention module of 0 blocks (that one still has its norm and projections).
    """

    in_channels: int = 4  # 9 for inpainting: latents, mask, masked picture's latents
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # of each level
    heads: tuple[int, ...] = (8, 8, 8, 8)  # of each level
    down_depths: Depths = ((1, 1), (1, 1), (1, 1), (None, None))  # [level][layer]
    mid_depth: int | None = 1  # None: one residual block without attention (SSD-1B)
    has_mid: bool = True
    up_depths: Depths = ((None, None, None), (1, 1, 1), (1, 1, 1), (1, 1, 1))  # from the deepest level upwards
    context_dim: int = 768  # width D of the text embeddings
    linear_projection: bool = False  # SD 2.x, SDXL: linear layers around the transformers instead of 1x1 convolutions
    guidance_dim: int | None = None  # LCM: width of the guidance embedding (256)
    addition_time_dim: int | None = None  # SDXL: width of each embedded size and crop number (256)
    addition_in_dim: int | None = None  # SDXL: width of pooled text and the embedded numbers together (2816)
    norm_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    sample_size: int = 64  # latent height and width it was trained for


@dataclass(frozen=True)
class Conditioning:
    """What steers the network, one row for each picture."""

    context: Tensor  # text embeddings (B, L, D)
    pooled: Tensor | None = None  # pooled text embedding (B, P), SDXL
    time_ids: Tensor | None = None  # (B, 6): original height, width, crop top, left, target height, width; SDXL
    w: Tensor | None = None  # guidance scale of the LCM paper (B,): diffusers' guidance_scale - 1

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Joins several along the batch. All must have the same optional fields."""

        def join(tensors: list[Tensor | None]) -> Tensor | None:
            present = [tensor for tensor in tensors if tensor is not None]
            assert len(present) in (0, len(tensors)), "conditionings of different kinds cannot share a batch"
            return torch.cat(present) if present else None

        context = torch.cat([part.context for part in parts])
        optional = [join([getattr(part, name) for part in parts]) for name in ("pooled", "time_ids", "w")]
        return Conditioning(context, *optional)

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """The same on a device and in a dtype."""
        optional = (self.pooled, self.time_ids, self.w)
        return Conditioning(
            self.context.to(device, dtype), *(None if field is None else field.to(device, dtype) for field in optional)
        )

    def select(self, rows: slice | Tensor) -> Conditioning:
        """The conditioning of some pictures of the batch."""
        optional = (self.pooled, self.time_ids, self.w)
        return Conditioning(self.context[rows], *(None if field is None else field[rows] for field in optional))


@dataclass(frozen=True)
class Residuals:
    """What controls add to the network's feature maps. Those of several add up; an empty one changes nothing."""

    down: tuple[Tensor, ...] = ()  # ControlNet: to every map that the way up takes in again, from the first on
    mid: Tensor | None = None  # ControlNet: to the middle's output
    level: tuple[Tensor, ...] = ()  # T2I-Adapter: to each level's map, from the first on; one more is the middle's

    def __add__(self, other: Residuals) -> Residuals:
        mids = [mid for mid in (self.mid, other.mid) if mid is not None]
        return Residuals(
            _add(self.down, other.down), sum(mids[1:], mids[0]) if mids else None, _add(self.level, other.level)
        )

    def scaled(self, scale: float | Tensor) -> Residuals:
        """All of it times `scale`: a number, or (B,) with one for each row."""
        return self._each(lambda x: x * (scale.to(x).view(-1, 1, 1, 1) if isinstance(scale, Tensor) else scale))

    def repeat(self, copies: int) -> Residuals:
        """The rows `copies` times over."""
        return self if copies == 1 else self._each(lambda x: x.repeat(copies, 1, 1, 1))

    def select(self, rows: Tensor) -> Residuals:
        """Those of some rows of the batch."""
        return self._each(lambda x: x[rows])

    @staticmethod
    def cat(parts: Sequence[Residuals]) -> Residuals:
        """Those of some rows and of the next, in one."""
        if len(parts) == 1:
            return parts[0]

        def join(maps: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
            return tuple(torch.cat(rows) for rows in zip(*maps, strict=True))

        mids = [part.mid for part in parts if part.mid is not None]
        mid = torch.cat(mids) if mids else None
        return Residuals(join([part.down for part in parts]), mid, join([part.level for part in parts]))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Residuals:
        mid = None if self.mid is None else change(self.mid)
        return Residuals(tuple(map(change, self.down)), mid, tuple(map(change, self.level)))


def _add(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not ours or not theirs:
        return ours or theirs
    return tuple(a + b for a, b in zip(ours, theirs, strict=True))


class Block(nn.Module):
    """One level of the U: residual blocks, each perhaps with a transformer, then perhaps a change of size."""

    def __init__(
        self,
        config: UNetConfig,
        ins: Sequence[int],  # input channels of each residual block
        out: int,
        depths: Sequence[int | None],
        heads: int,
        *,
        down: bool = False,
        up: bool = False,
    ) -> None:
        super().__init__()
        temb_dim = 4 * config.channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, out, temb_dim, config.norm_groups, config.norm_eps) for channels in ins
        )
        transformers = [
            Transformer2D(out, heads, depth, config.context_dim, config.norm_groups, config.linear_projection)
            for depth in depths
            if depth is not None
        ]
        self.attentions = nn.ModuleList(transformers) if transformers else None
        self.motion_modules: nn.ModuleList | None = None  # nn.motion puts them here
        self.downsamplers = nn.ModuleList([Downsample(out)]) if down else None
        self.upsamplers = nn.ModuleList([Upsample(out)]) if up else None

    def layer(self, i: int, x: Tensor, temb: Temb, context: Context, frames: int | None = None) -> Tensor:
        """The i-th residual block, its transformer and its motion module, if there are."""
        x = self.resnets[i](x, temb)
        if self.attentions is not None:
            x = self.attentions[i](x, context)
        return x if self.motion_modules is None or frames is None else self.motion_modules[i](x, frames)


class MidBlock(nn.Module):
    """The bottom of the U: residual, transformer, residual; or a single residual block."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels, depth = config.channels[-1], config.mid_depth
        count = 1 if depth is None else 2
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, 4 * config.channels[0], config.norm_groups, config.norm_eps)
            for _ in range(count)
        )
        self.attentions = None
        if depth is not None:
            transformer = Transformer2D(
                channels, config.heads[-1], depth, config.context_dim, config.norm_groups, config.linear_projection
            )
            self.attentions = nn.ModuleList([transformer])
        self.motion_modules: nn.ModuleList | None = None  # nn.motion puts one here

    def forward(self, x: Tensor, temb: Temb, context: Context, frames: int | None = None) -> Tensor:
        x = self.resnets[0](x, temb)
        if self.attentions is not None:
            x = self.attentions[0](x, context)
            if self.motion_modules is not None and frames is not None:
                x = self.motion_modules[0](x, frames)
            x = self.resnets[1](x, temb)
        return x


def skip_channels(config: UNetConfig) -> list[int]:
    """The channels of every feature map that the way up takes in again, from the first on."""
    found = [config.channels[0]]
    for level, depths in enumerate(config.down_depths):
        last = level == len(config.channels) - 1
        found += [config.channels[level]] * (len(depths) + (not last))
    return found


class UNetEncoder(nn.Module):
    """The half of a U-Net that a ControlNet copies: embeddings, the way down and the middle."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels, levels = config.channels, len(config.channels)
        self.config = config
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0], config.guidance_dim)
        self.add_embedding = None
        if config.addition_in_dim is not None:
            self.add_embedding = TimestepEmbedding(config.addition_in_dim, 4 * channels[0])

        down_blocks = []
        for level, depths in enumerate(config.down_depths):
            ins = [channels[max(level - 1, 0)]] + [channels[level]] * (len(depths) - 1)
            down = level < levels - 1
            down_blocks.append(Block(config, ins, channels[level], depths, config.heads[level], down=down))
        self.down_blocks = nn.ModuleList(down_blocks)
        self.mid_block = MidBlock(config) if config.has_mid else None

    def embed(self, t: Tensor, conditioning: Conditioning, dtype: torch.dtype) -> Tensor:
        """The embedding (B, 4 * channels[0]) of timesteps t (B,) and of everything else that is not a sequence."""
        config = self.config
        time = sinusoids(t, config.channels[0], cos_first=config.flip_sin_to_cos, shift=config.freq_shift).to(dtype)
        guidance = None
        if config.guidance_dim is not None and conditioning.w is not None:
            guidance = guidance_embedding(conditioning.w, config.guidance_dim).to(dtype)
        temb: Tensor = self.time_embedding(time, guidance)
        if self.add_embedding is not None:
            pooled, time_ids = conditioning.pooled, conditioning.time_ids
            assert pooled is not None
            assert time_ids is not None
            assert config.addition_time_dim is not None
            numbers = sinusoids(
                time_ids.flatten(), config.addition_time_dim, cos_first=config.flip_sin_to_cos, shift=config.freq_shift
            ).reshape(len(time_ids), -1)  # (6 B, addition_time_dim) -> (B, 6 addition_time_dim)
            temb = temb + self.add_embedding(torch.cat([pooled, numbers.to(pooled.dtype)], dim=-1).to(dtype))
        return temb

    def shifts(self, temb: Tensor) -> dict[nn.Module, Tensor]:
        """What each residual block makes of the time embedding, which they may stand for in all that follows."""
        return {block: block.shift(temb) for block in self.modules() if isinstance(block, ResnetBlock)}

    def keys_values(self, context: Tensor) -> dict[nn.Module, KeysValues]:
        """What each cross-attention makes of the text, which they may stand for in all that follows."""
        found = (block.attn2 for block in self.modules() if isinstance(block, TransformerBlock))
        return {attention: attention.keys_values(context) for attention in found}

    def encode(
        self, x: Tensor, temb: Temb, context: Context, levels: Sequence[Tensor] = (), frames: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The middle's output, and every map that the way up takes in again, for x (B, channels[0], h, w).

        `levels` are those of Residuals, `frames` is as in UNet.forward.
        """
        todo, skips = list(levels), [x]
        for block in self.down_blocks:
            assert isinstance(block, Block)
            for i in range(len(block.resnets)):
                x = block.layer(i, x, temb, context, frames)
                if todo and block.attentions is not None and i + 1 == len(block.resnets):
                    x = x + todo.pop(0)
                skips.append(x)
            if block.downsamplers is not None:
                x = block.downsamplers[0](x)
                skips.append(x)
            if todo and block.attentions is None:  # the reference adds these past the downsampling, to the skip too
                x = skips[-1] = x + todo.pop(0)
        if self.mid_block is not None:
            x = self.mid_block(x, temb, context, frames)
            if todo and todo[0].shape[1:] == x.shape[1:]:
                x = x + todo.pop(0)
        return x, skips


class UNet(UNetEncoder):
    """Predicts noise, velocity or the clean latent (whichever the checkpoint was trained for) from noisy latents.

    Ronneberger et al. 2015 (arXiv 1505.04597) with the transformers of Rombach et al. 2022 (arXiv 2112.10752, 3.3)
    and, in an LCM, the guidance embedding of Luo et al. 2023 (arXiv 2310.04378, 4.2).
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        channels, levels, skips = config.channels, len(config.channels), skip_channels(config)
        below = channels[-1]
        up_blocks = []
        for i, depths in enumerate(config.up_depths):
            level = levels - 1 - i
            ins = []
            for _ in depths:
                ins.append(below + skips.pop())
                below = channels[level]
            up_blocks.append(Block(config, ins, channels[level], depths, config.heads[level], up=level > 0))
        self.up_blocks = nn.ModuleList(up_blocks)

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        residuals: Residuals | None = None,
        frames: int | None = None,
    ) -> Tensor:
        """The prediction (B, out_channels, h, w) for noisy latents x (B, in_channels, h, w) at timesteps t (B,).

        `frames` rows of the batch after another are one clip, for the motion modules; None: pictures, without motion.
        """
        return self.run(x, self.embed(t, conditioning, x.dtype), conditioning.context, residuals, frames)

    def run(
        self, x: Tensor, temb: Temb, context: Context, residuals: Residuals | None = None, frames: int | None = None
    ) -> Tensor:
        """`forward` after `embed`. What the steps of a request have in common can be computed once for all of them."""
        residuals = residuals or Residuals()
        x, skips = self.encode(self.conv_in(x), temb, context, residuals.level, frames)
        if residuals.down:
            skips = [skip + residual for skip, residual in zip(skips, residuals.down, strict=True)]
        if residuals.mid is not None:
            x = x + residuals.mid

        for block in self.up_blocks:
            assert isinstance(block, Block)
            for i in range(len(block.resnets)):
                x = block.layer(i, torch.cat([x, skips.pop()], dim=1), temb, context, frames)
            if block.upsamplers is not None:
                x = block.upsamplers[0](x, skips[-1].shape[-2:])
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return x
