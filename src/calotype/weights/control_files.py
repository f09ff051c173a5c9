"""ControlNets and T2I-Adapters in single files: where in a file one is, what its names mean, and how those become whole
that hold only what they change of their model's U-Net.

Two kinds need that U-Net. A "difference" ControlNet (marked by the key `difference`) is a ControlNet minus the weights
that its encoder began with, and a Control-LoRA (`lora_controlnet`) has their difference as products up @ down. Both are
facts of ComfyUI, comfy/controlnet.py (`load_controlnet`, `ControlLora`), which wrote and reads them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from calotype.errors import CheckpointError
from calotype.families import family_of
from calotype.nn.unet import UNetConfig
from calotype.parts import Stored
from calotype.rules import shown
from calotype.weights.detect import NAMED_REFUSALS, Shapes, looks_like, shapes_of, sort_of
from calotype.weights.ldm import control_names, control_table
from calotype.weights.names import BOOKKEEPING
from calotype.weights.wrapping import without_inner

# The tensors that only these networks have; what stands before the name is the network's place in the file.
PLACE = re.compile(
    r"(?P<prefix>(?:.*\.)?)(?:controlnet_cond_embedding\.conv_in|input_hint_block\.0"
    r"|body\.0\.(?:in_conv|block1|resnets\.0\.block1))\.weight"
)
# What may lie beside one: the model that it is for, which the first ControlNets came with.
BESIDE = re.compile(
    r"(.*\.)?(diffusion_model|first_stage_model|cond_stage_model|conditioner|model_ema|unet|vae|text_encoder(_2)?)\..*"
    r"|betas|(sqrt_|log_)?\w*alphas_cumprod\w*|posterior_\w+|lvlb_weights|logvar|scale_factor"
)
DIFFERENCE, LOW_RANK = "difference", "lora_controlnet"
UP, DOWN = ".up", ".down"
TENCENT = re.compile(r"body\.(\d{1,3})\.(.+)")  # how the authors of T2I-Adapter call most of its tensors
# No tensor says that ControlNet Shuffle takes the means of its maps: webui and ComfyUI go by the file's name, too.
SHUFFLE = re.compile(r"(?<![A-Za-z])(?:[Ss]huffle|SHUFFLE)(?![a-z])|(?<=[a-z])Shuffle(?![a-z])")


@dataclass(frozen=True, eq=False)
class ControlFile:
    """What a file holds of a network."""

    tensors: dict[str, Tensor]  # under our names; of a Control-LoRA under the file's own
    is_difference: bool = False
    is_low_rank: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return shapes_of(self.tensors)


def opened(tensors: Mapping[str, Tensor], where: Path) -> ControlFile:
    """What is the network's among a file's tensors. Raises CheckpointError for what is of another kind."""
    shapes = shapes_of(tensors)
    if (sort := sort_of(shapes)) in NAMED_REFUSALS:
        raise CheckpointError(f"{where} is {sort}, which is not supported", NAMED_REFUSALS[sort])
    names = without_inner(tensors)
    places = [match["prefix"] for name in names if (match := PLACE.fullmatch(name))]
    if not places:
        return ControlFile(dict(tensors))
    prefix = min(places, key=len)
    own, marks = {}, set()
    for name, theirs in names.items():
        rest = name.removeprefix(prefix)
        if rest in (DIFFERENCE, LOW_RANK) or name in (DIFFERENCE, LOW_RANK):
            marks |= {rest, name}
        elif BESIDE.fullmatch(rest) or BOOKKEEPING.fullmatch(name):
            continue
        elif name.startswith(prefix):
            own[rest] = tensors[theirs]
        else:
            raise CheckpointError(
                f"{where} holds {looks_like(shapes)} and {shown(theirs)}, which is no part of it",
                "the file is damaged, or of a kind that is not supported",
            )
    if LOW_RANK in marks or any(name.endswith(UP) and name.removesuffix(UP) + DOWN in own for name in own):
        return ControlFile(own, is_low_rank=True)
    return ControlFile(_renamed(own), is_difference=DIFFERENCE in marks)


def _renamed(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's tensors under diffusers' names."""
    if any(name.startswith("input_hint_block.") for name in own):
        names = control_names(own)
        return {names.get(name, name): tensor for name, tensor in own.items()}
    if any(name.startswith("controlnet_cond_embedding.") for name in own):
        return dict(own)
    if any(".resnets." in name for name in own):
        return {f"adapter.{name}": tensor for name, tensor in own.items()}
    light = any(name.startswith("body.0.body.") for name in own)
    return {f"adapter.{_from_tencent(name, light)}": tensor for name, tensor in own.items()}


