"""Writes safetensors files one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calotype.atomic import replacing
from calotype.errors import CheckpointError
from calotype.weights.files import DTYPES, is_finite

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @staticmethod
    def of(tensor: Tensor, dtype: torch.dtype | None = None) -> Pending:
        """A tensor; its numbers in `dtype`, if one is given and it holds numbers that are not whole."""
        target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return Pending(target, tuple(tensor.shape), lambda: tensor)


def write_safetensors(path: Path, tensors: Mapping[str, Pending], metadata: Mapping[str, str]) -> None:
    """A file of these tensors, with no more than one of them in memory; or `path` stays as it was.

    Raises CheckpointError for numbers that the dtype cannot hold, OutputError where it cannot be written.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # so that every tensor is aligned
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in names:
        pending = tensors[name]
        entries[name] = {
            "dtype": NAMES[pending.dtype],
            "shape": list(pending.shape),
            "data_offsets": [end, end + pending.bytes],
        }
        end += pending.bytes
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            file.write(_content(name, tensors[name]))


def _content(name: str, pending: Pending) -> memoryview | bytes:
    tensor = pending.make()
    assert tuple(tensor.shape) == pending.shape, name
    converted = tensor.to("cpu", pending.dtype).contiguous()
    if converted.numel() == 0:
        return b""
    if converted.dtype != tensor.dtype and not is_finite(converted) and is_finite(tensor):
        dtype = str(pending.dtype).removeprefix("torch.")
        raise CheckpointError(f"{name} has values beyond {dtype}", "choose a wider --dtype")
    return converted.reshape(-1).view(torch.uint8).numpy().data
