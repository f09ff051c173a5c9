"""What an adapter's products are multiplied by, and how its rotations are computed: PEFT's configs, in the file's
header (diffusers) or in adapter_config.json beside it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from calotype.errors import CalotypeWarning
from calotype.lora.names import NETWORKS
from calotype.weights.fields import Fields
from calotype.weights.files import metadata, parse_json, read_json

T = TypeVar("T")

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"  # diffusers' entry in a file's header: the configs that PEFT trained with


@dataclass(frozen=True)
class Rotations:
    """How PEFT's OFT computed rotations."""

    terms: int | None  # of Neumann's series; None: Cayley's transform itself
    most: float | None  # COFT's eps, where it was used


@dataclass(frozen=True)
class Scaling:
    """What a network's adapter was trained with, where the file says it."""

    alpha: float | None = None
    rank: int | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)  # of modules whose name is this, or ends so
    ranks: Mapping[str, float] = field(default_factory=dict)
    stabilised: bool = False  # rsLoRA (arXiv 2312.03732): divided by the rank's root
    rotations: Rotations | None = None
    on_inputs: tuple[str, ...] | None = None  # modules whose inputs IA3 scales: their names end so

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
    text = metadata(path).get(METADATA)
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
    rotates = fields.given("oft_block_size") or raw.get("peft_type") == "OFT"
    least = 0 if rotates else 1  # OFT has either `r` or `oft_block_size`
    return Scaling(
        alpha=fields.number(alpha, 0.0, -1e6, 1e6) if fields.given(alpha) else None,
        rank=fields.integer("r", 1, least, 2**20) if fields.given("r") else None,
        alphas=_patterns(fields, "alpha_pattern", -1e6),
        ranks=_patterns(fields, "rank_pattern", 1),
        stabilised=fields.flag("use_rslora", False),
        rotations=_rotations(fields) if rotates else None,
        on_inputs=_names(fields, "feedforward_modules") if fields.given("feedforward_modules") else None,
    )


RESIDUAL = ("pissa", "olora", "corda", "loftq")  # they keep in the adapter what they take from the base


def _rotations(fields: Fields) -> Rotations:
    series = fields.flag("use_cayley_neumann", True) and fields.given("oft_block_size")
    if series and _version(fields) < (0, 18):
        message = "was trained before PEFT 0.18, whose series for rotations ends a little differently"
        warnings.warn(
            f"{fields.where}: it {message}: it is applied as PEFT applies it now", CalotypeWarning, stacklevel=6
        )
    return Rotations(
        terms=fields.integer("num_cayley_neumann_terms", 5, 1, 100) if series else None,
        most=fields.number("eps", 6e-5, 0.0, 1e6) if fields.flag("coft", False) else None,
    )


def _version(fields: Fields) -> tuple[int, int]:
    """PEFT's, which configs say from 0.18 on."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})", str(fields.raw.get("peft_version")))
    return (0, 0) if found is None else (int(found[1]), int(found[2]))


def _names(fields: Fields, name: str) -> tuple[str, ...]:
    values = fields.items(name, (), 0, 10_000)
    if not all(isinstance(value, str) for value in values):
        raise fields.refuse(name, "a list of modules' names is needed")
    return values


def _patterns(fields: Fields, name: str, low: float) -> dict[str, float]:
    """PEFT takes these names for regular expressions; a plain name is one as well, and nothing else is written."""
    raw = fields.raw.get(name) or {}
    if not isinstance(raw, dict) or not all(re.fullmatch(r"\^?[\w.-]+", pattern) for pattern in raw):
        raise fields.refuse(name, "an object of modules' names and numbers is needed")
    return {pattern: Fields(raw, f"{fields.where}: {name}").number(pattern, 1.0, low, 1e6) for pattern in raw}
