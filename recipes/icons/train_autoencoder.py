"""Trains the autoencoder that the icons' model works in: 8 x smaller, 4 channels, in Stable Diffusion's layout.

    python recipes/icons/train_autoencoder.py DATA OUT [--steps 6000] [--start FOLDER [--decoder]]

DATA is what draw.py leaves. OUT becomes a folder with config.json and weights in float16, which calotype and diffusers
load as a `vae`. The run can be stopped at any moment; the same command goes on with it. With `--decoder` the encoder
stays as it is, and so do the latents: models that were trained on them draw better pictures by the new decoder.

Its latents have mean 0 and deviation 1 in each channel, and the scaling factor is 1: a batch norm keeps them there in
training, and is folded into the 1x1 convolutions around the latents in the end. (A shift_factor would say the same, but
not every pipeline reads it.) Instead of a learnt variance, which ends far below what matters, the decoder is trained
under noise of up to a tenth of that deviation, about as much as a diffusion model's samples are off.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from folders import write_json, write_part
from muon import Muon
from resumable import Average, Run, add_options, autocast, learn, pick_device, rng
from scenes import SIZE, Icons, Scene, any_scene, read_icons, render, unseen
from torch import Tensor, nn

from calotype.nn.vae import AutoencoderKL, VAEConfig
from calotype.weights.load import load_vae

NOISE = 0.1  # the most that latents are disturbed by, in training
POSTERIOR = 0.03  # the deviation that the finished encoder reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, help="a folder with an autoencoder of this shape to go on from")
    parser.add_argument("--decoder", action="store_true", help="train only the decoder of what --start names")
    parser.add_argument(
        "--channels", type=lambda text: [int(part) for part in text.split(",")], default=[16, 32, 96, 192]
    )
    parser.add_argument("--steps", type=int, default=6000, help="may be another when a run goes on")
    parser.add_argument("--batch", type=int, default=16, help="crops; a quarter as many whole pictures")
    parser.add_argument(
        "--crop", type=int, default=64, help="pixels: the statistics of a crop differ, its cost is less"
    )
    parser.add_argument(
        "--whole",
        type=float,
        default=0.3,
        help="in the last share of the steps there are no crops, and the rate falls",
    )
    parser.add_argument("--rate", type=float, default=1.5e-3)
    add_options(parser, save_every=200)
    parser.add_argument("--compile", action="store_true", help="worth it on a GPU")
    options = parser.parse_args()
    if options.decoder and options.start is None:
        parser.error("--decoder trains the decoder of an autoencoder: name its folder with --start")
    train(options)


class Bottled(nn.Module):
    """The autoencoder while it is trained: its latents normalised, then disturbed."""

    def __init__(self, net: AutoencoderKL) -> None:
        super().__init__()
        self.net = net
        self.norm = nn.BatchNorm2d(net.config.latent_channels, affine=False, momentum=0.02)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        mean, _ = self.net.encode(x)
        return self.net.decode(self.norm(mean.float()) + noise)


class Decoding(nn.Module):
    """Its decoder by itself, trained on latents that stay what they are."""

    def __init__(self, net: AutoencoderKL) -> None:
        super().__init__()
        self.net = net.requires_grad_(True)
        for part in (net.encoder, net.quant_conv):
            if part is not None:
                part.requires_grad_(False)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        mean, _ = self.net.encode(x)
        return self.net.decode(mean.float() + noise)


def train(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    torch.manual_seed(options.seed)
    started = time.monotonic()
    icons = read_icons(options.data, options.limit)
    seen = [i for i, row in enumerate(icons.rows) if not unseen(row)]
    judged = [i for i, row in enumerate(icons.rows) if unseen(row)]
    print(f"{len(seen)} icons, and {len(judged)} held out; read in {time.monotonic() - started:.0f} s", flush=True)

    model = new_model(options, icons, seen).to(device)
    net = model.net
    average = Average(model, decay=0.998)
    optimizer = Muon(model.parameters(), lr=options.rate)
    kept = ("decoder", "channels", "batch", "crop", "whole", "rate", "seed")
    settings = {name: getattr(options, name) for name in kept}
    run = Run(options.out, settings, {"model": model, "average": average, "optimizer": optimizer})
    forward = torch.compile(model) if options.compile else model
    model.train()

    def loss(step: int) -> Tensor:
        x = batch(icons, seen, options, step, device)
        noise = disturbance(x, net.config, options.seed, step)
        with autocast(device, options.float32):
            y = forward(x, noise)
        return distance(y.float(), x)

    def figures() -> dict[str, float]:
        whole, mean = psnr(finished(average, icons, seen[:32]), icons, judged[:64])
        return {"psnr": whole, "psnr_mean": mean}

    learn(run, options, model, average, optimizer, loss, fall=options.whole, figures=figures)
    net = finished(average, icons, seen)
    whole, mean = psnr(net, icons, judged)
    export(net, options.out, {**settings, "psnr": round(whole, 2), "seconds": round(run.elapsed)})
    reached = f"{whole:.2f} dB on {len(judged)} held-out icons on white ({mean:.2f} dB the mean of each)"
    print(f"{options.out}: {reached}; {run.elapsed:.0f} s")


def new_model(options: argparse.Namespace, icons: Icons, seen: Sequence[int]) -> Bottled | Decoding:
    if options.start is None:
        return Bottled(new_net(options.channels))
    start = started_from(options.start)
    if options.decoder:
        return Decoding(start)
    fold(start.requires_grad_(True), *statistics(start, icons, seen[:: max(1, len(seen) // 500)]))
    return Bottled(start)


def new_net(channels: Sequence[int]) -> AutoencoderKL:
    # One layer a level and no attention: at this size the 128-px levels cost most, and the norms see the whole picture.
    groups = math.gcd(16, *channels)
    return AutoencoderKL(VAEConfig(channels=tuple(channels), layers=1, norm_groups=groups, mid_attention=False,
                                   scaling_factor=1.0, sample_size=SIZE))  # fmt: skip


def batch(icons: Icons, seen: Sequence[int], options: argparse.Namespace, step: int, device: torch.device) -> Tensor:
    """The pictures of a step: by turns crops, of more icons, and whole ones; at last whole ones alone."""
    dice = rng(options.seed, step)
    whole = step % 2 == 1 or step >= options.steps * (1 - options.whole)
    count = max(1, options.batch // 4) if whole else options.batch
    pictures = render(icons, [any_scene(seen, dice) for _ in range(count)], device)
    return pictures if whole else cropped(pictures, options.crop, dice)


def cropped(pictures: Tensor, side: int, dice: np.random.Generator) -> Tensor:
    """A square somewhere in each picture."""
    places = dice.integers(0, SIZE - side + 1, (len(pictures), 2)).tolist()
    return torch.stack([x[:, y : y + side, z : z + side] for x, (y, z) in zip(pictures, places, strict=True)])


def disturbance(x: Tensor, config: VAEConfig, seed: int, step: int) -> Tensor:
    """Noise for the latents of x, of another strength in each picture."""
    generator = torch.Generator().manual_seed((seed << 32) + step)
    side = x.shape[-1] // config.downscale
    strength = NOISE * torch.rand(len(x), 1, 1, 1, generator=generator)
    return (strength * torch.randn(len(x), config.latent_channels, side, side, generator=generator)).to(x.device)


def distance(y: Tensor, x: Tensor) -> Tensor:
    """How far y is from x: in colour, in edges, and in what is left from afar.

    The squared hue of whole areas counts much: most icons are yellow, red or blue, so that without it the network is
    long content with these, and draws the green and the pink in brown.
    """
    off = y - x
    edges = off.diff(dim=2).abs().mean() + off.diff(dim=3).abs().mean()
    near, far = F.avg_pool2d(off, 2), F.avg_pool2d(off, 4)
    hue = (far - far.mean(dim=1, keepdim=True)).square().mean()
    afar = near.abs().mean() + far.abs().mean()
    return off.abs().mean() + 2 * off.square().mean() + 0.5 * edges + 0.5 * afar + 6 * hue


# ---- the end: latents of mean 0 and deviation 1, and figures ----


def on_white(icons: Icons, chosen: Sequence[int], device: torch.device) -> list[Tensor]:
    """The icons as they are, in batches."""
    scenes = [Scene((i,)) for i in chosen]
    return [render(icons, scenes[at : at + 32], device) for at in range(0, len(scenes), 32)]


@torch.no_grad()
def normalise(net: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """The encoder's latents z become (z - mean) / std, and its variance a constant."""
    count, conv = net.config.latent_channels, net.quant_conv
    assert conv is not None
    assert conv.bias is not None
    conv.weight[:count] /= std[:, None, None, None]
    conv.bias[:count] = (conv.bias[:count] - mean) / std
    conv.weight[count:] = 0
    conv.bias[count:] = 2 * math.log(POSTERIOR)


