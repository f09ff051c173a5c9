"""The configs, scheduler and tokenizer settings that a single file lacks: those of its family come with the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calotype.families import SD21, Family
from calotype.weights.detect import Shapes

FAMILIES = Path(__file__).parent / "families"
GUIDANCE = ("time_embedding.cond_proj.weight", "time_embed.cond_proj.weight")  # an LCM's, in the spellings that occur

# What a file can say of its prediction in its header: (key, beginnings that mean velocity, beginnings that mean noise).
SAID = (
    ("modelspec.prediction_type", ("v",), ("eps",)),
    ("modelspec.predict_key", ("v",), ("eps",)),  # ComfyUI's
    ("modelspec.architecture", ("stable-diffusion-v2-768-v",), ("stable-diffusion-v2-512",)),
)

INPAINTING_CHANNELS = 9
V_SIZE = 96  # latents' side of Stable Diffusion 2.x's velocity models, which were trained on larger pictures
LCM_SCHEDULER = {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_spacing": "leading"}
KEPT = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type", "rescale_betas_zero_snr")


def family_texts(family: Family) -> dict[str, dict[str, Any]]:
    """The JSON files of a family's folder: their names there -> what they say."""
    found: dict[str, dict[str, Any]] = json.loads((FAMILIES / f"{family.name}.json").read_text("utf-8"))
    return found


def said_prediction(metadata: Mapping[str, str]) -> str | None:
    """The prediction that a file's header names, if it names one."""
    for key, velocity, noise in SAID:
        value = metadata.get(key, "").lower()
        if value.startswith((*velocity, *noise)):
            return "v_prediction" if value.startswith(velocity) else "epsilon"
    return None


def texts_of(family: Family, shapes: Shapes, prediction: str, *, zero_snr: bool = False) -> dict[str, dict[str, Any]]:
    """The family's files, changed to what a U-Net of it shows: `shapes` are its tensors without the prefix.

    `zero_snr` says that it was trained with a zero terminal signal-to-noise ratio.
    """
    texts = family_texts(family)
    unet, scheduler, index = (
        texts["unet/config.json"],
        texts["scheduler/scheduler_config.json"],
        texts["model_index.json"],
    )
    first = shapes.get("input_blocks.0.0.weight") or shapes.get("conv_in.weight", ())
    unet["in_channels"] = first[1] if len(first) > 1 else unet["in_channels"]
    guidance = next((shapes[name] for name in GUIDANCE if name in shapes), None)
    scheduler["prediction_type"] = prediction
    if zero_snr:
        scheduler["rescale_betas_zero_snr"] = True
    if family is SD21 and prediction == "v_prediction":
        unet["sample_size"] = V_SIZE
    if guidance is not None:
        unet["time_cond_proj_dim"] = guidance[-1] if guidance else 0
        scheduler = LCM_SCHEDULER | {name: scheduler[name] for name in KEPT if name in scheduler}
        texts["scheduler/scheduler_config.json"] = scheduler
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    if unet["in_channels"] == INPAINTING_CHANNELS:
        index["_class_name"] = index["_class_name"].replace("Pipeline", "InpaintPipeline")
    elif guidance is not None and index["_class_name"] == "StableDiffusionPipeline":
        index["_class_name"] = "LatentConsistencyModelPipeline"
    return texts
