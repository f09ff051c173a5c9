"""Pictures from strangers, to and from tensors, contact sheets."""

from __future__ import annotations

import io
import random
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from calotype.errors import CalotypeError, UsageError
from calotype.images import canny, grid, open_image, resize, to_pil, to_tensor, to_unit


def picture(seed: int = 0, width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---- tensors ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bytes_equal_diffusers(dtype: torch.dtype) -> None:
    from diffusers.image_processor import VaeImageProcessor

    images = (torch.randn(3, 3, 40, 56, generator=torch.Generator().manual_seed(0)) * 0.8).to(dtype)
    images[0, 0, 0] = torch.linspace(-1.2, 1.2, 56)
    images[1].view(-1)[:512] = (torch.arange(512) / 255 - 1).to(dtype)  # halves between two values too
    images[2, 0, 0, 0], images[2, 1, 0, 0] = float("inf"), float("-inf")
    wanted = VaeImageProcessor().postprocess(images, output_type="pil")
    ours = to_pil(images)
    assert len(ours) == 3
    for mine, theirs in zip(ours, wanted, strict=True):
        assert (mine.mode, mine.size) == ("RGB", (56, 40))
        assert mine.tobytes() == theirs.tobytes()


def test_tensor_equals_diffusers() -> None:
    from diffusers.image_processor import VaeImageProcessor

    image = picture()
    assert torch.equal(to_tensor(image), VaeImageProcessor().preprocess(image))
    assert to_tensor(image).shape == (1, 3, 16, 24)


def test_controls_are_from_0_to_1() -> None:
    image = picture()
    assert torch.equal(2 * to_unit(image) - 1, to_tensor(image))
    assert to_unit(Image.new("RGB", (8, 8), (255, 0, 51))).mean(dim=(0, 2, 3)).tolist() == pytest.approx([1, 0, 0.2])


def test_every_byte_comes_back() -> None:
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    (again,) = to_pil(to_tensor(levels))
    assert again.tobytes() == levels.tobytes()


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    tensor = to_tensor(picture().convert(mode))
    assert tensor.shape == (1, 3, 16, 24)
    assert tensor.dtype == torch.float32


def test_transparent_becomes_white() -> None:
    assert (to_tensor(Image.new("RGBA", (8, 8), (9, 9, 9, 0))) == 1).all()
    assert (to_tensor(Image.new("RGBA", (8, 8), (0, 0, 0, 255))) == -1).all()


def test_values_that_are_not_numbers() -> None:
    images = torch.zeros(1, 3, 8, 8)
    images[0, 1, 2, 3] = float("nan")
    with pytest.raises(CalotypeError, match="not numbers") as caught:
        to_pil(images)
    assert caught.value.hint is not None
    assert "float32" in caught.value.hint


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 8, 8, 3)])
def test_wrong_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        to_pil(torch.zeros(shape))


