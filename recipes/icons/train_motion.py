"""Trains a motion module of the base model: icons that bounce, spin, sway or throb (AnimateDiff's way of making clips).

    python recipes/icons/train_motion.py DATA BASE OUT [--motion bounce] [--steps 500]

DATA is what draw.py leaves, BASE what train_base.py leaves. OUT becomes a folder that `--motion` takes. The clips are
icons that are moved as wholes, one period of a motion in each, so that a clip loops. The U-Net stays as it is (Guo et
al. 2023, arXiv 2307.04725, section 4.2), and so does its schedule, where theirs went over to linear betas: config.json
says so. The run can be stopped at any moment; the same command goes on with it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from folders import write_json, write_part
from resumable import Average, Run, add_options, autocast, learn, pick_device
from scenes import Scene, read_icons, read_names, render, shown_and_held_out
from torch import Tensor, nn
from train_base import Steps, chances, early, latents_of, weighted

from calotype.nn.motion import MotionAdapter, MotionConfig, attach
from calotype.nn.unet import Conditioning, UNetConfig
from calotype.nn.vae import AutoencoderKL
from calotype.text.tokenizer import Tokenizer
from calotype.weights.load import load_parts

Pose = tuple[float, float, float, float]  # right, down (in half pictures), turned (radians), how large


def _bounce(phase: float) -> Pose:
    height = abs(math.sin(phase / 2))  # it falls and leaps: fast below, slow above
    return 0.0, 0.25 - 0.5 * height, 0.0, 0.72


MOTIONS: dict[str, Callable[[float], Pose]] = {
    "bounce": _bounce,
    "spin": lambda phase: (0.0, 0.0, phase, 0.72),
    "sway": lambda phase: (0.22 * math.sin(phase), 0.0, 0.25 * math.sin(phase), 0.72),
    "throb": lambda phase: (0.0, 0.0, 0.0, 0.72 + 0.2 * math.sin(phase)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--motion", choices=tuple(MOTIONS), default="bounce")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--steps", type=int, default=500, help="may be another when a run goes on")
    parser.add_argument("--batch", type=int, default=4, help="clips")
    parser.add_argument("--rate", type=float, default=5e-4)
    add_options(parser, save_every=100)
    train(parser.parse_args())


def clips(pictures: Tensor, motion: str, frames: int) -> Tensor:
    """Clips (n F, 3, H, W) of pictures on white (n, 3, H, W) in [-1, 1], one period of a motion in each."""
    poses = [MOTIONS[motion](2 * math.pi * frame / frames) for frame in range(frames)]
    places = torch.stack([_inverse(pose) for pose in poses]).to(pictures)
    count, channels, height, width = pictures.shape
    moved = pictures.repeat_interleave(frames, 0) - 1  # white is 0, as what comes in from beyond the edge
    grid = F.affine_grid(places.repeat(count, 1, 1), [len(moved), channels, height, width], align_corners=False)
    return F.grid_sample(moved, grid, mode="bicubic", padding_mode="zeros", align_corners=False).clamp(-2, 0) + 1


def _inverse(pose: Pose) -> Tensor:
    """The matrix (2, 3) that says for each pixel where it comes from."""
    right, down, turn, size = pose
    cos, sin = math.cos(turn) / size, math.sin(turn) / size
    return torch.tensor([[cos, sin, -cos * right - sin * down], [-sin, cos, sin * right - cos * down]])


def new_motion(unet: UNetConfig, frames: int) -> MotionAdapter:
    """Modules at every level of a U-Net that change nothing yet."""
    config = MotionConfig(
        channels=unet.channels,
        layers=tuple(len(depths) for depths in unet.down_depths),
        depths=(1,) * len(unet.channels),
        heads=(4,) * len(unet.channels),
        norm_groups=unet.norm_groups,
        max_frames=max(frames, 16),
    )
    adapter = MotionAdapter(config)
    for name, parameter in adapter.named_parameters():
        if ".proj_out." in name:
            nn.init.zeros_(parameter)
    return adapter


def train(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    torch.manual_seed(options.seed)
    icons, names = read_icons(options.data, options.limit), read_names(options.data)
    parts = load_parts(str(options.base), device=device)
    (text,), vae, unet, schedule = parts.text.models, parts.vae, parts.unet, parts.schedule
    assert isinstance(vae, AutoencoderKL)
    tokenizer = Tokenizer.load(options.base / "tokenizer")
    shown, _ = shown_and_held_out(icons.rows)
    motion = new_motion(unet.config, options.frames).to(device)
    attach(unet, motion)
    average = Average(motion, decay=0.99)
    optimizer = torch.optim.AdamW(motion.parameters(), lr=options.rate, weight_decay=0.01, betas=(0.9, 0.99))
    settings = {name: getattr(options, name) for name in ("motion", "frames", "batch", "rate", "seed")}
    run = Run(options.out, settings, {"motion": motion, "average": average, "optimizer": optimizer})
    steps = Steps(icons, shown, tokenizer, names, options.batch, options.seed)

    def loss(step: int) -> Tensor:
        scenes, ids = steps[step]
        white = [Scene(scene.icons) for scene in scenes]  # what moves has no background
        with torch.no_grad(), autocast(device, options.float32):
            x0 = latents_of(vae, clips(render(icons, white, device), options.motion, options.frames))
            context = text(ids.to(device)).last.repeat_interleave(options.frames, 0)
        noise, _ = chances(x0, options.seed, step, schedule.T)
        _, t = chances(x0[:: options.frames], options.seed, step, schedule.T)  # one for all frames of a clip
        t = early(t, schedule.T).repeat_interleave(options.frames)
        x = schedule.add_noise(x0, noise, t)
        with autocast(device, options.float32):
            output = unet(x, t, Conditioning(context), frames=options.frames)
        return weighted(schedule, output.float(), x, x0, t).mean()

    learn(run, options, motion, average, optimizer, loss, fall=0.5)
    network: Any = average.network
    write_json(options.out / "training.json", {**settings, "steps": run.step, "seconds": round(run.elapsed)})
    write_part(options.out, "diffusion_pytorch_model", network.state_dict(), described(network.config, parts.scheduler))
    print(f"{options.out}: {run.step} steps of {options.batch}; {run.elapsed:.0f} s")


def described(config: MotionConfig, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """As diffusers' config.json says it, and the kind of betas, which it has no word for."""
    return {
        "_class_name": "MotionAdapter",
        "block_out_channels": config.channels,
        "motion_layers_per_block": config.layers,
        "motion_transformer_layers_per_block": config.depths,
        "motion_mid_block_layers_per_block": 1,
        "motion_transformer_layers_per_mid_block": config.mid_depth,
        "motion_num_attention_heads": config.heads,
        "motion_norm_num_groups": config.norm_groups,
        "motion_max_seq_length": config.max_frames,
        "use_motion_mid_block": config.mid_depth is not None,
        "beta_schedule": scheduler["beta_schedule"],
    }


if __name__ == "__main__":
    main()
