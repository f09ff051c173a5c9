"""Trains a ControlNet or a T2I-Adapter of the base model that draws along edges (canny), on the base model's pictures.

    python recipes/icons/train_control.py DATA BASE OUT [--adapter] [--steps 800]

DATA is what draw.py leaves, BASE what train_base.py leaves. OUT becomes a folder that `--control` takes. A ControlNet
begins as a copy of the U-Net's way down whose outputs are zero (Zhang et al. 2023, arXiv 2302.05543, section 3.1), so
that from the first step on it only adds; a T2I-Adapter (Mou et al. 2023, arXiv 2302.08453) is smaller, and looks at the
picture once instead of in every step. The run can be stopped at any moment; the same command goes on with it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from folders import write_json, write_part
from resumable import Average, Run, add_options, autocast, learn, pick_device, rng
from scenes import read_icons, read_names, render, shown_and_held_out
from torch import Tensor, nn
from train_base import Steps, chances, early, latents_of, weighted
from words import tokens

import calotype
from calotype.images import to_pil
from calotype.nn.controlnet import ControlNet, ControlNetConfig
from calotype.nn.t2i_adapter import T2IAdapter, T2IAdapterConfig
from calotype.nn.unet import Conditioning, Residuals, UNet
from calotype.nn.vae import AutoencoderKL
from calotype.text.tokenizer import Tokenizer
from calotype.weights.load import load_parts

HINT = (16, 32, 64, 128)
NO_TEXT = 0.3  # share of captions that are left out, so that it reads the edges and not their names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--adapter", action="store_true", help="a T2I-Adapter instead of a ControlNet")
    parser.add_argument("--steps", type=int, default=800, help="may be another when a run goes on")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-4)
    add_options(parser, save_every=100)
    train(parser.parse_args())


def new_control(unet: UNet) -> ControlNet:
    """A copy of the U-Net's way down, with a reader of pictures before it and zeros behind it."""
    control = ControlNet(ControlNetConfig(**vars(unet.config), hint_channels=HINT))
    own = unet.state_dict()
    missing, _ = control.load_state_dict({k: v for k, v in own.items() if k in control.state_dict()}, strict=False)
    assert all(name.startswith("controlnet_") for name in missing), missing
    for zero in (
        control.controlnet_cond_embedding.conv_out, *control.controlnet_down_blocks, control.controlnet_mid_block
    ):  # fmt: skip
        for parameter in zero.parameters():
            nn.init.zeros_(parameter)
    return control


def new_adapter(unet: UNet) -> T2IAdapter:
    """One that looks at the picture alone.

    The icons' U-Net is SDXL's in small: its first level does not attend, so the first map is added below it.
    """
    channels = unet.config.channels
    return T2IAdapter(T2IAdapterConfig("full_xl", channels=(*channels, channels[-1]), downscale=16))


def edges(pictures: Tensor) -> Tensor:
    """Canny edges (B, 3, H, W) in [0, 1] of pictures in [-1, 1]."""
    drawn = [np.asarray(calotype.canny(picture)) for picture in to_pil(pictures)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255


class Steered(nn.Module):
    """The U-Net, and the control beside it."""

    def __init__(self, unet: UNet, control: ControlNet | T2IAdapter) -> None:
        super().__init__()
        self.unet, self.control = unet, control

    def forward(self, x: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> Tensor:
        conditioning = Conditioning(context)
        residuals: Residuals
        if isinstance(self.control, T2IAdapter):
            residuals = self.control(hint)
        else:
            residuals = self.control(x, t, conditioning, self.control.embed_hint(hint))
        return self.unet(x, t, conditioning, residuals)


def train(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    torch.manual_seed(options.seed)
    icons, names = read_icons(options.data, options.limit), read_names(options.data)
    parts = load_parts(str(options.base), device=device)
    (text,), vae, schedule = parts.text.models, parts.vae, parts.schedule
    assert isinstance(vae, AutoencoderKL)
    tokenizer = Tokenizer.load(options.base / "tokenizer")
    shown, _ = shown_and_held_out(icons.rows)
    control = (new_adapter if options.adapter else new_control)(parts.unet).to(device)
    model = Steered(parts.unet, control)
    average = Average(control, decay=0.995)
    optimizer = torch.optim.AdamW(control.parameters(), lr=options.rate, weight_decay=0.01, betas=(0.9, 0.99))
    settings = {name: getattr(options, name) for name in ("adapter", "batch", "rate", "seed")}
    run = Run(options.out, settings, {"control": control, "average": average, "optimizer": optimizer})
    steps = Steps(icons, shown, tokenizer, names, options.batch, options.seed)
    nothing = tokens(tokenizer, [""])[0]

    def loss(step: int) -> Tensor:
        scenes, ids = steps[step]
        pictures = render(icons, scenes, device)
        ids[torch.from_numpy(rng(options.seed + 1, step).random(len(ids)) < NO_TEXT)] = nothing
        with torch.no_grad():
            x0 = latents_of(vae, pictures)
            context = text(ids.to(device)).last
        noise, t = chances(x0, options.seed, step, schedule.T)
        t = early(t, schedule.T)
        x = schedule.add_noise(x0, noise, t)
        with autocast(device, options.float32):
            out = model(x, t, context, edges(pictures).to(device))
        return weighted(schedule, out.float(), x, x0, t).mean()

    learn(run, options, control, average, optimizer, loss, fall=0.5)
    network: Any = average.network
    write_json(options.out / "training.json", {**settings, "steps": run.step, "seconds": round(run.elapsed)})
    write_part(options.out, "diffusion_pytorch_model", network.state_dict(), described(network, options.base))
    print(f"{options.out}: {run.step} steps of {options.batch}; {run.elapsed:.0f} s")


SHARED = (
    "act_fn", "attention_head_dim", "block_out_channels", "cross_attention_dim", "down_block_types",
    "downsample_padding", "flip_sin_to_cos", "freq_shift", "in_channels", "layers_per_block", "norm_eps",
    "norm_num_groups", "transformer_layers_per_block", "use_linear_projection",
)  # fmt: skip


def described(network: ControlNet | T2IAdapter, base: Path) -> dict[str, Any]:
    """As diffusers' config.json says it."""
    if isinstance(network, T2IAdapter):
        return {
            "_class_name": "T2IAdapter",
            "adapter_type": "full_adapter_xl",
            "in_channels": network.config.in_channels,
            "channels": network.config.channels,
            "num_res_blocks": network.config.layers,
            "downscale_factor": network.config.downscale,
        }
    unet = json.loads((base / "unet" / "config.json").read_text(encoding="utf-8"))
    return {
        "_class_name": "ControlNetModel",
        **{name: unet[name] for name in SHARED},
        "conditioning_embedding_out_channels": HINT,
        "controlnet_conditioning_channel_order": "rgb",
    }


if __name__ == "__main__":
    main()
