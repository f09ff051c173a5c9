"""A request as AUTOMATIC1111's web UI writes it into a picture's file, for the programs and sites that read that.

What its names mean there is in its create_infotext (modules/processing.py) and its Lora extension: "Clip skip" counts
from the last layer, so 1 is none; a LoRA stands in the prompt; the hash is of a single file; commas and colons part the
values, so no name has any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from calotype.samplers import SAMPLERS

TWO_ENCODERS = ("sdxl", "ssd1b")  # families that use the last layer but one as they are: there that is "Clip skip: 2"
DIGITS = 10  # of a model's hash


def parameters(metadata: Mapping[str, Any]) -> str:
    """The prompt, the negative prompt, then a line of names and values, of the picture that `metadata` describes."""
    request = metadata.get("request", {})
    described = metadata.get("model", {})
    model = described if isinstance(described, Mapping) else {"model": described}
    loras = [f"<lora:{_name(_file_of(each))}:{each['scale']:g}>" for each in model.get("loras", {}).values()]
    lines = [" ".join([str(request.get("prompt", "")), *loras])]
    if request.get("negative_prompt"):
        lines.append(f"Negative prompt: {request['negative_prompt']}")
    skipped, seed = request.get("clip_skip"), request.get("seed")
    ref, digits = model.get("model"), model.get("files", {}).get("model", {}).get("sha256")
    named = {
        "Steps": request.get("steps"),
        "Sampler": SAMPLERS[request["sampler"]].title if request.get("sampler") in SAMPLERS else None,
        "CFG scale": request.get("guidance"),
        "Seed": None if seed is None else seed + metadata.get("index", 0),
        "Size": f"{request['width']}x{request['height']}" if "width" in request and "height" in request else None,
        "Model hash": None if digits is None else digits[:DIGITS],
        "Model": None if ref is None else _name(ref) or None,
        "Denoising strength": request.get("strength"),
        "Clip skip": None if skipped is None else skipped + (2 if model.get("family") in TWO_ENCODERS else 1),
        "Version": "calotype",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in named.items() if value is not None))
    return "\n".join(lines).replace("\0", "")


def _file_of(lora: Mapping[str, Any]) -> str:
    file = lora.get("weight_name")
    return str(lora["ref"] if file is None else file)


def _name(ref: str) -> str:
    """The last part of a path or a Hub id, without what follows its name: where a file lies is nobody's business."""
    last = re.split(r"[/\\]", ref.rstrip("/\\"))[-1].partition("@")[0].removesuffix(".safetensors")
    return re.sub(r"[,:<>\n]", "", last).strip(".")
