"""Reads safetensors and JSON files as if a stranger had written them: bounds first, then headers, data last by mmap.

Format: 8 bytes with the header's length N (little endian), N bytes of JSON, then the tensors without gaps
(github.com/huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calotype.errors import CheckpointError, UnsafeFileError
from calotype.rules import shown

JSON_LIMIT = 10_000_000  # bytes of a config or an index; SDXL's largest is 200 kB
HEADER_LIMIT = 16_000_000  # bytes; SDXL's U-Net has 200 kB. The format allows 100 MB, which cost gigabytes once parsed
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,  # how others make files small; PyTorch multiplies neither on a CPU
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,  # whole numbers are what files carry along: `position_ids`, a flag, an alpha, a count of epochs
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
STEMS = ("diffusion_pytorch_model", "model")  # how diffusers and transformers name weights
OLD_STEM = "pytorch_model"  # how transformers names pickles, which it calls "model" in safetensors
# One file of several: the variant stands before the numbers, in older repositories behind them.
NUMBERED = re.compile(
    r"(?P<stem>[a-z_]+)(?:\.(?P<variant>[\w-]+))?-(?P<number>\d{5})-of-(?P<count>\d{5})(?:\.(?P<older>[\w-]+))?\.\w+"
)
MAX_SERIES = 1000  # files
TEXT_LIMIT = 100_000  # bytes: more than what servers say in place of a file
# Pickles that a training run leaves beside the weights.
NO_WEIGHTS = re.compile(
    r"(optimizer|scheduler|scaler|sampler|training_args|rng_state|random_states|custom_checkpoint)(_\w+)?\.\w+"
)


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    begin: int  # bytes, from the end of the header
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin

    @property
    def count(self) -> int:
        return math.prod(self.shape)


# ---- JSON ----


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most JSON_LIMIT bytes.

    Raises CheckpointError where it is missing, too long, too deep, no object, or ambiguous (a key twice, NaN).
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if path.stat().st_size > JSON_LIMIT:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; at most {JSON_LIMIT:,} are read")
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`; `where` names it in a CheckpointError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise CheckpointError(f"{where} has the key {shown(twice)} twice")
        return found

    def constant(text: str) -> Never:
        raise CheckpointError(f"{where} has the value {text}; numbers must be finite")

    def number(text: str) -> float:
        return float(text) if math.isfinite(float(text)) else constant(text[:40])

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant, parse_float=number)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, an integer of thousands of digits
        if text.startswith(b"version https://git-lfs"):
            raise _lfs(where) from error
        raise CheckpointError(f"{where} is not valid JSON: {shown(str(error))}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a JSON {type(value).__name__}; an object is needed")
    return value


# ---- headers ----


def header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file by name, after all that can be checked without reading the data was checked.

    Raises UnsafeFileError for a pickle, CheckpointError for a file that is truncated, ambiguous or not safetensors.
    """
    entries, size = _header(path)
    where = f"{path}: the header"
    tensors = {name: _tensor_info(where, name, entry) for name, entry in entries.items() if name != "__metadata__"}
    _check_layout(path, tensors, size)
    return tensors


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself, by any names. Raises CheckpointError as `header` does."""
    found = _header(path)[0].get("__metadata__", {})
    assert isinstance(found, dict)
    return found


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header's entries as they are, and how many bytes of data follow it."""
    if path.suffix.lower() in PICKLES:
        raise unsafe(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8 or length > HEADER_LIMIT:
            raise _not_safetensors(path, prefix, length, size)
        text = file.read(length)
    where = f"{path}: the header"
    entries = parse_json(text, where)
    found = entries.get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(f"{where} has __metadata__ that is not text: {shown(found)}")
    return entries, size - 8 - length


def _tensor_info(where: str, name: str, entry: object) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where} gives {shown(name)} as {shown(entry)}; dtype, shape and data_offsets are needed"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} gives {shown(name)} the dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
            raise CheckpointError(f"{where} gives {shown(name)} the {what} {shown(numbers)}; counts are needed")
    if len(offsets) != 2 or len(shape) > 8:
        raise CheckpointError(f"{where} gives {shown(name)} {len(offsets)} data_offsets and {len(shape)} dimensions")
    info = TensorInfo(dtype, tuple(shape), *offsets)
    expected = info.count * DTYPES[dtype].itemsize
    if info.bytes != expected:
        raise CheckpointError(f"{where} gives {shown(name)} {info.bytes} bytes; {shape} of {dtype} takes {expected}")
    return info


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], size: int) -> None:
    """The data must be laid end to end: no overlap, no gap, nothing missing, nothing behind."""
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != end:
            fault = "overlaps the tensor before it" if info.begin < end else f"leaves a gap of {info.begin - end} bytes"
            raise CheckpointError(f"{path}: {shown(name)} at byte {info.begin} {fault}")
        end = info.end
    if end > size:
        raise CheckpointError(f"{path} is truncated: its tensors take {end} bytes, the file holds {size}", REFETCH)
    if end < size:
        raise CheckpointError(f"{path} has {size - end} bytes behind its last tensor")


