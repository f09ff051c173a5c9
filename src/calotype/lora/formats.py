"""Adapter files -> deltas. diffusers, PEFT, kohya and LyCORIS each have their own names for the same matrices."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from calotype.errors import CalotypeWarning, CheckpointError
from calotype.families import FAMILIES, SDXL, SSD1B
from calotype.lora.deltas import Decomposed, Delta, Difference, Hadamard, Kronecker, LoRA, LowRank, Plain, Shape
from calotype.lora.names import NETWORKS, Names, networks
from calotype.parts import Parts
from calotype.weights import source
from calotype.weights.detect import looks_like
from calotype.weights.fields import Fields
from calotype.weights.files import is_finite, parse_json, read, read_json, shown
from calotype.weights.habits import habit_of

T = TypeVar("T")

DEFAULT_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"  # diffusers' entry in a file's header: the configs that PEFT trained with

# How a key ends, and what its tensor is. In PEFT's own state the adapter's name stands behind `lora_A`.
ENDINGS = tuple(
    (re.compile(f"(.+?){ending}"), part)
    for ending, part in (
        (r"(?:\.lora_A(?:\.[\w-]+)?|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight", "down"),
        (r"(?:\.lora_B(?:\.[\w-]+)?|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight", "up"),
        (r"\.lora_B(?:\.[\w-]+)?\.bias", "up_bias"),
        (r"\.lora_mid\.weight", "mid"),
        (r"\.lora_magnitude_vector(?:\.[\w-]+){0,2}", "row_lengths"),  # DoRA, of the outputs
        (r"\.dora_scale", "lengths"),  # DoRA, of the outputs or of the inputs: its shape says which
        (r"(?:_lora)?\.alpha", "alpha"),
        (r"\.hada_(?P<part>w[12]_[ab]|t[12])", "hada_"),
        (r"\.lokr_(?P<part>w[12](?:_[ab])?|t2)", "lokr_"),
        (r"\.(?P<part>diff|diff_b|w_norm|b_norm)", ""),  # LyCORIS: the whole change of a weight or a bias
    )
)


def load_lora(
    ref: str | Path, parts: Parts, *, weight_name: str | None = None, revision: str | None = None, offline: bool = False
) -> LoRA:
    """An adapter for a model: a .safetensors file, or the file `weight_name` of a folder or Hub id.

    Every key must fit the model. Raises ModelNotFoundError, UnsafeFileError, CheckpointError.
    """
    path = source.resolve_file(
        ref, weight_name, preferred=(DEFAULT_FILE, PEFT_FILE), beside=(PEFT_CONFIG,), revision=revision, offline=offline
    )
    return LoRA(str(ref), weight_name, read_lora(path, parts), revision, habit_of("lora", ref, path))


def read_lora(path: Path, parts: Parts) -> dict[str, dict[str, Delta]]:
    """What an adapter's file changes: network -> parameter -> change. Raises UnsafeFileError, CheckpointError."""
    tensors = read([path])
    layers, strange = _layers(tensors)
    if not layers:
        held = looks_like({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        raise CheckpointError(f"{path} holds no adapter that can be read: it looks like {held}", KNOWN)
    modules = networks(parts)
    shapes = {
        network: {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        for network, module in modules.items()
    }
    names, scalings = Names.of(parts), read_scalings(path)
    found: dict[str, dict[str, Delta]] = {}
    misshapen: list[str] = []
    middle: list[str] = []
    for name, layer in layers.items():
        target = names.find(name)
        if target is None:
            (middle if _is_missing_middle(name, parts) else strange).append(name)
            continue
        network, module = target
        ours = shapes[network]
        try:
            values = {part: tensors[key] for part, key in layer.items()}
            deltas = _deltas(values, scalings.get(network, Scaling()), module, ours[f"{module}.weight"])
            made = {parameter: delta.shape for parameter, delta in deltas.items()}
        except ValueError as error:
            raise CheckpointError(f"{path}: {shown(name)} {error}", KNOWN) from error
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


KNOWN = "known are LoRA, LoCon, LoHa, LoKr and DoRA as diffusers, PEFT, kohya's scripts and LyCORIS write them"


def _owned(delta: Delta, where: str) -> Delta:
    """A delta that does not depend on its file, which may well be written again while it is in use."""
    if not all(is_finite(tensor) for tensor in delta.tensors()):
        raise CheckpointError(f"{where} has NaN or infinite values", "the file is damaged: download or train it again")
    return delta.map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))


# ---- keys ----


def _layers(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """{module's name in the file: {part: key}}, and the keys that are no part of an adapter."""
    layers: dict[str, dict[str, str]] = {}
    strange = []
    for key in keys:
        match, part = next(((m, part) for pattern, part in ENDINGS if (m := pattern.fullmatch(key))), (None, ""))
        if match is not None:
            part += match.groupdict().get("part", "")
            layer = layers.setdefault(match[1], {})
        if match is None or part in layer:  # the latter: a second spelling of what is there already
            strange.append(key)
        else:
            layer[part] = key
    return layers, strange


# ---- what it is multiplied by ----


@dataclass(frozen=True)
class Scaling:
    """What a network's adapter was trained with, where the file says it."""

    alpha: float | None = None
    rank: int | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)  # of modules whose name is this, or ends so
    ranks: Mapping[str, float] = field(default_factory=dict)
    stabilised: bool = False  # rsLoRA (arXiv 2312.03732): divided by the rank's root

    def ratio(self, module: str, rank: int | None, alpha: float | None) -> float:
        """What a product of rank `rank` (None: nothing in it is of low rank) is multiplied by; `alpha`: the layer's."""
        if alpha is not None:
            return 1.0 if rank is None else alpha / rank
        if self.alpha is None:
            return 1.0
        rank_ = _of(module, self.ranks, self.rank) if rank is None else rank
        if rank_ is None:
            return 1.0
        return _of(module, self.alphas, self.alpha) / (math.sqrt(rank_) if self.stabilised else rank_)


def _of(module: str, patterns: Mapping[str, float], default: T) -> float | T:
    """The value of the first pattern that a module's name ends with (that it is, behind "^"), as in PEFT."""
    for pattern, value in patterns.items():
        for name in (module, module.removeprefix("text_model.")):  # transformers 5 leaves that out
            if name == pattern.removeprefix("^") or (pattern[0] != "^" and name.endswith(f".{pattern}")):
                return value
    return default


def read_scalings(path: Path) -> dict[str, Scaling]:
    """Each network's scaling, from the file's header (diffusers) or from adapter_config.json beside it (PEFT)."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    if text is not None:
        where = f"{path}: {METADATA}"
        raw = parse_json(text.encode(), where)
    elif path.name == PEFT_FILE and (config := path.with_name(PEFT_CONFIG)).is_file():
        where, raw = str(config), read_json(config)
    else:
        return {}
    scalings = {}
    for network in NETWORKS:
        own = {key.removeprefix(f"{network}."): value for key, value in raw.items() if key.startswith(f"{network}.")}
        if own or "peft_type" in raw:  # the latter is a single network's, whose name goes unsaid
            scalings[network] = _scaling(own or raw, where)
    return scalings


def _scaling(raw: Mapping[str, Any], where: str) -> Scaling:
    fields = Fields(raw, where)
    if fields.given("init_lora_weights") and str(raw["init_lora_weights"]).startswith(RESIDUAL):
        raise fields.refuse("init_lora_weights", "its base model was changed in training: convert it to a plain LoRA")
    alpha = "lora_alpha" if fields.given("lora_alpha") else "alpha"  # the latter is LoHa's and LoKr's
    return Scaling(
        alpha=fields.number(alpha, 0.0, -1e6, 1e6) if fields.given(alpha) else None,
        rank=fields.integer("r", 1, 1, 2**20) if fields.given("r") else None,
        alphas=_patterns(fields, "alpha_pattern", -1e6),
        ranks=_patterns(fields, "rank_pattern", 1),
        stabilised=fields.flag("use_rslora", False),
    )


RESIDUAL = ("pissa", "olora", "corda", "loftq")  # they keep in the adapter what they take from the base


def _patterns(fields: Fields, name: str, low: float) -> dict[str, float]:
    """PEFT takes these names for regular expressions; a plain name is one as well, and nothing else is written."""
    raw = fields.raw.get(name) or {}
    if not isinstance(raw, dict) or not all(re.fullmatch(r"\^?[\w.-]+", pattern) for pattern in raw):
        raise fields.refuse(name, "an object of modules' names and numbers is needed")
    return {pattern: Fields(raw, f"{fields.where}: {name}").number(pattern, 1.0, low, 1e6) for pattern in raw}


# ---- parts of a layer -> deltas ----


def _deltas(layer: dict[str, Tensor], scaling: Scaling, module: str, shape: Shape) -> dict[str, Delta]:
    """A layer's changes by parameter ("weight", "bias"). Raises ValueError, a phrase about the layer."""
    left = dict(layer)  # each part is taken out of it when it is used
    alpha = _number(left.pop("alpha")) if "alpha" in left else None

    def ratio(rank: int | None) -> float:
        if rank == 0:
            raise ValueError("is of rank 0")
        return scaling.ratio(module, rank, alpha)

    lengths = _lengths(left, shape)
    found: dict[str, Delta] = {}
    rank = len(left["down"]) if "down" in left and left["down"].ndim else None
    if (weight := _weight(left, ratio)) is not None:
        found["weight"] = weight if lengths is None else Decomposed(weight, lengths)
    for part, of in (("up_bias", ratio(rank)), ("diff_b", 1.0), ("b_norm", 1.0)):
        if part in left:
            found["bias"] = Difference(left.pop(part), of)
    if left or not found:
        raise ValueError(f"has {', '.join(left) or 'alpha'} without what belongs to it")
    return found


def _weight(left: dict[str, Tensor], ratio: Callable[[int | None], float]) -> Plain | None:
    if "down" in left or "up" in left:
        low = _low_rank(left, "up", "down", "mid")
        return replace(low, ratio=ratio(len(low.down)))
    if any(part.startswith("hada_") for part in left):
        first, second = (_low_rank(left, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
        return Hadamard(first, second, ratio(len(first.down)))
    if any(part.startswith("lokr_") for part in left):
        one, other = (
            Difference(left.pop(f"lokr_w{i}"))
            if f"lokr_w{i}" in left
            else _low_rank(left, f"lokr_w{i}_a", f"lokr_w{i}_b", f"lokr_t{i}")
            for i in (1, 2)
        )
        ranks = [len(side.down) for side in (one, other) if isinstance(side, LowRank)]
        return Kronecker(one, other, ratio(ranks[-1] if ranks else None))
    whole = next((part for part in ("diff", "w_norm") if part in left), None)
    return None if whole is None else Difference(left.pop(whole))


def _low_rank(left: dict[str, Tensor], up: str, down: str, mid: str) -> LowRank:
    for part in (up, down):
        if part not in left:
            raise ValueError(f"has no {part}")
        if left[part].ndim < 2:
            raise ValueError(f"has a {part} of shape {list(left[part].shape)}")
    a, b, middle = left.pop(up), left.pop(down), left.pop(mid, None)
    if middle is not None and up != "up":  # LyCORIS has its own Tucker forms the other way round: (r, O)
        a = a.transpose(0, 1)
    return LowRank(b, a, mid=middle)


def _lengths(left: dict[str, Tensor], shape: Shape) -> Tensor | None:
    """DoRA's magnitudes, in a shape that goes with the weight's."""
    ones = [1] * (len(shape) - 2)
    if "row_lengths" in left:
        lengths, rows = left.pop("row_lengths"), True  # (O,), or of a convolution (1, O, 1, 1)
    elif "lengths" in left:
        lengths = left.pop("lengths")  # (O, 1, ...) or (1, I, ...)
        rows = lengths.ndim == 1 or len(lengths) == shape[0]
    else:
        return None
    if lengths.numel() != shape[0 if rows else 1]:
        raise ValueError(f"has {lengths.numel()} lengths for a weight of shape {list(shape)}")
    return lengths.reshape(-1, 1, *ones) if rows else lengths.reshape(1, -1, *ones)


def _number(tensor: Tensor) -> float:
    if tensor.numel() != 1 or not math.isfinite(tensor.item()):
        raise ValueError(f"has the alpha {shown(tensor.tolist())}")
    return float(tensor.item())


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
    likely = made_for({key: tuple(tensor.shape) for key, tensor in tensors.items()})
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
    if any(re.search(r"(double|single)_(transformer_)?blocks|joint_blocks|^transformer\.", key) for key in shapes):
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
