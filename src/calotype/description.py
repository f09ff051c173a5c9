"""What an engine is made of, as JSON and back: the model and how it was loaded, and all that was added to it.

Single files on this machine are named by name and SHA-256 as well as by path. Folders are named by path alone, what is
on the Hub by id and revision: a folder's gigabytes would have to be read, and its headers do not tell two trainings of
one network apart.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from calotype.errors import ModelNotFoundError, UsageError
from calotype.hashes import DIGITS, File, sha256

Arguments = Mapping[str, Any]  # with which something was loaded, and the `file` that it was in

PARTS = ("model", "unet", "vae", "tiny_vae")
LOADING = (*PARTS, "variant", "revision", "prediction", "device", "dtype", "optimize", "decoder")  # of calotype.load
ADDING = {  # of Engine.add_lora, add_control, add_embedding and set_motion
    "loras": ("ref", "weight_name", "revision", "scale"),
    "controls": ("ref", "subfolder", "variant", "revision"),
    "embeddings": ("ref", "weight_name", "revision"),
    "motion": ("ref", "beta_schedule", "variant", "revision"),
}
NAMED = ("loras", "controls", "embeddings")  # of these there may be many
KNOWN = (*LOADING, "family", "files", *ADDING)


@dataclass(frozen=True)
class Description:
    """An engine, as what it takes to load it again."""

    model: Arguments = field(default_factory=dict)  # LOADING
    family: str | None = None
    files: Mapping[str, Any] = field(default_factory=dict)  # of PARTS: a File, or its name and sha256
    loras: Mapping[str, Arguments] = field(default_factory=dict)  # by name
    controls: Mapping[str, Arguments] = field(default_factory=dict)  # by name
    embeddings: Mapping[str, Arguments] = field(default_factory=dict)  # by token
    motion: Arguments | None = None

    @classmethod
    def of(cls, described: object) -> Description:
        """What `to_json` wrote, perhaps long ago, perhaps a stranger's. Raises UsageError."""
        known = _dict(described, "the description", KNOWN)
        model = {name: _text(known[name], name) for name in LOADING if name in known}
        files = _dict(known.get("files", {}), "files", PARTS)
        for part, file in files.items():
            if model.get(part) is None:
                raise UsageError(f"the description has the file of {part} and does not say where it is")
            _check_file(file, f"files: {part}")
        added: dict[str, Any] = {kind: _dict(known.get(kind, {}), kind) for kind in NAMED}
        for kind, each in added.items():
            for name, arguments in each.items():
                _check_arguments(kind, arguments, f"{kind}: {name!a:.80}")
        motion = known.get("motion")
        if motion is not None:
            _check_arguments("motion", motion, "motion")
        return cls(model, _text(known.get("family"), "family"), files, **added, motion=motion)

    def with_added(self, kind: str, name: str, arguments: Arguments) -> Description:
        """With a control or an embedding."""
        return replace(self, **{kind: {**getattr(self, kind), name: arguments}})  # type: ignore[arg-type]

    def without(self, kind: str, name: str) -> Description:
        """Without a control or an embedding. Raises UsageError where there is none of that name."""
        there = dict(getattr(self, kind))
        if name not in there:
            listed = ", ".join(there) or "none"
            raise UsageError(f"there is no {kind.removesuffix('s')} {name!r}: the engine has {listed}")
        del there[name]
        return replace(self, **{kind: there})  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """Files that were not hashed yet are hashed now."""
        added = {kind: getattr(self, kind) for kind in ("files", *ADDING)}
        told = {**self.model, "family": self.family, **{kind: each for kind, each in added.items() if each}}
        return {name: _told(each) for name, each in told.items()}

    def found(self, search: Sequence[str | Path] = ()) -> Description:
        """The same, with the places of its files: each is where it was, or else has its name in a folder of `search`
        or below one.

        Raises ModelNotFoundError where one has gone or is another, UsageError for a folder that is none.
        """
        for folder in search:
            if not os.path.isdir(folder):
                raise UsageError(f"search has {str(folder)!a:.200}, which is no folder")
        parts = {part: _found({"ref": self.model[part], "file": file}, search) for part, file in self.files.items()}
        added: dict[str, Any] = {
            kind: {name: _found(each, search) for name, each in getattr(self, kind).items()} for kind in NAMED
        }
        model = {**self.model, **{part: each["ref"] for part, each in parts.items()}}
        motion = None if self.motion is None else _found(self.motion, search)
        return Description(model, self.family, {}, **added, motion=motion)

    def add_to(self, engine: Any) -> None:
        """Gives a fresh Engine the adapters. Raises ModelNotFoundError, CheckpointError, UsageError."""
        if self.motion is not None:  # first: motion LoRAs need its modules
            engine.set_motion(**self.motion)
        for name, lora in self.loras.items():
            engine.add_lora(**{**lora, "scale": 0.0}, name=name)  # merged once, when all are there
        if self.loras:
            engine.set_loras({name: lora.get("scale", 1.0) for name, lora in self.loras.items()})
        for token, each in self.embeddings.items():
            engine.add_embedding(**{"token": token, **each})
        for name, each in self.controls.items():
            engine.add_control(**each, name=name)


