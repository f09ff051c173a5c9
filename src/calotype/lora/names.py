"""What adapters' files call our modules, in both directions: tables made from the networks at hand, nothing is guessed.

diffusers and PEFT write a module's own name behind the network's; kohya's scripts put `_` for every dot, and for SDXL
take the names of the LDM code. So every spelling is looked up with `_` for dots.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from calotype.nn.clip import CLIPText
from calotype.nn.unet import UNet
from calotype.parts import Parts
from calotype.weights.ldm import unet_table
from calotype.weights.wrapping import COMPILERS

NETWORKS = ("unet", "text_encoder", "text_encoder_2")
ADAPTABLE = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}

# What stands before a module's name, with `_` for dots -> its network; None: what another program wraps it in.
PREFIXES: dict[str, str | None] = {
    **{prefix: network for network, prefix in KOHYA_PREFIXES.items()},
    "lora_te_": "text_encoder",  # kohya's, of models with one text encoder
    "oft_unet_": "unet",  # kohya's, of OFT
    **{f"{network}_": network for network in NETWORKS},
    "text_encoder_1_": "text_encoder",
    "diffusion_model_": "unet",  # LDM's and ComfyUI's
    **{f"{head}clip_{letter}_": "text_encoder" for head in ("text_encoders_", "") for letter in "lh"},  # ComfyUI's
    **{f"{head}clip_g_": "text_encoder_2" for head in ("text_encoders_", "")},
    "cond_stage_model_": "text_encoder",  # LDM's
    "conditioner_embedders_0_": "text_encoder",  # SGM's
    "conditioner_embedders_1_": "text_encoder_2",
    "model_": None,
    "transformer_": None,
}
LONGEST_FIRST = sorted(PREFIXES, key=len, reverse=True)

# What PEFT, LyCORIS, compilers, sharding and transformers put around a network or a block. No network here has a module
# with such a name, so it may go wherever it stands. With `_` for dots, as kohya has it, `model` may be of `text_model`.
WRAPPERS = (*COMPILERS, "module", "lycoris", "processor")
DOTTED_WRAPPERS = {*WRAPPERS, "base_model", "model", "transformer"}
WRAPPED = re.compile(rf"(?:(?<=_)|^)(?:base_model_model|{'|'.join(WRAPPERS)})(?:_|$)")

# CLIP's attention as diffusers once called it, and the motion modules' as AnimateDiff's authors do.
CLIP_OLD = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
TOKENS = "text_model.embeddings.token_embedding.weight"
MOTION = ".motion_modules."  # only the names of a U-Net's motion modules have it
MOTION_OLD = {"attn1": "attention_blocks.0", "attn2": "attention_blocks.1"}


def networks(parts: Parts) -> dict[str, nn.Module]:
    """The networks of a model that adapters change, by diffusers' names for them."""
    return dict(zip(NETWORKS, (parts.unet, *parts.text.models), strict=False))


@dataclass(frozen=True)
class Names:
    """The spellings of the modules of a model's networks."""

    tables: Mapping[str, Mapping[str, str]]  # network -> spelling with `_` for dots -> our name of the module

    @staticmethod
    def of(parts: Parts) -> Names:
        return Names({network: _table(module) for network, module in networks(parts).items()})

    def find(self, path: str) -> tuple[str, str] | None:
        """(network, our name of the module) of a module's name in a file."""
        said, spelling = _parse(path)
        networks = self.tables if said is None else [said]
        for network in networks:
            module = self.tables.get(network, {}).get(spelling)
            if module is not None:
                return network, module
        return None

    def is_unused(self, path: str) -> bool:
        """Whether it is the projection of pooled text of a text encoder of ours that has none, for no part of the model
        reads it.
        """
        network, spelling = _parse(path)
        return network != "unet" and network in self.tables and spelling == "text_projection" and not self.find(path)


def _parse(path: str) -> tuple[str | None, str]:
    """A module's name in a file as its network, if that is said, and the rest without wrappers, with `_` for dots."""
    spelling = "_".join(name for name in path.split(".") if name not in DOTTED_WRAPPERS)
    spelling = WRAPPED.sub("", spelling).strip("_")
    said: str | None = None
    while (prefix := next((prefix for prefix in LONGEST_FIRST if spelling.startswith(prefix)), None)) is not None:
        network = PREFIXES[prefix]
        if said is not None and network not in (None, said):
            return said, path  # two networks: it names nothing
        said, spelling = network or said, spelling.removeprefix(prefix)
    return said, spelling


def own_rows(network: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """A parameter of a network as its files have it: without the rows of words that were added behind its tokens'."""
    return parameter[: network.config.vocab_size] if name == TOKENS and isinstance(network, CLIPText) else parameter


def ldm_names(unet: UNet) -> dict[str, str]:
    """Our names of a U-Net's modules -> the LDM code's. Motion modules have none."""
    ours = [name for name in _adaptable(unet) if MOTION not in name]
    table = unet_table([f"{name}.weight" for name in ours], unet.config)
    return {name: table[f"{name}.weight"].removesuffix(".weight") for name in ours}


def kohya_name(network: str, module: str, ldm: Mapping[str, str]) -> str:
    """What kohya's scripts call a module: its name, or for SDXL's U-Net the one in `ldm_names`, with `_` for dots."""
    return KOHYA_PREFIXES[network] + (ldm.get(module, module) if network == "unet" else module).replace(".", "_")


def _adaptable(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, ADAPTABLE)]


def _table(network: nn.Module) -> dict[str, str]:
    ldm = ldm_names(network) if isinstance(network, UNet) else {}
    table: dict[str, str] = {}
    for name in _adaptable(network):
        for spelling in _spellings(name, ldm.get(name)):
            table.setdefault(spelling.replace(".", "_"), name)
    return table


def _spellings(name: str, ldm: str | None) -> Iterator[str]:
    """All that a module is called, with dots; our own name first."""
    names = [name] if ldm is None else [name, ldm]
    if MOTION in name:
        names.append(_motion_old(name))
    if name.startswith("text_model."):
        block, _, projection = name.rpartition(".")
        if projection in CLIP_OLD:
            names.append(f"{block}.{CLIP_OLD[projection]}")
        names += [other.removeprefix("text_model.") for other in names]  # transformers 5 leaves it out
    for other in names:
        yield other
        if other.endswith(".to_out.0"):
            yield other.removesuffix(".0")


def _motion_old(name: str) -> str:
    """AnimateDiff's own name of a motion module's layer."""
    module, _, rest = name.partition(".transformer_blocks.")
    for ours, theirs in MOTION_OLD.items():
        rest = rest.replace(f".{ours}.", f".{theirs}.")
    return f"{module}.temporal_transformer.transformer_blocks.{rest}" if rest else name
