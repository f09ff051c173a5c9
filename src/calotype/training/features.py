"""The feature network of `calotype eval`: a small CNN of our own that turns a picture into 256 numbers.

It was trained by recipes/icons/train_features.py to tell what an icon shows, in which style it is drawn and how it was
damaged (blur, noise, colour, JPEG, ghosts, warps), so its features see content, style and defects alike.
docs/notes/eval.md says how far distances between them can be trusted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

SHIPPED = Path(__file__).parents[1] / "models" / "features"


@dataclass(frozen=True)
class FeatureConfig:
    """The widths of the stem (1/4 of the picture's side) and of the three stages after it (1/8, 1/16, 1/32)."""

    size: int = 128  # side in pixels of the pictures it was trained on; others are resized to it
    channels: tuple[int, int, int, int] = (24, 32, 80, 144)

    @property
    def dim(self) -> int:
        """How many features: mean and deviation of the two early layers, mean of the last."""
        stem, early, _, last = self.channels
        return 2 * stem + 2 * early + last


class Stage(nn.Module):
    """Halves the picture, then refines it with one residual convolution."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(ins, outs, 3, stride=2, padding=1)
        self.refine = nn.Conv2d(outs, outs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(x))
        return F.relu(x + self.refine(x))


class FeatureNet(nn.Module):
    """Pictures (B, 3, size, size) in [-1, 1] to features (B, dim), each with mean 0 and deviation 1 over clean icons.

    The early layers are pooled too, because sharpness and colour live there; mean and deviation over the picture say
    how much of each pattern there is and how unevenly it is spread.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config = config
        stem, *widths = config.channels
        self.stem = nn.Conv2d(12, stem, 3, stride=2, padding=1)
        self.stages = nn.ModuleList(Stage(ins, outs) for ins, outs in zip(config.channels[:-1], widths, strict=True))
        self.register_buffer("mean", torch.zeros(config.dim))
        self.register_buffer("std", torch.ones(config.dim))

    def pooled(self, x: Tensor) -> Tensor:
        """The features (B, dim) before standardisation."""
        x = F.relu(self.stem(F.pixel_unshuffle(x, 2)))
        maps = [x]
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        stem, early, _, last = maps
        columns = [column for map in (stem, early) for column in (map.mean((2, 3)), map.flatten(2).std(2))]
        return torch.cat([*columns, last.mean((2, 3))], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.pooled(x) - self.mean) / self.std


def load_features(folder: Path = SHIPPED) -> FeatureNet:
    """The trained network, in float32, from a folder with config.json and model.safetensors."""
    fields = json.loads((folder / "config.json").read_text())
    net = FeatureNet(FeatureConfig(size=fields["size"], channels=tuple(fields["channels"])))
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    net.load_state_dict(weights)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def features(net: FeatureNet, pictures: Tensor, batch: int = 64) -> Tensor:
    """Features (n, dim) in float32 of pictures (n, 3, H, W) in uint8."""
    size = net.config.size
    rows = []
    for chunk in torch.split(pictures, batch):
        x = chunk.float() / 127.5 - 1
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        rows.append(net(x.contiguous(memory_format=torch.channels_last)))
    return torch.cat(rows)
