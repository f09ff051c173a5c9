"""Pictures to and from tensors, PNG files with their request, contact sheets."""

from __future__ import annotations

import json
import os
import random
import resource
import stat
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from calotype.errors import CalotypeError, OutputError, UsageError
from calotype.images import MAX_METADATA, grid, parameters, read_metadata, save_png, to_pil, to_tensor
from calotype.request import Request

METADATA = {
    "request": Request(
        "a fox, 日本語 😀\nsecond line", negative_prompt="blurry", steps=4, guidance=8.0, seed=0, width=64, height=32
    ).to_json(),
    "model": "icons",
    "device": "cpu",
}


def picture(seed: int = 0, width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


# ---- PNG ----


def test_png_and_metadata_come_back(tmp_path: Path) -> None:
    image = picture()
    path = save_png(image, tmp_path / "fox.png", METADATA)
    assert path == tmp_path / "fox.png"
    assert Image.open(path).tobytes() == image.tobytes()
    assert read_metadata(path) == METADATA
    assert read_metadata(str(path)) == METADATA
    assert Request.from_json(read_metadata(path)["request"]) == Request.from_json(METADATA["request"])
    assert left_in(tmp_path) == ["fox.png"]


def test_metadata_of_any_text_comes_back(tmp_path: Path) -> None:
    chance = random.Random(5)
    blocks = [(0, 128), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    for index in range(60):
        text = "".join(chr(chance.randrange(*chance.choice(blocks))) for _ in range(chance.randrange(200)))
        metadata = {"request": Request(text, negative_prompt=text[::-1]).to_json(), text[:5]: [text, None, 1.5, True]}
        path = save_png(picture(), tmp_path / f"{index}.png", metadata)
        assert read_metadata(path) == metadata


def test_long_prompts_fit(tmp_path: Path) -> None:
    metadata = {"request": Request("😀" * 20_000, negative_prompt="\x01" * 20_000).to_json()}
    assert read_metadata(save_png(picture(), tmp_path / "x.png", metadata)) == metadata


def test_other_tools_see_text(tmp_path: Path) -> None:
    with Image.open(save_png(picture(), tmp_path / "fox.png", METADATA)) as image:
        assert image.info["parameters"] == (
            "a fox, 日本語 😀\nsecond line\nNegative prompt: blurry\n"
            "Steps: 4, CFG scale: 8.0, Seed: 0, Size: 64x32, Model: icons, Version: calotype"
        )
        assert json.loads(image.info["calotype"]) == METADATA
        assert ": " not in image.info["calotype"].replace("fox, ", "")  # compact


def test_parameters_leave_out_what_is_unknown() -> None:
    assert parameters({}) == "\nVersion: calotype"
    assert parameters({"request": {"prompt": "a\0b"}}) == "ab\nVersion: calotype"


def test_no_metadata(tmp_path: Path) -> None:
    path = save_png(picture(), tmp_path / "plain.png")
    with Image.open(path) as image:
        assert image.info == {}
    with pytest.raises(UsageError, match="holds no calotype metadata"):
        read_metadata(path)


@pytest.mark.parametrize("metadata", [{"x": float("nan")}, {"x": object()}, {"x": "\ud800"}, {"x": "y" * MAX_METADATA}])
def test_metadata_that_cannot_be_written_leaves_no_file(tmp_path: Path, metadata: dict[str, Any]) -> None:
    with pytest.raises((UsageError, ValueError, TypeError)):
        save_png(picture(), tmp_path / "x.png", metadata)
    assert left_in(tmp_path) == []


def test_an_older_file_is_replaced_and_permissions_are_the_usual(tmp_path: Path) -> None:
    path = tmp_path / "fox.PNG"
    path.write_bytes(b"old")
    save_png(picture(), path)
    with Image.open(path) as image:
        assert image.size == (24, 16)
    (tmp_path / "usual").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


@pytest.mark.parametrize("name", ["fox.jpg", "fox.webp", "fox", "fox.png.gz", ".png", "", "png"])
def test_only_png(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"does not end in \.png"):
        save_png(picture(), tmp_path / name)
    assert left_in(tmp_path) == []


def refused(path: str | Path, message: str) -> OutputError:
    with pytest.raises(OutputError, match=message) as caught:
        save_png(picture(), path, METADATA)
    assert "\n" not in str(caught.value)
    return caught.value


def test_target_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "dir.png").mkdir()
    error = refused(tmp_path / "dir.png", "is a directory")
    assert error.hint is not None
    assert "picture.png" in error.hint
    assert left_in(tmp_path) == ["dir.png"]
    assert left_in(tmp_path / "dir.png") == []


def test_folder_is_missing(tmp_path: Path) -> None:
    refused(tmp_path / "no" / "fox.png", "there is no folder .*no'")
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "fox.png", "there is no folder")
    assert left_in(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "fo\0x.png"])
def test_impossible_names(tmp_path: Path, name: str) -> None:
    refused(tmp_path / name, "cannot be written|no folder")
    assert left_in(tmp_path) == []


