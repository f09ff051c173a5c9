"""Pictures as files: PNG, JPEG and WebP, with their request, in whole or not at all."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import stat
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from calotype.errors import OutputError, UsageError
from calotype.images import open_image
from calotype.request import Request
from calotype.stills import MAX_METADATA, encode, read_metadata, save

METADATA = {
    "request": Request(
        "a fox, 日本語 😀\nsecond line", negative_prompt="blurry", steps=4, guidance=8.0, seed=0, width=64, height=32
    ).to_json(),
    "model": "icons",
    "device": "cpu",
}
PARAMETERS = (
    "a fox, 日本語 😀\nsecond line\nNegative prompt: blurry\n"
    "Steps: 4, CFG scale: 8.0, Seed: 0, Size: 64x32, Model: icons, Version: calotype"
)
LONGEST = {"request": Request("😀" * 20_000, negative_prompt="\x01" * 20_000).to_json()}
NAMES = ["fox.png", "fox.jpg", "fox.jpeg", "fox.webp"]
LOSSY = NAMES[1:]


def picture(seed: int = 0, width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def gradient(width: int = 64, height: int = 64) -> Image.Image:
    """Smooth, in hues whose mean a format that halves their resolution keeps."""
    ramps = [Image.linear_gradient("L").rotate(turn).resize((width, height)) for turn in (0, 90, 180)]
    return Image.merge("RGB", ramps)


def off(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures' values."""
    return int(np.abs(np.asarray(one.convert("RGB"), int) - np.asarray(other.convert("RGB"), int)).max())


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- every format ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("metadata", [METADATA, LONGEST, {"request": {"prompt": "calotype {"}}], ids=range(3))
def test_what_is_written_is_read(tmp_path: Path, name: str, metadata: dict[str, Any]) -> None:
    image = gradient()
    path = save(image, tmp_path / name, metadata)
    assert path == tmp_path / name
    assert left_in(tmp_path) == [name]
    assert read_metadata(path) == metadata
    kind = {".png": "PNG", ".webp": "WEBP"}.get(path.suffix, "JPEG")
    assert path.read_bytes() == encode(image, kind, metadata)
    with Image.open(path) as found:
        assert (found.format, found.mode, found.size) == (kind, "RGB", image.size)
        assert off(found, image) <= (0 if kind == "PNG" else 8)


@pytest.mark.parametrize("name", NAMES)
def test_other_readers_find_what_made_it(tmp_path: Path, name: str) -> None:
    """XMP by Pillow and out of the bytes themselves, as XML; AUTOMATIC1111's text where its own reader looks."""
    path = save(picture(), tmp_path / name, METADATA)
    content = path.read_bytes()
    begin, end = content.index(b"<x:xmpmeta"), content.index(b"</x:xmpmeta>") + 12
    with Image.open(path) as found:
        packet = found.info["xmp"]
        exif = found.getexif()
    rdf, extension = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}", "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
    for text in (packet, content[begin:end]):
        (described,) = ElementTree.fromstring(text).findall(f"{rdf}RDF/{rdf}Description")
        assert described.attrib == {f"{rdf}about": ""}
        assert {each.tag: each.text for each in described} == {
            f"{extension}DigitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
        }
    if path.suffix == ".png":
        return
    assert json.loads(exif[ExifTags.Base.ImageDescription].removeprefix("calotype ")) == METADATA
    comment = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment == b"UNICODE\0" + PARAMETERS.encode("utf-16-be")


def segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The marker and the content of each segment before a JPEG's pixels."""
    at = 2
    while content[at + 1] != 0xDA:
        assert content[at] == 0xFF
        length = int.from_bytes(content[at + 2 : at + 4])
        yield content[at + 1], content[at + 4 : at + 2 + length]
        at += 2 + length


