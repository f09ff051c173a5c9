"""The spellings that real files use for one tensor -> our networks' name for it (that of diffusers or transformers)."""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal["unet", "vae", "text_encoder", "clip"]  # "clip": a whole CLIP, which is no part of a pipeline
# A model's networks, by the names of their folders.
KINDS: dict[str, Kind] = {
    "unet": "unet",
    "vae": "vae",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder",
}

# What training leaves in a file beside the weights, of a model or of an adapter: counts, noise levels that it computed,
# averages, its optimizer's state, words that were being learnt. Nothing here reads it.
BOOKKEEPING = re.compile(
    r"(.*\.)?((global_|current_|num_|total_)?(step|epoch|iter|iteration|update)s?|iter_num|lr|best_loss)"
    r"|(.*\.)?num_batches_tracked|state|best_model_score|pytorch-lightning_version"
    r"|(log_)?sigmas|ddim_(sigmas|alphas|alphas_prev|sqrt_one_minus_alphas|timesteps)(_for_original_num_steps)?"
    r"|(model_ema|embedding_manager|optimizers?|optimizer_states|lr_schedulers?|callbacks|loops)\..*|model_ema_.*"
    r"|_aux\..*"  # which makers of sliders append to LoRAs
)

# Saved along with the weights, but not weights of the network.
IGNORABLE: dict[Kind, re.Pattern[str]] = {
    "unet": re.compile(r"model_ema\..*"),
    "vae": re.compile(r"model_ema\..*|loss\..*"),
    "text_encoder": re.compile(
        r"(.*\.)?position_ids"  # a buffer 0, 1, 2, ... that transformers saved until 4.31
        r"|logit_scale|vision_model\..*|visual_projection\..*"  # the other half of a whole CLIP
        r"|model_ema\..*"
    ),
    "clip": re.compile(r"(.*\.)?position_ids"),
}

# The VAE's attention before diffusers 0.15, as LDM's and later as an "AttentionBlock".
VAE_ATTENTION = re.compile(
    r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn|to_q|to_k|to_v|to_out\.0)\.(weight|bias)"
)
VAE_PROJECTIONS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# CLIP's text model with or without the prefix: transformers 5 leaves it out of a CLIPTextModel, older ones write it.
TEXT_ROOTS = ("embeddings.", "encoder.", "final_layer_norm.")


def canonical(kind: Kind, name: str, *, projection: bool = True) -> str | None:
    """Our name of the tensor that a file calls `name`, or None where it is known not to matter.

    `projection` says whether the text encoder projects its pooled output; if not, a file's `text_projection` is unused.
    """
    if IGNORABLE[kind].fullmatch(name) or BOOKKEEPING.fullmatch(name):
        return None
    if kind == "text_encoder":
        if name == "text_projection.weight" and not projection:
            return None
        return f"text_model.{name}" if name.startswith(TEXT_ROOTS) else name
    if kind == "vae" and (match := VAE_ATTENTION.fullmatch(name)):
        block, projection_name, parameter = match.groups()
        return f"{block}.{VAE_PROJECTIONS.get(projection_name, projection_name)}.{parameter}"
    return name


def may_squeeze(kind: Kind, name: str) -> bool:
    """Whether files hold `name` (ours) as a 1x1 convolution (C, C, 1, 1) too, where we have a linear layer (C, C)."""
    return kind == "vae" and name.endswith(".weight") and VAE_ATTENTION.fullmatch(name) is not None
