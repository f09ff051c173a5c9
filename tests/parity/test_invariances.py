"""What must hold for every combination, those that diffusers lacks included: what is switched off is not there."""

from __future__ import annotations

import os
import shutil
from copy import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel
from matrix.cells import ADAPTERS, CANDIDATES, GUIDANCES, LACKING, Cell
from matrix.compare import Matrix
from matrix.ours import Ours
from matrix.theirs import fold
from PIL import Image
from reference import distance
from torch import Tensor

import calotype

ALONE = 1e-5
LCM = [cell for cell in CANDIDATES if cell.model == "lcm"]
PLAIN = Cell("sd15", "lcm", "text", "none", "embedded")
# One cell of each task and adapter, the families and models in turn.
EACH = [
    next(cell for cell in (*CANDIDATES[turn:], *CANDIDATES) if (cell.task, cell.adapter) == combination)
    for turn, combination in zip(
        range(0, len(CANDIDATES), 7),
        dict.fromkeys((cell.task, cell.adapter) for cell in CANDIDATES),
        strict=False,
    )
]

# The same of those with a guidance embedding, whether diffusers has them or not; the families in turn.
EMBEDDED = [
    next(cell for cell in LCM[turn % 3 * len(LCM) // 3 :] if (cell.task, cell.adapter) == combination)
    for turn, combination in enumerate(dict.fromkeys((cell.task, cell.adapter) for cell in LCM))
]


def latents(engine: calotype.Engine, request: calotype.Request, **changes: Any) -> Tensor:
    *_, last = engine.stream(replace(request, **changes))
    return last.x


def test_each_combination_is_here() -> None:
    assert {(cell.task, cell.adapter) for cell in EACH} == {(cell.task, cell.adapter) for cell in CANDIDATES}
    assert {adapter for _, adapter in ((cell.task, cell.adapter) for cell in EACH)} == set(ADAPTERS)
    assert any(cell in LACKING for cell in EACH)


# ---- alone and in a batch ----


@pytest.mark.parametrize("cell", EACH, ids=str)
def test_a_picture_of_several_is_that_of_its_seed(matrix: Matrix, cell: Cell) -> None:
    """Whatever the task and the adapters: of clips, all frames."""
    together = matrix.ours(cell, n=2)
    rows = len(together) // 2
    assert torch.isfinite(together).all()
    for i, own in enumerate(together.split(rows)):
        assert distance(own, matrix.ours(cell, seed=7 + i)) < ALONE
    assert distance(together[:rows], together[rows:]) > 1e-2


# ---- guidance by embedding ----


@pytest.fixture(scope="module")
def unembedded(matrix: Matrix, tmp_path_factory: pytest.TempPathFactory) -> Ours:
    """The same models without a guidance embedding: that of one guidance is in a bias instead."""

    @cache
    def model(family: str, model: str, channels: int) -> Path:
        source = matrix.world.model(family, model, channels)
        folder = tmp_path_factory.mktemp("folded") / "model"
        shutil.copytree(source, folder, copy_function=os.link, ignore=shutil.ignore_patterns("unet"))
        unet = UNet2DConditionModel.from_pretrained(source / "unet")
        with torch.no_grad():
            fold(unet, GUIDANCES["embedded"][0])
        unet.save_pretrained(folder / "unet")
        return folder

    world = copy(matrix.world)
    world.model = model  # type: ignore[method-assign]
    return Ours(world, matrix.ours.grid)


@pytest.mark.parametrize("cell", EMBEDDED, ids=str)
def test_guidance_is_embedded_whatever_the_task_and_the_adapters(matrix: Matrix, unembedded: Ours, cell: Cell) -> None:
    """diffusers drops it in many of these."""
    made, plain = matrix.ours(cell), unembedded(cell, guidance=1.0)
    assert distance(made, plain) < ALONE
    assert distance(matrix.ours(cell, guidance=4.0), plain) > 1e-3


# ---- switched off ----


@pytest.mark.parametrize("cell", [cell for cell in EACH if cell.controls], ids=str)
def test_a_control_of_scale_0_is_none(matrix: Matrix, cell: Cell) -> None:
    engine, request = matrix.ours.prepared(cell), matrix.ours.request(cell)
    off = tuple(replace(control, scale=0.0) for control in request.controls)
    without = latents(engine, request, controls=())
    assert torch.equal(latents(engine, request, controls=off), without)
    assert distance(latents(engine, request), without) > 1e-3


@pytest.mark.parametrize("adapter", ["control", "t2i"])
def test_a_control_acts_in_its_share_of_the_steps_alone(matrix: Matrix, adapter: str) -> None:
    """Of three steps, the first half holds one whole step, and the sixth after it none."""
    cell = replace(PLAIN, adapter=adapter)
    engine, request = matrix.ours.prepared(cell), matrix.ours.request(cell)
    (control,) = request.controls

    def during(start: float, end: float) -> Tensor:
        return latents(engine, request, controls=(replace(control, start=start, end=end),))

    assert torch.equal(during(0.5, 0.66), latents(engine, request, controls=()))
    assert torch.equal(during(0.0, 0.5), during(0.0, 0.34))
    assert distance(during(0.0, 0.5), during(0.5, 1.0)) > 1e-3


@pytest.mark.parametrize("family", ["sd15", "sdxl", "ssd1b"])
def test_no_loras_are_the_model_itself(matrix: Matrix, family: str) -> None:
    """Bit for bit, after mixes that touch every layer and the text encoders."""
    plain, mixed = (Cell(family, "lora", "text", adapter, "off") for adapter in ("none", "styles"))
    fresh = calotype.load(matrix.world.model(family, "lora", 4), device="cpu", dtype="float32")
    request = matrix.ours.request(plain)
    matrix.ours(mixed)
    engine = matrix.ours.prepared(mixed)
    assert distance(latents(engine, request), latents(fresh, request)) > 1e-2
    engine.set_loras({})
    assert torch.equal(latents(engine, request), latents(fresh, request))


@pytest.mark.parametrize("adapter", ["none", "control", "motion"])
def test_a_white_mask_is_no_mask(matrix: Matrix, adapter: str) -> None:
    """With a sampler that draws no noise on the way: the masked picture's posterior has taken one draw by then."""
    cell = Cell("sd15", "lora", "image", adapter, "cfg")
    engine, request = matrix.ours.prepared(cell), replace(matrix.ours.request(cell), sampler="ddim")
    white = matrix.world.mask.point(lambda _: 255)
    assert torch.equal(latents(engine, request, mask=white), latents(engine, request))
    assert distance(latents(engine, request, mask=matrix.world.mask), latents(engine, request)) > 1e-2


@pytest.mark.parametrize("adapter", ["control", "t2i"])
@pytest.mark.filterwarnings("ignore:the picture is resized")
def test_a_control_is_cropped_as_the_picture_is(matrix: Matrix, adapter: str) -> None:
    """Working on the mask's part is working on pictures of that part."""
    cell = Cell("sd15", "lora", "inpaint 4", adapter, "off")
    engine, request = matrix.ours.prepared(cell), matrix.ours.request(cell)
    (control,) = request.controls
    assert isinstance(request.image, Image.Image)
    assert isinstance(control.image, Image.Image)
    mask = Image.new("L", request.image.size)
    mask.paste(255, (30, 20, 50, 40))
    size = {"width": 64, "height": 64}
    cropped = latents(engine, request, mask=mask, mask_crop=6, **size)
    box = (24, 14, 56, 46)  # six pixels more on each side, which is square already
    by_hand = {
        "image": request.image.crop(box),
        "mask": mask.crop(box),
        "controls": (replace(control, image=control.image.crop(box)),),
    }
    assert torch.equal(cropped, latents(engine, request, **by_hand, **size))
    assert distance(cropped, latents(engine, request, **by_hand | {"controls": request.controls}, **size)) > 1e-4
    small = replace(control, image=control.image.resize((32, 32)))
    with pytest.raises(calotype.UsageError, match=r"'(control|t2i) 1' is 32x32 and the image 96x64: with mask_crop"):
        engine.resolve(replace(request, mask=mask, mask_crop=6, controls=(small,), **size))


@pytest.mark.parametrize("task", ["text", "image"])
@pytest.mark.parametrize(("family", "model"), [("sd15", "lcm"), ("sdxl", "lora")])
def test_a_clip_of_one_frame_without_motion_is_a_picture(
    matrix: Matrix, tmp_path: Path, family: str, model: str, task: str
) -> None:
    """Motion modules that put nothing out, and the picture's betas."""
    cell = Cell(family, model, task, "none", "embedded" if model == "lcm" else "cfg")
    adapter = MotionAdapter.from_pretrained(matrix.world.motion(family))
    for name, parameter in adapter.named_parameters():
        if ".proj_out." in name:
            torch.nn.init.zeros_(parameter)
    adapter.save_pretrained(tmp_path / "still")
    engine = calotype.load(matrix.world.model(family, model, 4), device="cpu", dtype="float32")
    request = matrix.ours.request(cell)
    picture = latents(engine, request)
    engine.set_motion(tmp_path / "still", beta_schedule="scaled_linear")
    assert torch.equal(latents(engine, request), picture)
    assert distance(latents(engine, request, frames=1), picture) < ALONE
    engine.set_motion(matrix.world.motion(family), beta_schedule="scaled_linear")
    assert distance(latents(engine, request, frames=1), picture) > 1e-3
