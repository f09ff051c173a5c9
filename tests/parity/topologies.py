"""Random models in the topologies of the real ones, written by diffusers: the same structure with narrow channels."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from checkpoints import BOS, EOS, save, vocabulary, write_scheduler, write_tokenizer

ATTENTION, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def write_unet(folder: Path, attention: Iterable[bool], **config: Any) -> None:
    """A U-Net whose levels, from the widest down, have attention or not."""
    levels = [ATTENTION if here else PLAIN for here in attention]
    config |= {"down_block_types": [down for down, _ in levels], "up_block_types": [up for _, up in levels[::-1]]}
    save(UNet2DConditionModel(**config), folder)


def write_vae(folder: Path, **changes: Any) -> None:
    config: dict[str, Any] = {
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "sample_size": 64,
    }
    save(AutoencoderKL(**(config | changes)), folder)


def write_text(folder: Path, number: int = 1, *, pad: str = EOS, **config: Any) -> None:
    """The tokenizer and the text encoder; of SDXL's two the second projects its pooled output."""
    suffix, vocab = "" if number == 1 else f"_{number}", vocabulary()
    write_tokenizer(folder / f"tokenizer{suffix}", pad=pad)
    ids = {"bos_token_id": vocab[BOS], "eos_token_id": vocab[EOS], "pad_token_id": vocab[pad]}
    shape = {"max_position_embeddings": 77, "vocab_size": len(vocab), "intermediate_size": 4 * config["hidden_size"]}
    kind = CLIPTextModel if number == 1 else CLIPTextModelWithProjection
    save(kind(CLIPTextConfig(**(ids | shape | config))), folder / f"text_encoder{suffix}")


def write_index(folder: Path, pipeline: str, scheduler: str, *, xl: bool = False, vae: str = "AutoencoderKL") -> None:
    index: dict[str, Any] = {
        "_class_name": pipeline,
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", f"{scheduler}Scheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae],
    }
    if xl:
        del index["safety_checker"], index["requires_safety_checker"]
        index |= {
            "force_zeros_for_empty_prompt": True,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    (folder / "model_index.json").write_text(json.dumps(index))


# ---- the topologies ----

NARROW_L: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
NARROW_G: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "projection_dim": 40}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "vocab_size": 49408,
}
FULL_VAE: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512)}


def sd15_lcm(folder: Path, *, full: bool = False) -> None:
    """LCM_Dreamshaper_v7's structure: Stable Diffusion 1.5 with a guidance embedding.

    At its full size it has 860 million parameters in the U-Net, 123 in the text encoder, 84 in the VAE.
    """
    narrow: dict[str, Any] = {"block_out_channels": (32, 64, 96, 96), "cross_attention_dim": 32, "sample_size": 12}
    wide: dict[str, Any] = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "sample_size": 64}
    write_unet(
        folder / "unet",
        (True, True, True, False),
        layers_per_block=2,
        attention_head_dim=8,
        time_cond_proj_dim=256,
        **(wide if full else narrow),
    )
    write_vae(folder / "vae", **(FULL_VAE if full else {}))
    write_text(folder, hidden_act="quick_gelu", **(CLIP_L if full else NARROW_L))
    write_scheduler(folder / "scheduler", "LCM")
    write_index(folder, "LatentConsistencyModelPipeline", "LCM")


def sd21(folder: Path) -> None:
    """Stable Diffusion 2.1: velocity, linear projections, heads by level, CLIP H less a layer, `!` padding."""
    write_unet(
        folder / "unet",
        (True, True, True, False),
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=2,
        cross_attention_dim=64,
        attention_head_dim=[2, 4, 8, 8],
        use_linear_projection=True,
        sample_size=12,
    )
    write_vae(folder / "vae")
    # Old configs say eos_token_id 2, which transformers reads as "the highest id".
    write_text(
        folder,
        pad="!",
        hidden_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        hidden_act="gelu",
        projection_dim=48,
        eos_token_id=2,
    )
    write_scheduler(folder / "scheduler", "DDIM", prediction_type="v_prediction")
    write_index(folder, "StableDiffusionPipeline", "DDIM")