REFETCH = "download or copy it again"


def _not_safetensors(path: Path, prefix: bytes, length: int, size: int) -> CheckpointError:
    if prefix == b"version ":
        return _lfs(str(path))
    if _starts_as_pickle(prefix):
        return unsafe(path)
    if prefix and (other := no_pickle(path, path)) is not None:
        return other
    if len(prefix) < 8:
        return CheckpointError(f"{path} has {size} bytes; a safetensors file has at least 8", REFETCH)
    if length > HEADER_LIMIT:
        return CheckpointError(f"{path} claims a header of {length:,} bytes; at most {HEADER_LIMIT:,} are read")
    return CheckpointError(f"{path} is truncated: its header takes {length} bytes, the file holds {size - 8}", REFETCH)


def _lfs(where: str) -> CheckpointError:
    return CheckpointError(f"{where} is a Git LFS pointer, not the file itself", "fetch the files with: git lfs pull")


def unsafe(path: Path | str) -> CheckpointError:
    """The refusal of a file that is a pickle by its name or by how it begins; or what else it is, if it is none."""
    path = Path(path)
    name, target = path, _converted(path)
    first = f"{path} is a pickle, which can run code when it is read; only .safetensors files are read"
    remedy = "convert it once"
    if path.suffix.lower() in PICKLES:
        if (other := no_pickle(path, target)) is not None:
            return other
        if target.is_file():
            return UnsafeFileError(first, f"it was converted already, it seems: give {target}")
    elif path.name.startswith(STEMS):  # only under this name it is looked for
        name, target = path.with_name(f"{path.stem}-pickle.bin"), path
        remedy = f"rename it ({shlex.join(['mv', str(path), str(name)])}) and convert it once"
    return UnsafeFileError(
        first, f"if you trust it, {remedy}: {shlex.join(['calotype', 'convert', str(name), str(target)])}"
    )


