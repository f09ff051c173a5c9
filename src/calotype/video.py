"""Clips: frames to GIF, animated WebP and MP4 files that carry their request, and frames out of such files.

GIF and WebP files are put together here out of stills that Pillow encodes: its own writers, and libwebp's, leave out a
frame that is like the one before. MP4 takes PyAV, the extra "video".
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from calotype import atomic
from calotype.errors import OutputError, UsageError, missing_package
from calotype.images import MAX_PIXELS, check_file, damaged, on_white, opened
from calotype.stills import MAX_METADATA, XMP, comment, exif, metadata_in

SUFFIXES = {".gif": "GIF", ".webp": "WEBP", ".mp4": "MP4"}
MAX_FPS = 60
MAX_GIF_FPS = 50  # its clock ticks a hundred times a second, and browsers slow down frames of a single tick
MAX_FRAMES = 512
MAX_CLIP_PIXELS = 2**29  # of all frames that are read, 1.6 GB; 512 frames of 1024 x 1024
PALETTE_SIDE = 128  # pixels of each frame's longer side that the palette is chosen from
WEBP_QUALITY, MP4_CRF = 90, 18
MAX_BOXES = 10_000  # looked at in one level of an MP4 file


def check(path: str | Path, fps: int) -> None:
    """Whether a clip can be written there, as far as that can be known beforehand. Raises UsageError."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{str(path)!r} does not end in {', '.join(SUFFIXES)}: clips are written as these")
    _check_format(SUFFIXES[suffix], fps)


def _check_format(format: str, fps: int) -> None:
    if not 1 <= fps <= MAX_FPS:
        raise UsageError(f"fps is {fps}: must be 1 to {MAX_FPS}")
    if format == "GIF" and fps > MAX_GIF_FPS:
        raise UsageError(f"fps is {fps}: a GIF has at most {MAX_GIF_FPS}", "write .webp or .mp4")
    if format == "MP4" and find_spec("av") is None:
        raise _no_pyav("written")