# ---- pictures from outside ----


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bare_png(width: int, height: int, depth: int, colour: int, rows: bytes, before: bytes = b"") -> bytes:
    """A PNG file of these bytes, each row with its filter in front, whatever the header claims."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_a_picture_comes_from_anywhere(tmp_path: Path) -> None:
    image = picture()
    path = tmp_path / "x.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), memoryview(path.read_bytes()), image):
        opened = open_image(source)
        assert (opened.mode, opened.tobytes()) == ("RGB", image.tobytes())


@pytest.mark.parametrize(
    ("kind", "mode", "becomes"),
    [
        *(("PNG", mode, "RGB") for mode in ("1", "L", "P", "RGB")),
        *(("PNG", mode, "RGBA") for mode in ("LA", "RGBA")),
        *(("JPEG", mode, "RGB") for mode in ("L", "RGB", "CMYK")),
        *(("WEBP", mode, mode) for mode in ("RGB", "RGBA")),
    ],
)
def test_every_mode_of_every_format(kind: str, mode: str, becomes: str) -> None:
    alpha = Image.linear_gradient("L").resize((24, 16))
    image = picture()
    image.putalpha(alpha)
    options = {} if kind == "PNG" else {"quality": 100} if kind == "JPEG" else {"lossless": True, "exact": True}
    opened = open_image(file_of((image if mode.endswith("A") else image.convert("RGB")).convert(mode), kind, **options))
    assert (opened.mode, opened.size) == (becomes, (24, 16))
    if becomes == "RGBA":
        assert opened.getchannel("A").tobytes() == alpha.tobytes()


def test_a_palette_with_a_transparent_colour() -> None:
    image = picture().quantize(4)
    opened = open_image(file_of(image, transparency=2))
    assert opened.mode == "RGBA"
    assert (np.asarray(opened.getchannel("A")) == 255 * (np.asarray(image) != 2)).all()


def test_an_opaque_alpha_is_none() -> None:
    image = picture()
    image.putalpha(255)
    assert open_image(file_of(image)).mode == "RGB"


def test_sixteen_bits_become_eight() -> None:
    values = np.array([[0, 128, 129, 257 * 100, 257 * 100 + 128, 257 * 100 + 129, 65406, 65407, 65535]], dtype=">u2")
    grey = open_image(bare_png(9, 1, 16, 0, b"\0" + values.tobytes()))
    assert np.asarray(grey)[0, :, 1].tolist() == [0, 0, 1, 100, 100, 101, 254, 255, 255]
    assert open_image(bare_png(9, 1, 16, 0, b"\0" + values.tobytes(), chunk(b"tRNS", b"\xff\xff"))).mode == "RGB"
    colour = open_image(bare_png(3, 1, 16, 2, b"\0" + values.tobytes()))
    assert np.abs(np.asarray(colour).reshape(-1) - values.reshape(-1).astype(float) / 257).max() < 1


STORED = {  # EXIF orientation -> how a file with it holds an upright picture
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize(("orientation", "turn"), STORED.items())
def test_orientation(orientation: int, turn: Image.Transpose | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture()
    stored = image if turn is None else image.transpose(turn)
    assert open_image(file_of(stored, exif=exif)).tobytes() == image.tobytes()
    photo = open_image(file_of(stored.resize((stored.width * 8, stored.height * 8)), "JPEG", exif=exif, quality=95))
    assert photo.size == (192, 128)
    assert np.abs(np.asarray(photo.resize((24, 16)), int) - np.asarray(image)).mean() < 40  # 80 for two random pictures
    assert open_image(Image.open(io.BytesIO(file_of(stored, exif=exif)))).tobytes() == image.tobytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_damaged_exif_turns_nothing(exif: bytes) -> None:
    assert open_image(file_of(picture(), "JPEG", exif=exif)).size == (24, 16)


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (24, 16), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    opened = open_image(file_of(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True))
    assert opened.getcolors() == [(24 * 16, (255, 0, 0))]


def refused_picture(source: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_image(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(source))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PPM", "ICO", "PDF", "TGA"])
def test_other_formats_are_not_opened_whatever_their_name(tmp_path: Path, kind: str) -> None:
    picture().save(tmp_path / "x.png", kind)
    refused_picture(tmp_path / "x.png", r"x\.png' is not a picture in PNG, JPEG or WebP")


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF", b"\x89PNG"]
)
def test_what_is_no_picture(content: bytes) -> None:
    refused_picture(content, "is not a picture in PNG, JPEG or WebP")


def test_bombs_are_refused_by_their_header() -> None:
    """Nothing is decoded: there are no pixels in these files, which would be another message."""
    for side in (8193, 12_000, 50_000, 2**31 - 1):  # Pillow's `open` warns of the second, an error here
        refused_picture(bare_png(side, side, 8, 2, b""), f"is {side}x{side}: at most 67108864 pixels")
    refused_picture(bare_png(67_108_865, 1, 8, 0, b""), "67108865x1: at most 67108864 pixels")
    still = file_of(Image.new("RGBA", (8, 8), (1, 2, 3, 4)), "WEBP", lossless=True)[12:]
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + (16_383).to_bytes(3, "little") * 2
    refused_picture(b"RIFF" + struct.pack("<I", 4 + len(canvas + still)) + b"WEBP" + canvas + still, "at most|damaged")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_files(kind: str) -> None:
    content = file_of(picture(width=64, height=64), kind)
    refused_picture(content[: len(content) // 2], "is damaged: it cannot be decoded")


def test_sources_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path / "no.png", tmp_path, "a\0b.png", "x" * 5000, ""):
        refused_picture(path, "there is no file")
    refused_picture(np.zeros((8, 8, 3), np.uint8), "is of type ndarray: must be a file's name")
    refused_picture(None, "is of type NoneType")
    refused_picture(Image.new("RGB", (0, 8)), "0x8: it has no pixels")
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(256_000_001)
    refused_picture(tmp_path / "x.png", "too large: at most 256000000 bytes")


def test_any_damage_gives_a_picture_or_one_error() -> None:
    chance = random.Random(3)
    goods = [file_of(picture(), kind) for kind in ("PNG", "JPEG", "WEBP")]
    refusals = 0
    for index in range(240):
        bad = bytearray(goods[index % 3])
        for _ in range(chance.randint(1, 4)):
            bad[chance.randrange(min(len(bad), chance.choice([40, 4000])))] = chance.randrange(256)
        try:
            assert open_image(bytes(bad)).mode in ("RGB", "RGBA")
        except UsageError:
            refusals += 1
    assert 20 < refusals < 220


# ---- sizes ----


@pytest.mark.parametrize(("mode", "theirs"), [("stretch", "default"), ("crop", "crop"), ("pad", "fill")])
def test_resizing_equals_diffusers(mode: str, theirs: str) -> None:
    from diffusers.image_processor import VaeImageProcessor

    processor, chance = VaeImageProcessor(), random.Random(1)
    for index in range(60):
        width, height = (chance.randint(5, 70) for _ in range(2))
        image = picture(index, width, height).convert(("RGB", "L", "1")[index % 3])
        size = (8 * chance.randint(2, 10), 8 * chance.randint(2, 10)) if index % 4 else (width, height)
        ours = resize(image, *size, mode)
        assert ours.size == size
        assert (
            ours.convert("RGB").tobytes() == processor.resize(image, size[1], size[0], theirs).convert("RGB").tobytes()
        )


def test_padding_is_cut_off_again() -> None:
    image = Image.new("RGB", (40, 20), (9, 99, 199))
    padded = resize(image, 64, 64, "pad")
    assert padded.getcolors() == [(64 * 64, (9, 99, 199))]
    noise = picture(width=40, height=20)
    assert resize(resize(noise, 40, 64, "pad"), 40, 20, "crop").tobytes() == noise.tobytes()


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (1, 1)])
@pytest.mark.parametrize("mode", ["stretch", "crop", "pad"])
def test_any_proportions(size: tuple[int, int], mode: str) -> None:
    assert resize(picture(width=size[0], height=size[1]), 16, 24, mode).size == (16, 24)


@pytest.mark.parametrize("mode", ["P", "LA", "PA", "I", "I;16", "F", "CMYK", "RGBA", "HSV"])
def test_any_mode_is_resized_smoothly(mode: str) -> None:
    grey = Image.linear_gradient("L").resize((24, 16))
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode.startswith("I") else grey
    resized = resize(image.convert(mode) if mode != "PA" else grey.convert("LA").convert("PA"), 12, 8)
    assert resized.size == (12, 8)
    found = np.asarray(resized.convert("RGB").convert("L"), int)
    assert np.abs(found - np.asarray(grey.resize((12, 8), Image.Resampling.LANCZOS), int)).max() <= 3


def test_a_line_that_should_fill_a_square() -> None:
    """The resized picture would have terabytes."""
    line = Image.new("L", (1, 1_000_000))
    with pytest.raises(UsageError, match="1x1000000 is too narrow to fill 1024x1024"):
        resize(line, 1024, 1024, "crop")
    assert resize(line, 1024, 1024, "pad").size == (1024, 1024)


def test_unknown_way_to_resize() -> None:
    with pytest.raises(UsageError, match="resize is 'fit': must be one of stretch, crop, pad"):
        resize(picture(), 8, 8, "fit")


# ---- edges ----


def test_canny_without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)  # as if it were not installed
    with pytest.raises(UsageError, match="canny needs OpenCV") as caught:
        canny(picture())
    assert caught.value.hint == "pip install opencv-python-headless, or in calotype's folder: pip install '.[control]'"


def test_canny_asks_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guide does: thresholds on the RGB array, one channel of edges as three."""
    asked: list[tuple[Any, ...]] = []

    def edges(*given: Any) -> Any:
        asked.append(given)
        return np.eye(8, dtype=np.uint8) * 255

    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(Canny=edges))
    found = canny(Image.new("RGBA", (8, 8), (9, 9, 9, 0)))
    assert found.mode == "RGB"
    assert (np.asarray(found) == np.eye(8)[..., None] * 255).all()
    array, low, high = asked[0]
    assert (low, high) == (100, 200)
    assert (array.shape, array.dtype, array.min()) == ((8, 8, 3), np.uint8, 255)  # what is transparent is white


