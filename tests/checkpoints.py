"""Writes tiny models with random weights in the diffusers layout, by diffusers itself."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SLIM: dict[str, Any] = {  # of a U-Net like SSD-1B's
    "transformer_layers_per_block": [1, [2]],
    "reverse_transformer_layers_per_block": [[1, 2], 1],
    "mid_block_type": "UNetMidBlock2D",
}
CONTROLNET: dict[str, Any] = {  # of a ControlNet for the model that is like Stable Diffusion 1.5
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "conditioning_embedding_out_channels": (8, 8, 16, 16),
}
WORDS = ("a", "fox", "red", "cat", "in", "the", "snow", "of", "dog", "astronaut")


def write_model(
    folder: Path,
    *,
    lcm: bool = False,
    xl: bool = False,
    sd2: bool = False,
    slim: bool = False,
    channels: int = 4,
) -> Path:
    """A complete model folder of about 2 MB, the same one every time.

    It is shaped like Stable Diffusion 1.5; `sd2`: like 2.1, which predicts velocity; `xl`: like SDXL; `slim`, with it:
    like SSD-1B, each layer with a depth of its own, and no attention in the middle. Nine `channels` are for inpainting.
    """
    import torch

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # the peers' own
        torch.manual_seed(0)
        shape: dict[str, Any] = {"in_channels": channels}
        shape |= {"use_linear_projection": True, "attention_head_dim": (2, 4)} if sd2 else {}
        write_unet(folder / "unet", lcm=lcm, xl=xl, **shape, **(SLIM if slim else {}))
        write_vae(folder / "vae")
        write_tokenizer(folder / "tokenizer", **({"pad": "!"} if sd2 else {}))
        write_text_encoder(folder / "text_encoder", **({"hidden_act": "gelu", "eos_token_id": 2} if sd2 else {}))
        if xl:
            write_tokenizer(folder / "tokenizer_2", pad="!")
            write_text_encoder(folder / "text_encoder_2", projection=32)
        predicts = {"prediction_type": "v_prediction"} if sd2 else {}
        write_scheduler(folder / "scheduler", "LCM" if lcm else "EulerDiscrete" if xl else "DDIM", **predicts)
    inpaint = "Inpaint" if channels == 9 else ""
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' if xl else ''}{inpaint}Pipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", json.loads((folder / "scheduler/scheduler_config.json").read_text())["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if lcm and not inpaint:
        index["_class_name"] = "LatentConsistencyModelPipeline"
    if xl:
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        index["force_zeros_for_empty_prompt"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_unet(folder: Path, *, lcm: bool = False, xl: bool = False, **changes: Any) -> None:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "time_cond_proj_dim": 16 if lcm else None,
    }
    if xl:
        config |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 64,
            "attention_head_dim": (2, 4),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 32 + 6 * 8,
        }
    save(UNet2DConditionModel(**(config | changes)), folder)


def write_vae(folder: Path, **changes: Any) -> None:
    from diffusers import AutoencoderKL

    config: dict[str, Any] = {
        "block_out_channels": (16, 32, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 8,
        "sample_size": 64,
    }
    save(AutoencoderKL(**(config | changes)), folder)


def write_tiny_vae(folder: Path, **changes: Any) -> None:
    from diffusers import AutoencoderTiny

    config: dict[str, Any] = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    save(AutoencoderTiny(**(config | changes)), folder)


def write_text_encoder(folder: Path, projection: int | None = None, **changes: Any) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocab = vocabulary()
    config: dict[str, Any] = {
        "vocab_size": len(vocab),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu" if projection is None else "gelu",
        "projection_dim": 32 if projection is None else projection,
        "bos_token_id": vocab[BOS],
        "eos_token_id": vocab[EOS],
        "pad_token_id": vocab[EOS] if projection is None else vocab["!"],
    }
    kind = CLIPTextModel if projection is None else CLIPTextModelWithProjection
    save(kind(CLIPTextConfig(**(config | changes))), folder)


def write_clip(folder: Path, **changes: Any) -> Path:
    """A whole CLIP with its tokenizer; `changes` are of the half for pictures."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    write_tokenizer(folder)
    vocab = vocabulary()
    both = {"intermediate_size": 64, "num_attention_heads": 4, "hidden_act": "quick_gelu"}
    special = {"bos_token_id": vocab[BOS], "eos_token_id": vocab[EOS], "pad_token_id": vocab[EOS]}
    text = {**both, **special, "vocab_size": len(vocab), "hidden_size": 32, "num_hidden_layers": 2}
    vision = {**both, "hidden_size": 48, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = CLIPModel(CLIPConfig(text_config=text, vision_config={**vision, **changes}, projection_dim=24))
        save(network, folder)
    return folder


def write_scheduler(folder: Path, kind: str, **changes: Any) -> None:
    import diffusers

    config: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if kind == "DDIM":
        config |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    getattr(diffusers, f"{kind}Scheduler")(**(config | changes)).save_pretrained(folder)


def save(network: Any, folder: Path) -> None:
    randomise(network)
    network.save_pretrained(folder)


def randomise(network: Any) -> None:
    """Every parameter at random, norms and biases included, so that a network that leaves one out or confuses two gives
    other numbers. Weights keep the scale of what passes through them, norms are around 1, biases matter.
    """
    from torch import nn, no_grad

    with no_grad():
        for name, parameter in network.named_parameters():
            if "embedding.weight" in name:
                nn.init.normal_(parameter)
            elif parameter.ndim >= 2:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif name.endswith("weight"):
                nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                nn.init.normal_(parameter, std=0.2)


def byte_letters() -> list[str]:
    """GPT-2's 256 printable stand-ins for the bytes, printable bytes first, as in CLIP's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def merges() -> list[tuple[str, str]]:
    """Byte-pair merges that make a token of each of WORDS."""
    found: dict[tuple[str, str], None] = {}
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            found[(pieces[0], pieces[1])] = None
            pieces[:2] = [pieces[0] + pieces[1]]
    return list(found)


def vocabulary() -> dict[str, int]:
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges()), BOS, EOS]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def write_tokenizer(folder: Path, pad: str = EOS) -> None:
    """The older layout, vocab.json and merges.txt, which the peers read as well."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges())]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