def no_pickle(path: Path, target: Path) -> CheckpointError | None:
    """What a file is that is neither of what its name says, nor a pickle, if that is certain."""
    if not path.is_file():
        return None
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return CheckpointError(f"{path} is empty", REFETCH)
    if start.startswith(b"version https://git-lfs"):
        return _lfs(str(path))
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return CheckpointError(
            f"{path} is a web page, not a model", "download it again: the link led to a page about it"
        )
    if start.startswith(b"GGUF"):
        return CheckpointError(f"{path} is a GGUF file under another name, which is not read")
    if (
        size < TEXT_LIMIT
        and start.isascii()
        and (text := start.decode("ascii").strip()).replace("\n", " ").isprintable()
    ):
        return CheckpointError(f"{path} is a text of {size} bytes, not a model: {shown(text)}", REFETCH)
    if start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= min(HEADER_LIMIT, size - 8):
        rename = f"rename it: {shlex.join(['mv', str(path), str(target)])}"
        hint = f"there is {target} beside it: give that" if target.is_file() else rename
        return CheckpointError(f"{path} is a safetensors file under a pickle's name", hint)
    return None


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, by its name or by how it begins."""
    if path.suffix.lower() in PICKLES:
        return True
    with path.open("rb") as file:
        return _starts_as_pickle(file.read(8))


def _starts_as_pickle(prefix: bytes) -> bool:
    return prefix[:4] == b"PK\x03\x04" or (
        prefix[:1] == b"\x80" and prefix[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    )


def _converted(path: Path) -> Path:
    """The name for what a pickle is converted to, which is not its own: the one that is looked for."""
    stem = path.stem
    if stem == OLD_STEM or stem.startswith((f"{OLD_STEM}.", f"{OLD_STEM}-")):
        stem = STEMS[1] + stem.removeprefix(OLD_STEM)
    return path.with_name(f"{stem}-converted.safetensors" if path.suffix == ".safetensors" else f"{stem}.safetensors")


def pickles(names: Iterable[str], stems: Sequence[str] | None = None, variant: str | None = None) -> list[str]:
    """The pickles among file names that may be weights, without those that were converted already.

    With `stems` only those whose converted name is looked for: of several variants those of `variant`, or the plain.
    """
    names = set(names)
    held = [name for name in sorted(names) if name.endswith(PICKLES) and not NO_WEIGHTS.fullmatch(name)]
    found = {name: _converted(Path(name)).name for name in held}
    if stems is not None:
        kinds = {name: kind for name, new in found.items() if (kind := _variant(new, stems)) is not None}
        wanted = next((kind for kind in (variant, "") if kind in kinds.values()), None)
        found = {name: found[name] for name, kind in kinds.items() if wanted in (None, kind)}
    return [name for name, new in found.items() if new not in names]


def _variant(name: str, stems: Sequence[str]) -> str | None:
    """The variant that weights of that name are, "" being the plain ones; None where no stem is theirs."""
    for stem in stems:
        if match := re.fullmatch(rf"{stem}(?:\.([\w-]+))?\.safetensors", name):
            return re.sub(r"-\d{5}-of-\d{5}", "", match[1] or "")
        if (match := NUMBERED.fullmatch(name)) and match["stem"] == stem:
            return match["variant"] or match["older"] or ""
    return None


# ---- data ----


def read(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files as views of the mapped files: nothing is copied, pages are read when touched.

    Raises CheckpointError as `header` does, and where two files hold the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        names = header(path)
        if twice := names.keys() & tensors.keys():
            raise CheckpointError(f"{path} holds {shown(min(twice))}, which another file of the model holds too")
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    return tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass and no copy of the tensor, but for one in float8."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    wide = tensor.half() if tensor.itemsize == 1 else tensor  # of float8, of which PyTorch knows no minimum; exact
    low, high = torch.aminmax(wide)  # NaN wins both
    return bool(torch.isfinite(low) & torch.isfinite(high))


# ---- which files ----


def variants(names: Iterable[str], stem: str) -> dict[str | None, str]:
    """The variants among file names (None is the plain one) -> the file to start from: weights, an index of several
    files, or the first of them where there is no index.

    `model.safetensors`, `model.fp16.safetensors`, `model.safetensors.index.json`, `model.safetensors.index.fp16.json`,
    `model-00001-of-00002.safetensors`. The index counts before one file, as in diffusers, and that before several.
    """
    single = re.compile(rf"{stem}(?:\.([\w-]+))?\.safetensors")
    sharded = re.compile(rf"{stem}\.safetensors\.index(?:\.([\w-]+))?\.json")
    ordered = sorted(names)
    found: dict[str | None, str] = {}
    for name in ordered:
        if name.endswith(".safetensors") and (match := NUMBERED.fullmatch(name)) and match["stem"] == stem:
            found.setdefault(match["variant"] or match["older"], name)
    for pattern in (single, sharded):
        for name in ordered:
            match = pattern.fullmatch(name)
            if match and not re.search(r"-\d{5}-of-\d{5}", name):
                found[match.group(1)] = name
    return found


def shards(folder: Path, entry: str) -> list[Path]:
    """The weight files behind `entry`, a file of `folder` that `variants` gave.

    Raises CheckpointError where an index names files outside the folder, or tensors that its files do not hold, and
    where one of several files is missing; UnsafeFileError where that one is a pickle still.
    """
    if entry.endswith(".safetensors"):
        return _numbered(folder, entry)
    index = folder / entry
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has the weight_map {shown(weight_map)}; it must name the file of each tensor")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise CheckpointError(f"{index} names {shown(name)}; it must be a .safetensors file in the same folder")
    held = {name: header(folder / name) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        if tensor not in held[name]:
            raise CheckpointError(f"{index} says that {name} holds {shown(tensor)}; it does not")
    return [folder / name for name in held]


def missing_files(folder: Path, entry: str) -> list[Path]:
    """What lacks of a series of files, by the name of one of them."""
    return [path for path in _series(folder, entry) if not path.is_file()]


def _series(folder: Path, entry: str) -> list[Path]:
    """All files of a series, by the name of one of them; a file that is in none is its own series."""
    match = NUMBERED.fullmatch(entry)
    if match is None:
        return [folder / entry]
    begin, end = entry[: match.start("number")], entry[match.end("number") :]
    return [folder / f"{begin}{number:05}{end}" for number in range(1, min(int(match["count"]), MAX_SERIES) + 1)]


def _numbered(folder: Path, entry: str) -> list[Path]:
    """A series of files, all of which must be there."""
    series = _series(folder, entry)
    if missing := missing_files(folder, entry) if len(series) > 1 else []:
        for name in pickles([path.name for path in folder.iterdir()]):
            if _converted(Path(name)).name == missing[0].name:
                raise unsafe(folder / name)
        listed = ", ".join(path.name for path in missing[:5])
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(series)} files of its weights: {listed}", REFETCH)
    return series