@pytest.mark.parametrize("thresholds", [(200, 100), (-1, 100), (float("nan"), 100)])
def test_canny_thresholds(thresholds: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="must be at least 0 and ascending"):
        canny(picture(), *thresholds)


# ---- grid ----


def test_grid_places_every_picture() -> None:
    images = [Image.new("RGB", (20, 10), (index, 0, 0)) for index in range(5)]
    sheet = grid(images, 3, gap=4)
    assert sheet.size == (4 + 3 * 24, 4 + 2 * 14)
    for index in range(5):
        row, column = divmod(index, 3)
        assert sheet.getpixel((4 + column * 24, 4 + row * 14)) == (index, 0, 0)
        assert sheet.getpixel((4 + column * 24 + 19, 4 + row * 14 + 9)) == (index, 0, 0)
    assert sheet.getpixel((4 + 2 * 24, 4 + 14)) == (255, 255, 255)  # the sixth cell is empty
    assert sheet.getpixel((0, 0)) == sheet.getpixel((26, 8)) == (255, 255, 255)


def ink(sheet: Image.Image, box: tuple[int, int, int, int]) -> int:
    """Pixels in the box that are not paper."""
    return int((np.asarray(sheet.crop(box)) < 200).any(axis=-1).sum())


def test_grid_titles_stand_outside_the_pictures() -> None:
    images = [Image.new("RGB", (64, 64), (255, 255, 255)) for _ in range(6)]
    bare = grid(images, 3)
    assert ink(bare, (0, 0, *bare.size)) == 0
    sheet = grid(images, 3, column_titles=["1 step", "2 steps", ""], row_titles=["a fox", "an astronaut in the snow"])
    left, top = sheet.width - 3 * 72, sheet.height - 2 * 72
    assert left > 8
    assert top > 8
    assert ink(sheet, (left, 0, left + 64, top)) > 20
    assert ink(sheet, (left + 72, 0, left + 136, top)) > 20
    assert ink(sheet, (left + 144, 0, sheet.width, top)) == 0
    assert ink(sheet, (0, top, left, top + 64)) > 20
    assert ink(sheet, (0, top + 72, left, top + 136)) > 40
    assert ink(sheet, (left, top, *sheet.size)) == 0
    assert ink(sheet, (0, 0, 2, sheet.height)) == 0  # nothing runs over the edge