def _from_tencent(name: str, light: bool) -> str:
    """A light adapter's levels have a body of their own; a full one counts its residual blocks through, two a level."""
    match = TENCENT.fullmatch(name)
    if match is None or light:
        return name.replace(".body.", ".resnets.")
    number, rest = int(match[1]), match[2]
    return f"body.{number // 2}.{f'resnets.{number % 2}.' if rest.startswith('block') else ''}{rest}"


def pools(where: Path) -> bool:
    """Whether a ControlNet's file is Shuffle's, by its name."""
    return SHUFFLE.search(where.stem) is not None


# ---- what the U-Net completes ----


def base_weights(
    base: Stored | None, unet: UNetConfig | None, what: str, where: Path
) -> tuple[UNetConfig, Mapping[str, Tensor]]:
    """The U-Net that a file is completed from: its config and its weights as they are in its own file."""
    if base is None or unet is None:
        raise CheckpointError(
            f"{where} is {what}: it holds only what it changes of its model's U-Net, and no model is given",
            "load it into an engine of the model that it was made for: engine.add_control",
        )
    return unet, base()


def whole_of_difference(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ControlNet out of a difference: what its encoder shares with the U-Net is added, all else is whole already."""
    found = {}
    for name, tensor in tensors.items():
        began = base.get(name)
        fits = began is not None and began.numel() == tensor.numel() and began.shape[:2] == tensor.shape[:2]
        found[name] = tensor.float() + began.float().reshape(tensor.shape) if began is not None and fits else tensor
    return found


def whole_of_low_rank(
    own: Mapping[str, Tensor], base: Mapping[str, Tensor], config: UNetConfig, shapes: Shapes, where: Path
) -> dict[str, Tensor]:
    """A ControlNet of these shapes out of a Control-LoRA: each tensor is W + up @ down, its own, or the U-Net's.

    Raises CheckpointError where a product does not fit and for what belongs to no layer.
    """
    found: dict[str, Tensor] = {}
    faults: list[str] = []
    used: set[str] = set()
    for ours, theirs in control_table(shapes, config).items():
        layer = theirs.removesuffix(".weight")
        up, down, began = own.get(layer + UP), own.get(layer + DOWN), base.get(ours)
        if theirs in own:
            found[ours] = own[theirs]
            used.add(theirs)
        elif ours.endswith(".weight") and up is not None and down is not None:
            used |= {layer + UP, layer + DOWN}
            want = shapes[ours]
            product = _product(up, down)
            if began is None or tuple(began.shape) != want or product is None or product.numel() != math.prod(want):
                faults.append(f"{layer}: {list(up.shape)} and {list(down.shape)} for {list(want)}")
            else:
                found[ours] = began.float() + product.reshape(want)
        elif began is not None:
            found[ours] = began
    faults += [f"{name}: no such layer" for name in own if name not in used]
    if faults:
        listed = "; ".join([*faults[:3], *([f"{len(faults) - 3} more"] if len(faults) > 3 else [])])
        title = family_of(config).title
        raise CheckpointError(
            f"{where} is a Control-LoRA that does not fit {title}: {listed}", f"use one that was made for {title}"
        )
    return found


def _product(up: Tensor, down: Tensor) -> Tensor | None:
    """up @ down, convolutions (out, rank, 1, 1) and (rank, in, k, k) taken as matrices; None if they do not fit."""
    if up.ndim < 2 or down.ndim < 2 or up[:1].numel() != len(down) or not len(down):
        return None
    return up.flatten(1).float() @ down.flatten(1).float()
