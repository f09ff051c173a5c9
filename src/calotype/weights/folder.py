"""A model's folder in the diffusers layout: its texts, and which files hold the weights of each part."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from calotype.errors import CalotypeWarning, CheckpointError, ModelNotFoundError
from calotype.rules import shown
from calotype.text.tokenizer import TABLES, Tokenizer, has_clip_tables
from calotype.weights.compare import check
from calotype.weights.configs import MOTION_UNET, Config
from calotype.weights.detect import Shapes
from calotype.weights.files import (
    NUMBERED,
    STEMS,
    TensorInfo,
    header,
    missing_files,
    pickles,
    read,
    read_json,
    shards,
    unsafe,
    variants,
)
from calotype.weights.names import KINDS
from calotype.weights.pipeline import Pipeline, read_pipeline

SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

# What a file calls each tensor -> what we do, and the tensors by the file's names, as views of the mapped files.
Weights = tuple[dict[str, str], dict[str, Tensor]]


class Model(Protocol):
    """What a folder and a single file have in common. Everything raises CheckpointError."""

    @property
    def path(self) -> Path: ...

    def pipeline(self) -> Pipeline:
        """What parts it has."""

    def has(self, name: str) -> bool:
        """Whether there is such a text: "unet/config.json", "calotype.json", ..."""

    def where(self, name: str) -> str:
        """A text's or a part's place, for messages."""

    def json(self, name: str) -> dict[str, Any]:
        """What a text says."""

    def texts(self) -> dict[str, str]:
        """All that is needed beside the weights, by their names in a folder; CLIP's own tables go without saying."""

    def tokenizer(self, part: str) -> Tokenizer: ...

    def weights(self, part: str, config: Config, shapes: Shapes) -> Weights:
        """A part's weights: those of a network of this config, whose tensors are `shapes`. Nothing is copied."""


class Folder:
    """A Model in a folder, or with `parts` a single part of one, that lies elsewhere."""

    def __init__(
        self,
        path: Path,
        variant: str | None = None,
        parts: Mapping[str, Path] | None = None,
        prediction: str | None = None,
    ) -> None:
        """`prediction` overrules the scheduler's."""
        self._path = path
        self._variant = variant
        self._parts = parts or {}
        self._prediction = prediction

    @property
    def path(self) -> Path:
        return self._path

    def pipeline(self) -> Pipeline:
        return read_pipeline(self.path)

    def has(self, name: str) -> bool:
        return self._file(name).is_file()

    def where(self, name: str) -> str:
        return str(self._file(name))

    def json(self, name: str) -> dict[str, Any]:
        found = read_json(self._file(name))
        if name == SCHEDULER and self._prediction is not None:
            found["prediction_type"] = self._prediction
        return found

    def texts(self) -> dict[str, str]:
        names = ["model_index.json", "calotype.json", SCHEDULER]
        for part in self.pipeline().classes:
            if part.startswith("tokenizer"):
                names += [f"{part}/{name}" for name in TOKENIZER_FILES]
                if not has_clip_tables(self.folder(part)):
                    names += [f"{part}/{name}" for name in TABLES]
            elif part in KINDS:
                names.append(f"{part}/config.json")
        found = {name: self._file(name).read_text("utf-8") for name in names if self.has(name)}
        return found | {SCHEDULER: json.dumps(self.json(SCHEDULER))}

    def tokenizer(self, part: str) -> Tokenizer:
        return Tokenizer.load(self.folder(part))

    def weights(self, part: str, config: Config, shapes: Shapes) -> Weights:
        folder = self.folder(part)
        paths = weight_files(folder, self._variant)
        return check(KINDS[part], part_header(folder, paths), shapes, folder), read(paths)

    def folder(self, part: str) -> Path:
        """Where a part is."""
        return self._parts.get(part, self.path / part)

    def _file(self, name: str) -> Path:
        part, _, rest = name.partition("/")
        return self.folder(part) / rest if rest or part in self._parts else self.path / name


# ---- which files ----


