"""Training pictures: decoded, cut to a bucket of their own proportions, and for inpainting partly hidden.

Sizes are (height, width) in pixels, as SDXL's conditioning has them. torch is not imported.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from calotype.errors import UsageError
from calotype.images import on_white, open_image, resize
from calotype.training.sources import Example

Size = tuple[int, int]  # height, width

BROKEN = 0.01  # of the examples may be broken, and are left out; more are a mistake

LEAST, MOST = 0.1, 0.6  # shares of a picture that a mask hides
WHOLE = 0.1  # of the masks hide everything
TRIES = 200


@dataclass(frozen=True)
class View:
    """How a picture was cut."""

    original: Size
    crop: tuple[int, int]  # top, left: where in the scaled picture it was cut out


def decode(data: bytes, name: str) -> Image.Image:
    """The picture in RGB, upright, what is transparent being white. UsageError for what is no whole PNG, JPEG or WebP
    of bearable size.
    """
    try:
        return on_white(open_image(data))
    except UsageError as error:
        raise UsageError(error.message.replace("the given data", name, 1), error.hint) from error


def too_many(broken: int, total: int) -> bool:
    """Whether so many of all pictures are broken that training must not begin."""
    return broken > BROKEN * total


def views(example: Example, data: bytes, sizes: Sequence[Size], flip: bool = False) -> list[tuple[Image.Image, View]]:
    """An example's picture cut to the bucket that suits it best, and with `flip` its mirror image as well.

    Raises UsageError, which begins with the example's name, where it is broken.
    """
    picture = decode(data, example.name)
    bucket = bucket_of((picture.height, picture.width), sizes)
    try:
        return [fit(picture, bucket, mirrored) for mirrored in ((False, True) if flip else (False,))]
    except UsageError as error:
        raise UsageError(f"{example.name}: {error.message}", error.hint) from error


# ---- buckets (NovelAI 2022, "Improvements on Stable Diffusion"; SDXL's report, arXiv 2307.01952, section 2.3) ----


def buckets(resolution: int, unit: int) -> tuple[Size, ...]:
    """The sizes that pictures are cut to, from narrow to wide: for each width the greatest height.

    Multiples of `unit` with at most as many pixels as the square, which is one of them, and proportions between 1:2
    and 2:1. Raises UsageError.
    """
    if resolution < unit:
        raise UsageError(f"resolution is {resolution}: must be at least {unit}, the least that this model can draw")
    side, sizes = resolution // unit * unit, []
    for width in range(unit, 2 * side + 1, unit):
        height = side * side // width // unit * unit
        if width <= 2 * height and height <= 2 * width:
            sizes.append((height, width))
    return tuple(sizes)


def sizes_for(resolution: int, unit: int, enabled: bool) -> tuple[Size, ...]:
    """The buckets, or the square alone."""
    return buckets(resolution, unit) if enabled else ((resolution, resolution),)


def bucket_of(size: Size, sizes: Sequence[Size]) -> Size:
    """The bucket whose proportions are nearest to the picture's, by their ratio."""
    aspect = math.log(size[1] / size[0])
    return min(sizes, key=lambda bucket: abs(math.log(bucket[1] / bucket[0]) - aspect))


def enlarged(size: Size, bucket: Size) -> bool:
    """Whether a picture of this size has fewer pixels than its bucket wants."""
    return size[0] < bucket[0] or size[1] < bucket[1]


def fit(picture: Image.Image, bucket: Size, flip: bool = False) -> tuple[Image.Image, View]:
    """The picture, mirrored with `flip`, scaled to cover the bucket and cut at its centre. UsageError where it is too
    narrow for that.
    """
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    (height, width), original = bucket, (picture.height, picture.width)
    scaled = original[0] * width // original[1], original[1] * height // original[0]  # as `resize` has them
    top, left = (max(0, whole // 2 - part // 2) for whole, part in zip(scaled, bucket, strict=True))
    return resize(picture, width, height, "crop"), View(original, (top, left))


# ---- masks ----


def hole(key: str, size: Size) -> np.ndarray:
    """What an inpainting model must paint: bool (height, width), True where the picture is hidden.

    Rectangles and brush strokes that cover a share of LEAST to MOST, sometimes everything (as LaMa's and Stable
    Diffusion's inpainting models were trained: arXiv 2109.07161, section 2.3). A pure function of key and size.
    """
    rng = np.random.default_rng(np.frombuffer(hashlib.sha256(key.encode()).digest(), dtype=np.uint32))
    height, width = size
    if rng.random() < WHOLE:
        return np.ones(size, dtype=bool)
    wanted = rng.uniform(LEAST, MOST - LEAST / 2)  # so that the last shape rarely goes too far
    mask = Image.new("1", (width, height))
    for _ in range(TRIES):
        if np.asarray(mask).mean() >= wanted:
            break
        more = mask.copy()
        (_rectangle if rng.random() < 0.5 else _stroke)(ImageDraw.Draw(more), rng, size)
        if np.asarray(more).mean() <= MOST:
            mask = more
    return np.asarray(mask)


def _rectangle(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: Size) -> None:
    height, width = (max(1, round(side * rng.uniform(0.1, 0.6))) for side in size)
    top, left = (int(rng.integers(0, side - part + 1)) for side, part in zip(size, (height, width), strict=True))
    draw.rectangle((left, top, left + width - 1, top + height - 1), fill=1)


def _stroke(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: Size) -> None:
    """A brush with a round tip, along a line with a few bends."""
    radius = max(1, round(min(size) * rng.uniform(0.05, 0.12)))
    points = [(float(rng.uniform(0, size[1])), float(rng.uniform(0, size[0]))) for _ in range(rng.integers(2, 6))]
    draw.line(points, fill=1, width=2 * radius)
    for x, y in points:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
