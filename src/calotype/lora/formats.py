"""Adapter files -> what they change of a model. Every key is used, known to mean nothing here, or an error."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from calotype.errors import CalotypeWarning, CheckpointError
from calotype.families import FAMILIES, SDXL, SSD1B
from calotype.hashes import File
from calotype.lora.deltas import Delta, LoRA, LowRank, Shape
from calotype.lora.keys import layers_of, unsupported
from calotype.lora.layers import Damaged, Place, deltas_of
from calotype.lora.names import MOTION, Names, networks, own_rows
from calotype.lora.scaling import METADATA, PEFT_CONFIG, PEFT_FILE, Scaling, read_scalings
from calotype.lora.words import is_of_word, read_words
from calotype.parts import Parts
from calotype.rules import shown
from calotype.weights import source
from calotype.weights.detect import looks_like, shapes_of
from calotype.weights.files import is_finite, metadata, read
from calotype.weights.habits import habit_of
from calotype.weights.names import BOOKKEEPING

__all__ = ["DEFAULT_FILE", "METADATA", "load_lora", "made_for", "read_lora"]

DEFAULT_FILE = "pytorch_lora_weights.safetensors"


def load_lora(
    ref: str | Path, parts: Parts, *, weight_name: str | None = None, revision: str | None = None, offline: bool = False
) -> LoRA:
    """An adapter for a model: a .safetensors file, or the file `weight_name` of a folder or Hub id.

    Every key must fit the model. Raises ModelNotFoundError, UnsafeFileError, CheckpointError.
    """
    path = source.resolve_file(
        ref, weight_name, preferred=(DEFAULT_FILE, PEFT_FILE), beside=(PEFT_CONFIG,), revision=revision, offline=offline
    )
    tensors = read([path])
    deltas, habit = _changes(path, tensors, parts), habit_of("lora", ref, path)
    unsaid = habit is None and _may_be_few_step(path, deltas, parts)
    words = read_words(path, tensors)
    return LoRA(str(ref), weight_name, deltas, revision, habit, words, unsaid, File.of(ref, path))


def read_lora(path: Path, parts: Parts) -> dict[str, dict[str, Delta]]:
    """What an adapter's file changes: network -> parameter -> change. Raises UnsafeFileError, CheckpointError."""
    return _changes(path, read([path]), parts)


def _changes(path: Path, tensors: Mapping[str, Tensor], parts: Parts) -> dict[str, dict[str, Delta]]:
    mine = [key for key in tensors if not is_of_word(key) and not BOOKKEEPING.fullmatch(key)]
    if (known := unsupported(mine)) is not None:
        raise CheckpointError(f"{path} is not supported: it is {known[0]} ({shown(known[1])})", KNOWN)
    layers, strange = layers_of(mine)
    if not layers:
        held = looks_like(shapes_of(tensors))
        raise CheckpointError(f"{path} holds no adapter that can be read: it looks like {held}", KNOWN)
    modules = networks(parts)
    shapes = {
        network: {name: tuple(own_rows(module, name, own).shape) for name, own in module.named_parameters()}
        for network, module in modules.items()
    }
    names, scalings = Names.of(parts), read_scalings(path)
    found: dict[str, dict[str, Delta]] = {}
    misshapen: list[str] = []
    middle: list[str] = []
    for name, layer in layers.items():
        target = names.find(name)
        if target is None:
            if not names.is_unused(name):
                (middle if _is_missing_middle(name, parts) else strange).append(name)
            continue
        network, module = target
        ours = shapes[network]
        scaling, shape, biased = scalings.get(network, Scaling()), ours[f"{module}.weight"], f"{module}.bias" in ours
        try:
            values = {part: tensors[key] for part, key in layer.items()}
            deltas = deltas_of(values, Place(name, module, shape, biased, scaling))
            made = {parameter: delta.shape for parameter, delta in deltas.items()}
        except ValueError as error:
            hint = DAMAGED if isinstance(error, Damaged) else KNOWN
            raise CheckpointError(f"{path}: {shown(name)} {error}", hint) from error
        for parameter, delta in deltas.items():
            full = f"{module}.{parameter}"
            if full in found.get(network, {}):
                strange.append(f"{name} (a second time)")
            elif full not in ours:
                strange.append(f"{name} ({parameter})")
            elif not delta.fits(ours[full]):
                misshapen.append(f"{name}: {list(made[parameter])}, the model's is {list(ours[full])}")
            else:
                found.setdefault(network, {})[full] = delta
    if strange or misshapen or not found:
        raise _misfit(path, parts, len(layers), strange or middle, misshapen, tensors)
    config = parts.unet.config
    xl = config.addition_in_dim is not None and config.mid_depth is not None
    if xl and _spares_the_middle(found.get("unet", {})):
        raise CheckpointError(
            f"{path} does not fit {SDXL.title}: it changes attention everywhere but in the middle block, whose"
            f" convolutions it changes; it looks made for {SSD1B.title}",
            FAMILY_HINT,
        )
    if middle:
        message = f"{path} also changes motion modules in the middle block, which the motion adapter lacks"
        warnings.warn(f"{message}: those {len(middle)} layers are left out", CalotypeWarning, stacklevel=4)
    return {
        network: {name: _owned(delta, f"{path}: {name}") for name, delta in deltas.items()}
        for network, deltas in found.items()
    }


