"""Trains the tiny autoencoder that shows a picture while it is made: the same latents, a tenth of the work.

    python recipes/icons/train_preview.py DATA AUTOENCODER OUT [--steps 1500]

DATA is what draw.py leaves, AUTOENCODER what train_autoencoder.py leaves. OUT becomes a folder in the layout of
AutoencoderTiny, which calotype and diffusers load as a `vae`. The same command goes on with a run that was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from folders import write_json, write_part
from resumable import Average, Run, add_options, autocast, learn, pick_device, rng
from scenes import any_scene, read_icons, render, unseen
from torch import Tensor, nn
from train_autoencoder import distance, disturbance, psnr
from train_base import latents_of

from calotype.nn.tiny_vae import AutoencoderTiny, TinyVAEConfig
from calotype.nn.vae import AutoencoderKL
from calotype.weights.load import load_vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("autoencoder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1500, help="may be another when a run goes on")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    add_options(parser, save_every=200)
    train(parser.parse_args())


def train(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    torch.manual_seed(options.seed)
    icons = read_icons(options.data, options.limit)
    seen, judged = ([i for i, row in enumerate(icons.rows) if unseen(row) == wanted] for wanted in (False, True))
    full = load_vae(options.autoencoder, device=device).requires_grad_(False).eval()
    assert isinstance(full, AutoencoderKL)
    width, config = options.channels, full.config
    net = AutoencoderTiny(
        TinyVAEConfig(
            latent_channels=config.latent_channels, encoder_channels=(width,) * 4, decoder_channels=(width,) * 4
        )
    ).to(device)
    average = Average(net, decay=0.998)
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.rate, weight_decay=0.0)
    settings = {name: getattr(options, name) for name in ("channels", "batch", "rate", "seed")}
    run = Run(options.out, settings, {"net": net, "average": average, "optimizer": optimizer})

    def loss(step: int) -> Tensor:
        dice = rng(options.seed, step)
        x = render(icons, [any_scene(seen, dice) for _ in range(options.batch)], device)
        with autocast(device, options.float32):
            with torch.no_grad():
                latents = latents_of(full, x)
            y = net.decode(latents + disturbance(x, config, options.seed, step))
            own = net.encode(x)[0]
        return distance(y.float(), x) + (own.float() - latents).square().mean()

    def figures() -> dict[str, float]:
        return {"psnr": psnr(Preview(full, average.network), icons, judged[:96])[0]}

    learn(run, options, net, average, optimizer, loss, fall=0.5, figures=figures)
    write_json(options.out / "training.json", {**settings, "steps": run.step, "seconds": round(run.elapsed)})
    write_part(options.out, "diffusion_pytorch_model", average.network.state_dict(), described(net.config))
    print(f"{options.out}: {run.step} steps; {run.elapsed:.0f} s")


class Preview(nn.Module):
    """The full encoder and the tiny decoder: what a preview shows of a picture."""

    def __init__(self, full: AutoencoderKL, tiny: nn.Module) -> None:
        super().__init__()
        self.full, self.tiny = full, tiny
        self.encode, self.decode = full.encode, tiny.decode


def described(config: TinyVAEConfig) -> dict[str, object]:
    """As diffusers' config.json says it."""
    return {
        "_class_name": "AutoencoderTiny",
        "act_fn": "relu",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "encoder_block_out_channels": config.encoder_channels,
        "decoder_block_out_channels": config.decoder_channels,
        "num_encoder_blocks": config.encoder_blocks,
        "num_decoder_blocks": config.decoder_blocks,
        "upsampling_scaling_factor": 2,
        "scaling_factor": 1.0,
        "force_upcast": False,
    }


if __name__ == "__main__":
    main()
