"""Writes adapter files in the formats that people have, with random weights, for the modules of any network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Factors = dict[str, tuple[Tensor, Tensor]]  # module -> (A: down, B: up), as PEFT has them


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers(network: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)) -> dict[str, nn.Module]:
    return {name: module for name, module in network.named_modules() if isinstance(module, kinds)}


def low_rank(modules: Mapping[str, nn.Module], rank: int = 3, seed: int = 0) -> Factors:
    """A and B for each module, of a size that matters, in the shapes that PEFT gives them."""
    made: Factors = {}
    for number, (name, module) in enumerate(modules.items()):
        weight = module.get_parameter("weight")
        size = (rank * weight[0].numel()) ** -0.25 * 0.5
        down = normal(rank, *weight.shape[1:], seed=seed + 2 * number) * size
        up = normal(weight.shape[0], rank, *[1] * (weight.ndim - 2), seed=seed + 2 * number + 1) * size
        made[name] = (down, up)
    return made


def peft_names(factors: Factors, prefix: str = "", adapter: str = "") -> dict[str, Tensor]:
    """`down_blocks.0...to_q.lora_A.weight`, perhaps behind the network's or PEFT's prefix, with the adapter's name."""
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"{prefix}{name}.lora_A{adapter}.weight"] = down
        tensors[f"{prefix}{name}.lora_B{adapter}.weight"] = up
    return tensors


def kohya_names(
    factors: Factors, prefix: str, alpha: Callable[[str], float] | None, rename: Callable[[str], str] = str
) -> dict[str, Tensor]:
    """`lora_unet_down_blocks_0_..._to_q.lora_down.weight` and `.alpha`; `rename`: the module's name in the file."""
    tensors = {}
    for name, (down, up) in factors.items():
        key = prefix + rename(name).replace(".", "_")
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha(name))
    return tensors


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object] | None = None) -> Path:
    """A .safetensors file; `metadata` is what diffusers calls lora_adapter_metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {"format": "pt"} | ({} if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)})
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata=texts)
    return path


def chosen(modules: Mapping[str, nn.Module], endings: Iterable[str]) -> dict[str, nn.Module]:
    """The modules whose names end so."""
    return {name: module for name, module in modules.items() if name.endswith(tuple(endings))}