def test_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a system call that fails, since root may write anywhere."""

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(tmp_path / "fox.png", "cannot be written: Permission denied")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_at_any_moment_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    path = tmp_path / "fox.png"
    path.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises((OutputError, KeyboardInterrupt)) as caught:
        save_png(picture(), path, METADATA)
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert left_in(tmp_path) == ["fox.png"]


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """The real thing: the system refuses to let the file grow."""
    path = tmp_path / "fox.png"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match="cannot be written: File too large"):
            save_png(picture(width=100, height=100), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert left_in(tmp_path) == ["fox.png"]


# ---- reading ----


def png(*texts: tuple[str, str, bool]) -> bytes:
    """A PNG file with these texts (key, text, compressed)."""
    import io

    info = PngInfo()
    for key, text, compressed in texts:
        info.add_itxt(key, text, zip=compressed)
    buffer = io.BytesIO()
    picture().save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


GOOD = png(("calotype", '{"request":{"prompt":"a fox"}}', False))
HEADER = GOOD[:33]  # signature and IHDR


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (b"", "is not a PNG file", "into PNG files"),
        (b"hello", "is not a PNG file", ""),
        (b"\xff\xd8\xff\xe0" + b"\0" * 100, "is not a PNG file", ""),
        (GOOD[:8], "is not a PNG file|cannot be read", ""),
        (GOOD[:40], "cannot be read|is not a PNG|holds no", ""),
        (png(), "holds no calotype metadata", "websites often remove it"),
        (png(("parameters", "a fox\nSteps: 20", False)), "holds no calotype metadata", "another program's settings"),
        (png(("workflow", "{}", False)), "holds no calotype metadata", "another program's settings"),
        (png(("calotype", "", False)), "metadata is damaged", ""),
        (png(("calotype", "{", False)), "metadata is damaged", ""),
        (png(("calotype", "[1]", False)), "metadata is damaged", ""),
        (png(("calotype", "null", False)), "metadata is damaged", ""),
        (png(("calotype", "9" * 5000, False)), "metadata is damaged", ""),
        (png(("calotype", "[" * 100_000, False)), "metadata is damaged", ""),
        (png(("calotype", '{"x":"' + "y" * MAX_METADATA + '"}', False)), "metadata is damaged", ""),
        (png(("calotype", " " * 50_000_000, True)), "cannot be read|holds no", ""),
        (HEADER + chunk(b"zTXt", b"calotype\0\0" + b"not deflated") + GOOD[33:], "", ""),
        (HEADER + chunk(b"iTXt", b"calotype\0\0\0\0\0\xff\xfe") + png()[33:], "holds no|damaged", ""),
        (HEADER + struct.pack(">I", 2**31 - 1) + b"iTXtcalotype\0", "is not a PNG|cannot be read|holds no", ""),
        (GOOD[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + GOOD[24:], "is not a PNG|cannot be read", ""),
    ],
)
def test_foreign_damaged_and_hostile_files(tmp_path: Path, content: bytes, message: str, hint: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    if not message:  # damage beside the metadata: it may or may not be found
        assert read_metadata(path) == {"request": {"prompt": "a fox"}}
        return
    with pytest.raises(UsageError, match=message) as caught:
        read_metadata(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    if hint:
        assert hint in str(caught.value.hint)


def test_compressed_metadata_reads_too(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(("calotype", '{"a":1}', True)))
    assert read_metadata(tmp_path / "x.png") == {"a": 1}


def test_jpeg_is_not_opened(tmp_path: Path) -> None:
    picture().save(tmp_path / "x.png", "JPEG")
    with pytest.raises(UsageError, match="is not a PNG file"):
        read_metadata(tmp_path / "x.png")


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "no.png", tmp_path, tmp_path / "a\0b.png", tmp_path / ("x" * 5000)):
        with pytest.raises(UsageError, match="there is no file"):
            read_metadata(path)


def test_file_of_absurd_size(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as file:
        file.write(GOOD)
        file.truncate(256_000_001)
    with pytest.raises(UsageError, match="too large: at most 256000000 bytes"):
        read_metadata(tmp_path / "x.png")


def test_any_damage_gives_metadata_or_one_error(tmp_path: Path) -> None:
    chance = random.Random(11)
    path = tmp_path / "x.png"
    refusals = 0
    for _ in range(400):
        bad = bytearray(GOOD[: chance.choice([len(GOOD), chance.randrange(len(GOOD))])])
        for _ in range(chance.randint(0, 4)):
            if bad:
                bad[chance.randrange(min(len(bad), 120))] = chance.randrange(256)
        path.write_bytes(bad)
        try:
            assert isinstance(read_metadata(path), dict)
        except UsageError:
            refusals += 1
    assert 100 < refusals < 400


def test_reading_metadata_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(GOOD)
    code = (
        f"import sys, calotype.images as i; print(i.read_metadata({str(tmp_path / 'x.png')!r}), 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "{'request': {'prompt': 'a fox'}} False"


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
