"""Masks: what is repainted, what the network sees of it, and what comes back bit for bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from calotype import masks
from calotype.errors import UsageError
from calotype.images import resize

THEIRS = VaeImageProcessor(
    do_normalize=False, do_binarize=True, do_convert_grayscale=True
)  # as their pipelines have it


def picture(seed: int = 0, width: int = 40, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mask(box: tuple[int, int, int, int] = (8, 4, 20, 16), width: int = 40, height: int = 24) -> Image.Image:
    """White in the box."""
    found = Image.new("L", (width, height))
    found.paste(255, box)
    return found


def noise(seed: int, width: int, height: int) -> Image.Image:
    """A mask of every shade of grey."""
    return picture(seed, width, height).convert("L")


# ---- modes ----


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I", "I;16"])
def test_any_mode(mode: str) -> None:
    """16 bits of grey go to 65535."""
    plain = mask()
    given = Image.fromarray(np.asarray(plain).astype(np.uint16) * 257) if mode.startswith("I") else plain
    assert masks.grey(given.convert(mode)).tobytes() == plain.tobytes()


def test_what_is_transparent_is_black() -> None:
    strokes = Image.new("RGBA", (40, 24), (255, 255, 255, 0))  # as a page's canvas gives them
    strokes.paste((255, 255, 255, 255), (8, 4, 20, 16))
    assert masks.grey(strokes).tobytes() == mask().tobytes()


def test_colours_count_by_their_brightness() -> None:
    assert masks.grey(Image.new("RGB", (1, 1), (0, 255, 0))).getpixel((0, 0)) == 150
    assert masks.grey(Image.new("RGB", (1, 1), (0, 0, 255))).getpixel((0, 0)) == 29


# ---- for the network ----


@pytest.mark.parametrize(("mode", "theirs"), [("stretch", "default"), ("crop", "crop"), ("pad", "fill")])
def test_the_network_sees_what_diffusers_shows_it(mode: str, theirs: str) -> None:
    chance = random.Random(2)
    for index in range(40):
        given = noise(index, chance.randint(5, 60), chance.randint(5, 60)).convert(("L", "RGB", "1")[index % 3])
        width, height = 8 * chance.randint(2, 8), 8 * chance.randint(2, 8)
        found = masks.to_tensor(resize(given, width, height, mode))
        assert torch.equal(found, THEIRS.preprocess(given, height, width, theirs))
        assert found.shape == (1, 1, height, width)


def test_cut_at_a_half() -> None:
    levels = Image.fromarray(np.array([[0, 1, 127, 128, 254, 255]], np.uint8))
    assert masks.to_tensor(levels).flatten().tolist() == [0, 0, 0, 1, 1, 1]


def test_the_latents_mask_is_diffusers() -> None:
    for seed, (h, w) in enumerate([(8, 8), (5, 9), (1, 2)]):
        hole = masks.to_tensor(noise(seed, 8 * w, 8 * h))
        hole[0, 0, 0, 0] = 1
        assert torch.equal(masks.to_latents(hole, 8), F.interpolate(hole, size=(h, w)))


def test_a_mask_that_falls_between_the_latents() -> None:
    with pytest.raises(UsageError, match="nothing of the mask is left at the latents' size") as caught:
        masks.to_latents(masks.to_tensor(mask((1, 1, 8, 24))), 8)
    assert "crop to the mask" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("value", "message"), [(0, "all black: nothing would be painted"), (127, "brightest value is 127 of 255")]
)
def test_nothing_to_paint(value: int, message: str) -> None:
    for mode in ("L", "RGB"):
        with pytest.raises(UsageError, match=message) as caught:
            masks.check(Image.new("L", (8, 8), value).convert(mode))
        assert caught.value.hint == "white in the mask is repainted"


def test_one_pixel_is_enough() -> None:
    for value in (128, 255):
        one = Image.new("L", (8, 8))
        one.putpixel((3, 3), value)
        masks.check(one)


# ---- compositing ----


def test_feathering_fades_inside() -> None:
    row = np.asarray(masks.feather(mask((60, 0, 140, 9), 200, 9), 8))[4].astype(int)
    assert (row[:60] == 0).all()  # black stays black, so that pixels come back
    assert (np.diff(row[:100]) >= 0).all()
    assert 90 < (row[63] + row[64]) / 2 < 165  # a half in the middle of the fade
    assert row[60] < 20
    assert row[68] > 235
    assert row[75] == 255
    assert (row == row[::-1]).all()


def test_feathering_leaves_what_has_no_edge() -> None:
    """The picture's own border is none, and soft masks stay soft."""
    for value in (255, 180):
        flat = Image.new("L", (40, 24), value)
        assert masks.feather(flat, 6).tobytes() == flat.tobytes()
    assert masks.feather(mask().convert("RGB"), 0).tobytes() == mask().tobytes()


