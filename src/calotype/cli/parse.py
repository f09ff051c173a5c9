"""Option values from text. The option parser's own messages do not repeat the value; these do."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from calotype.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image


def whole(text: str) -> int:
    """For `typer.Option(parser=whole)`."""
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{reprlib.repr(text)} is not a whole number") from None


def number(text: str) -> float:
    """For `typer.Option(parser=number)`."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{reprlib.repr(text)} is not a number") from None


def size(text: str) -> tuple[int, int]:
    """(width, height) of "512x768"."""
    sides = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text, re.IGNORECASE)
    if sides is None:
        message = f"--size must be WIDTHxHEIGHT in pixels, not {reprlib.repr(text)}"
        raise UsageError(message, hint="for example --size 512x512")
    return int(sides[1]), int(sides[2])


def timesteps(text: str) -> tuple[int, ...]:
    """The whole numbers in "999,499"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,9}", part) for part in parts):
        message = f"--timesteps must be whole numbers with commas between them, not {reprlib.repr(text)}"
        raise UsageError(message, hint="for example --timesteps 999,499")
    return tuple(int(part) for part in parts)


def picture(path: Path, frames: int | None) -> Image.Image | list[Image.Image]:
    """The picture in a file; where a clip is to be made, all of a clip's."""
    from calotype import images, video

    if frames is None or not video.is_clip(path):
        return images.open_image(path)
    found = video.load_frames(path, frames)
    return found if len(found) > 1 else found[0]
