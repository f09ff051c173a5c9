"""A folder in the diffusers layout whose weights are pickles, as the same folder with .safetensors files."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from calotype.atomic import replacing_folder
from calotype.errors import CalotypeWarning
from calotype.weights.files import PICKLES, metadata, read, read_json
from calotype.weights.unpickle import unpickle
from calotype.weights.write import Pending, write_safetensors

# How transformers and diffusers name weights, variants and shards among them: pytorch_model.fp16-00001-of-00002.bin
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model)(?:[.-][\w.-]+)?\.(?:bin|safetensors)")
INDEX = re.compile(r"(?:diffusion_pytorch_model|pytorch_model)\.bin\.index(?:\.[\w-]+)?\.json")
OTHERS = (*PICKLES, ".safetensors", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb")  # of other programs, or by others
SHOWN = 5  # names in the warning


def has_pickles(folder: Path) -> bool:
    """Whether weights of a model's folder are there as pickles alone."""
    return any(_is_pickled(path) for path in _files(folder))


def convert_folder(folder: Path, output: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the folder anew: weights as .safetensors under the names that are looked for, all else as it is.

    Variants are kept. Weights of other programs and what training left are left out (CalotypeWarning). Raises
    CheckpointError, OutputError; then nothing is written.
    """
    left = []
    with replacing_folder(output) as new:
        for path in _files(folder):
            target = new / path.relative_to(folder).with_name(_renamed(path.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            if _is_pickled(path):
                unpickle(path, target)
                if dtype is not None:
                    _rewrite(target, target, dtype)
            elif WEIGHTS.fullmatch(path.name):
                if path.suffix == ".safetensors":
                    _rewrite(path, target, dtype)
            elif INDEX.fullmatch(path.name):
                if not _beside(path).is_file():
                    index = read_json(path)
                    held = index.get("weight_map")
                    names = held.items() if isinstance(held, dict) else ()
                    target.write_text(json.dumps({**index, "weight_map": {n: _renamed(str(f)) for n, f in names}}))
            elif path.suffix.lower() in OTHERS:
                left.append(path.relative_to(folder).as_posix())
            else:
                shutil.copyfile(path, target)
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        warnings.warn(f"left out: {', '.join(left[:SHOWN])}{more}", CalotypeWarning, stacklevel=3)


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _is_pickled(path: Path) -> bool:
    return path.suffix == ".bin" and WEIGHTS.fullmatch(path.name) is not None and not _beside(path).is_file()


def _beside(path: Path) -> Path:
    """The .safetensors file (or index) that counts before this one."""
    return path.with_name(_renamed(path.name))


def _renamed(name: str) -> str:
    """As safetensors are called; transformers calls its pickles pytorch_model."""
    if not WEIGHTS.fullmatch(name) and not INDEX.fullmatch(name):
        return name
    return re.sub(r"\.bin(?=$|\.index)", ".safetensors", re.sub(r"^pytorch_model", "model", name))


def _rewrite(path: Path, target: Path, dtype: torch.dtype | None) -> None:
    if dtype is None:
        shutil.copyfile(path, target)
    else:
        said = metadata(path)
        write_safetensors(target, {name: Pending.of(tensor, dtype) for name, tensor in read([path]).items()}, said)
