"""Trains the feature network of `calotype eval` on captioned icons: about eight minutes on one CPU thread.

    python recipes/icons/train_features.py ICONS [-o OUT] [--steps 3000]

ICONS holds manifest.jsonl and pictures-128.tar (`<id>.webp`, RGBA, 128 px). The network learns to tell three things of
a picture: what it shows (sub-group), in which style, and how much of each of six defects was put into it. One concept
in five, by the hash of its caption, is never trained on: check_features.py uses those.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from calotype.training.features import SHIPPED, FeatureConfig, FeatureNet, features

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("icons", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=SHIPPED)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()

    torch.manual_seed(0)
    rows, pictures = read_icons(args.icons)
    held_out = torch.tensor([is_held_out(row) for row in rows])
    subs, styles = labels([row["sub"] or row["group"] for row in rows]), labels([row["style"] for row in rows])
    print(f"{len(rows)} pictures, {int(held_out.sum())} held out, {subs.max() + 1} subjects, {styles.max() + 1} styles")

    net = FeatureNet(FeatureConfig())
    heads = Heads(net.config.dim, int(subs.max()) + 1, int(styles.max()) + 1)
    train(net, heads, pictures[~held_out], subs[~held_out], styles[~held_out], args.steps)
    report(net, heads, pictures[held_out], subs[held_out], styles[held_out])
    for module in list(net.modules()):
        fuse_norms(module)
    standardise(net.eval(), pictures[~held_out])
    save(net, args.output)


def read_icons(folder: Path) -> tuple[list[dict[str, str]], Tensor]:
    """The manifest's rows and their pictures (n, 3, 128, 128) in uint8, on white."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    index = {f"{row['id']:05d}.webp": i for i, row in enumerate(rows)}
    pictures = torch.empty(len(rows), 3, 128, 128, dtype=torch.uint8)
    with tarfile.open(folder / "pictures-128.tar") as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None and member.name in index:
                icon = Image.open(io.BytesIO(file.read())).convert("RGBA")
                icon = Image.alpha_composite(Image.new("RGBA", icon.size, "white"), icon).convert("RGB")
                pictures[index.pop(member.name)] = torch.from_numpy(np.array(icon)).permute(2, 0, 1)
    if index:
        raise SystemExit(f"{len(index)} pictures of the manifest are missing in the tar, such as {next(iter(index))}")
    return rows, pictures


def is_held_out(row: dict[str, str]) -> bool:
    """One concept in five, the same in every style."""
    return zlib.crc32(row["caption"].encode()) % 5 == 0


def labels(words: list[str], least: int = 20) -> Tensor:
    """Class numbers (n,); words with fewer than `least` pictures, and '?', are -100, which the loss ignores."""
    frequent = [word for word, count in Counter(words).most_common() if count >= least and word != "?"]
    return torch.tensor([frequent.index(word) if word in frequent else -100 for word in words])


# Defects: pictures x (n, 3, H, W) in [-1, 1] and how much of the defect each one gets (n,).