def save(frames: Sequence[Image.Image], path: str | Path, fps: int, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a clip whole or not at all, in the format of the path's suffix: .gif, .webp or .mp4. It repeats for ever.

    `metadata` is what `encode` takes and `read_metadata` gives back. Raises UsageError, OutputError.
    """
    check(path, fps)
    path = Path(path)
    atomic.write(path, encode(frames, SUFFIXES[path.suffix.lower()], fps, metadata))
    return path


def encode(frames: Sequence[Image.Image], format: str, fps: int, metadata: Mapping[str, Any] | None = None) -> bytes:
    """The content of a file in `format`: "GIF", "WEBP" or "MP4". The clip repeats for ever.

    Every frame is written, also where it is like the one before. `metadata` is what `stills.encode` takes. Raises
    UsageError, OutputError.
    """
    encoders = {"GIF": _gif, "WEBP": _webp, "MP4": _mp4}
    if format not in encoders:
        raise UsageError(f"format is {format!r}: must be one of {', '.join(encoders)}, for a clip")
    _check_format(format, fps)
    if not frames:
        raise UsageError("a clip of no frames: must be at least 1")
    if len({frame.size for frame in frames}) > 1:
        raise UsageError("a clip's frames are of different sizes: must be equal")
    plain = [on_white(frame) for frame in frames]
    for frame in plain:
        frame.info.clear()  # no colour profile or older metadata gets into the stills
    return encoders[format](plain, fps, metadata)


def is_clip(path: str | Path) -> bool:
    """Whether a file is a GIF, WebP or MP4 file, whatever its name says. (A WebP file may be a still picture.)"""
    if _is_mp4(path):
        return True
    with open(path, "rb") as file:
        head = file.read(12)
    return head.startswith(b"GIF8") or (head.startswith(b"RIFF") and head.endswith(b"WEBP"))


def load_frames(path: str | Path, limit: int = MAX_FRAMES) -> list[Image.Image]:
    """The frames of a GIF, WebP or MP4 file in RGB, whatever its name says. What is transparent becomes white.

    Raises UsageError for any other file, for a damaged one, and for one of more than `limit` frames.
    """
    frames: list[Image.Image] = []
    pixels = 0
    shown = repr(str(path))
    try:
        for frame in _mp4_frames(path) if _is_mp4(path) else _picture_frames(path):
            pixels += frame.width * frame.height
            if len(frames) == limit:
                raise UsageError(f"{shown} has more than {limit} frames", "cut it first")
            if pixels > MAX_CLIP_PIXELS:
                raise UsageError(f"{shown} has more than {MAX_CLIP_PIXELS} pixels", "make it smaller or shorter")
            frames.append(on_white(frame))
    except UsageError:
        raise
    except UnidentifiedImageError:
        raise UsageError(f"{shown} is not a clip in GIF, WebP or MP4: no other format is opened") from None
    except Image.DecompressionBombError as error:
        raise UsageError(f"{shown} is too large: {error}", "make it smaller") from None
    except Exception as error:  # the parsers let through whatever they meet in a damaged file
        raise damaged(shown, error, "read") from None
    if not frames:
        raise UsageError(f"{shown} has no frames")
    return frames


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `save` was given for this file. Raises UsageError for any other; the frames are not decoded."""
    shown = repr(str(path))
    try:
        held = {"comment": _mp4_comment(path)} if _is_mp4(path) else _picture_info(path)
    except UsageError:
        raise
    except UnidentifiedImageError:
        raise UsageError(f"{shown} is not a clip in GIF, WebP or MP4") from None
    except Exception as error:  # see load_frames
        raise damaged(shown, error, "read") from None
    return metadata_in(held, shown)


def durations(count: int, fps: int, ticks: int) -> list[int]:
    """How long each frame is shown, in ticks of which there are so many a second: what is rounded does not add up."""
    ends = [(2 * i * ticks + fps) // (2 * fps) for i in range(count + 1)]
    return [after - before for before, after in itertools.pairwise(ends)]


# ---- GIF (www.w3.org/Graphics/GIF/spec-gif89a.txt) ----


def _gif(frames: Sequence[Image.Image], fps: int, metadata: Mapping[str, Any] | None) -> bytes:
    """One palette serves all frames, so that what does not move keeps its colours."""
    palette = _palette(frames)
    head, body = b"", b""
    for frame, ticks in zip(frames, durations(len(frames), fps, 100), strict=True):
        file = io.BytesIO()
        still = frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        still.save(file, "GIF", optimize=False, interlace=False)
        content = file.getvalue()
        begin = 13 + 3 * 2 ** ((content[10] & 7) + 1)  # behind the screen's size and the palette
        head = head or content[:begin]
        while content[begin] == 0x21:  # an extension: two bytes, then blocks until an empty one
            begin += 2
            while content[begin]:
                begin += 1 + content[begin]
            begin += 1
        control = b"\x21\xf9\x04\x04" + ticks.to_bytes(2, "little") + b"\0\0"  # 4: leave the frame where it is
        body += control + content[begin:-1]
    blocks = b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0"  # repeat for ever
    if metadata is not None:
        text = comment(metadata).encode("ascii")
        pieces = [text[i : i + 255] for i in range(0, len(text), 255)]
        blocks += b"\x21\xfe" + b"".join(bytes([len(piece)]) + piece for piece in pieces) + b"\0"
        # XMP specification, part 3, GIF: to other readers its bytes are lengths of blocks; the tail leads them out.
        blocks += b"\x21\xff\x0bXMP DataXMP" + XMP.encode() + b"\x01" + bytes(range(255, -1, -1)) + b"\0"
    return b"GIF89a" + head[6:] + blocks + body + b";"


def _palette(frames: Sequence[Image.Image]) -> Image.Image:
    """The 256 colours that serve all frames best, in a picture of mode P. The same ones where there are no more."""
    width, height = frames[0].size
    shrink = max(1, max(width, height) / PALETTE_SIDE)
    width, height = max(1, int(width / shrink)), max(1, int(height / shrink))
    sheet = Image.new("RGB", (width, height * len(frames)))
    for i, frame in enumerate(frames):
        sheet.paste(frame.resize((width, height), Image.Resampling.NEAREST), (0, i * height))
    return sheet.quantize(256)


# ---- WebP (developers.google.com/speed/webp/docs/riff_container) ----


def _webp(frames: Sequence[Image.Image], fps: int, metadata: Mapping[str, Any] | None) -> bytes:
    size = b"".join((side - 1).to_bytes(3, "little") for side in frames[0].size)
    flags = 0x02 if metadata is None else 0x0E  # animation; EXIF and XMP
    chunks = [_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + size), _chunk(b"ANIM", bytes(6))]  # 0 repeats: for ever
    for frame, ticks in zip(frames, durations(len(frames), fps, 1000), strict=True):
        file = io.BytesIO()
        frame.save(file, "WEBP", quality=WEBP_QUALITY)
        still = file.getvalue()[12:]
        chunks.append(
            _chunk(b"ANMF", bytes(6) + size + ticks.to_bytes(3, "little") + b"\x02" + still)
        )  # 2: no blending
    if metadata is not None:
        chunks += [_chunk(b"EXIF", exif(metadata)), _chunk(b"XMP ", XMP.encode())]
    return _chunk(b"RIFF", b"WEBP" + b"".join(chunks))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return kind + len(content).to_bytes(4, "little") + content + bytes(len(content) % 2)


def _picture_frames(path: str | Path) -> Iterator[Image.Image]:
    """Those of a GIF or WebP file, through Pillow."""
    check_file(path)
    with opened(path, ("GIF", "WEBP")) as image:
        for index in itertools.count():
            try:
                image.seek(index)
            except EOFError:
                return
            if image.width * image.height > MAX_PIXELS:
                raise UsageError(f"{str(path)!r} is {image.width}x{image.height}: too large", "make it smaller")
            yield image


def _picture_info(path: str | Path) -> Mapping[Any, Any]:
    check_file(path)
    with opened(path, ("GIF", "WEBP")) as image:
        return image.info


# ---- MP4 ----


def _pyav(what: str) -> Any:
    try:
        return import_module("av")  # an extra: 100 MB of FFmpeg
    except ImportError:
        raise _no_pyav(what) from None


def _no_pyav(what: str) -> UsageError:
    hint = f"take .webp or .gif, or {missing_package('av', 'video')}"
    return UsageError(f"MP4 files cannot be {what}: PyAV is not installed", hint)


def _mp4(frames: Sequence[Image.Image], fps: int, metadata: Mapping[str, Any] | None) -> bytes:
    av = _pyav("written")
    tags = {} if metadata is None else {"comment": comment(metadata)}
    file = io.BytesIO()
    try:
        with av.open(file, "w", format="mp4") as container:
            container.metadata.update(tags)
            stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": str(MP4_CRF)})
            stream.pix_fmt = "yuv420p"  # what every player knows; it halves the colours' resolution
            stream.width, stream.height = _even(frames[0]).size
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(_even(frame))))
            container.mux(stream.encode())
    except Exception as error:  # FFmpeg's errors have no base of their own in all versions
        raise OutputError(f"the clip cannot be encoded as MP4: {error}", "write .webp") from error
    content = file.getvalue()
    return content if metadata is None else content + _xmp_box()


