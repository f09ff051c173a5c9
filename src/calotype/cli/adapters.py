"""The adapters of one command line, or of a picture's metadata: what to put into the engine beside the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calotype.errors import UsageError

if TYPE_CHECKING:
    from calotype import Control, Engine

CANNY = "canny:"  # before a control's picture: its edges, found here


@dataclass(frozen=True)
class Adapters:
    """What `Engine.describe` calls loras, controls, embeddings and motion."""

    loras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name -> ref, weight_name, scale
    controls: Mapping[str, str] = field(default_factory=dict)  # name -> ref
    embeddings: Mapping[str, str] = field(default_factory=dict)  # token -> ref
    motion: str | None = None

    @staticmethod
    def of(described: Mapping[str, Any]) -> Adapters:
        """Those of an engine's description. UsageError where somebody has broken it."""
        loras, motion = described.get("loras", {}), described.get("motion")
        controls, embeddings = described.get("controls", {}), described.get("embeddings", {})
        sound = isinstance(loras, dict) and all(isinstance(each, dict) for each in loras.values())
        for refs in (controls, embeddings):
            sound = sound and isinstance(refs, dict) and all(isinstance(each, str) for each in refs.values())
        if not sound or not isinstance(motion, str | None):
            raise UsageError("the calotype metadata is damaged where it names adapters")
        return Adapters(loras, controls, embeddings, motion)

    def put_into(self, engine: Engine) -> None:
        """Loads them all. Raises ModelNotFoundError, CheckpointError."""
        if self.motion is not None:  # first: motion LoRAs need its modules
            engine.set_motion(self.motion)
        for name, lora in self.loras.items():
            engine.add_lora(lora.get("ref", ""), name=name, weight_name=lora.get("weight_name"))
        if self.loras:
            engine.set_loras({name: lora.get("scale", 1.0) for name, lora in self.loras.items()})
        for token, ref in self.embeddings.items():
            engine.add_embedding(ref, token)
        for name, ref in self.controls.items():
            engine.add_control(ref, name=name)


def loras(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """--lora REF[:SCALE], each under a name of its own."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        ref, scale = _scaled(text)
        found[_unused(Path(ref).stem, found)] = {"ref": ref, "weight_name": None, "scale": scale}
    return found


def embeddings(texts: Sequence[str]) -> dict[str, str]:
    """--embedding REF[=TOKEN]; without a token it is the file's name."""
    found = {}
    for text in texts:
        ref, _, token = text.partition("=")
        found[token or Path(ref).stem] = ref
    return found


def controls(texts: Sequence[str]) -> tuple[dict[str, str], tuple[Control, ...]]:
    """--control REF=IMAGE[:SCALE] (or REF=canny:IMAGE[:SCALE]): what to load, and what to ask for."""
    from calotype import Control, canny, open_image

    refs: dict[str, str] = {}
    asked = []
    for text in texts:
        ref, equals, rest = text.partition("=")
        if not (ref and equals and rest):
            message = f"--control must be REF=IMAGE or REF=IMAGE:SCALE, not {text!r}"
            raise UsageError(message, hint=f"for example --control sd-controlnet-canny={CANNY}photo.jpg:0.8")
        path, scale = _scaled(rest)
        picture = canny(open_image(path.removeprefix(CANNY))) if path.startswith(CANNY) else open_image(path)
        known = next((name for name, other in refs.items() if other == ref), None)
        name = _unused(Path(ref).stem, refs) if known is None else known
        refs[name] = ref
        asked.append(Control(name, picture, scale))
    return refs, tuple(asked)


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
