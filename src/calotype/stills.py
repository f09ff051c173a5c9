"""Stills: pictures as PNG, JPEG and WebP files that carry their request, and the request out of such files.

A PNG holds it as text, a JPEG and a WebP as the description in EXIF. With it each says, in XMP, that an algorithm made
the picture. torch is not imported, so that reading a request stays quick.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import IFD, Base
from PIL.PngImagePlugin import PngInfo
from PIL.TiffTags import ASCII, LONG, UNDEFINED

from calotype import atomic
from calotype.errors import OutputError, UsageError
from calotype.images import FORMATS, check_file, on_white, opened
from calotype.parameters import parameters

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
QUALITY = 95
METADATA_KEY = "calotype"
PARAMETERS_KEY = "parameters"  # where AUTOMATIC1111 and the tools that read its pictures look
MAX_METADATA = 1_000_000  # characters; a request has at most two prompts of 20,000

# What IPTC's guidance asks of generated pictures (iptc.org/std/photometadata/specification, Digital Source Type).
XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
<Iptc4xmpExt:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia</Iptc4xmpExt:DigitalSourceType>
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""
JFIF = 20  # bytes that a JPEG begins with; EXIF follows
MAX_SEGMENT = 65_533  # bytes that a JPEG's segment holds, behind the two of its length


# ---- written ----


def save(picture: Image.Image, path: str | Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a picture whole or not at all, in the format of the path's suffix: .png, .jpg, .jpeg or .webp.

    `metadata` is what `encode` takes. Raises UsageError, OutputError.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{str(path)!r} does not end in {', '.join(SUFFIXES)}: pictures are written as these", "name it NAME.png"
        )
    atomic.write(path, encode(picture, SUFFIXES[path.suffix.lower()], metadata))
    return path


def encode(picture: Image.Image, format: str, metadata: Mapping[str, Any] | None = None) -> bytes:
    """The content of a file in `format`: "PNG", which keeps every bit, "JPEG" or "WEBP".

    `metadata` is an object of JSON whose key "request" holds `Request.to_json()`; `read_metadata` gives it back. With
    it go `parameters`, for other tools, and XMP. JPEG and WebP are of quality 95, the highest that Pillow advises: flat
    colours show every blemish. For the same reason a JPEG keeps colours at full resolution, which WebP cannot. What is
    transparent is white in a JPEG. Raises UsageError, OutputError.
    """
    if format not in FORMATS:
        raise UsageError(f"format is {format!r}: must be one of {', '.join(FORMATS)}")
    if format == "PNG":
        return _saved(picture, format, pnginfo=PngInfo() if metadata is None else _png_texts(metadata))
    block, xmp = (b"", b"") if metadata is None else (exif(metadata), XMP.encode())
    options = {"quality": QUALITY, "icc_profile": picture.info.get("icc_profile"), "xmp": xmp}
    if format == "WEBP":
        return _saved(picture, format, exif=block, **options)
    # An empty comment, for otherwise Pillow writes that of the file which a picture comes from.
    content = _saved(on_white(picture), format, subsampling="4:4:4", comment=b"", **options)
    return content[:JFIF] + _segments(block) + content[JFIF:]


def _saved(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        picture.save(buffer, format, **options)
    except (OSError, ValueError) as error:  # too many pixels to a side, or a mode that the format has not
        shown = f"a picture of {picture.width}x{picture.height} in mode {picture.mode}"
        raise OutputError(f"{shown} cannot be encoded as {format}: {error}", "make it smaller, or RGB") from error
    return buffer.getvalue()


def _png_texts(metadata: Mapping[str, Any]) -> PngInfo:
    texts = PngInfo()
    texts.add_itxt(METADATA_KEY, _to_json(metadata, ascii=False))
    texts.add_itxt(PARAMETERS_KEY, parameters(metadata))
    texts.add_itxt("XML:com.adobe.xmp", XMP)
    return texts


def _to_json(metadata: Mapping[str, Any], *, ascii: bool) -> str:
    text = json.dumps(metadata, ensure_ascii=ascii, separators=(",", ":"), allow_nan=False)
    if len(text) > MAX_METADATA:
        raise UsageError(f"the metadata has {len(text)} characters: must be at most {MAX_METADATA}")
    return text


def comment(metadata: Mapping[str, Any]) -> str:
    """The metadata as a format's one comment can hold it: in ASCII, behind calotype's name."""
    return f"{METADATA_KEY} {_to_json(metadata, ascii=True)}"


def exif(metadata: Mapping[str, Any]) -> bytes:
    """A block of EXIF (version 2.32, 4.6) whose ImageDescription is `comment`, and whose UserComment is `parameters`.

    That is where AUTOMATIC1111 looks. Not by Pillow, which takes all bytes for type BYTE: its reader, piexif, does not.
    """
    description = comment(metadata).encode("ascii") + b"\0"
    even = bytes(len(description) % 2)  # where what follows has to begin
    text = b"UNICODE\0" + parameters(metadata).encode("utf-16-be")  # in the block's order of bytes, MM
    inner, begin = 38, 56  # where the second directory begins, and what both point to
    behind = begin + len(description + even)
    return b"".join(
        (
            struct.pack(">2sHI", b"MM", 42, 8),
            struct.pack(">HHHII", 2, Base.ImageDescription, ASCII, len(description), begin),
            struct.pack(">HHIII", IFD.Exif, LONG, 1, inner, 0),
            struct.pack(">HHHIII", 1, Base.UserComment, UNDEFINED, len(text), behind, 0),
            description + even,
            text,
        )
    )


def _segments(block: bytes) -> bytes:
    """A JPEG's segments for a block of EXIF: one, and for the longest prompts several.

    The standard has one only; more are ExifTool's way, and Pillow, so AUTOMATIC1111 and we too, joins them again.
    """
    header = b"Exif\0\0"
    room = MAX_SEGMENT - len(header)
    pieces = (header + block[i : i + room] for i in range(0, len(block), room))
    return b"".join(b"\xff\xe1" + (len(piece) + 2).to_bytes(2) + piece for piece in pieces)


# ---- read ----


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `save` was given for this file. Raises UsageError for any other file; the pixels are not decoded."""
    shown = repr(str(path))
    check_file(path)
    try:
        with opened(path, FORMATS) as image:
            held = image.info
    except UnidentifiedImageError:
        raise UsageError(
            f"{shown} is not a PNG, JPEG or WebP file", "calotype writes its metadata into these, and into clips"
        ) from None
    except Exception as error:  # see images.open_image
        raise UsageError(f"{shown} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return metadata_in(held, shown)


def metadata_in(held: Mapping[Any, Any], shown: str) -> dict[str, Any]:
    """The metadata among what Pillow finds in a file's header, or in another's "comment".

    Raises UsageError where there is none, and where somebody has broken it.
    """
    text, block = held.get(METADATA_KEY), held.get("exif", held.get("comment"))
    if not isinstance(block, bytes):
        block = b""
    described = re.search(rb"(?:\A|\0)calotype ([^\0]*)", block)  # the directory in front may be damaged
    if described and not isinstance(text, str):
        text = described[1].decode("ascii", "replace")
    if not isinstance(text, str):
        foreign = PARAMETERS_KEY in held or "workflow" in held or "Steps: ".encode("utf-16-be") in block
        raise UsageError(
            f"{shown} holds no calotype metadata",
            "another program's settings are in it"
            if foreign
            else "only files written by calotype hold their request; editors and websites often remove it",
        )
    try:
        metadata = json.loads(text) if len(text) <= MAX_METADATA else None
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise UsageError(f"{shown}: its calotype metadata is damaged", "the file was changed after it was written")
    return metadata