def test_the_segments_of_a_jpeg() -> None:
    """JFIF, EXIF in as many as it takes, XMP."""
    for metadata, count in ((METADATA, 1), (LONGEST, 8)):
        (first, jfif), *others = segments(encode(picture(), "JPEG", metadata))
        assert (first, jfif[:5]) == (0xE0, b"JFIF\0")
        apps = [content for marker, content in others if 0xE1 <= marker <= 0xEF]
        assert [app[:6] for app in apps] == [b"Exif\0\0"] * count + [b"http:/"]


def test_user_comments_are_undefined_bytes() -> None:
    """Type 7, as the standard has it: other readers take BYTE, which is 1, for numbers."""
    _, (_, segment), *_ = segments(encode(picture(), "JPEG", METADATA))
    exif = segment[6:]
    at = exif.index(b"\x92\x86")
    kind, count, place = struct.unpack(">HII", exif[at + 2 : at + 12])
    assert (kind, exif[place : place + count]) == (7, b"UNICODE\0" + PARAMETERS.encode("utf-16-be"))


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_without_metadata_says_nothing(tmp_path: Path, name: str) -> None:
    path = save(picture(), tmp_path / name)
    with Image.open(path) as found:
        assert not {"exif", "xmp", "comment", "calotype", "parameters"} & found.info.keys()
    with pytest.raises(UsageError, match="holds no calotype metadata") as caught:
        read_metadata(path)
    assert "websites often remove it" in str(caught.value.hint)


def test_what_a_picture_brings_along(tmp_path: Path) -> None:
    """Its colour profile counts; what another file said of itself does not."""
    image = picture()
    image.info |= {"icc_profile": b"profile", "comment": b"calotype {}", "exif": b"Exif\0\0", "xmp": b"<x/>"}
    for name in NAMES:
        with Image.open(save(image, tmp_path / name)) as found:
            assert found.info["icc_profile"] == b"profile"
            assert not {"exif", "xmp", "comment"} & found.info.keys()


def test_transparency() -> None:
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    for kind, expected in (("PNG", (200, 0, 0, 0)), ("JPEG", (255, 255, 255))):
        assert Image.open(io.BytesIO(encode(image, kind))).getpixel((0, 0)) == expected
    found = Image.open(io.BytesIO(encode(image, "WEBP"))).getpixel((0, 0))
    assert isinstance(found, tuple)
    assert found[3] == 0


def test_quality() -> None:
    """The worst that there is, noise: a JPEG is near it in all colours, a WebP in grey."""
    noise, grey = picture(), picture().convert("L").convert("RGB")
    assert off(Image.open(io.BytesIO(encode(noise, "JPEG"))), noise) <= 24
    assert off(Image.open(io.BytesIO(encode(grey, "WEBP"))), grey) <= 6


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "I;16", "RGB", "RGBA"])
def test_a_png_keeps_every_bit_of_every_mode(mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (16, 24), dtype=np.uint16)
    image = Image.fromarray(values) if mode == "I;16" else picture().convert(mode)
    found = Image.open(io.BytesIO(encode(image, "PNG", METADATA)))
    assert (found.mode, found.tobytes()) == (mode, image.tobytes())


@pytest.mark.parametrize(
    ("image", "kind", "says"),
    [
        (Image.new("L", (70_000, 1)), "JPEG", r"a picture of 70000x1 in mode RGB cannot be encoded as JPEG: "),
        (Image.new("L", (1, 20_000)), "WEBP", r"a picture of 1x20000 in mode L cannot be encoded as WEBP: "),
        (Image.new("CMYK", (8, 8)), "PNG", r"a picture of 8x8 in mode CMYK cannot be encoded as PNG: "),
    ],
)
def test_what_a_format_cannot_hold(image: Image.Image, kind: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=says) as caught:
        save(image, tmp_path / f"x.{kind.lower()}", METADATA)
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("kind", ["GIF", "png", "JPG", "", "MP4"])
def test_unknown_formats(kind: str) -> None:
    with pytest.raises(UsageError, match=f"format is '{kind}': must be one of PNG, JPEG, WEBP"):
        encode(picture(), kind)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("metadata", [{"x": float("nan")}, {"x": object()}, {"x": "y" * MAX_METADATA}])