def test_feathering_never_brightens() -> None:
    for seed in range(3):
        given = noise(seed, 40, 24)
        assert (np.asarray(masks.feather(given, 3)) <= np.asarray(given)).all()


def test_a_mask_that_feathering_leaves_nothing_of() -> None:
    line = mask((0, 10, 40, 14))
    masks.check(line, 2)
    with pytest.raises(UsageError, match="nothing is left of the mask when 9 pixels of its edge fade") as caught:
        masks.check(line, 9)
    assert caught.value.hint == "feather it less, or paint a larger spot"


@pytest.mark.parametrize("pixels", [0, 3])
def test_pixels_outside_come_back(pixels: int) -> None:
    original, painted = picture(1), picture(2)
    soft = masks.feather(mask(), pixels)
    found, shade = np.asarray(masks.composite(original, painted, soft), int), np.asarray(soft)
    assert (found[shade == 0] == np.asarray(original)[shade == 0]).all()
    assert (found[shade == 255] == np.asarray(painted)[shade == 255]).all()
    share = shade[..., None] / 255
    wanted = np.asarray(original) * (1 - share) + np.asarray(painted) * share
    assert np.abs(found - wanted).max() <= 0.51
    assert (shade == 0).sum() > 200
    assert ((shade > 0) & (shade < 255)).any() == bool(pixels)


def test_a_white_mask_is_the_painted_picture() -> None:
    painted = picture(2)
    assert masks.composite(picture(1), painted, Image.new("1", (40, 24), 1)).tobytes() == painted.tobytes()


def test_transparency_in_the_original_becomes_white() -> None:
    original = Image.new("RGBA", (40, 24), (9, 9, 9, 0))
    found = masks.composite(original, picture(), mask())
    assert found.mode == "RGB"
    assert found.getpixel((0, 0)) == (255, 255, 255)


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="must be of one size"):
        masks.composite(picture(), picture(), mask(width=41))


# ---- crop to the mask ----


def test_the_box_is_diffusers() -> None:
    chance, random_spots = random.Random(4), np.random.default_rng(4)
    for _ in range(500):
        width, height = chance.randint(2, 60), chance.randint(2, 60)
        spots = np.zeros((height, width), np.uint8)
        for _ in range(chance.randint(1, 3)):
            spots[random_spots.integers(height), random_spots.integers(width)] = random_spots.integers(1, 256)
        given, size = Image.fromarray(spots), (8 * chance.randint(1, 9), 8 * chance.randint(1, 9))
        padding = chance.choice([0, 1, 5, 32])
        left, top, right, bottom = box = masks.crop_box(given, size, padding)
        assert box == VaeImageProcessor.get_crop_region(given, *size, padding)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_no_box_of_nothing() -> None:
    with pytest.raises(UsageError, match="all black: there is no part to crop to"):
        masks.crop_box(Image.new("RGB", (8, 8)), (64, 64), 4)


@pytest.mark.parametrize("blur", [0, 2])
def test_pasting_back(blur: int) -> None:
    chance, worst = random.Random(6), 0
    for seed in range(30):
        width, height = chance.randint(30, 90), chance.randint(30, 90)
        x, y = chance.randint(0, width - 12), chance.randint(0, height - 12)
        original, painted = picture(seed, width, height), picture(seed + 100, 64, 48)
        soft = masks.feather(mask((x, y, x + 12, y + 9), width, height), blur)
        box = masks.crop_box(soft, painted.size, 5)
        found = np.asarray(masks.paste(original, painted, box, soft), int)
        outside = np.asarray(soft) == 0
        assert (found[outside] == np.asarray(original)[outside]).all()
        theirs = THEIRS.apply_overlay(soft, original, painted, box)
        worst = max(worst, int(np.abs(found - np.asarray(theirs, int)).max()))
    assert worst <= (blur > 0)  # theirs rounds soft edges twice


def test_a_part_comes_back_where_it_was() -> None:
    """Cut out, padded to another shape and pasted unchanged, at its own scale, a part is the original."""
    original, white = picture(), mask((2, 0, 38, 10))
    box = masks.crop_box(white, (64, 64), 0)
    part = original.crop(box)
    assert part.size == (36, 24)  # the picture ends before it is square
    padded = resize(part, 36, 36, "pad")
    assert masks.paste(original, padded, box, white).tobytes() == original.tobytes()


def test_torch_is_not_needed_to_composite(tmp_path: Any) -> None:
    import subprocess
    import sys

    code = "import sys; from calotype import masks; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert shown.stdout.strip() == "False"