def test_grid_takes_pictures_of_different_sizes_and_modes() -> None:
    sheet = grid([Image.new("L", (10, 30), 0), Image.new("RGBA", (30, 10), (9, 9, 9, 255))], 2, gap=2)
    assert sheet.size == (2 + 2 * 32, 2 + 32)
    assert sheet.getpixel((2 + 10, 2)) == (0, 0, 0)
    assert sheet.getpixel((34, 2 + 10)) == (9, 9, 9)
    assert sheet.getpixel((34, 2)) == (255, 255, 255)


@pytest.mark.parametrize("title", ["x" * 500, "word " * 100, "日本語 😀", "a\nb", "\0", " "])
def test_grid_takes_any_title(title: str) -> None:
    sheet = grid([picture(width=64, height=64)], 1, column_titles=[title], row_titles=[title])
    assert sheet.width < 64 * 4
    assert sheet.height < 64 * 60


@pytest.mark.parametrize(
    ("count", "columns", "titles", "message"),
    [
        (0, 1, {}, "0 pictures in 1 columns"),
        (1, 0, {}, "1 pictures in 0 columns"),
        (4, 2, {"column_titles": ["a"]}, "has 1 column titles: must be 2"),
        (3, 2, {"row_titles": ["a"]}, "has 1 row titles: must be 2"),
        (3, 2, {"row_titles": ["a", "b", "c"]}, "has 3 row titles: must be 2"),
    ],
)
def test_grid_refuses(count: int, columns: int, titles: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        grid([picture()] * count, columns, **titles)
