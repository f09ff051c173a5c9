"""Models of the real sizes, one program at a time: LCM_Dreamshaper_v7's structure (1.07 billion parameters, 4.3 GB)
stage by stage, and cells of the matrix at the size of Stable Diffusion 1.5 and of SDXL (3.5 billion, 14 GB).
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import topologies
import torch
from matrix.cells import CELLS, Cell
from matrix.compare import Matrix
from matrix.theirs import Theirs
from matrix.world import World
from reference import LATENTS, NETWORK, Agreement, Pair, Picture, distance
from torch import Tensor

from calotype.nn.unet import Conditioning

# Small pictures, of models that were made for large ones: they need not look like anything.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.* is far from the:calotype.errors.CalotypeWarning")]
NAME = "sd15-lcm-full"
REQUEST: dict[str, Any] = {"prompt": "a red fox in the snow", "seed": 3, "guidance": 8.0, "width": 128, "height": 64}
STEPS = (1, 2, 4, 8)
Found = tuple[dict[str, Tensor], dict[int, Picture]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("full") / "model"
    yield topologies.write(NAME, path)
    shutil.rmtree(path)


def reference(folder: Path, inputs: dict[str, Tensor]) -> Found:
    pair = Pair(NAME, folder)
    pipeline = pair.pipeline
    assert sum(parameter.numel() for parameter in pipeline.unet.parameters()) > 859e6
    with torch.inference_mode():
        w = pipeline.get_guidance_scale_embedding(inputs["w"], 256)
        images = pipeline.vae.encode(inputs["images"]).latent_dist
        found = {
            "text": pipeline.encode_prompt(REQUEST["prompt"], "cpu", 1, False)[0],
            "unet": pipeline.unet(inputs["x"], inputs["t"], inputs["context"], timestep_cond=w).sample,
            "decode": pipeline.vae.decode(inputs["x"]).sample,
            "encode": torch.cat([images.mean, images.logvar]),
        }
    return found, {steps: pair.theirs(**REQUEST, steps=steps) for steps in STEPS}


def ours(folder: Path, inputs: dict[str, Tensor]) -> Found:
    pair = Pair(NAME, folder)
    parts = pair.engine.parts
    assert parts.family == "sd15"
    with torch.inference_mode():
        mean, logvar = parts.vae.encode(inputs["images"])
        assert logvar is not None
        conditioning = Conditioning(inputs["context"], w=inputs["w"])
        found = {
            "text": parts.text.encode([REQUEST["prompt"]])[0],
            "unet": parts.unet(inputs["x"], inputs["t"], conditioning),
            "decode": parts.vae.decode(inputs["x"]),
            "encode": torch.cat([mean, logvar]),
        }
    return found, {steps: pair.ours(**REQUEST, steps=steps) for steps in STEPS}


def alone(run: Callable[[Path, dict[str, Tensor]], Found], folder: Path) -> Found:
    """What one program gives; its model has left the memory when this returns."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(2, 4, 8, 16, generator=generator),
        "t": torch.tensor([999, 259]),
        "context": torch.randn(2, 77, 768, generator=generator),
        "w": torch.tensor([7.0, 2.0]),
        "images": torch.randn(1, 3, 64, 128, generator=generator).clamp(-1, 1),
    }
    try:
        return run(folder, inputs)
    finally:
        gc.collect()


def test_full_size(folder: Path, agree: Agreement) -> None:
    networks, pictures = alone(reference, folder)
    made_networks, made_pictures = alone(ours, folder)
    for what, found in networks.items():
        agree.tensors(NAME, what, made_networks[what], found, NETWORK)
    for steps in STEPS:
        agree.pictures(NAME, made_pictures[steps], pictures[steps])
    assert distance(pictures[1].latents, pictures[2].latents) > 1e-2


# ---- cells of the matrix ----

FULL_CELLS = (
    Cell("sd15", "lcm", "text", "control", "embedded"),
    Cell("sd15", "lora", "inpaint 4, part", "control", "cfg"),
    Cell("sd15", "lora", "text", "motion, lora", "off"),
    Cell("sdxl", "lcm", "text", "t2i", "embedded"),
    Cell("sdxl", "lora", "image", "style", "off"),
)


@pytest.fixture(scope="module", params=("sd15", "sdxl"))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, World]]:
    """A family, and its models and adapters: up to 25 GB."""
    path = tmp_path_factory.mktemp(request.param)
    yield request.param, World(path, full=True)
    shutil.rmtree(path)


def test_cells_at_full_size(world: tuple[str, World], agree: Agreement, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program has the memory to itself: first diffusers, then calotype, loading its parts anew for each cell."""
    family, models = world
    monkeypatch.setattr(Theirs, "pristine", lambda self, network: dict(network.named_parameters()))  # no second copy
    for cell in (cell for cell in FULL_CELLS if cell.family == family):
        assert cell in CELLS
        wanted = Matrix(models).theirs(cell)
        gc.collect()
        error = Matrix(models).between(cell, Matrix(models).ours(cell), wanted)
        gc.collect()
        assert agree.note(f"{family}, full", f"{cell.task}, {cell.adapter}", error) < LATENTS
        assert wanted.std() > 0.1