def test_metadata_that_is_none(tmp_path: Path, name: str, metadata: dict[str, Any]) -> None:
    with pytest.raises((UsageError, ValueError, TypeError)):
        save(picture(), tmp_path / name, metadata)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        (b'calotype {"', b'calotype "{', "metadata is damaged", "changed after"),
        (b'calotype {"', b"calotype [[", "metadata is damaged", "changed after"),
        (b'calotype {"', b"calotype \xff\0", "metadata is damaged", "changed after"),
        (b"calotype {", b"calotipe {", "holds no calotype metadata", "another program's settings"),
        (b"Exif\0\0MM", b"Exif\0\0??", "", ""),  # the directory is not needed
    ],
)
def test_metadata_that_somebody_has_broken(
    tmp_path: Path, name: str, old: bytes, new: bytes, message: str, hint: str
) -> None:
    path = save(picture(), tmp_path / name, METADATA)
    path.write_bytes(path.read_bytes().replace(old, new))
    if not message:
        assert read_metadata(path) == METADATA
        return
    with pytest.raises(UsageError, match=message) as caught:
        read_metadata(path)
    assert "\n" not in str(caught.value)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((kind, text) for kind in ("JPEG", "WEBP") for text in ("", "9" * 5000, "[" * 60_000, "{}}")),
        ("WEBP", '{"x":"' + "y" * MAX_METADATA + '"}'),
    ],
)
def test_hostile_metadata(tmp_path: Path, kind: str, text: str) -> None:
    """Behind an empty directory, which we do not read."""
    picture().save(tmp_path / "x", kind, exif=b"Exif\0\0MM\0*\0\0\0\x08" + bytes(6) + b"calotype " + text.encode())
    with pytest.raises(UsageError, match="metadata is damaged"):
        read_metadata(tmp_path / "x")


def test_settings_of_another_program(tmp_path: Path) -> None:
    """As AUTOMATIC1111 writes them into a JPEG, and a camera's comment, which is none."""
    for text, hint in (("a fox\nSteps: 20", "another program's settings"), ("no flash", "websites often remove it")):
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text.encode("utf-16-be")
        picture().save(tmp_path / "x.jpg", exif=exif)
        with pytest.raises(UsageError, match="holds no calotype metadata") as caught:
            read_metadata(tmp_path / "x.jpg")
        assert hint in str(caught.value.hint)


def damaged(good: bytes, chance: random.Random, most: int, within: Sequence[int]) -> bytes:
    """A file that was perhaps cut, and up to `most` bytes changed, each among so many first ones."""
    bad = bytearray(good[: chance.choice([len(good), chance.randrange(len(good))])])
    for _ in range(chance.randint(0, most)):
        if bad:
            bad[chance.randrange(min(len(bad), chance.choice(within)))] = chance.randrange(256)
    return bytes(bad)


def is_refused(path: Path, content: bytes) -> bool:
    """Whether a file of this content gives a UsageError; if not, it gives metadata, and nothing else comes of it."""
    path.write_bytes(content)
    try:
        assert isinstance(read_metadata(path), dict)
    except UsageError:
        return True
    return False


@pytest.mark.parametrize("name", LOSSY)
def test_any_damage_to_a_picture_gives_metadata_or_one_error(tmp_path: Path, name: str) -> None:
    chance = random.Random(12)
    path = save(picture(), tmp_path / name, METADATA)
    good, refusals = path.read_bytes(), 0
    for _ in range(300):
        refusals += is_refused(path, damaged(good, chance, 6, (60, 4000)))
    assert 50 < refusals < 300


def test_a_still_may_be_started_from(tmp_path: Path) -> None:
    """A file that we wrote is one that we open, its EXIF turning nothing."""
    for name in NAMES:
        assert off(open_image(save(gradient(), tmp_path / name, LONGEST)), gradient()) <= 8


# ---- PNG ----


def test_png_and_metadata_come_back(tmp_path: Path) -> None:
    image = picture()
    path = save(image, tmp_path / "fox.png", METADATA)
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
        path = save(picture(), tmp_path / f"{index}.png", metadata)
        assert read_metadata(path) == metadata


