"""What `calotype distill --check` says of data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from test_sources import jpeg, members, write_tar

from calotype.errors import UsageError
from calotype.training.check import DataReport, checking


def check(path: Path, resolution: int, buckets: bool = True) -> DataReport:
    *_, report = checking(path, resolution, buckets=buckets)
    assert isinstance(report, DataReport)
    return report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    for name, size in {"a": (640, 640), "b": (1280, 640), "c": (100, 200), "d": (640, 640)}.items():
        Image.new("RGB", size, "red" if name != "d" else "blue").save(data / f"{name}.png")
        (data / f"{name}.txt").write_text({"a": "a fox", "b": "", "c": "a very red cat"}.get(name, "snow"))
    (data / "e.png").write_bytes((data / "a.png").read_bytes())
    (data / "e.txt").write_text("the same")
    (data / "f.png").write_bytes(b"nothing")
    (data / "f.txt").write_text("broken")
    (data / "g.png").write_bytes((data / "a.png").read_bytes())
    return data


def test_a_report(folder: Path) -> None:
    report = check(folder, 512)
    assert (report.examples, report.uncaptioned, report.prompts) == (6, 1, 0)
    assert (report.captions, report.empty, report.shortest, report.longest) == (6, 1, 0, 4)
    assert (report.smallest, report.largest) == ((200, 100), (640, 1280))
    assert report.enlarged == 1
    assert dict(report.buckets) == {(512, 512): 3, (384, 640): 1, (640, 384): 1}
    assert report.duplicates == (("a.png", "e.png"),)
    assert [name for name, _ in report.broken] == ["f.png"]
    assert not report.passes
    assert json.loads(json.dumps(report.to_json()))["broken"][0]["name"] == "f.png"
    text = "\n".join(report.lines())
    for wanted in (
        "6 captioned pictures",
        "0 to 4 words; 1 empty",
        "left out: 1 picture\n",
        "100x200 to 1280x640",
        "enlarged: 1 picture\n",
        "a.png = e.png",
        "f.png is not a picture",
        "too many are broken",
    ):
        assert wanted in text


def test_what_was_left_alone_is_named(tmp_path: Path) -> None:
    data = tmp_path / "10_cat"
    data.mkdir()
    for name in ("a.png", "b.gif", "c.gif", "a_512x512_sd.npz", "LICENSE"):
        (data / name).write_bytes(jpeg())
    (data / "a.txt").write_text("a cat")
    (data / "a.caption").write_text("a dog")
    report = check(data, 512)
    text = "\n".join(report.lines())
    for wanted in (
        "described twice, and differently: 1\n  a.png: a.txt counts, not a.caption\n",
        "folders named as for kohya's scripts: 10_cat; their repeats are not read\n",
        "seen and left alone, kinds of files: 3\n",
        "  .gif (2), such as b.gif: such pictures are not read\n",
        "  .npz (1), such as a_512x512_sd.npz: kohya's cache of latents\n",
        "  LICENSE (1), such as LICENSE\n",
        "ready to train",
    ):
        assert wanted in text
    assert json.loads(json.dumps(report.to_json()))["left"][0] == {"kind": ".gif", "count": 2, "example": "b.gif"}


def test_the_square_alone(folder: Path) -> None:
    (folder / "f.png").unlink()
    report = check(folder, 512, buckets=False)
    assert report.buckets == (((512, 512), 5),)
    assert report.passes
    assert report.lines()[-1] == "ready to train"


def test_one_broken_in_a_hundred_passes(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", [*members(*range(99)), ("x.jpg", jpeg()[:300]), ("x.txt", b"broken")])
    *counts, report = checking(tmp_path / "s.tar", 64, unit=16, cache=tmp_path / "cache")
    assert counts == [64, 100]
    assert isinstance(report, DataReport)
    assert report.passes
    assert [name for name, _ in report.broken] == ["s.tar:x.jpg"]
    assert len(report.duplicates[0]) == 99
    assert list((tmp_path / "cache").iterdir())


def test_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a fox\nsnow\n")
    report = check(tmp_path / "p.txt", 512)
    assert (report.prompts, report.examples, report.passes) == (2, 0, True)
    assert "2 prompts; the teacher will draw" in report.lines()[0]
    json.dumps(report.to_json())


def test_errors_are_those_of_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no captioned pictures"):
        check(tmp_path, 512)
    with pytest.raises(UsageError, match="resolution is 32"):
        check(tmp_path, 32)
