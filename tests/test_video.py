"""Clips as files: what is written is what is read, frame by frame, with its request."""

from __future__ import annotations

import struct
import sys
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from calotype import video
from calotype.errors import OutputError, UsageError
from calotype.video import check, durations, load_frames, read_metadata, save

METADATA = {"calotype": "0.1.0", "request": {"prompt": 'é "fox"\0\n', "frames": 6}, "long": "x" * 3000}
COLOURS = ("red", "red", "blue", "#010203", "#010203", "white")  # two are like the one before
PICTURES = (".gif", ".webp")
WRITABLE = video.SUFFIXES if find_spec("av") else PICTURES  # MP4 takes the extra "video"


def clip(width: int = 40, height: int = 24) -> list[Image.Image]:
    return [Image.new("RGB", (width, height), colour) for colour in COLOURS]


def gradient(width: int, height: int) -> Image.Image:
    """Smooth in all three channels, in more than 256 colours."""
    bands = (
        Image.linear_gradient("L").resize((width, height)),
        Image.radial_gradient("L").resize((width, height)),
        Image.linear_gradient("L").rotate(90).resize((width, height)),
    )
    return Image.merge("RGB", bands)


def off(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of two pictures' values."""
    pairs = zip(one.tobytes(), other.tobytes(), strict=True)
    return sum(abs(a - b) for a, b in pairs) / len(one.tobytes())


def shown_for(path: Path) -> list[int]:
    """Milliseconds of each frame, as Pillow reads them."""
    with Image.open(path) as image:
        found = []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            image.load()
            found.append(image.info["duration"])
        assert image.info["loop"] == 0
    return found


# ---- what is written ----


@pytest.mark.parametrize("suffix", WRITABLE)
def test_every_frame_comes_back(tmp_path: Path, suffix: str) -> None:
    """Also those that are like the one before, which Pillow's GIF and libwebp's WebP writers leave out."""
    path = tmp_path / f"a{suffix}"
    assert save(clip(), path, 8, METADATA) == path
    found = load_frames(path)
    assert len(found) == 6
    assert [frame.mode for frame in found] == ["RGB"] * 6
    assert max(off(a, b) for a, b in zip(found, clip(), strict=True)) < (0.01 if suffix == ".gif" else 4)
    assert read_metadata(path) == METADATA


@pytest.mark.parametrize("suffix", WRITABLE)
def test_a_clip_says_that_an_algorithm_made_it(tmp_path: Path, suffix: str) -> None:
    """In XMP, where the format has its place for it; nothing, where it is not known."""
    content = save(clip(), tmp_path / f"a{suffix}", 8, METADATA).read_bytes()
    begin, end = content.index(b"<?xpacket begin"), content.index(b'<?xpacket end="w"?>') + 19
    source = ElementTree.fromstring(content[begin:end]).find(".//{*}DigitalSourceType")
    assert source is not None
    assert source.text == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    if suffix == ".webp":
        with Image.open(tmp_path / "a.webp") as image:
            assert image.info["xmp"] == content[begin:end]
    elif suffix == ".gif":
        assert content[begin - 14 : begin] == b"\x21\xff\x0bXMP DataXMP"
        assert content[end : end + 258] == b"\x01" + bytes(range(256))[::-1] + b"\0"
    else:
        assert content[begin - 24 : begin - 20] == (end - begin + 24).to_bytes(4)
        assert (content[begin - 20 : begin - 16], end) == (b"uuid", len(content))
    assert b"xpacket" not in save(clip(), tmp_path / f"b{suffix}", 8).read_bytes()


@pytest.mark.parametrize("suffix", WRITABLE)
@pytest.mark.parametrize("size", [(1, 1), (15, 9), (130, 66)])
def test_any_size_and_a_single_frame(tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
    path = tmp_path / f"a{suffix}"
    save([gradient(*size)], path, 8)
    (found,) = load_frames(path)
    even = tuple(side + side % 2 for side in size)
    assert found.size == (even if suffix == ".mp4" else size)
    # Four pixels share a colour in an MP4, and there are few of them in so small a picture.
    assert off(found.crop((0, 0, *size)), gradient(*size)) < (12 if suffix == ".mp4" else 6)


@pytest.mark.parametrize(
    ("fps", "gif", "webp"),
    [(8, [130, 120, 130, 120, 130, 120], [125] * 6), (12, [80, 90, 80, 80, 90, 80], [83, 84, 83, 83, 84, 83])],
)
def test_frames_are_shown_for_their_time(tmp_path: Path, fps: int, gif: list[int], webp: list[int]) -> None:
    """What a clock of hundredths cannot say is made up for in the next frame: 6 frames at 8 a second are 750 ms."""
    for suffix, expected in ((".gif", gif), (".webp", webp)):
        save(clip(), tmp_path / f"a{suffix}", fps)
        assert shown_for(tmp_path / f"a{suffix}") == expected


@pytest.mark.parametrize("fps", [1, 7, 24, 60])
def test_time_does_not_drift(fps: int) -> None:
    for ticks in (100, 1000):
        times = durations(512, fps, ticks)
        assert max(times) - min(times) <= 1
        assert all(abs(sum(times[:i]) - i * ticks / fps) <= 0.5 for i in range(513))


def test_a_gif_of_few_colours_keeps_them(tmp_path: Path) -> None:
    """One palette for the clip: 200 colours over 8 frames, each exactly as it was."""
    frames = []
    for first in range(0, 200, 25):
        frame = Image.new("RGB", (25, 4))
        frame.putdata([((first + x) % 256, 7 * (first + x) % 256, 13 * (first + x) % 256) for x in range(25)] * 4)
        frames.append(frame)
    save(frames, tmp_path / "a.gif", 8)
    assert [frame.tobytes() for frame in load_frames(tmp_path / "a.gif")] == [frame.tobytes() for frame in frames]


def test_what_does_not_move_keeps_its_colours_in_a_gif(tmp_path: Path) -> None:
    """A palette for each frame would make still ground shimmer."""
    frames = []
    for step in range(4):
        frame = gradient(64, 64)
        frame.paste("red", (0, 48 + 4 * step, 64, 52 + 4 * step))
        frames.append(frame)
    save(frames, tmp_path / "a.gif", 8)
    above = [frame.crop((0, 0, 64, 48)).tobytes() for frame in load_frames(tmp_path / "a.gif")]
    assert len(set(above)) == 1


def test_stills_bring_nothing_along(tmp_path: Path) -> None:
    """A still with a colour profile or older metadata is WebP's extended format, which a frame cannot be."""
    frame = gradient(16, 16)
    frame.info["icc_profile"] = b"profile" * 50
    frame.info["exif"] = b"Exif\0\0old"
    save([frame, frame], tmp_path / "a.webp", 8)
    assert b"profile" not in (tmp_path / "a.webp").read_bytes()
    assert len(load_frames(tmp_path / "a.webp")) == 2


def test_transparency_becomes_white(tmp_path: Path) -> None:
    save([Image.new("RGBA", (8, 8), (0, 0, 0, 0))], tmp_path / "a.gif", 8)
    assert load_frames(tmp_path / "a.gif")[0].getpixel((0, 0)) == (255, 255, 255)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    save(clip(), path, 8)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="metadata"):
        save(clip(), path, 8, {"long": "x" * 2_000_000})
    with pytest.raises(OutputError, match="no folder"):
        save(clip(), tmp_path / "none" / "a.gif", 8)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.gif"]


# ---- what is not written ----


@pytest.mark.parametrize(
    ("name", "fps", "message"),
    [
        ("a.avi", 8, r"\.gif, \.webp, \.mp4"),
        ("a", 8, r"\.gif, \.webp, \.mp4"),
        ("a.png", 8, r"\.gif, \.webp, \.mp4"),
        ("a.gif", 0, "1 to 60"),
        ("a.webp", 61, "1 to 60"),
        ("a.gif", 60, "at most 50"),
    ],
)
def test_what_cannot_be_a_clip(tmp_path: Path, name: str, fps: int, message: str) -> None:
    for refusing in (lambda: check(tmp_path / name, fps), lambda: save(clip(), tmp_path / name, fps)):
        with pytest.raises(UsageError, match=message):
            refusing()
    assert list(tmp_path.iterdir()) == []


def test_frames_that_are_no_clip(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no frames"):
        save([], tmp_path / "a.gif", 8)
    with pytest.raises(UsageError, match="different sizes"):
        save([*clip(), gradient(4, 4)], tmp_path / "a.gif", 8)


def test_mp4_without_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    (tmp_path / "b.mp4").write_bytes(mp4(b"text"))
    for refusing in (
        lambda: check(tmp_path / "a.mp4", 8),
        lambda: save(clip(), tmp_path / "a.mp4", 8),
        lambda: load_frames(tmp_path / "b.mp4"),
    ):
        with pytest.raises(UsageError, match=r"pip install av, .*'\.\[video\]'"):
            refusing()


class FakeFrame:
    """What this file's MP4 tests need of PyAV, where it is not installed."""

    def __init__(self, image: Image.Image, rotation: int = 0) -> None:
        self.image, self.rotation = image, rotation
        self.width, self.height = image.size

    from_image = classmethod(lambda cls, image: cls(image))

    def to_image(self) -> Image.Image:
        return self.image


class FakeContainer:
    def __init__(self, frames: list[FakeFrame]) -> None:
        self.metadata: dict[str, str] = {}
        self.frames, self.packets = frames, list[Any]()
        self.streams = SimpleNamespace(video=frames)
        self.stream = SimpleNamespace(encode=lambda frame=None: [frame])

    def __enter__(self) -> FakeContainer:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def add_stream(self, codec: str, rate: Fraction, options: dict[str, str]) -> Any:
        self.stream.codec, self.stream.rate, self.stream.options = codec, rate, options
        return self.stream

    def mux(self, packets: list[Any]) -> None:
        self.packets += packets

    def decode(self, video: int) -> list[FakeFrame]:
        return self.frames


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> FakeContainer:
    """The one that a stand-in for PyAV opens, to be read or written; it has a film of two frames."""
    opened = FakeContainer([FakeFrame(Image.new("RGB", (8, 6), "red")), FakeFrame(gradient(6, 8), rotation=-90)])
    fake = SimpleNamespace(open=lambda file, mode="r", format=None: opened, VideoFrame=FakeFrame)
    monkeypatch.setitem(sys.modules, "av", fake)
    monkeypatch.setattr(video, "find_spec", lambda name: fake)
    return opened


def test_what_an_mp4_file_is_made_of(tmp_path: Path, container: FakeContainer) -> None:
    """Frames of even size, their last row and column repeated; what is odd in one direction only as well."""
    for width, height in ((8, 6), (15, 9), (16, 9), (15, 10)):
        container.packets.clear()
        frame = gradient(width, height)
        save([frame] * 3, tmp_path / "a.mp4", 12, METADATA)
        assert (container.stream.codec, container.stream.pix_fmt) == ("libx264", "yuv420p")
        assert container.stream.rate == 12
        *frames, flush = container.packets
        assert flush is None
        assert len(frames) == 3
        even = (width + width % 2, height + height % 2)
        assert (container.stream.width, container.stream.height) == frames[0].image.size == even
        assert frames[0].image.crop((0, 0, width, height)).tobytes() == frame.tobytes()
        assert frames[0].image.getpixel((even[0] - 1, even[1] - 1)) == frame.getpixel((width - 1, height - 1))
        assert frames[0].image.getpixel((even[0] - 1, 0)) == frame.getpixel((width - 1, 0))
        assert frames[0].image.getpixel((0, even[1] - 1)) == frame.getpixel((0, height - 1))
    (tmp_path / "b.mp4").write_bytes(mp4(container.metadata["comment"].encode()))
    assert read_metadata(tmp_path / "b.mp4") == METADATA


def test_the_frames_of_an_mp4_file(tmp_path: Path, container: FakeContainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turned as the camera was held."""
    (tmp_path / "a.mp4").write_bytes(mp4(b"text"))
    red, turned = load_frames(tmp_path / "a.mp4")
    assert red.getpixel((0, 0)) == (255, 0, 0)
    assert turned.size == (8, 6)
    assert turned.tobytes() == gradient(6, 8).transpose(Image.Transpose.ROTATE_270).tobytes()
    monkeypatch.setattr(video, "MAX_PIXELS", 40)
    with pytest.raises(UsageError, match="8x6: too large"):
        load_frames(tmp_path / "a.mp4")
    container.streams.video = []
    with pytest.raises(UsageError, match="no pictures"):
        load_frames(tmp_path / "a.mp4")


def test_an_encoder_that_fails(tmp_path: Path, container: FakeContainer) -> None:
    container.stream.encode = lambda frame=None: 1 / 0
    with pytest.raises(OutputError, match="cannot be encoded as MP4: division by zero"):
        save(clip(), tmp_path / "a.mp4", 8)
    assert list(tmp_path.iterdir()) == []


# ---- what is read ----


def test_frames_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in PICTURES:
        path = tmp_path / f"a{suffix}"
        save(clip(), path, 8)
        assert len(load_frames(path, 6)) == 6
        with pytest.raises(UsageError, match="more than 5 frames"):
            load_frames(path, 5)
        monkeypatch.setattr(video, "MAX_CLIP_PIXELS", 40 * 24 * 5)
        with pytest.raises(UsageError, match="pixels"):
            load_frames(path)
        monkeypatch.undo()


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    """A header that claims 60,000 x 60,000 pixels, and a frame that is larger than the screen it is on."""
    gif, webp = tmp_path / "a.gif", tmp_path / "a.webp"
    save(clip(), gif, 8)
    content = bytearray(gif.read_bytes())
    content[6:10] = struct.pack("<HH", 60_000, 60_000)
    gif.write_bytes(content)
    save(clip(), webp, 8)
    content = bytearray(webp.read_bytes())
    content[24:30] = (16_000).to_bytes(3, "little") * 2
    webp.write_bytes(content)
    for path in (gif, webp):
        with pytest.raises(UsageError, match="too large"):
            load_frames(path)


def test_a_frame_larger_than_its_screen(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    save(clip(), path, 8)
    content = bytearray(path.read_bytes())
    last = content.rindex(b"\x2c\0\0\0\0" + struct.pack("<HH", 40, 24))
    content[last + 5 : last + 9] = struct.pack("<HH", 60_000, 60_000)
    path.write_bytes(content)
    with pytest.raises(UsageError, match="too large"):
        load_frames(path)


@pytest.mark.parametrize("suffix", PICTURES)
def test_damaged_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    save([gradient(32, 32)] * 3, path, 8, METADATA)
    content = path.read_bytes()
    for length in range(0, len(content), 211):
        path.write_bytes(content[:length])
        for read in (load_frames, read_metadata):
            try:
                read(path)
            except UsageError:
                continue
    for place in range(0, len(content), 101):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        for read in (load_frames, read_metadata):
            try:
                read(path)
            except UsageError:
                continue
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match=r"is damaged|not a clip"):
        load_frames(path)


def test_only_clips_are_opened(tmp_path: Path) -> None:
    gradient(8, 8).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.gif")
    (tmp_path / "text.webp").write_text("no picture")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("a.gif", "text.webp", "empty.mp4"):
        for read in (load_frames, read_metadata):
            with pytest.raises(UsageError, match="not a clip in GIF, WebP or MP4"):
                read(tmp_path / name)
    for read in (load_frames, read_metadata):
        with pytest.raises(UsageError, match="no file"):
            read(tmp_path / "none.gif")
        with pytest.raises(UsageError, match="no file"):
            read(tmp_path)


@pytest.mark.parametrize("suffix", PICTURES)
def test_files_without_our_metadata(tmp_path: Path, suffix: str) -> None:
    save(clip(), tmp_path / f"a{suffix}", 8)
    with pytest.raises(UsageError, match="no calotype metadata"):
        read_metadata(tmp_path / f"a{suffix}")
    save(clip(), tmp_path / f"b{suffix}", 8, METADATA)
    content = (tmp_path / f"b{suffix}").read_bytes()
    (tmp_path / f"b{suffix}").write_bytes(content.replace(b'calotype {"', b'calotype "{'))
    with pytest.raises(UsageError, match="damaged"):
        read_metadata(tmp_path / f"b{suffix}")


# ---- MP4's tags, which are read without FFmpeg ----


def box(kind: bytes, content: bytes, *, wide: bool = False) -> bytes:
    if wide:
        return struct.pack(">I4sQ", 1, kind, len(content) + 16) + content
    return struct.pack(">I4s", len(content) + 8, kind) + content


def mp4(comment: bytes, *, wide: bool = False) -> bytes:
    """An MP4 file as FFmpeg lays it out, without a film."""
    tool = box(b"\xa9too", box(b"data", bytes(8) + b"Lavf"))
    tag = box(b"\xa9cmt", box(b"data", struct.pack(">II", 1, 0) + comment))
    meta = box(b"meta", bytes(4) + box(b"hdlr", bytes(25)) + box(b"ilst", tool + tag))
    moov = box(b"moov", box(b"mvhd", bytes(100)) + box(b"udta", meta))
    return box(b"ftyp", b"isomiso2") + box(b"free", b"") + box(b"mdat", bytes(99), wide=wide) + moov


@pytest.mark.parametrize("wide", [True, False])
def test_the_comment_of_an_mp4_file(tmp_path: Path, wide: bool) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(mp4(b'calotype {"request":{"prompt":"\\u00e9"}}', wide=wide))
    assert read_metadata(path) == {"request": {"prompt": "é"}}


@pytest.mark.parametrize(
    "content",
    [
        box(b"ftyp", b"isom"),
        mp4(b"made with another program"),
        mp4(b'calotype {"a":1}').replace(b"udta", b"free"),
        mp4(b'calotype {"a":1}')[:-30],
        box(b"ftyp", b"isom") + struct.pack(">I4s", 4, b"moov"),
        box(b"ftyp", b"isom") + struct.pack(">I4sQ", 1, b"moov", 2**63),
    ],
)
def test_mp4_files_without_our_comment(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(UsageError, match="no calotype metadata"):
        read_metadata(tmp_path / "a.mp4")


def test_an_mp4_file_of_many_boxes_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_BOXES", 10)
    path = tmp_path / "a.mp4"
    tail = mp4(b'calotype {"a":1}')
    path.write_bytes(box(b"ftyp", b"isom") + box(b"free", b"") * 5 + tail)
    assert read_metadata(path) == {"a": 1}
    path.write_bytes(box(b"ftyp", b"isom") + box(b"free", b"") * 50 + tail)
    with pytest.raises(UsageError, match="no calotype metadata"):
        read_metadata(path)


def test_metadata_is_json(tmp_path: Path) -> None:
    bad: dict[str, Any] = {"a": float("nan")}
    with pytest.raises(ValueError, match="JSON compliant"):
        save(clip(), tmp_path / "a.gif", 8, bad)
    assert list(tmp_path.iterdir()) == []