def _told(value: Any) -> Any:
    if isinstance(value, File):
        return value.to_json()
    if isinstance(value, Mapping):
        return {name: _told(each) for name, each in value.items() if name != "file" or each is not None}
    return value


# ---- files ----


def _found(arguments: Arguments, search: Sequence[str | Path]) -> dict[str, Any]:
    """The arguments that load the very file that they describe, wherever it is by now."""
    kept = {name: value for name, value in arguments.items() if name != "file"}
    if "file" not in arguments:
        return kept
    name, wanted = arguments["file"]["name"], arguments["file"]["sha256"]
    place = Path(os.path.expanduser(kept["ref"]))
    if "weight_name" in kept and os.path.isdir(place):
        kept["weight_name"] = name if kept.get("weight_name") is None else kept["weight_name"]
        place /= kept["weight_name"]
    there = sha256(place)
    if there is not None and there == wanted:
        return kept
    for folder in search if wanted is not None else ():
        for path in sorted(Path(folder).rglob(glob.escape(name))):
            if sha256(path) == wanted:
                lost = ("weight_name", "subfolder", "revision")  # of where it was
                return {name: value for name, value in kept.items() if name not in lost} | {"ref": str(path)}
    state = "is not there" if there is None else "is another file now"
    hashed = "which was changed before it was hashed" if wanted is None else f"SHA-256 {wanted[:12]}..."
    raise ModelNotFoundError(f"{str(place)!a:.200} {state}: {name!a:.80} is needed ({hashed})", MOVED)


MOVED = "name the folder that it is in now (load_from's search), or what is to be taken instead of it"


# ---- what a stranger may have written ----


def _dict(value: object, what: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise UsageError(f"{what} must be names and values, not {value!a:.80}", "engine.describe() gives a description")
    if strange := [name for name in value if known is not None and name not in known]:
        raise UsageError(f"{what} has {strange[0]!a:.80}: known are {', '.join(known or ())}")
    return dict(value)


def _text(value: object, what: str) -> str | None:
    if value is not None and not (isinstance(value, str) and "\0" not in value):
        raise UsageError(f"the description's {what} is {value!a:.80}: a text is needed")
    return value


def _check_arguments(kind: str, value: object, what: str) -> None:
    arguments = _dict(value, what, (*ADDING[kind], "file"))
    if arguments.get("ref") is None:
        raise UsageError(f"{what} has no ref: a path or a Hub id is needed")
    for name, each in arguments.items():
        if name == "file":
            _check_file(each, what)
        elif name != "scale":
            _text(each, f"{what}: {name}")
        elif isinstance(each, bool) or not isinstance(each, int | float) or not abs(each) <= sys.float_info.max:
            raise UsageError(f"the description's {what}: scale is {each!a:.80}: a finite number is needed")


def _check_file(value: object, what: str) -> None:
    file = _dict(value, f"{what}: file", ("name", "sha256"))
    name, digits = file.get("name"), file.get("sha256")
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
        raise UsageError(f"{what} has a file named {name!a:.80}: a name without a folder is needed")
    if digits is not None and not (isinstance(digits, str) and re.fullmatch(rf"[0-9a-f]{{{DIGITS}}}", digits)):
        raise UsageError(f"{what} has the SHA-256 {digits!a:.80}: {DIGITS} hexadecimal digits are needed")
