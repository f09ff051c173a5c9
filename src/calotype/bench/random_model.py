"""Models of the released ones' shapes with random weights: as fast as those, and nothing to download."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calotype.atomic import replacing_folder
from calotype.families import FAMILIES
from calotype.text.tokenizer import clip_tables
from calotype.weights.load import text_encoder_of, unet_of, vae_of
from calotype.weights.texts import LCM_SCHEDULER, family_texts
from calotype.weights.write import Pending, write_safetensors

NAMES = tuple(family.name for family in FAMILIES)
GUIDANCE_DIM = 256  # of the released LCMs' guidance embedding
TINY = {"_class_name": "AutoencoderTiny", "latent_channels": 4}  # TAESD: the rest is the class's default
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "tiny_vae": "diffusion_pytorch_model"}
DRAWN = 1_048_573  # numbers, repeated: drawing a billion would take a minute; a prime, so that no two rows are the same


def write(name: str, folder: Path, *, lcm: bool = True, seed: int = 0) -> None:
    """A model of a family's shapes in float16, with a TAESD beside it; `lcm` embeds guidance. OutputError."""
    family = next(each for each in FAMILIES if each.name == name)
    texts = family_texts(family)
    if lcm:
        texts["unet/config.json"]["time_cond_proj_dim"] = GUIDANCE_DIM
        texts["scheduler/scheduler_config.json"] |= LCM_SCHEDULER
        texts["model_index.json"]["scheduler"] = ["diffusers", LCM_SCHEDULER["_class_name"]]
    texts["tiny_vae/config.json"] = dict(TINY)
    noise = torch.randn(DRAWN, generator=torch.Generator().manual_seed(seed))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder) as made:
        for place, content in texts.items():
            (made / place).parent.mkdir(exist_ok=True)
            (made / place).write_text(json.dumps(content, indent=1), "utf-8")
            part, _, file = place.rpartition("/")
            if file == "config.json":
                tensors = _weights(_network(part, content), noise)
                write_safetensors(made / part / f"{STEMS.get(part, 'model')}.safetensors", tensors, {})
            elif file == "tokenizer_config.json":
                for table, text in clip_tables().items():
                    (made / part / table).write_text(text, "utf-8")


def _network(part: str, config: dict[str, Any]) -> nn.Module:
    build: Any = {"unet": unet_of, "vae": vae_of, "tiny_vae": vae_of}.get(part, text_encoder_of)
    network: nn.Module = build(config, part)
    return network


def _weights(network: nn.Module, noise: Tensor) -> dict[str, Pending]:
    return {
        name: Pending(torch.float16, tuple(meta.shape), partial(_drawn, name, meta.shape, noise))
        for name, meta in network.state_dict().items()
    }


def _drawn(name: str, shape: torch.Size, noise: Tensor) -> Tensor:
    """Kernels keep the scale of what they are applied to; norms' weights are about 1, biases about 0."""
    count = math.prod(shape)
    drawn = noise.repeat(-(-count // len(noise)))[:count].reshape(shape)
    if len(shape) > 1:
        return drawn / math.sqrt(math.prod(shape[1:]))
    return drawn / 8 + (1 if name.endswith("weight") else 0)