def warp(x: Tensor, amount: Tensor) -> Tensor:
    """Wobbly outlines: a smooth random displacement of `amount` (standard deviation in half picture sides)."""
    n, _, height, width = x.shape
    field = F.interpolate(torch.randn(n, 2, 8, 8), (height, width), mode="bicubic", align_corners=False)
    field = field * amount.view(-1, 1, 1, 1)
    straight = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), [n, 3, height, width], align_corners=False)
    grid = straight + field.permute(0, 2, 3, 1)
    return F.grid_sample(x - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 1  # 0 is white


def ghost(x: Tensor, share: Tensor) -> Tensor:
    """Another picture shines through."""
    return x.lerp(x.roll(1, 0), share.view(-1, 1, 1, 1))


def turn_hue(x: Tensor, angle: Tensor) -> Tensor:
    """Turns the colours around the grey axis (Rodrigues' formula) by an angle in radians, either way."""
    angle = angle * torch.randint(0, 2, angle.shape).mul(2).sub(1)
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    turn = cos * torch.eye(3) + (1 - cos) / 3 + sin * cross
    return torch.einsum("nij,njhw->nihw", turn, x).clamp(-1, 1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian, sigma in pixels, at most 4."""
    kernel = torch.exp(-(torch.arange(-10, 11) ** 2) / (2 * sigma.view(-1, 1) ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # (3n, 21)
    y = F.pad(x.flatten(0, 1)[None], (10, 10, 10, 10), mode="replicate")
    y = F.conv2d(y, kernel[:, None, :, None], groups=len(kernel))
    return F.conv2d(y, kernel[:, None, None, :], groups=len(kernel)).view_as(x)


def noise(x: Tensor, sigma: Tensor) -> Tensor:
    return (x + sigma.view(-1, 1, 1, 1) * torch.randn_like(x)).clamp(-1, 1)


def jpeg(x: Tensor, quality: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for i, q in enumerate(quality.round().int().tolist()):
        file = io.BytesIO()
        array = x[i].add(1).mul(127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(array).save(file, "JPEG", quality=q)
        out[i] = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 127.5 - 1
    return out


Defect = Callable[[Tensor, Tensor], Tensor]
# Each with its amounts, from hardly visible to gross.
DEFECTS: tuple[tuple[Defect, float, float], ...] = (
    (warp, 0.008, 0.12),
    (ghost, 0.04, 0.5),
    (turn_hue, 0.05, math.pi / 2),
    (blur, 0.35, 4.0),
    (noise, 0.02, 0.6),
    (jpeg, 80, 3),
)


def damage(x: Tensor, chance: float = 0.15) -> tuple[Tensor, Tensor]:
    """Each picture with each defect by chance; also the strengths (n, defects): 0 is none, else 0.1 to 1."""
    strengths = torch.zeros(len(x), len(DEFECTS))
    for k, (defect, low, high) in enumerate(DEFECTS):
        rows = torch.nonzero(torch.rand(len(x)) < chance).flatten()
        if len(rows) > 0:
            s = torch.rand(len(rows))
            x[rows] = defect(x[rows], low * (high / low) ** s)
            strengths[rows, k] = 0.1 + 0.9 * s
    return x, strengths


def jitter(x: Tensor) -> Tensor:
    """Mirrors half of the pictures and moves all by whole pixels: what leaves every edge as sharp as it was."""
    dy, dx = torch.randint(-4, 5, (2,)).tolist()
    mirrored = torch.rand(len(x), 1, 1, 1) < 0.5
    return torch.where(mirrored, x.flip(3), x).roll((dy, dx), (2, 3))


class Heads(nn.Module):
    """Linear read-outs of the standardised features."""

    def __init__(self, dim: int, subs: int, styles: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.sub, self.style = nn.Linear(dim, subs), nn.Linear(dim, styles)
        self.defects = nn.Linear(dim, len(DEFECTS))

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f = self.norm(pooled)
        return self.sub(f), self.style(f), self.defects(f)


def train(net: FeatureNet, heads: Heads, pictures: Tensor, subs: Tensor, styles: Tensor, steps: int) -> None:
    add_norms(net)
    net.to(memory_format=torch.channels_last)
    parameters = [*net.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.15)
    start, order = time.monotonic(), torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(pictures))
        rows, order = order[:BATCH], order[BATCH:]
        x, strengths = damage(jitter(pictures[rows].float() / 127.5 - 1))
        sub, style, defects = heads(net.pooled(x.contiguous(memory_format=torch.channels_last)))
        losses = torch.stack(
            [
                F.cross_entropy(sub, subs[rows]),
                F.cross_entropy(style, styles[rows]),
                10 * F.mse_loss(defects, strengths),
            ]
        )
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        rate.step()
        if step % 100 == 0:
            terms = " ".join(f"{loss:.3f}" for loss in losses.tolist())
            print(f"step {step}: subject, style, defects {terms}; {time.monotonic() - start:.0f} s", flush=True)


@torch.inference_mode()
def report(net: FeatureNet, heads: Heads, pictures: Tensor, subs: Tensor, styles: Tensor) -> None:
    """Accuracies on clean held-out pictures and the correlation of every guessed strength with the true one."""
    net.eval()
    heads.eval()
    clean, damaged = [], []
    for chunk in pictures.split(BATCH):
        x = chunk.float() / 127.5 - 1
        clean.append(heads(net.pooled(x)))
        x, strengths = damage(x)
        damaged.append((heads(net.pooled(x))[2], strengths))
    for name, column, truth in (("subject", 0, subs), ("style", 1, styles)):
        guess = torch.cat([row[column] for row in clean]).argmax(1)
        known = truth >= 0
        print(f"{name}: {(guess == truth)[known].float().mean():.1%} right on {int(known.sum())} held-out pictures")
    guesses, truths = (torch.cat(column) for column in zip(*damaged, strict=True))
    for k, (defect, _, _) in enumerate(DEFECTS):
        r = torch.corrcoef(torch.stack([guesses[:, k], truths[:, k]]))[0, 1]
        print(f"{defect.__name__}: correlation {r:.3f}")


def add_norms(module: nn.Module) -> None:
    """Puts a batch norm behind every convolution, for training alone."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            setattr(module, name, nn.Sequential(child, nn.BatchNorm2d(child.out_channels)))
        else:
            add_norms(child)


def fuse_norms(module: nn.Module) -> None:
    """Folds each batch norm back into its convolution: the same function with fewer parts."""
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential):
            setattr(module, name, fuse_conv_bn_eval(child[0], child[1]))


def standardise(net: FeatureNet, pictures: Tensor) -> None:
    """Sets the net's mean and std so that features of these pictures have mean 0 and deviation 1."""
    f = features(net, pictures)
    net.mean.copy_(f.mean(0))
    net.std.copy_(f.std(0).clamp(min=1e-3))


def save(net: FeatureNet, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half().contiguous() for name, tensor in net.state_dict().items()}
    partial = folder / "model.safetensors.part"
    partial.write_bytes(to_bytes(weights))
    os.replace(partial, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(net.config)) + "\n")
    print(f"{folder}: {sum(tensor.numel() for tensor in weights.values()):,} numbers")


if __name__ == "__main__":
    main()
