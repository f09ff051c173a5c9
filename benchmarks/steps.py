"""What each stage takes in a warm process, against diffusers' networks: the text, a step of the U-Net, the decoder.

python benchmarks/steps.py [FOLDER] [--runs N] [--threads N ...]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import calotype
from calotype.prepare import condition
from measure import SHIPPED, ratio

GUIDANCE = 4.0
Stage = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=SHIPPED)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    print(f"{'':8} {'threads':>8} {'calotype ms':>12} {'diffusers ms':>13} {'ratio':>7} {'difference':>11}")
    with torch.inference_mode():
        pairs = stages(args.folder)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for name, (ours, theirs) in pairs.items():
                difference = (ours() - theirs()).norm() / theirs().norm()  # also warms both up
                mine, other = interleaved_calls(ours, theirs, args.runs)
                medians = f"{1e3 * median(mine):12.2f} {1e3 * median(other):13.2f} {ratio(mine, other):7.3f}"
                print(f"{name:8} {threads:8} {medians} {difference:11.1e}")


def stages(folder: Path) -> dict[str, tuple[Stage, Stage]]:
    """Stage -> ours and theirs, which compute the same tensor."""
    parts = calotype.load(folder, device="cpu").parts
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    side = parts.unet.config.sample_size
    x, t = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)), torch.tensor([499])
    conditioning, _ = condition(parts, ["astronaut"], "", GUIDANCE, (parts.defaults.width, parts.defaults.height))
    w = pipeline.get_guidance_scale_embedding(
        torch.tensor([GUIDANCE - 1.0]), embedding_dim=pipeline.unet.config.time_cond_proj_dim
    )
    return {
        "text": (
            lambda: parts.text.encode(["astronaut"])[0],
            lambda: pipeline.encode_prompt("astronaut", torch.device("cpu"), 1, False)[0],
        ),
        "step": (
            lambda: parts.unet(x, t, conditioning),
            lambda: pipeline.unet(x, t, timestep_cond=w, encoder_hidden_states=conditioning.context).sample,
        ),
        "decode": (lambda: parts.vae.decode(x), lambda: pipeline.vae.decode(x).sample),
    }


def interleaved_calls(ours: Stage, theirs: Stage, runs: int) -> tuple[list[float], list[float]]:
    """Seconds of each call, the two taking turns."""
    seconds: dict[Stage, list[float]] = {ours: [], theirs: []}
    for _ in range(runs):
        for stage, taken in seconds.items():
            start = time.perf_counter()
            stage()
            taken.append(time.perf_counter() - start)
    return seconds[ours], seconds[theirs]


if __name__ == "__main__":
    main()
