"""A whole warm picture of a model of a real size, against diffusers on the same weights, each in a process of its own.

    python benchmarks/pictures.py [FOLDER] [--runs N] [--side PIXELS] [--dtype T] [--optimize STEPS ...]

Without a folder it writes a random Stable Diffusion 1.5 (2.1 GB). The processes live on and draw in turn, one at a
time; a ratio says how many times faster than diffusers, the median of each round's. diffusers has channels last, and
bfloat16 where the processor multiplies that itself. The machine's own ceiling is the best of products of matrices.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from measure import ratio
from memory import write

STEPS, PROMPT = 4, "a red fox in the snow"
STAGES = ("picture", "unet", "decode")  # seconds of: the whole, one call of the U-Net, the decoder
Draw = Callable[[int], None]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--dtype", help="of both (bfloat16 where the processor multiplies it, else float32)")
    parser.add_argument("--optimize", nargs="+", default=["auto"], help="a row each: auto, none, or steps with commas")
    parser.add_argument(
        "--child", nargs=5, metavar=("LIBRARY", "FOLDER", "OPTIMIZE", "SIDE", "DTYPE"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.child is not None:
        child(*args.child)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "sd15") if args.folder is None else args.folder
        if not (folder / "model_index.json").is_file():
            write(folder)
        compare(folder, args.optimize, args.runs, args.side, args.dtype or suitable())


def suitable() -> str:
    import torch

    from calotype.precision import multiplies_bfloat16

    return "bfloat16" if multiplies_bfloat16(torch.device("cpu")) else "float32"


def compare(folder: Path, rows: list[str], runs: int, side: int, dtype: str) -> None:
    print(f"ceiling: {ceiling(dtype) / 1e9:.0f} GFLOP/s in {dtype}")
    asked = {"diffusers": ("diffusers", "-")} | {f"calotype {row}": ("calotype", row) for row in rows}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in asked}
    processes = {name: started(library, folder, row, side, dtype) for name, (library, row) in asked.items()}
    for i in range(runs + 1):
        for name, process in processes.items():
            measured = told(process)
            if i > 0:  # the first one warms up
                found[name].append(measured)
    for process in processes.values():
        process.kill()
    print(f"{'':34}" + "".join(f"{stage + ' ms':>12}{'ratio':>8}" for stage in STAGES))
    for name, rounds in found.items():
        line = ""
        for stage in STAGES:
            ours, theirs = [each[stage] for each in rounds], [each[stage] for each in found["diffusers"]]
            line += f"{1e3 * median(ours):12.0f}{1 / ratio(ours, theirs):8.2f}"
        print(f"{name:34}{line}")


def started(library: str, folder: Path, optimize: str, side: int, dtype: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", library, str(folder), optimize, str(side), dtype]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, text=True, **pipes)


def told(process: subprocess.Popen[str]) -> dict[str, float]:
    """Has a process draw, and returns what that took."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):
            measured: dict[str, float] = json.loads(line)
            return measured
    raise RuntimeError(f"{process.args} ended")


def ceiling(dtype: str) -> float:
    """FLOP a second."""
    import torch

    a, b = torch.randn(2, 2048, 2048).to(getattr(torch, dtype))
    seconds = []
    for _ in range(20):
        clock = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - clock)
    return 2 * 2048**3 / min(seconds)


# ---- the processes that draw ----


def child(library: str, folder: str, optimize: str, side: str, dtype: str) -> None:
    """Draws a picture for each line that it is told."""
    draw, unet, decoder = {"calotype": with_calotype, "diffusers": with_diffusers}[library](
        folder, optimize, int(side), dtype
    )
    calls, decodes = watched(unet), watched(decoder)
    for seed, _ in enumerate(sys.stdin):
        calls.clear(), decodes.clear()
        clock = time.perf_counter()
        draw(seed)
        whole = time.perf_counter() - clock
        print(json.dumps({"picture": whole, "unet": median(calls), "decode": sum(decodes)}), flush=True)


def watched(network: Any) -> list[float]:
    """Seconds of each call of a network from now on."""
    seconds: list[float] = []
    clock = [0.0]
    network.register_forward_pre_hook(lambda *_: clock.__setitem__(0, time.perf_counter()))
    network.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - clock[0]))
    return seconds


def with_calotype(folder: str, optimize: str, side: int, dtype: str) -> tuple[Draw, Any, Any]:
    import calotype

    engine = calotype.load(folder, device="cpu", dtype=dtype, optimize=optimize)
    fields: dict[str, Any] = {"steps": STEPS, "guidance": 1.0, "sampler": "lcm", "width": side, "height": side}
    return lambda seed: engine(PROMPT, seed=seed, **fields).image.load(), engine.parts.unet, engine.parts.vae.decoder


def with_diffusers(folder: str, _: str, side: int, dtype: str) -> tuple[Draw, Any, Any]:
    import torch
    from diffusers import LCMScheduler, StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=getattr(torch, dtype), local_files_only=True
    )
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for network in (pipeline.unet, pipeline.vae):
        network.to(memory_format=torch.channels_last)

    def draw(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = {"width": side, "height": side}
        pipeline(PROMPT, num_inference_steps=STEPS, guidance_scale=1.0, generator=generator, **sizes).images[0].load()

    return draw, pipeline.unet, pipeline.vae.decoder


if __name__ == "__main__":
    main()
