"""Writing what was distilled: a model as a folder in the diffusers layout, a LoRA as diffusers writes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from calotype.lora import LoRA, LowRank
from calotype.lora.formats import DEFAULT_FILE, METADATA
from calotype.nn.unet import UNet
from calotype.parts import Parts
from calotype.weights.write import Pending, write_safetensors

SHARED = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
# What the student inherits from the teacher's scheduler config: the noise levels and what the network predicts.
SCHEDULE = (
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "num_train_timesteps",
    "prediction_type",
    "rescale_betas_zero_snr",
)
SCHEDULER = {
    "_class_name": "LCMScheduler",
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
    "timestep_spacing": "leading",
    "clip_sample": False,
    "set_alpha_to_one": True,
}


def export_lcm(teacher: Path, unet: UNet, parts: Parts, output: Path, history: list[dict[str, Any]]) -> None:
    """Writes `unet`, in float16, and the teacher's other parts to `output`. `history` is the run's settings.

    model_index.json comes last, so that a folder that has one is complete.
    """
    for name in SHARED:
        if (teacher / name).is_dir():
            shutil.copytree(teacher / name, output / name, dirs_exist_ok=True)

    config = json.loads((teacher / "unet" / "config.json").read_text())
    config["time_cond_proj_dim"] = unet.config.guidance_dim
    weights = {
        name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in unet.state_dict().items()
    }
    (output / "unet").mkdir(exist_ok=True)
    file = output / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes it readable by its owner alone, unlike every other file of the folder
    _write(output / "unet" / "config.json", config)

    scheduler = json.loads((teacher / "scheduler" / "scheduler_config.json").read_text())
    (output / "scheduler").mkdir(exist_ok=True)
    _write(
        output / "scheduler" / "scheduler_config.json",
        {**SCHEDULER, **{name: scheduler[name] for name in SCHEDULE if name in scheduler}},
    )

    settings = history[-1]
    low, high = 1 + settings["w_min"], 1 + settings["w_max"]
    _write(
        output / "calotype.json",
        {
            "sampler": settings["sampler"],
            "steps": 4,
            "guidance": min(max(parts.defaults.guidance, low), high),
            "width": settings["resolution"],
            "height": settings["resolution"],
            "guidance_range": [low, high],
        },
    )
    _write(output / "distillation.json", history)  # how it was made
    index = json.loads((teacher / "model_index.json").read_text())
    index["_class_name"] = "LatentConsistencyModelPipeline" if parts.family != "sdxl" else "StableDiffusionXLPipeline"
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    _write(output / "model_index.json", index)


def export_lora(lora: LoRA, output: Path, history: list[dict[str, Any]]) -> Path:
    """Writes an adapter of the U-Net, in float16, under the names of diffusers and PEFT; returns its file.

    The header says how PEFT would have trained it: that is where diffusers and we find alpha, which is the rank here.
    """
    tensors: dict[str, Pending] = {}
    modules, ranks = [], set()
    for parameter, delta in lora.deltas["unet"].items():
        assert isinstance(delta, LowRank)
        module = parameter.removesuffix(".weight")
        modules.append(module)
        ranks.add(len(delta.down))
        for name, factor in (("lora_A", delta.down), ("lora_B", delta.up)):
            tensors[f"unet.{module}.{name}.weight"] = Pending.of(factor.detach(), torch.float16)
    (rank,) = ranks
    config = {"unet.r": rank, "unet.lora_alpha": rank, "unet.target_modules": modules}
    path = output / DEFAULT_FILE
    write_safetensors(path, tensors, {METADATA: json.dumps(config)})
    _write(output / "training.json", history)  # how it was made
    return path


def _write(path: Path, value: object) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
