"""The adapters of one command line, or of a picture's metadata: what to put into the engine beside the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calotype.cli import parse
from calotype.errors import UsageError

if TYPE_CHECKING:
    from calotype import Control, Engine

Added = Mapping[str, Any]  # the arguments with which the engine was given an adapter

CANNY = "canny:"  # before a control's picture: its edges, found here


@dataclass(frozen=True)
class Adapters:
    """What `Engine.describe` calls loras, controls, embeddings and motion."""

    loras: Mapping[str, Added] = field(default_factory=dict)  # name -> ref, weight_name, revision, scale
    controls: Mapping[str, Added] = field(default_factory=dict)  # name -> ref, subfolder, variant, revision
    embeddings: Sequence[Added] = ()  # ref, token, weight_name; without a token, the file says it
    motion: Added | None = None  # ref, beta_schedule, variant

    @staticmethod
    def of(described: Mapping[str, Any]) -> Adapters:
        """Those of an engine's description. UsageError where somebody has broken it."""
        named = [described.get(kind, {}) for kind in ("loras", "controls", "embeddings")]
        motion = described.get("motion")
        if not all(isinstance(each, dict) and all(map(_is_sound, each.values())) for each in named) or not (
            motion is None or _is_sound(motion)
        ):
            raise UsageError("the calotype metadata is damaged where it names adapters")
        loras, controls, embeddings = named
        return Adapters(loras, controls, [{**each, "token": token} for token, each in embeddings.items()], motion)

    def put_into(self, engine: Engine) -> None:
        """Loads them all. Raises ModelNotFoundError, CheckpointError."""
        if self.motion is not None:  # first: motion LoRAs need its modules
            engine.set_motion(**self.motion)
        for name, lora in self.loras.items():
            engine.add_lora(**{key: value for key, value in lora.items() if key != "scale"}, name=name)
        if self.loras:
            engine.set_loras({name: lora.get("scale", 1.0) for name, lora in self.loras.items()})
        for each in self.embeddings:
            engine.add_embedding(**each)
        for name, each in self.controls.items():
            engine.add_control(**each, name=name)


TEXTS = ("ref", "weight_name", "subfolder", "variant", "revision", "beta_schedule")


def _is_sound(each: object) -> bool:
    """Whether a description of one adapter, out of somebody's file, is as an engine writes it."""
    return (
        isinstance(each, dict)
        and isinstance(each.get("ref"), str)
        and all(isinstance(value, str | None) if name in TEXTS else name == "scale" for name, value in each.items())
    )


def loras(texts: Sequence[str]) -> dict[str, Added]:
    """--lora REF[:SCALE], each under a name of its own."""
    from calotype.request import adapter_name

    found: dict[str, Added] = {}
    for text in texts:
        ref, scale = _scaled(text)
        found[_unused(adapter_name(ref), found)] = {"ref": ref, "scale": scale}
    return found


def embeddings(texts: Sequence[str]) -> list[Added]:
    """--embedding REF[=TOKEN]; without a token it is what the file says."""
    pairs = [text.partition("=") for text in texts]
    return [{"ref": ref, "token": token or None} for ref, _, token in pairs]


def controls(texts: Sequence[str], frames: int | None) -> tuple[dict[str, Added], tuple[Control, ...]]:
    """--control REF=IMAGE[:SCALE] (or REF=canny:IMAGE[:SCALE]): what to load, and what to ask for."""
    from calotype import Control, canny
    from calotype.request import adapter_name

    added: dict[str, Added] = {}
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
