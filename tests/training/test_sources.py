"""Where training pictures come from: folders, WebDataset tars, prompts; and how pictures are cut."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calotype.errors import UsageError
from calotype.training import sources
from calotype.training.pictures import LEAST, MOST, bucket_of, buckets, decode, fit, hole
from calotype.training.sources import open_source


def jpeg(colour: str = "red", size: tuple[int, int] = (16, 8), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, options.pop("format", "JPEG"), **options)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# ---- folders ----


def test_captions_beside_pictures(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    for name in ("z.png", "b/deep/a.JPG", "alone.webp", "._z.png"):
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "z.txt").write_bytes("\ufeffa fox\n".encode())
    (tmp_path / "b/deep/a.txt").write_text("a cat")
    source = open_source(tmp_path)
    assert [(one.name, one.captions) for one in source.examples] == [
        ("b/deep/a.JPG", ("a cat",)),
        ("z.png", ("a fox",)),
    ]
    assert source.uncaptioned == 1
    assert source.examples[0].read() == jpeg()


def test_captions_from_metadata(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "unnamed.png"):
        (tmp_path / name).write_bytes(jpeg())
    rows = [{"file_name": "b.png", "text": ["one", "two\u2028three"]}, {"file_name": "./a.png", "text": ""}]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    source = open_source(tmp_path)
    assert [one.captions for one in source.examples] == [("one", "two\u2028three"), ("",)]
    assert source.uncaptioned == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("{", "line 1 is not a caption"),
        ('{"file_name": "a.png"}', "line 1 is not a caption"),
        ('{"file_name": 3, "text": "x"}', "line 1 is not a caption"),
        ('{"file_name": "a.png", "text": []}', "line 1 is not a caption"),
        ('{"file_name": "a.png", "text": ["x", 1]}', "line 1 is not a caption"),
        ('["a.png", "x"]', "line 1 is not a caption"),
        ('{"file_name": "gone.png", "text": "x"}', "line 1 names gone.png, which is not there"),
        (
            '{"file_name": "a.png", "text": "x"}\n{"file_name": "gone.png", "text": "x"}\n'
            '{"file_name": "b", "text": "x"}',
            r"line 2 names gone.png, which is not there \(2 pictures are missing\)",
        ),
        (
            '{"file_name": "b.png", "text": "x"}\n{"file_name": "gone.png", "text": "x"}',
            r"none of the 2 pictures that .* names is there",
        ),
        ("", "has no captioned pictures, and 1 without a caption"),
    ],
)
def test_bad_metadata(lines: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(jpeg())
    (tmp_path / "metadata.jsonl").write_text(lines)
    with pytest.raises(UsageError, match=message):
        open_source(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere is not there"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"has no captioned pictures \(hint"):
        open_source(tmp_path)
    (tmp_path / "a.parquet").write_text("")
    with pytest.raises(UsageError, match="is of no known kind"):
        open_source(tmp_path / "a.parquet")
    (tmp_path / "a.png").write_bytes(jpeg())
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe caf\xe9")
    with pytest.raises(UsageError, match=r"a\.txt is not text in UTF-8"):
        open_source(tmp_path)


def put(folder: Path, *files: str | tuple[str, str]) -> Path:
    """Pictures by their names, and texts."""
    for file in files:
        name, text = (file, None) if isinstance(file, str) else file
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg() if text is None else text.encode())
    return folder


def found(folder: Path) -> dict[str, tuple[str, ...]]:
    return {one.name: one.captions for one in open_source(folder).examples}


@pytest.mark.parametrize("ending", ["txt", "TXT", "caption", "Caption", "text"])
def test_endings_of_captions(ending: str, tmp_path: Path) -> None:
    assert found(put(tmp_path, "a.v1.png", (f"a.v1.{ending}", "a fox"))) == {"a.v1.png": ("a fox",)}


def test_which_caption_counts(tmp_path: Path) -> None:
    """Lists of the nearest folder, lists above, texts, JSON; what says something else is named."""
    put(tmp_path, *(f"{name}.png" for name in "abcde"), "deep/a.png", "deep/b.png")
    put(tmp_path, ("a.txt", "text"), ("a.caption", "other"), ("b.text", "same"), ("b.caption", "same"))
    put(tmp_path, ("c.json", '{"prompt": "json"}'), ("d.json", '{"tags": 3}'), ("a.json", "unread, and no JSON"))
    put(tmp_path, ("e.txt", "text"), ("deep/b.txt", "deep list"))
    put(tmp_path, ("metadata.csv", "file_name,text\ne.png,list\ndeep/a.png,list above\n"))
    put(tmp_path, ("deep/metadata.jsonl", '{"file_name": "a.png", "text": "deep list"}'))
    source = open_source(tmp_path)
    assert {one.name: one.captions for one in source.examples} == {
        "deep/a.png": ("deep list",),
        "e.png": ("list",),
        "a.png": ("text",),
        "b.png": ("same",),
        "c.png": ("json",),
        "deep/b.png": ("deep list",),
    }
    assert source.uncaptioned == 1
    assert source.differing == (
        "deep/a.png: deep/metadata.jsonl counts, not metadata.csv",
        "a.png: a.txt counts, not a.caption",
        "e.png: metadata.csv counts, not e.txt",
    )
    assert [str(each) for each in source.left] == [".json (2), such as a.json: no picture's caption"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", '\ufefffile_name,text\r\na.png,"a ""cat"", red\nand blue"\r\nsub/b.png,a dog\r\n'),
        ("metadata.csv", 'id;caption; file_name\n1;"a ""cat"", red\nand blue";a.png\n2;a dog;sub\\b.png'),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "prompt": "a \\"cat\\", red\\nand blue"}\n'
            '{"file_name": "./sub/b.png", "text": "a dog"}',
        ),
        (
            "metadata.json",
            '{"a": {"caption": "a \\"cat\\"", "tags": "red\\nand blue"}, "/data/x/sub/b.png": {"tags": "a dog"}}',
        ),
        (
            "metadata.json",
            '{"C:\\\\x\\\\a": {"tags": "a \\"cat\\", red\\nand blue"}, "/b": {"caption": "a dog", "tags": ""}}',
        ),
    ],
)
def test_lists_of_captions(name: str, text: str, tmp_path: Path) -> None:
    put(tmp_path, "a.png", "sub/b.png", "c.png", (name, text))
    assert found(tmp_path) == {"a.png": ('a "cat", red\nand blue',), "sub/b.png": ("a dog",)}
    assert (open_source(tmp_path).uncaptioned, open_source(tmp_path).left) == (1, ())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metadata.csv",
            "image,text\na.png,x",
            r"has the columns image, text: must have file_name and one of",
        ),
        ("metadata.csv", "file_name,label\na.png,x", "has the columns file_name, label: must have"),
        ("metadata.csv", "file_name,text\na.png", r"metadata\.csv line 2 is not a caption"),
        ("metadata.csv", "file_name,text\na.png,a cat, red", "line 2 has more than the 2 columns"),
        ("metadata.csv", 'file_name,text\na.png,"a cat', "is not CSV, after line 1: unexpected end of data"),
        ("metadata.csv", "file_name,text\ngone.png,a cat\n", r"line 2 names gone\.png, which is not there"),
        ("metadata.csv", "file_name,text\n", r"and 1 without a caption; \.csv \(1\), such as metadata\.csv"),
        ("metadata.csv", "file_name,text\na.png," + "x" * 200_000, "is not CSV, after line 1: field larger than"),
        ("metadata.json", '{"gone": {"caption": "x"}}', r"json entry 'gone' names gone, which is not there"),
        ("metadata.json", '{"a": {"caption": "x"}, "b": 3}', r"json entry 'b' is not a caption: 3"),
        ("metadata.json", '{"a": {"caption": "x"}', "metadata.json is not a caption"),
        ("metadata.json", '["another program\'s"]', r"and 1 without a caption; \.json \(1\)"),
        ("a.json", "{", r"a\.json is not a caption"),
        ("metadata.parquet", "", r"\.parquet \(1\), such as metadata\.parquet: tables are not read"),
    ],
)
def test_bad_lists(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        open_source(put(tmp_path, "a.png", (name, text)))


def test_a_name_that_fits_two_pictures(tmp_path: Path) -> None:
    put(tmp_path, "x/1.png", "y/1.png", ("metadata.json", '{"/there/x/1.png": {"caption": "whole"}}'))
    assert found(tmp_path) == {"x/1.png": ("whole",)}
    put(tmp_path, ("metadata.json", '{"/there/1.png": {"caption": "whole"}}'))
    with pytest.raises(UsageError, match=r"names /there/1\.png, which may be x/1\.png or y/1\.png"):
        open_source(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("name", ["a.txt", "a.caption", "a.json", "metadata.csv", "metadata.jsonl", "metadata.json"])
def test_other_encodings(name: str, encoding: str, tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / name).write_bytes("file_name,text\na.png,gr\u00fcn".encode(encoding))
    with pytest.raises(UsageError, match=rf"{name} is not text in UTF-8") as caught:
        open_source(tmp_path)
    assert caught.value.hint == "save it as UTF-8"


def test_an_unreadable_text_of_a_picture_that_a_list_names(tmp_path: Path) -> None:
    put(tmp_path, "a.png", ("metadata.csv", "file_name,text\na.png,a cat"))
    (tmp_path / "a.txt").write_bytes(b"\xff")
    assert found(tmp_path) == {"a.png": ("a cat",)}
    assert [each.kind for each in open_source(tmp_path).left] == [".txt"]


def test_tars_and_what_lies_beside_them(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", members(1))
    put(tmp_path, "a.png", ("0.parquet", ""), ("0_stats.json", "{}"))
    source = open_source(tmp_path)
    assert [one.name for one in source.examples] == ["0.tar:1.jpg"]
    assert [each.kind for each in source.left] == [".json", ".parquet", ".png"]


# ---- prompts ----


def test_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a fox\n\n a cat \n")
    assert open_source(tmp_path / "p.txt").prompts == ("a fox", "a cat")
    (tmp_path / "p.jsonl").write_text('{"text": "a fox"}\n{"text": ["", "a dog"], "id": 3}\n')
    source = open_source(tmp_path / "p.jsonl")
    assert (source.prompts, source.examples) == (("a fox", "", "a dog"), ())
    (tmp_path / "p.jsonl").write_text('{"file_name": "a.png", "text": "a fox"}')
    with pytest.raises(UsageError, match="line 1 names a picture"):
        open_source(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text('{"title": "a fox"}')
    with pytest.raises(UsageError, match="line 1 is not a caption"):
        open_source(tmp_path / "p.jsonl")
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(UsageError, match="holds no prompts"):
        open_source(tmp_path / "p.txt")


# ---- tars ----


def test_webdataset(tmp_path: Path) -> None:
    """What img2dataset and webdataset.ShardWriter make, and the corners of their naming."""
    shard = write_tar(
        tmp_path / "s-000.tar",
        [
            ("00000.jpg", jpeg("red")),
            ("00000.txt", b"a red thing\n"),
            ("00000.json", b'{"caption": "not this one"}'),
            ("dir.v1/00001.PNG", jpeg("blue", format="PNG")),
            ("dir.v1/00001.Json", '{"text": ["blau", "größer"], "key": 1}'.encode()),
            ("dir.v1/00002.webp", jpeg("green", format="WEBP")),
            ("dir.v1/00002.json", b'{"caption": "green"}'),
            ("00003.jpeg", jpeg()),
            ("00003.json", b'{"caption": null}'),
            ("00004.txt", b"no picture"),
            ("00005.seg.png", jpeg()),
            ("00005.txt", b"seg.png is another kind"),
            ("._00006.jpg", b"macOS"),
            ("._00006.txt", b"macOS"),
            ("00007.txt", b"first the caption"),
            ("README", b"no extension"),
            ("00007.jpg", jpeg("white")),
            ("00000.jpg", jpeg("black")),  # a key again is a new sample
            ("00000.caption", b"a black thing"),
            ("n" * 150 + ".jpg", jpeg("pink")),  # a name too long for the plain header
            ("n" * 150 + ".txt", b"long"),
        ],
    )
    source = open_source(shard)
    found = [(one.name.removeprefix("s-000.tar:"), one.captions) for one in source.examples]
    assert found == [
        ("00000.jpg", ("a red thing",)),
        ("dir.v1/00001.PNG", ("blau", "größer")),
        ("dir.v1/00002.webp", ("green",)),
        ("00007.jpg", ("first the caption",)),
        ("00000.jpg", ("a black thing",)),
        ("n" * 150 + ".jpg", ("long",)),
    ]
    assert source.uncaptioned == 1
    colours = ("red", "blue", "green", "white", "black", "pink")
    kinds = ("JPEG", "PNG", "WEBP", "JPEG", "JPEG", "JPEG")
    for example, colour, kind in zip(source.examples, colours, kinds, strict=True):
        assert example.read() == jpeg(colour, format=kind)


def members(*numbers: int) -> list[tuple[str, bytes]]:
    return [pair for i in numbers for pair in ((f"{i}.jpg", jpeg()), (f"{i}.txt", f"caption {i}".encode()))]


def test_several_tars(tmp_path: Path) -> None:
    for i in range(9, 12):
        write_tar(tmp_path / f"s-{i:03}.tar", members(i))
    wanted = [f"s-{i:03}.tar:{i}.jpg" for i in range(9, 12)]
    assert [one.name for one in open_source(tmp_path / "s-{009..011}.tar").examples] == wanted
    assert [one.name for one in open_source(tmp_path).examples] == wanted
    with pytest.raises(UsageError, match=r"s-008\.tar is not there \(hint"):
        open_source(tmp_path / "s-{008..010}.tar")
    with pytest.raises(UsageError, match=r"s-012\.tar is not there, nor are 2 others of 6"):
        open_source(tmp_path / "s-{009..014}.tar")
    with pytest.raises(UsageError, match="counts downwards"):
        open_source(tmp_path / "s-{011..009}.tar")


def test_a_tar_is_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, cache = write_tar(tmp_path / "s.tar", members(1, 2)), tmp_path / "cache"
    first = open_source(shard, cache)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_scan", lambda tar: pytest.fail("scanned again"))
        assert open_source(shard, cache) == first
    (index,) = cache.iterdir()
    for spoilt in ('{"pictures": [', "[]"):
        index.write_text(spoilt)
        assert open_source(shard, cache) == first
    write_tar(shard, members(1, 2, 3))
    assert len(open_source(shard, cache).examples) == 3
    assert not list(cache.glob(".*"))


def test_damaged_tars(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "s.tar", [("1.jpg", os.urandom(3000)), *members(2)]).read_bytes()
    end = whole.rstrip(b"\0")
    for cut in (0, 100, 700, 3000, 4096, 4300, len(end), len(end) // 512 * 512 + 512):
        (tmp_path / "s.tar").write_bytes(whole[:cut])
        with pytest.raises(UsageError, match=r"s\.tar is truncated, or no tar"):
            open_source(tmp_path / "s.tar")
    (tmp_path / "s.tar").write_bytes(whole[:3584] + b"\x55" * 512 + whole[4096:])  # a damaged header in the middle
    with pytest.raises(UsageError, match=r"s\.tar is truncated, or no tar: no end where it should be, at byte"):
        open_source(tmp_path / "s.tar")
    with tarfile.open(tmp_path / "s.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a"))
    with pytest.raises(UsageError, match=r"s\.tar is compressed"):
        open_source(tmp_path / "s.tar")
    (tmp_path / "s.tar").rename(tmp_path / "s.tar.gz")
    for path in (tmp_path, tmp_path / "s.tar.gz"):
        with pytest.raises(UsageError, match=r"s\.tar\.gz is compressed"):
            open_source(path)
    write_tar(tmp_path / "t.tar", [("1.jpg", jpeg()), ("1.txt", b"\xff")])
    with pytest.raises(UsageError, match=r"t\.tar:1\.txt is not text in UTF-8"):
        open_source(tmp_path / "t.tar")
    write_tar(tmp_path / "t.tar", [("1.jpg", jpeg())])
    with pytest.raises(UsageError, match=r"t\.tar has no captioned pictures, and 1 without a caption"):
        open_source(tmp_path / "t.tar")


def test_a_tar_that_changes_under_us(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", members(1))
    (example,) = open_source(shard).examples
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(UsageError, match=r"s\.tar:1\.jpg is cut off"):
        example.read()
    shard.unlink()
    with pytest.raises(UsageError, match=r"s\.tar:1\.jpg cannot be read: No such file"):
        example.read()


# ---- pictures ----


@pytest.mark.parametrize(("resolution", "unit"), [(512, 64), (1024, 64), (64, 16), (768, 8), (500, 64), (64, 64)])
def test_buckets(resolution: int, unit: int) -> None:
    sizes, side = buckets(resolution, unit), resolution // unit * unit
    assert len({width for _, width in sizes}) == len(sizes)
    for height, width in sizes:
        assert height % unit == width % unit == 0
        assert (height + unit) * width > side**2 >= height * width
        assert 0.5 <= height / width <= 2
    assert bucket_of((100, 100), sizes) == (side, side)


def test_sdxl_buckets() -> None:
    assert {(1024, 1024), (832, 1216), (768, 1344), (1344, 768), (1216, 832)} <= set(buckets(1024, 64))
    with pytest.raises(UsageError, match="resolution is 32: must be at least 64"):
        buckets(32, 64)


def test_the_nearest_proportions() -> None:
    sizes = ((1024, 512), (512, 512), (512, 1024))
    assert bucket_of((1000, 3000), sizes) == (512, 1024)
    assert bucket_of((141, 100), sizes) == (512, 512)
    assert bucket_of((143, 100), sizes) == (1024, 512)


@pytest.mark.parametrize("size", [(100, 100), (300, 100), (101, 333), (97, 64), (40, 30), (64, 48)])
@pytest.mark.parametrize("flip", [False, True])
def test_fit_says_where_it_cut(size: tuple[int, int], flip: bool) -> None:
    """A picture whose colours are its coordinates tells where each pixel came from."""
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width]
    ramp = np.stack([rows * 255 / (height - 1), columns * 255 / (width - 1), 0 * rows], axis=2)
    picture, view = fit(Image.fromarray(ramp.round().astype(np.uint8)), (48, 64), flip)
    assert picture.size == (64, 48)
    assert view.original == size
    scale = max(48 / height, 64 / width)
    whole, (top, left) = (height * scale, width * scale), view.crop
    pixels = np.asarray(picture).astype(float)
    y, x = (top + 12) / whole[0], (left + 16) / whole[1]
    seen = pixels[11:13, 15:17].mean(axis=(0, 1)) / 255
    assert abs(seen[0] - y) < 0.03
    assert abs(seen[1] - (1 - x if flip else x)) < 0.03
    assert min(top, left) == 0
    assert abs(top - (whole[0] - 48) / 2) <= 1
    assert abs(left - (whole[1] - 64) / 2) <= 1


def test_decoding() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    Image.new("RGB", (20, 10)).save(file, "JPEG", exif=exif)
    assert decode(file.getvalue(), "a").size == (10, 20)
    clear = io.BytesIO()
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(clear, "PNG")
    assert decode(clear.getvalue(), "a").getpixel((0, 0)) == (255, 255, 255)
    gif = io.BytesIO()
    Image.new("RGB", (4, 4)).save(gif, "GIF")
    for data in (b"", b"not a picture", jpeg()[:200], gif.getvalue()):
        with pytest.raises(UsageError, match=r"^t\.tar:7\.jpg is "):
            decode(data, "t.tar:7.jpg")
    with pytest.raises(UsageError, match="too narrow"):
        fit(Image.new("RGB", (1, 60000)), (1024, 1024))


def test_masks() -> None:
    covered = []
    for i in range(300):
        mask = hole(f"picture {i}", (96, 64))
        assert mask.shape == (96, 64)
        assert mask.dtype == bool
        covered.append(mask.mean())
    shares = np.array(covered)
    whole = shares == 1
    assert 0.04 < whole.mean() < 0.2
    assert shares[~whole].min() >= LEAST
    assert shares[~whole].max() <= MOST
    assert shares[~whole].std() > 0.1
    assert (hole("a", (64, 64)) == hole("a", (64, 64))).all()
    assert (hole("a", (64, 64)) != hole("b", (64, 64))).any()


def test_torch_is_not_loaded() -> None:
    code = "import sys, calotype.training.check; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
