"""Loading a gigabyte grows anonymous memory by no more than 1.15 times the weights in the target dtype."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from calotype.weights import load
from calotype.weights.files import DTYPES

CONFIG = """{
  "_class_name": "UNet2DConditionModel", "block_out_channels": [320, 640, 1280],
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
  "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
  "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "use_linear_projection": true,
  "transformer_layers_per_block": [1, 1, 1]
}"""

MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from calotype.weights.load import load_unet

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch)
thread.start()
unet = load_unet(Path(sys.argv[1]), dtype=getattr(torch, sys.argv[2]))
done.set()
thread.join()
size = sum(parameter.nbytes for parameter in unet.parameters())
print(size, anonymous() - before, max(peak[0], anonymous()) - before)
"""


@pytest.fixture(scope="module", params=["F16", "F32"])
def big(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A U-Net of more than 10^9 bytes in either dtype, and the dtype of its file."""
    folder = tmp_path_factory.mktemp("big")
    (folder / "config.json").write_text(CONFIG)
    network = load.unet_on_meta(folder)
    dtype = DTYPES[request.param]
    tensors = {name: torch.full(shape, 0.01, dtype=dtype) for name, shape in load.network_shapes(network).items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder, request.param


@pytest.mark.slow
@pytest.mark.parametrize("target", ["float16", "float32", "bfloat16"])
def test_memory_grows_by_the_weights_that_are_converted(big: tuple[Path, str], target: str) -> None:
    folder, stored = big
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), target], capture_output=True, text=True, check=True, timeout=300
    )
    size, after, peak = map(int, done.stdout.split())
    assert size >= 1e9
    assert after <= 1.15 * size
    assert peak <= 1.15 * size
    if DTYPES[stored] == getattr(torch, target):  # views of the mapped file
        assert peak < 0.05 * size
