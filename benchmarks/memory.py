"""How much anonymous memory (RssAnon) loading a large checkpoint takes, while it loads and after.

    python benchmarks/memory.py [--folder FOLDER]     # keeps the random Stable Diffusion 1.5 that it writes (2.1 GB)

Figures are bytes grown over a process that has imported its library, divided by the bytes of the loaded parameters.
Linux only: the figures come from /proc/self/status.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from measure import SHIPPED, verdict

if TYPE_CHECKING:
    from torch import Tensor

TARGET = 1.15  # bytes grown for each byte of weights
UNET = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 2,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": False,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "eos_token_id": 49407,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
}
PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, help="where the random checkpoint is kept")
    parser.add_argument("--child", nargs=3, metavar=("LIBRARY", "FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(*args.child)
    elif args.folder is not None:
        compare(args.folder)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            compare(Path(scratch, "sd15"))


def compare(folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        write(folder)
    print(f"{'':10} {'dtype':9} weights GB   grown: peak    ratio    after    ratio")
    for dtype in ("float16", "float32"):  # the files are float16: the second is a conversion
        for library in ("calotype", "diffusers"):
            command = [sys.executable, __file__, "--child", library, str(folder), dtype]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            weights, peak, after = json.loads(output.splitlines()[-1])
            numbers = f"{peak / 1e9:8.3f} {peak / weights:8.3f} {after / 1e9:8.3f} {after / weights:8.3f}"
            print(f"{library:10} {dtype:9} {weights / 1e9:10.3f}       {numbers}")
            if library == "calotype":
                verdict(f"anonymous memory at its peak / weights in {dtype}", peak / weights, TARGET)


# ---- the measurement, in a process of its own ----


def child(library: str, folder: str, dtype: str) -> None:
    """Prints [bytes of the loaded parameters, RssAnon's growth at its peak, and at the end]."""
    load = {"calotype": with_calotype, "diffusers": with_diffusers}[library]()
    before = anonymous()
    with Peak() as peak:
        parameters = list(load(folder, dtype))
        after = anonymous()
    weights = sum(parameter.nbytes for parameter in parameters)
    print(json.dumps([weights, max(peak.bytes, after) - before, after - before]))


def with_calotype() -> Callable[[str, str], Iterable]:
    import calotype.engine

    def load(folder: str, dtype: str) -> Iterable:
        parts = calotype.engine.load(folder, dtype=dtype, device="cpu").parts
        return [p for network in (parts.unet, parts.vae, *parts.text.models) for p in network.parameters()]

    return load


def with_diffusers() -> Callable[[str, str], Iterable]:
    import torch
    from diffusers import StableDiffusionPipeline

    def load(folder: str, dtype: str) -> Iterable:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, torch_dtype=getattr(torch, dtype), local_files_only=True
        )
        return [p for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in network.parameters()]

    return load


def anonymous() -> int:
    """This process's RssAnon in bytes."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Peak:
    """The largest RssAnon while it is entered, looked at every 5 ms."""

    def __enter__(self) -> Peak:
        self.bytes, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.is_set():
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.005)

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()


# ---- the checkpoint ----


def write(folder: Path) -> None:
    """A random Stable Diffusion 1.5 in float16, with the shipped model's tokenizer and scheduler."""
    import torch
    from safetensors.torch import save_file

    from calotype.weights.load import text_encoder_on_meta, unet_on_meta, vae_on_meta

    parts = {
        "unet": (UNET, unet_on_meta, "diffusion_pytorch_model"),
        "vae": (VAE, vae_on_meta, "diffusion_pytorch_model"),
        "text_encoder": (TEXT, text_encoder_on_meta, "model"),
    }
    noise = (0.02 * torch.randn(2**20)).half()  # repeated: a billion draws would take a minute
    folder.mkdir(parents=True)
    for name, (config, on_meta, stem) in parts.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        shapes = on_meta(folder / name).state_dict()
        weights = {key: repeated(noise, meta.shape) for key, meta in shapes.items()}
        save_file(weights, folder / name / f"{stem}.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(SHIPPED / name, folder / name)
    scheduler = json.loads((SHIPPED / "model_index.json").read_text())["scheduler"]
    (folder / "model_index.json").write_text(json.dumps(PIPELINE | {"scheduler": scheduler}))


def repeated(noise: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of this shape, filled with the noise over and over."""
    count = math.prod(shape)
    return noise.repeat(-(-count // len(noise)))[:count].reshape(shape)


if __name__ == "__main__":
    main()