@torch.no_grad()
def fold(net: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """The same, and the decoder undoes it: the same pictures from other latents."""
    normalise(net, mean, std)
    conv = net.post_quant_conv
    assert conv is not None
    assert conv.bias is not None
    conv.bias += conv.weight[:, :, 0, 0] @ mean
    conv.weight *= std[None, :, None, None]


@torch.no_grad()
def statistics(net: AutoencoderKL, icons: Icons, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and deviation (C,) of the latents of icons on white."""
    device = next(net.parameters()).device
    latents = torch.cat([net.encode(x)[0] for x in on_white(icons, chosen, device)])
    return latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))


def finished(average: Average, icons: Icons, chosen: Sequence[int]) -> AutoencoderKL:
    """The average as an autoencoder by itself. Crops taught the norm; icons on white, some of them, set it right."""
    model: Any = average.network
    if isinstance(model, Decoding):
        return model.net
    net = AutoencoderKL(model.net.config).to(next(model.parameters()).device)
    net.load_state_dict(model.net.state_dict())
    normalise(net, model.norm.running_mean, (model.norm.running_var + model.norm.eps).sqrt())
    fold(net, *statistics(net, icons, chosen[:: max(1, len(chosen) // 1000)]))
    return net.requires_grad_(False).eval()


def started_from(folder: Path) -> AutoencoderKL:
    """A finished autoencoder as the start of another."""
    net = load_vae(folder)
    if not isinstance(net, AutoencoderKL) or net.quant_conv is None or net.post_quant_conv is None:
        raise SystemExit(f"{folder} is no AutoencoderKL with quant convolutions: leave out --start")
    return net


@torch.no_grad()
def psnr(net: nn.Module, icons: Icons, chosen: Sequence[int]) -> tuple[float, float]:
    """Decibels of the mean squared error of all pixels, and the mean of each picture's decibels."""
    device = next(net.parameters()).device
    errors = []
    for x in on_white(icons, chosen, device):
        y = net.decode(net.encode(x)[0]).clamp(-1, 1)
        errors.append((y - x).square().mean(dim=(1, 2, 3)) / 4)
    error = torch.cat(errors)
    return -10 * math.log10(error.mean().item()), (-10 * error.log10()).mean().item()


def export(net: AutoencoderKL, folder: Path, told: dict[str, Any]) -> None:
    """The folder of a `vae`, config.json last, so that one that has it is complete."""
    config, levels = net.config, len(net.config.channels)
    content = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": config.channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "force_upcast": False,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.norm_groups,
        "sample_size": SIZE,
        "scaling_factor": 1.0,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    }
    write_json(folder / "training.json", told)  # how it was made
    write_part(folder, "diffusion_pytorch_model", net.state_dict(), content)


if __name__ == "__main__":
    main()
