"""The adapters of one command line: what to put into the engine beside the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calotype.cli import parse
from calotype.description import Arguments
from calotype.errors import UsageError

if TYPE_CHECKING:
    from calotype import Control

CANNY = "canny:"  # before a control's picture: its edges, found here


def loras(texts: Sequence[str]) -> dict[str, Arguments]:
    """--lora REF[:SCALE], each under a name of its own."""
    from calotype.request import adapter_name

    found: dict[str, Arguments] = {}
    for text in texts:
        ref, scale = _scaled(text)
        found[_unused(adapter_name(ref), found)] = {"ref": ref, "scale": scale}
    return found


def embeddings(texts: Sequence[str]) -> dict[str, Arguments]:
    """--embedding REF[=TOKEN]; without a token it is what the file says."""
    pairs = [text.partition("=") for text in texts]
    return {text: {"ref": ref, "token": token or None} for text, (ref, _, token) in zip(texts, pairs, strict=True)}


def controls(texts: Sequence[str], frames: int | None) -> tuple[dict[str, Arguments], tuple[Control, ...]]:
    """--control REF=IMAGE[:SCALE] (or REF=canny:IMAGE[:SCALE]): what to load, and what to ask for."""
    from calotype import Control, canny
    from calotype.request import adapter_name

    added: dict[str, Arguments] = {}
    asked = []
    for text in texts:
        ref, equals, rest = text.partition("=")
        if not (ref and equals and rest):
            message = f"--control must be REF=IMAGE or REF=IMAGE:SCALE, not {text!r}"
            raise UsageError(message, hint=f"for example --control sd-controlnet-canny={CANNY}photo.jpg:0.8")
        path, scale = _scaled(rest)
        picture: Any = parse.picture(Path(path.removeprefix(CANNY)), frames)
        if path.startswith(CANNY):
            picture = [canny(each) for each in picture] if isinstance(picture, list) else canny(picture)
        known = next((name for name, other in added.items() if other["ref"] == ref), None)
        name = _unused(adapter_name(ref), added) if known is None else known
        added[name] = {"ref": ref}
        asked.append(Control(name, picture, scale))
    return added, tuple(asked)


def _scaled(text: str) -> tuple[str, float]:
    """("papercut", 0.8) of "papercut:0.8"; without a number the scale is 1."""
    match = re.fullmatch(r"(.+):(-?\d+(?:\.\d*)?|-?\.\d+)", text)
    return (text, 1.0) if match is None else (match[1], float(match[2]))


def _unused(stem: str, taken: Mapping[str, object]) -> str:
    name, i = stem, 1
    while name in taken:
        i += 1
        name = f"{stem}-{i}"
    return name