def test_long_prompts_fit(tmp_path: Path) -> None:
    metadata = {"request": Request("😀" * 20_000, negative_prompt="\x01" * 20_000).to_json()}
    assert read_metadata(save(picture(), tmp_path / "x.png", metadata)) == metadata


def test_other_tools_see_text(tmp_path: Path) -> None:
    with Image.open(save(picture(), tmp_path / "fox.png", METADATA)) as image:
        assert image.info["parameters"] == (
            "a fox, 日本語 😀\nsecond line\nNegative prompt: blurry\n"
            "Steps: 4, CFG scale: 8.0, Seed: 0, Size: 64x32, Model: icons, Version: calotype"
        )
        assert json.loads(image.info["calotype"]) == METADATA
        assert ": " not in image.info["calotype"].replace("fox, ", "")  # compact


def test_no_metadata(tmp_path: Path) -> None:
    path = save(picture(), tmp_path / "plain.png")
    with Image.open(path) as image:
        assert image.info == {}
    with pytest.raises(UsageError, match="holds no calotype metadata"):
        read_metadata(path)


@pytest.mark.parametrize("metadata", [{"x": float("nan")}, {"x": object()}, {"x": "\ud800"}, {"x": "y" * MAX_METADATA}])
def test_metadata_that_cannot_be_written_leaves_no_file(tmp_path: Path, metadata: dict[str, Any]) -> None:
    with pytest.raises((UsageError, ValueError, TypeError)):
        save(picture(), tmp_path / "x.png", metadata)
    assert left_in(tmp_path) == []


def test_an_older_file_is_replaced_and_permissions_are_the_usual(tmp_path: Path) -> None:
    path = tmp_path / "fox.PNG"
    path.write_bytes(b"old")
    save(picture(), path)
    with Image.open(path) as image:
        assert image.size == (24, 16)
    (tmp_path / "usual").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


@pytest.mark.parametrize("name", ["fox.bmp", "fox.gif", "fox.jpg.gz", "fox", "fox.png.gz", ".png", "", "png"])
def test_only_these_formats(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"does not end in \.png, \.jpg, \.jpeg, \.webp: pictures are"):
        save(picture(), tmp_path / name)
    assert left_in(tmp_path) == []


def refused(path: str | Path, message: str) -> OutputError:
    with pytest.raises(OutputError, match=message) as caught:
        save(picture(), path, METADATA)
    assert "\n" not in str(caught.value)
    return caught.value


def test_target_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "dir.png").mkdir()
    error = refused(tmp_path / "dir.png", "is a directory")
    assert error.hint is not None
    assert "new.png" in error.hint
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
    refused(tmp_path / "fox.png", "cannot be written: permission denied")
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
        save(picture(), path, METADATA)
    if isinstance(error, OSError):
        assert "no space left on device" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert left_in(tmp_path) == ["fox.png"]


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """The real thing: the system refuses to let the file grow."""
    path = tmp_path / "fox.png"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match="cannot be written: file too large"):
            save(picture(width=100, height=100), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert left_in(tmp_path) == ["fox.png"]


# ---- reading ----


def png(*texts: tuple[str, str, bool]) -> bytes:
    """A PNG file with these texts (key, text, compressed)."""
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
        (b"", "is not a PNG, JPEG or WebP file", "into these, and into clips"),
        (b"hello", "is not a PNG, JPEG or WebP file", ""),
        (b"\xff\xd8\xff\xe0" + b"\0" * 100, "is not a PNG|cannot be read", ""),
        (GOOD[:8], "is not a PNG|cannot be read", ""),
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
        refusals += is_refused(path, damaged(GOOD, chance, 4, (120,)))
    assert 100 < refusals < 400


def test_reading_metadata_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(GOOD)
    code = (
        f"import sys, calotype.stills as s; print(s.read_metadata({str(tmp_path / 'x.png')!r}), 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "{'request': {'prompt': 'a fox'}} False"
