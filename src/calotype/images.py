"""Pictures: from files that strangers made, to and from tensors, contact sheets.

torch is imported only where a tensor is made, so that reading a file's metadata stays quick.
"""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from calotype.errors import CalotypeError, UsageError, missing_package

if TYPE_CHECKING:
    from torch import Tensor

MAX_FILE_BYTES = 256_000_000  # the largest picture that a request may ask for has 50 MB of pixels

FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow knows 43, and each is a parser that a stranger's file could reach
PARSERS: dict[str, type[ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,  # of clips
}
MAX_PIXELS = 8192 * 8192  # 200 MB once decoded; a request may ask for a quarter of it
RESIZES = ("stretch", "crop", "pad")

INK, PAPER = (32, 32, 32), (255, 255, 255)


# ---- from outside ----


def open_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """A picture from outside: upright, 8 bits, in RGB, or in RGBA if some of it is transparent.

    source: a file's name, its content, or a picture of any mode. Only PNG, JPEG and WebP are opened, whatever the name
    says; of an animation, the first frame. Raises UsageError for anything but a whole picture of at most MAX_PIXELS,
    which the header says before a pixel is decoded.
    """
    if isinstance(source, Image.Image):
        return _normal(source, "the picture")
    if isinstance(source, bytes | bytearray | memoryview):
        shown, size = "the given data", len(source)
    elif isinstance(source, str | Path):
        shown, size = repr(str(source)), _file_size(source)
    else:
        raise UsageError(
            f"a picture is of type {type(source).__name__}: must be a file's name, its content or a picture",
            "PIL.Image.fromarray makes a picture of an array",
        )
    _check_bytes(shown, size)
    try:
        with opened(source if isinstance(source, str | Path) else io.BytesIO(source), FORMATS) as image:
            return _normal(image, shown)
    except UsageError:
        raise
    except UnidentifiedImageError:
        raise UsageError(
            f"{shown} is not a picture in PNG, JPEG or WebP: no other format is opened", "save it as PNG"
        ) from None
    except Image.DecompressionBombError as error:
        raise UsageError(f"{shown} is too large: at most {MAX_PIXELS} pixels", "make it smaller first") from error
    except Exception as error:  # Pillow lets through whatever its parsers meet in a damaged file
        raise damaged(shown, error, "decoded") from None


def opened(source: str | Path | IO[bytes], formats: Sequence[str]) -> ImageFile:
    """A picture of which only the header is read. Raises UnidentifiedImageError where it is of none of these formats.

    `Image.open` would warn of many pixels, and what to do with a warning is decided for the whole process: whoever
    calls this has a limit of its own.
    """
    for name in formats:
        try:
            return PARSERS[name](source)
        except SyntaxError:  # their word for another format
            if not isinstance(source, str | Path):
                source.seek(0)
    raise UnidentifiedImageError(f"not in {', '.join(formats)}")


def _normal(image: Image.Image, shown: str) -> Image.Image:
    """The picture decoded, upright and in RGB or RGBA."""
    image = checked(image, shown)
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        return image
    return image.convert("RGB")


def checked(image: Image.Image, shown: str) -> Image.Image:
    """The picture decoded, upright, and in a mode that all else here understands: 1, L, RGB, RGBA or CMYK.

    One that is all this already comes back as it is. Raises UsageError as `open_image` does.
    """
    if image.width * image.height > MAX_PIXELS:
        raise UsageError(
            f"{shown} is {image.width}x{image.height}: at most {MAX_PIXELS} pixels are opened", "make it smaller first"
        )
    if not (image.width and image.height):
        raise UsageError(f"{shown} is {image.width}x{image.height}: it has no pixels")
    try:
        image.load()
        return _eight_bits(_upright(image))
    except Exception as error:  # see open_image
        raise damaged(shown, error, "decoded") from None


def damaged(shown: str, error: Exception, done: str) -> UsageError:
    """What is said of a file that cannot be read, or decoded."""
    reason = str(error).strip().splitlines()
    said = f" ({reason[0][:160]})" if reason else ""
    return UsageError(f"{shown} is damaged: it cannot be {done}{said}", "copy or download it again")


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation asks; as it is, where that cannot be read."""
    try:
        return image if image.getexif().get(ExifTags.Base.Orientation, 1) == 1 else ImageOps.exif_transpose(image)
    except Exception:  # see open_image; the pixels are decoded already, so only the metadata is damaged
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """A picture of any mode in one that filters and compositing understand: 1, L, RGB, RGBA or CMYK."""
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion clips them instead of scaling
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
        image.info.pop("transparency", None)  # it is a value of 16 bits
    if image.mode == "La":  # premultiplied; Pillow converts it to this mode alone
        image = image.convert("LA")
    if image.has_transparency_data:
        return image.convert("RGBA") if image.mode != "RGBA" else image
    return image if image.mode in ("1", "L", "RGB", "RGBA", "CMYK") else image.convert("RGB")


def resize(image: Image.Image, width: int, height: int, mode: str = "stretch") -> Image.Image:
    """The picture at another size, by Lanczos' filter (a 1-bit one by its nearest pixels).

    "stretch" changes its proportions. "crop" fills the size and cuts off what is over, evenly at both ends. "pad" fits
    it into the size and repeats its edges in the margins. All three are bit for bit those of diffusers' image processor
    ("default", "crop", "fill").
    """
    if mode not in RESIZES:
        raise UsageError(f"resize is {mode!r}: must be one of {', '.join(RESIZES)}")
    image = _eight_bits(image)
    if mode == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    wider = image.width * height > width * image.height  # than what is asked for
    if wider == (mode == "crop"):
        w, h = max(1, image.width * height // image.height), height
    else:
        w, h = width, max(1, image.height * width // image.width)
    if w * h > MAX_PIXELS:
        raise UsageError(
            f"a picture of {image.width}x{image.height} is too narrow to fill {width}x{height}", 'resize it by "pad"'
        )
    scaled = image.resize((w, h), Image.Resampling.LANCZOS)
    left, top = width // 2 - w // 2, height // 2 - h // 2
    if mode == "crop":
        return scaled.crop((-left, -top, width - left, height - top))
    padded = Image.new(scaled.mode, (width, height))
    padded.paste(scaled, (left, top))
    for y, edge in ((0, 0), (top + h, h)) if top else ():
        padded.paste(scaled.resize((width, top), box=(0, edge, width, edge)), (0, y))
    for x, edge in ((0, 0), (left + w, w)) if left else ():
        padded.paste(scaled.resize((left, height), box=(edge, 0, edge, height)), (x, 0))
    return padded


def canny(image: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """The picture's edges, white on black in RGB, as canny ControlNets and T2I-Adapters want them (Canny 1986).

    low, high: gradients above `high` are edges, and so are those above `low` that continue one. Raises UsageError, also
    where OpenCV is missing: it is the extra "control".
    """
    if not 0 <= low <= high:
        raise UsageError(
            f"canny's thresholds are {low} and {high}: must be at least 0 and ascending", "try 100 and 200"
        )
    try:
        cv2: Any = import_module("cv2")  # an extra: 90 MB that only pictures of edges need
    except ImportError:
        hint = missing_package("opencv-python-headless", "control")
        raise UsageError("canny needs OpenCV, which is not installed", hint) from None
    import numpy as np

    return Image.fromarray(cv2.Canny(np.asarray(on_white(image)), low, high)).convert("RGB")


# ---- tensors ----


def to_pil(images: Tensor) -> list[Image.Image]:
    """RGB pictures of images (n, 3, H, W) in [-1, 1], of any floating dtype; values beyond are clamped.

    Raises CalotypeError for values that are not numbers, which a half-precision decoder may give.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(images.shape)}: must be (n, 3, H, W)")
    if bool(images.isnan().any()):
        raise CalotypeError("the decoded picture has values that are not numbers", 'try dtype="float32"')
    # The scaling in the images' own dtype and the rounding in float32, as diffusers does, for equal bytes.
    unit = (images / 2 + 0.5).clamp(0, 1)
    pixels = (unit.permute(0, 2, 3, 1).float().cpu() * 255).round().byte()
    return [Image.fromarray(picture.contiguous().numpy()) for picture in pixels]


