"""What a file is, from the names and shapes in its header."""

from __future__ import annotations

from collections.abc import Mapping

from calotype.families import CUSTOM, recognise
from calotype.weights.names import Kind

Shapes = Mapping[str, tuple[int, ...]]

# A name that only files of this sort have, or a part of it; the first match counts.
SIGNS = (
    ("lora", "a LoRA"),
    ("model.diffusion_model.", "a single-file (LDM) checkpoint"),
    ("controlnet_cond_embedding.", "a ControlNet"),
    ("motion_modules.", "a motion module"),
    ("adapter.body.", "a T2I-Adapter"),
    ("transformer_blocks.0.attn.norm_added_k", "a diffusion transformer, which is another architecture"),
)
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
    return next((sort for sign, sort in SIGNS if any(sign in name for name in shapes)), None)


def is_tiny(shapes: Shapes) -> bool:
    """Whether an autoencoder is the tiny one."""
    return any(name.startswith("decoder.layers.") for name in shapes)


def looks_like(shapes: Shapes) -> str:
    """What a file looks like, as an English phrase: "SDXL's U-Net", "a LoRA", "nothing known"."""
    sort, kind = sort_of(shapes), kind_of(shapes)
    if sort is not None:
        return sort
    if kind == "unet":
        return _unet_like(shapes)
    if kind == "vae":
        return "a tiny autoencoder (TAESD)" if is_tiny(shapes) else "an autoencoder (AutoencoderKL)"
    if kind == "text_encoder":
        width = next((s[-1] for name, s in shapes.items() if name.endswith("token_embedding.weight") and s), 0)
        return TEXT_WIDTHS.get(width, f"a CLIP text encoder of width {width}")
    return "nothing known"


def _unet_like(shapes: Shapes) -> str:
    widths = {shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and shape}
    conv_in = shapes["conv_in.weight"]
    family = recognise(
        width=conv_in[0] if conv_in else 0,
        context_dim=max(widths, default=0),
        pooled="add_embedding.linear_1.weight" in shapes,
        mid_attention=any(name.startswith("mid_block.attentions.") for name in shapes),
    )
    lcm = " with guidance embedding (LCM)" if "time_embedding.cond_proj.weight" in shapes else ""
    owner = "a U-Net of no known family" if family is CUSTOM else f"{family.title}'s U-Net"
    return owner + lcm