def _xmp_box() -> bytes:
    """XMP at the end of an MP4 file (XMP specification, part 3, MPEG-4)."""
    content = bytes.fromhex("be7acfcb97a942e89c71999491e3afac") + XMP.encode()
    return (len(content) + 8).to_bytes(4) + b"uuid" + content


def _even(frame: Image.Image) -> Image.Image:
    """The picture with its last row and column repeated where it has an odd number of them, as yuv420p needs."""
    width, height = frame.size
    if not (width % 2 or height % 2):
        return frame
    larger = Image.new("RGB", (width + width % 2, height + height % 2))
    for corner in ((width % 2, height % 2), (0, height % 2), (width % 2, 0), (0, 0)):
        larger.paste(frame, corner)
    return larger


def _is_mp4(path: str | Path) -> bool:
    check_file(path)
    with open(path, "rb") as file:
        return file.read(8)[4:] == b"ftyp"


def _mp4_frames(path: str | Path) -> Iterator[Image.Image]:
    av = _pyav("read")
    # Through a Python file, FFmpeg opens nothing but this file, whatever the file asks for.
    with open(path, "rb") as file, av.open(file, format="mp4") as container:
        if not container.streams.video:
            raise UsageError(f"{str(path)!r} has no pictures")
        for frame in container.decode(video=0):
            if frame.width * frame.height > MAX_PIXELS:
                raise UsageError(f"{str(path)!r} is {frame.width}x{frame.height}: too large", "make it smaller")
            yield frame.to_image().rotate(frame.rotation, expand=True)  # as its camera was held


def _mp4_comment(path: str | Path) -> bytes:
    """The comment among a file's tags (ISO 14496-12, and Apple's list of tags), without FFmpeg."""
    with open(path, "rb") as file:
        begin, end = 0, os.path.getsize(path)
        # Of these two some bytes of version or type come before what they hold.
        for kind, skip in ((b"moov", 0), (b"udta", 0), (b"meta", 4), (b"ilst", 0), (b"\xa9cmt", 0), (b"data", 8)):
            inner = next((inner for name, *inner in _boxes(file, begin, end) if name == kind), None)
            if inner is None:
                return b""
            begin, end = inner[0] + skip, inner[1]
        file.seek(begin)
        return file.read(max(0, min(end - begin, 2 * MAX_METADATA)))


def _boxes(file: IO[bytes], begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes between two places in a file: their kind, and where what they hold begins and ends."""
    for _ in range(MAX_BOXES):
        if begin + 8 > end:
            return
        file.seek(begin)
        head = file.read(16)
        size, header = int.from_bytes(head[:4]), 8
        if size == 1:  # it did not fit
            size, header = int.from_bytes(head[8:]), 16
        elif size == 0:
            size = end - begin
        if size < header or begin + size > end:
            return
        yield head[4:8], begin + header, begin + size
        begin += size
