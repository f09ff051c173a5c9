"""Writes and reads a network as a part of a model folder in the diffusers layout: config.json, weights in float16."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from calotype.weights.write import Pending, write_safetensors

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
SHARD = 15 << 20  # bytes of a file at most: small enough for version control and any way between machines


def write_part(
    folder: Path, stem: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], shard: int = SHARD
) -> None:
    """A part's folder; config.json is written last, so that one that has it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{stem}*"):
        old.unlink()
    groups: list[dict[str, Pending]] = [{}]
    room = shard
    for name, tensor in tensors.items():
        pending = Pending.of(tensor.detach(), torch.float16)
        if pending.bytes > room and groups[-1]:
            groups.append({})
            room = shard
        groups[-1][name] = pending
        room -= pending.bytes
    if len(groups) == 1:
        write_safetensors(folder / f"{stem}.safetensors", groups[0], {})
    else:
        names = [f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
        for name, group in zip(names, groups, strict=True):
            write_safetensors(folder / name, group, {})
        where = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
        size = sum(pending.bytes for group in groups for pending in group.values())
        write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    write_json(folder / "config.json", config)


def read_part(folder: Path) -> dict[str, Tensor]:
    """The tensors of a part's folder, whatever files they are in."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def must_be_finished(model: Path) -> None:
    if not (model / "model_index.json").is_file():
        raise SystemExit(f"{model} is no finished model: it lacks model_index.json")


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
