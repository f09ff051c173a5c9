"""Image to image, inpainting and guidance, as the engine does them: sizes, what comes back, what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import calotype
from calotype import Control, Request
from calotype.errors import CalotypeError, UsageError
from calotype.prepare import prepare
from calotype.resolve import resolve

NOISE = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
PHOTO = Image.fromarray(NOISE)
MASK = Image.new("L", PHOTO.size)
MASK.paste(255, (16, 16, 40, 48))
HOLE = np.asarray(MASK) > 0


@pytest.fixture(scope="module")
def engine(tiny_sd15: Path) -> calotype.Engine:
    return calotype.load(tiny_sd15, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def lcm(tiny_sd15_lcm: Path) -> calotype.Engine:
    return calotype.load(tiny_sd15_lcm, device="cpu", dtype="float32")


def latents(engine: calotype.Engine, **fields: Any) -> torch.Tensor:
    *_, last = engine.stream(Request("a red fox", **{"seed": 3, "steps": 2} | fields))
    return last.x


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---- what comes back ----


@pytest.mark.parametrize(
    "fields", [{}, {"strength": 0.5}, {"mask_feather": 3}, {"mask_crop": 4, "width": 32, "height": 32}]
)
def test_outside_the_mask_pixels_come_back_bit_for_bit(lcm: calotype.Engine, fields: dict[str, Any]) -> None:
    result = lcm("a red fox", steps=2, seed=0, n=2, image=PHOTO, mask=MASK, **fields)
    for image in result.images:
        pixels = np.asarray(image)
        assert pixels.shape == NOISE.shape
        assert np.array_equal(pixels[~HOLE], NOISE[~HOLE])
        assert not np.array_equal(pixels[HOLE], NOISE[HOLE])


def test_a_soft_mask_blends(lcm: calotype.Engine) -> None:
    hard = lcm("a red fox", steps=2, seed=0, image=PHOTO, mask=MASK).image
    soft = lcm("a red fox", steps=2, seed=0, image=PHOTO, mask=MASK.point(lambda value: value // 255 * 153)).image
    wanted = NOISE[HOLE] * 0.4 + np.asarray(hard)[HOLE] * 0.6
    assert np.abs(np.asarray(soft)[HOLE] - wanted).max() <= 1


def test_more_strength_changes_more(lcm: calotype.Engine) -> None:
    from calotype.images import to_tensor
    from calotype.latents import encode

    start = encode(lcm.parts.vae, to_tensor(PHOTO))
    moved = [distance(latents(lcm, image=PHOTO, strength=s), start) for s in (0.1, 0.4, 1.0)]
    assert moved == sorted(moved)


@pytest.mark.parametrize("fields", [{}, {"image": PHOTO}, {"image": PHOTO, "mask": MASK}])
@pytest.mark.parametrize("sampler", ["lcm", "tcd", "ddim", "euler"])
def test_a_seed_belongs_to_a_picture(engine: calotype.Engine, sampler: str, fields: dict[str, Any]) -> None:
    together = latents(engine, n=3, sampler=sampler, **fields)
    for i in range(3):
        assert distance(together[i : i + 1], latents(engine, seed=3 + i, sampler=sampler, **fields)) < 1e-5


# ---- sizes ----


def test_the_picture_gives_the_size(engine: calotype.Engine) -> None:
    odd = PHOTO.resize((45, 70))
    resolved = engine.resolve(Request("", image=odd))
    assert (resolved.width, resolved.height) == (44, 70) or (resolved.width, resolved.height) == (40, 64)
    assert engine.resolve(Request("", image=odd, width=32)).width == 32
    huge = engine.resolve(Request("", image=Image.new("RGB", (4000, 2000))))
    assert huge.width is not None
    assert huge.height is not None
    assert huge.width * huge.height <= 4 * 64 * 64
    assert huge.width == 2 * huge.height
    defaults = engine.parts.defaults
    cropped = engine.resolve(Request("", image=PHOTO, mask=MASK, mask_crop=0))
    assert (cropped.width, cropped.height) == (defaults.width, defaults.height)


def test_what_is_resized_although_the_mask_keeps_it_is_said(engine: calotype.Engine) -> None:
    fields: dict[str, Any] = {"image": PHOTO, "mask": MASK, "width": 32, "height": 32}
    (note,) = engine.notes(Request("", **fields))
    assert "is resized from 48x64 to 32x32, also where the mask keeps it" in note
    assert engine.notes(Request("", **fields, mask_crop=4)) == []


def test_a_feather_is_of_the_results_pixels(engine: calotype.Engine) -> None:
    """Which is the request's size, or with a crop the picture's own."""
    large, hole = PHOTO.resize((480, 640)), MASK.resize((480, 640), Image.Resampling.NEAREST)
    fields: dict[str, Any] = {"image": large, "mask": hole, "mask_feather": 60}
    engine.resolve(Request("", **fields, mask_crop=4, width=32, height=32))
    with pytest.raises(UsageError, match="nothing is left of the mask when 60 pixels of its edge fade"):
        engine.resolve(Request("", **fields, width=48, height=64))


def test_strength_is_filled_in(engine: calotype.Engine) -> None:
    assert engine.resolve(Request("")).strength is None
    assert engine.resolve(Request("", image=PHOTO)).strength == 0.5
    assert engine.resolve(Request("", image=PHOTO, mask=MASK)).strength == 1.0


# ---- guidance and its cost ----


def test_evaluations_are_counted(engine: calotype.Engine, lcm: calotype.Engine) -> None:
    def cost(engine: calotype.Engine, **fields: Any) -> float:
        return engine("a red fox", seed=0, steps=4, **fields).timings["evaluations"]

    assert cost(lcm, guidance=8.0) == 4
    assert cost(engine, guidance=1.0) == 4
    assert cost(engine, guidance=4.0) == 8
    assert cost(engine, guidance=4.0, guidance_steps=1) == 5
    assert cost(engine, guidance=4.0, guidance_mode="once") == 5
    assert cost(engine, guidance=4.0, guidance_mode="once", guidance_steps=0) == 4


def test_one_negative_evaluation_is_full_guidance_in_the_first_step(engine: calotype.Engine) -> None:
    fields = {"guidance": 4.0, "negative_prompt": "a dog", "sampler": "lcm"}
    assert torch.equal(latents(engine, steps=1, **fields), latents(engine, steps=1, guidance_mode="once", **fields))
    full, once = latents(engine, steps=3, **fields), latents(engine, steps=3, guidance_mode="once", **fields)
    assert not torch.equal(full, once)
    assert not torch.equal(
        once, latents(engine, steps=3, **fields | {"negative_prompt": "the snow"}, guidance_mode="once")
    )


# ---- refused, and nothing changed ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": PHOTO, "mask": Image.new("L", PHOTO.size)}, "the mask is all black"),
        ({"controls": (Control("canny", PHOTO),)}, "there is no control 'canny': the engine has none"),
        ({"frames": 4}, "frames is 4, and the model has no motion adapter"),
        ({"image": PHOTO, "strength": 0.01}, "strength is 0.01, which leaves none of the 50 timesteps"),
        ({"image": PHOTO, "strength": 0.1, "steps": 6}, "steps is 6: allowed are 1 to 5"),
    ],
)
def test_refused_in_one_line(lcm: calotype.Engine, fields: dict[str, Any], message: str) -> None:
    before = fingerprint(lcm)
    with pytest.raises(UsageError, match=message) as caught:
        lcm("a red fox", **fields)
    assert "\n" not in str(caught.value)
    assert fingerprint(lcm) == before


def test_a_bad_adapter_changes_nothing(lcm: calotype.Engine, tiny_sd15: Path) -> None:
    before, described = fingerprint(lcm), lcm.describe()
    for add in (lcm.add_control, lcm.set_motion, lcm.add_lora):
        for ref in (tiny_sd15 / "unet", tiny_sd15 / "unet" / "config.json", "nobody/nothing"):
            with pytest.raises(CalotypeError) as caught:
                add(ref)
            assert "\n" not in str(caught.value)
    assert fingerprint(lcm) == before
    assert lcm.describe() == described


def test_an_inpainting_network_needs_a_mask(tmp_path: Path) -> None:
    from checkpoints import write_model, write_unet

    engine = calotype.load(inpainting(write_model(tmp_path / "model"), write_unet))
    with pytest.raises(UsageError, match="9 channels: it is made for inpainting, and there is no mask"):
        engine("a red fox")
    job = prepare(engine.parts, resolve(engine.parts, Request("a red fox", image=PHOTO, mask=MASK, n=2))[0])
    assert job.beside is not None
    assert job.beside.shape[:2] == (2, 5)


def inpainting(model: Path, write_unet: Any) -> Path:
    write_unet(model / "unet", in_channels=9)
    return model


def fingerprint(engine: calotype.Engine) -> str:
    digest = hashlib.sha256()
    for network in (engine.parts.unet, engine.parts.vae, *engine.parts.text.models):
        for name, tensor in network.state_dict().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