def _may_be_few_step(path: Path, deltas: Mapping[str, Mapping[str, Delta]], parts: Parts) -> bool:
    """Whether it changes every layer of the U-Net's blocks at one rank, and no text encoder: so do all that came out of
    the scripts that made the LCM-LoRAs. Ordinary ones that do come from kohya's scripts, which say so in the header.
    """
    layers = {
        f"{name}.weight"
        for name, module in parts.unet.named_modules()
        if "block" in name and MOTION not in name and isinstance(module, nn.Linear | nn.Conv2d)
    }
    changes = [delta for delta in deltas.get("unet", {}).values() if isinstance(delta, LowRank)]
    whole = deltas.keys() == {"unet"} and deltas["unet"].keys() == layers
    alike = len(changes) == len(layers) and len({len(delta.down) for delta in changes}) == 1
    return whole and alike and not any(key.startswith("ss_") for key in metadata(path))


def _is_missing_middle(name: str, parts: Parts) -> bool:
    """Whether a layer is in motion modules of the middle block, which an adapter of version 1 or 3 does not have.

    The released motion LoRAs were trained on version 2, which does, and are used on the others all the same.
    """
    found = re.search(r"mid_block[._]motion_modules[._]", name) is not None
    return found and parts.motion is not None and parts.motion.adapter.config.mid_depth is None


def _spares_the_middle(names: Iterable[str]) -> bool:
    """Whether an adapter's layers are all that SSD-1B has, which is SDXL less the middle's attention, and more."""
    told = " ".join(names)
    return "mid_block.resnets.0." in told and ".attentions." in told and "mid_block.attentions." not in told


KNOWN = (
    "known are LoRA, LoCon, LoHa, LoKr, DoRA, GLoRA, IA3 and OFT as diffusers, PEFT, kohya's scripts, LyCORIS,"
    " OneTrainer and ComfyUI write them"
)
DAMAGED = "the file is damaged: download or train it again"


def _owned(delta: Delta, where: str) -> Delta:
    """A delta that does not depend on its file, which may well be written again while it is in use."""
    if not all(is_finite(tensor) for tensor in delta.tensors()):
        raise CheckpointError(f"{where} has NaN or infinite values", DAMAGED)
    return delta.map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))


# ---- what it was made for ----


def _misfit(
    path: Path,
    parts: Parts,
    count: int,
    strange: list[str],
    misshapen: list[str],
    tensors: Mapping[str, Tensor],
) -> CheckpointError:
    titles = {family.name: family.title for family in FAMILIES}
    faults = (("name nothing in it", strange), ("are of another shape", misshapen))
    said = "; ".join(f"{len(names)} {what} ({_first(names)})" for what, names in faults if names)
    likely = made_for(shapes_of(tensors))
    hint = FAMILY_HINT
    if parts.motion is None and any("motion_modules" in name for name in strange):
        hint = "a motion LoRA takes a motion adapter: set that first"
    return CheckpointError(
        f"{path} does not fit {titles.get(parts.family, 'this model')}: of its {count} layers {said}"
        + ("" if likely is None else f"; it looks made for {likely}"),
        hint,
    )


FAMILY_HINT = "an adapter fits models of the family that it was trained on"


def _first(names: list[str]) -> str:
    return ", ".join(ascii(name)[1:-1][:120] for name in names[:3]) + (", ..." if len(names) > 3 else "")


def made_for(shapes: Mapping[str, Shape]) -> str | None:
    """The family that an adapter's keys and shapes speak of, if one."""
    if any(key.startswith("lora_prior_") for key in shapes):
        return "Stable Cascade, which is another architecture"
    if any(
        re.search(r"(double|single)_(transformer_)?blocks|joint_blocks|^(base_model\.model\.)?transformer\.", key)
        for key in shapes
    ):
        return "a diffusion transformer (Flux, SD 3 or the like), which is another architecture"
    widths = set()
    for key, shape in shapes.items():
        if re.search(r"attn2[._](processor\.)?to_[kv](_lora)?\W.*(down|lora_A|w1_b)", key) and len(shape) > 1:
            widths.add(shape[1])
    families = [family for family in FAMILIES if widths == {family.context_dim}]
    if not families:
        return f"text of width {min(widths)}" if len(widths) == 1 else None
    if len(families) > 1 and any(re.search(r"mid_block[._]attentions|middle_block[._]1", key) for key in shapes):
        families = [SDXL]  # SSD-1B has none there
    return " or ".join(family.title for family in families)