def available(folder: Path, variant: str | None = None) -> dict[str | None, tuple[str, str]]:
    """The variants of a part's weights (None is the plain one) -> (stem, the file to start from).

    Raises CheckpointError where there are none, UnsafeFileError where they are pickles: of `variant`, if there are.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    for stem in STEMS:
        if found := variants(names, stem):
            return {key: (stem, entry) for key, entry in found.items()}
    if left := pickled(folder, variant):
        raise unsafe(left[0])
    others = sorted(name for name in names if name.endswith(".safetensors")) + pickles(names)
    detail = f"; {others[0]} is not one of theirs" if others else ""
    raise CheckpointError(
        f"{folder} holds no weights: {' or '.join(stem + '.safetensors' for stem in STEMS)} is needed{detail}",
        "if it is a download that was cut short, load it once more with a network",
    )


def pickled(folder: Path, variant: str | None = None) -> list[Path]:
    """The pickles that hold a part's weights, or what is missing of them; none where .safetensors files have all."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    there = [entry for stem in STEMS for entry in variants(names, stem).values()]
    if any(not NUMBERED.fullmatch(entry) or not missing_files(folder, entry) for entry in there):
        return []
    left = pickles(names, STEMS, variant)
    return [folder / name for name in left if not there or NUMBERED.fullmatch(name)]


def check_pickles(folders: Mapping[str, Path], variant: str | None) -> None:
    """Where parts of a model are pickles: an UnsafeFileError for the first, which names the others too."""
    left = [path for folder in folders.values() for path in pickled(folder, variant)]
    if not left:
        return
    error = unsafe(left[0])
    others = ", ".join(f"{path.parent.name}/{path.name}" for path in left[1:6])
    more = f"; {len(left) - 1} more {'is' if len(left) == 2 else 'are'} left: {others}" if others else ""
    raise type(error)(f"{error.message}{more}", error.hint)


def check_variant(folders: Mapping[str, Path], variant: str | None) -> None:
    """A variant that no part has is refused; parts without it fall back to their plain weights, with a warning."""
    if variant is None:
        return
    weightless = ("tokenizer", "tokenizer_2", "scheduler")
    found = {part: available(folder, variant) for part, folder in folders.items() if part not in weightless}
    lacking = [part for part, there in found.items() if variant not in there]
    if len(lacking) == len(found):
        there = sorted({name for variants_ in found.values() for name in variants_ if name is not None})
        raise ModelNotFoundError(
            f"no part of the model has the variant {shown(variant)}; there are: {', '.join(there) or 'none'}",
            "leave the variant out for the plain weights",
        )
    if lacking:
        message = f"{', '.join(lacking)}: no {variant} weights, the plain ones are used"
        warnings.warn(message, CalotypeWarning, stacklevel=2)


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files of one part's weights: the variant's; else the plain ones; else the only ones there are."""
    found = available(folder, variant)
    chosen = next((key for key in (variant, None) if key in found), None)
    if chosen is None and None not in found:
        if len(found) > 1:
            names = ", ".join(str(name) for name in sorted(found, key=str))
            raise ModelNotFoundError(f"{folder} has only variants ({names})", "say which by variant=")
        chosen = next(iter(found))
    return shards(folder, found[chosen][1])


def merged_header(paths: Sequence[Path]) -> dict[str, TensorInfo]:
    """The headers of a part's files as one."""
    merged: dict[str, TensorInfo] = {}
    for path in paths:
        found = header(path)
        if twice := found.keys() & merged.keys():
            raise CheckpointError(f"{path} holds {shown(min(twice))}, which another file of the model holds too")
        merged |= found
    return merged


def part_header(folder: Path, paths: Sequence[Path]) -> dict[str, TensorInfo]:
    """The headers of a part's files as one, without the motion modules that AnimateDiff's pipelines save in a U-Net."""
    merged = merged_header(paths)
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("_class_name") == MOTION_UNET:
        return {name: info for name, info in merged.items() if ".motion_modules." not in name}
    return merged
