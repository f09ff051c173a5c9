"""What a file is, from the names and shapes in its header."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from calotype.families import CUSTOM, Family, recognise
from calotype.weights.names import Kind

Shapes = Mapping[str, tuple[int, ...]]


class Shaped(Protocol):
    """A tensor, or what a file's header says of one."""

    @property
    def shape(self) -> Sequence[int]: ...


def shapes_of(tensors: Mapping[str, Shaped]) -> dict[str, tuple[int, ...]]:
    """Their shapes, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


SINGLE_FILE = "a single-file (LDM) checkpoint"
TRANSFORMER = "a diffusion transformer, which is another architecture"
UNION = "a ControlNet Union (ControlNet++), which takes pictures of several kinds at once"
CONTROL_TRANSFORMER = "a ControlNet for a diffusion transformer (Stable Diffusion 3, Flux)"
CONTROL_XS, SPARSE, LLLITE = "a ControlNet-XS", "a SparseCtrl, a ControlNet for clips", "a ControlNet-LLLite"
STYLE, FUSER, IP_ADAPTER = "a T2I style adapter", "a CoAdapter fuser", "an IP-Adapter"
# What is given as a control and is none that is known here -> what there is instead.
SINGLE_KIND = "use a ControlNet for one kind of picture"
NAMED_REFUSALS = {
    UNION: SINGLE_KIND,
    CONTROL_TRANSFORMER: "use one for Stable Diffusion 1.x, 2.x or SDXL",
    CONTROL_XS: SINGLE_KIND,
    SPARSE: "use an ordinary ControlNet: it acts on every frame",
    LLLITE: SINGLE_KIND,
    STYLE: "use an ordinary T2I-Adapter",
    FUSER: "use the T2I-Adapters without it",
    IP_ADAPTER: "image prompts are not read; image= begins from a picture",
}
# Patterns that are found in names of files of this sort only, each in one name at least; the first match counts.
SIGNS: tuple[tuple[str, ...], ...] = (
    (r"(^|\.)ip_adapter\.\d|\.to_[kv]_ip\.", IP_ADAPTER),
    (r"^lllite_", LLLITE),
    (r"(^|\.)spatial_feat_mapping\.", FUSER),
    (r"(^|\.)style_embedding$", STYLE),
    (r"(^|\.)(task_embedding$|control_add_embedding\.)", UNION),
    (r"(^|\.)(control_to_base_for_conv_in|(base_to_ctrl|ctrl_to_base)|enc_zero_convs_(in|out))\.", CONTROL_XS),
    (r"(^|\.)controlnet_(blocks|single_blocks|x_embedder)\.", CONTROL_TRANSFORMER),
    (r"(^|\.)(controlnet_cond_embedding|input_hint_block)\.", r"\.motion_modules\.", SPARSE),
    (r"(^|\.)lora_controlnet$", "a Control-LoRA"),
    (r"(^|\.)input_hint_block\.", r"(^|\.)(input_blocks|middle_block)\..*\.up$", "a Control-LoRA"),
    (r"(^|\.)input_hint_block\.", r"(^|\.)difference$", "a ControlNet as a difference from its model's U-Net"),
    (r"controlnet_cond_embedding\.", r"(^|\.)difference$", "a ControlNet as a difference from its model's U-Net"),
    (r"lora|^lycoris_|oft_unet_|\.hada_w1_|\.lokr_w|\.oft_|\.ia3_l", "a LoRA"),
    (r"controlnet_cond_embedding\.|control_model\.|input_hint_block\.", "a ControlNet"),
    (r"motion_modules\.", "a motion module"),
    (r"adapter\.body\.|(^|\.)body\.0\.(in_conv|block1|resnets\.0\.block1)\.", "a T2I-Adapter"),
    (r"joint_blocks\.", TRANSFORMER),  # Stable Diffusion 3
    (r"double_blocks\.", TRANSFORMER),  # Flux, HunyuanVideo
    (r"double_layers\.", TRANSFORMER),  # AuraFlow
    (r"transformer_blocks\.0\.attn\.norm_added_k", TRANSFORMER),
    (r"adaln_single\.", TRANSFORMER),  # PixArt, LTX
    (r"\.channelwise\.", "a model of Stable Cascade, which is another architecture"),
    (r"edm_mean", "an EDM model (Playground 2.5), whose noise levels are other than Stable Diffusion's"),
    (r"edm_vpred\.", "an EDM model (CosXL), whose noise levels are other than Stable Diffusion's"),
    (r"input_blocks\.0\.0\.weight", SINGLE_FILE),
    (r"(^|\.)(taesd_)?decoder\.3\.conv\.0\.weight$", "a tiny autoencoder (TAESD)"),
    (r"^3\.conv\.0\.weight$", r"^0\.weight$", "the encoder of a tiny autoencoder (TAESD)"),
    (r"^3\.conv\.0\.weight$", r"^1\.weight$", "the decoder of a tiny autoencoder (TAESD)"),
)
# Where a file has its U-Net, if LDM named it.
UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
REFINER_WIDTH = 384
# What tells the families apart: the first convolution, the added inputs, the attention in the middle.
SIGNATURE = ("conv_in.weight", "add_embedding.linear_1.weight", "mid_block.attentions.")
LDM_SIGNATURE = ("input_blocks.0.0.weight", "label_emb.0.0.weight", "middle_block.1.")
TEXT_WIDTHS = {
    768: "CLIP L's text encoder",
    1024: "OpenCLIP H's text encoder",
    1280: "OpenCLIP bigG's text encoder",
}


def kind_of(shapes: Shapes) -> Kind | None:
    """Which of a pipeline's networks a file holds, if one."""
    if sort_of(shapes) is not None:
        return None
    if "time_embedding.linear_1.weight" in shapes and "conv_in.weight" in shapes:
        return "unet"
    if "decoder.conv_in.weight" in shapes or is_tiny(shapes):
        return "vae"
    if any(name.endswith("embeddings.token_embedding.weight") for name in shapes):
        return "text_encoder"
    return None