def on_white(image: Image.Image) -> Image.Image:
    """The picture in RGB, what is transparent being white."""
    image = _eight_bits(image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*PAPER, 255)), image)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """The picture as float32 (1, 3, H, W) in [-1, 1]. What is transparent becomes white."""
    return 2 * to_unit(image) - 1


def to_unit(image: Image.Image) -> Tensor:
    """The picture as float32 (1, 3, H, W) in [0, 1], as controls want it. What is transparent becomes white."""
    import torch

    image = on_white(image)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    return pixels.permute(2, 0, 1)[None].float() / 255


# ---- files ----


def check_file(path: str | Path) -> None:
    """Raises UsageError where there is no file, and for one that is too large to be read."""
    _check_bytes(repr(str(path)), _file_size(path))


def _check_bytes(shown: str, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise UsageError(f"{shown} is too large: at most {MAX_FILE_BYTES} bytes")


def _file_size(path: str | Path) -> int:
    """A file's bytes. Raises UsageError where there is none."""
    if not os.path.isfile(path):
        raise UsageError(f"there is no file {str(path)!r}")
    return os.path.getsize(path)


# ---- contact sheets ----


def grid(
    images: Sequence[Image.Image],
    columns: int,
    *,
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    gap: int = 8,
    text_size: int = 14,
) -> Image.Image:
    """A contact sheet: the pictures row by row, `columns` a row, with titles above and to the left if given.

    Cells are as large as the largest picture; gap and text_size are pixels. Raises UsageError for counts that disagree.
    """
    if not images or columns < 1:
        raise UsageError(f"a grid of {len(images)} pictures in {columns} columns: must be at least 1 of each")
    rows = -(-len(images) // columns)
    for name, titles, count in (("column", column_titles, columns), ("row", row_titles, rows)):
        if titles and len(titles) != count:
            raise UsageError(f"the grid has {len(titles)} {name} titles: must be {count}, one for each {name}")
    font = ImageFont.load_default(text_size)
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    above = [_wrapped(title, font, width) for title in column_titles]
    beside = [_wrapped(title, font, width) for title in row_titles]
    top = gap + max((_text_box(text, font)[1] + gap for text in above), default=0)
    left = gap + max((_text_box(text, font)[0] + gap for text in beside), default=0)
    sheet = Image.new("RGB", (left + columns * (width + gap), top + rows * (height + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(above):
        middle = left + column * (width + gap) + width // 2
        draw.multiline_text((middle, top - gap), text, INK, font, anchor="md", align="center")
    for row, text in enumerate(beside):
        middle = top + row * (height + gap) + height // 2
        draw.multiline_text((left - gap, middle), text, INK, font, anchor="rm", align="right")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        x = left + column * (width + gap) + (width - image.width) // 2
        y = top + row * (height + gap) + (height - image.height) // 2
        sheet.paste(image.convert("RGB"), (x, y))
    return sheet


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _wrapped(text: str, font: Font, width: int) -> str:
    """The text in lines of about `width` pixels."""
    if not text:
        return text
    characters = int(width * len(text) / max(font.getlength(text.replace("\n", " ")), 1))
    return "\n".join(textwrap.wrap(text, max(characters, 1)))


def _text_box(text: str, font: Font) -> tuple[int, int]:
    """Width and height of a text of several lines, in pixels."""
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)
    return math.ceil(right - min(left, 0)), math.ceil(bottom - min(top, 0))