def sdxl(folder: Path, *, lcm: bool = False, full: bool = False) -> None:
    """SDXL: two text encoders, sizes and crops, several transformer blocks a level, none in the widest.

    At its full size it has 2.57 billion parameters in the U-Net, 0.82 in the text encoders.
    """
    narrow: dict[str, Any] = {
        "block_out_channels": (32, 64, 96),
        "cross_attention_dim": 32 + 48,
        "attention_head_dim": [2, 4, 8],
        "transformer_layers_per_block": [1, 2, 3],
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 40 + 6 * 16,
        "sample_size": 12,
    }
    wide: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 768 + 1280,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 1280 + 6 * 256,
        "sample_size": 128,
    }
    write_unet(
        folder / "unet",
        (False, True, True),
        layers_per_block=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        time_cond_proj_dim=256 if lcm else None,
        **(wide if full else narrow),
    )
    write_xl_rest(folder, "LCM" if lcm else "EulerDiscrete", full=full)


def ssd1b_lcm(folder: Path) -> None:
    """SSD-1B: SDXL cut down by hand, so every residual block has a depth of its own, and the middle no attention."""
    write_unet(
        folder / "unet",
        (False, True, True),
        block_out_channels=(32, 64, 96),
        layers_per_block=2,
        cross_attention_dim=32 + 48,
        attention_head_dim=[2, 4, 8],
        transformer_layers_per_block=[1, [2, 1], [2, 3]],
        reverse_transformer_layers_per_block=[[2, 1, 3], [2, 1, 1], 1],
        mid_block_type="UNetMidBlock2D",
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=40 + 6 * 16,
        time_cond_proj_dim=256,
        sample_size=12,
    )
    write_xl_rest(folder, "LCM")


def write_xl_rest(folder: Path, scheduler: str, *, full: bool = False) -> None:
    write_vae(folder / "vae", scaling_factor=0.13025, **(FULL_VAE if full else {}))
    write_text(folder, hidden_act="quick_gelu", **(CLIP_L if full else NARROW_L))
    write_text(folder, 2, pad="!", hidden_act="gelu", eos_token_id=2, **(CLIP_G if full else NARROW_G))
    spaced = {"timestep_spacing": "leading", "steps_offset": 1} if scheduler == "EulerDiscrete" else {}
    write_scheduler(folder / "scheduler", scheduler, **spaced)
    write_index(folder, "StableDiffusionXLPipeline", scheduler, xl=True)


WRITERS: dict[str, Callable[[Path], None]] = {
    "sd15-lcm": sd15_lcm,
    "sd15-lcm-full": lambda folder: sd15_lcm(folder, full=True),
    "sd21": sd21,
    "sdxl": sdxl,
    "sdxl-lcm": lambda folder: sdxl(folder, lcm=True),
    "sdxl-lcm-full": lambda folder: sdxl(folder, lcm=True, full=True),
    "ssd1b-lcm": ssd1b_lcm,
}
REDUCED = tuple(name for name in WRITERS if not name.endswith("full"))


def write(name: str, folder: Path) -> Path:
    """A complete model folder, the same one every time."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # the peers' own
        torch.manual_seed(0)
        WRITERS[name](folder)
    return folder


def with_scheduler(folder: Path, target: Path, kind: str, **config: Any) -> Path:
    """The same model beside another scheduler; its weights are hard links."""
    shutil.copytree(folder, target, copy_function=os.link, ignore=shutil.ignore_patterns("scheduler", "*index.json"))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", f"{kind}Scheduler"]
    (target / "model_index.json").write_text(json.dumps(index))
    write_scheduler(target / "scheduler", kind, **({"steps_offset": 1} | config))
    return target