def sort_of(shapes: Shapes) -> str | None:
    """What a file is that is none of a pipeline's networks."""
    for *signs, sort in SIGNS:
        if all(any(re.search(sign, name) for name in shapes) for sign in signs):
            return sort
    return None


def is_tiny(shapes: Shapes, prefix: str = "") -> bool:
    """Whether an autoencoder is the tiny one."""
    return any(name.startswith(f"{prefix}decoder.layers.") for name in shapes)


def unet_prefix(shapes: Shapes) -> str | None:
    """What stands before the names of a U-Net that LDM named, if the file has one."""
    return next((prefix for prefix in UNET_PREFIXES if f"{prefix}input_blocks.0.0.weight" in shapes), None)


def unet_family(shapes: Shapes, prefix: str = "", *, ldm: bool = False) -> Family:
    """The family of a file's U-Net, in diffusers' names or in LDM's, or CUSTOM."""
    conv_in, added, middle = LDM_SIGNATURE if ldm else SIGNATURE
    widths = {
        shape[-1]
        for name, shape in shapes.items()
        if name.startswith(prefix) and name.endswith("attn2.to_k.weight") and shape
    }
    return recognise(
        width=next(iter(shapes.get(f"{prefix}{conv_in}", ())), 0),
        context_dim=max(widths, default=0),
        pooled=f"{prefix}{added}" in shapes,
        mid_attention=any(name.startswith(f"{prefix}{middle}") for name in shapes),
    )


def is_refiner(shapes: Shapes, prefix: str) -> bool:
    """Whether a U-Net that LDM named is that of SDXL's refiner, which no other model is as wide as."""
    return shapes[f"{prefix}input_blocks.0.0.weight"][:1] == (REFINER_WIDTH,)


def _title(shapes: Shapes, prefix: str) -> str:
    if is_refiner(shapes, prefix):
        return "SDXL's refiner"
    family = unet_family(shapes, prefix, ldm=True)
    return "no known family" if family is CUSTOM else family.title


def looks_like(shapes: Shapes) -> str:
    """What a file looks like, as an English phrase: "SDXL's U-Net", "a LoRA", "nothing known"."""
    sort, kind = sort_of(shapes), kind_of(shapes)
    if sort is not None:
        prefix = unet_prefix(shapes)
        return sort if prefix is None or sort != SINGLE_FILE else f"{sort} of {_title(shapes, prefix)}"
    if kind == "unet":
        return _unet_like(shapes)
    if kind == "vae":
        return "a tiny autoencoder (TAESD)" if is_tiny(shapes) else "an autoencoder (AutoencoderKL)"
    if kind == "text_encoder":
        width = next((s[-1] for name, s in shapes.items() if name.endswith("token_embedding.weight") and s), 0)
        return TEXT_WIDTHS.get(width, f"a CLIP text encoder of width {width}")
    return "nothing known"


def _unet_like(shapes: Shapes) -> str:
    family = unet_family(shapes)
    lcm = " with guidance embedding (LCM)" if "time_embedding.cond_proj.weight" in shapes else ""
    owner = "a U-Net of no known family" if family is CUSTOM else f"{family.title}'s U-Net"
    return owner + lcm
