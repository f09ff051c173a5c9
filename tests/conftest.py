"""Tiny models with random weights in the diffusers layout, written by diffusers itself, and no network for any test."""

from __future__ import annotations

import json
import shutil
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORDS = ("a", "fox", "red", "cat", "in", "the", "snow", "of", "dog", "astronaut")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Connections beyond this machine fail the test; the Hub's cache is an empty folder."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else address
        if self.family != socket.AF_UNIX and host not in ("127.0.0.1", "::1", "localhost"):
            pytest.fail(f"a test tried to connect to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf", numbered=True)))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a session's model folder into this test's own, where it may be spoilt."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name))

    return copy


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model shaped like Stable Diffusion 1.5: epsilon, one text encoder, convolutional projections, DDIM."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny_sd15")


@pytest.fixture(scope="session")
def tiny_sd15_lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a latent consistency model with a guidance embedding."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny_sd15_lcm", lcm=True)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model shaped like SDXL: two text encoders, added size embeddings, linear projections, Euler."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny_sdxl", xl=True)


# ---- writing them ----


def write_model(folder: Path, *, lcm: bool = False, xl: bool = False) -> Path:
    """A complete model folder of about 2 MB, the same one every time."""
    import torch

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # the peers' own
        torch.manual_seed(0)
        write_unet(folder / "unet", lcm=lcm, xl=xl)
        write_vae(folder / "vae")
        write_tokenizer(folder / "tokenizer")
        write_text_encoder(folder / "text_encoder")
        if xl:
            write_tokenizer(folder / "tokenizer_2", pad="!")
            write_text_encoder(folder / "text_encoder_2", projection=32)
        write_scheduler(folder / "scheduler", "LCM" if lcm else "EulerDiscrete" if xl else "DDIM")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
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
    if lcm:
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
    UNet2DConditionModel(**(config | changes)).save_pretrained(folder)


def write_vae(folder: Path, **changes: Any) -> None:
    from diffusers import AutoencoderKL

    config: dict[str, Any] = {
        "block_out_channels": (16, 32, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 8,
        "sample_size": 64,
    }
    AutoencoderKL(**(config | changes)).save_pretrained(folder)


def write_tiny_vae(folder: Path) -> None:
    from diffusers import AutoencoderTiny

    AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).save_pretrained(folder)


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
    kind(CLIPTextConfig(**(config | changes))).save_pretrained(folder)


def write_scheduler(folder: Path, kind: str, **changes: Any) -> None:
    import diffusers

    config: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if kind == "DDIM":
        config |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    getattr(diffusers, f"{kind}Scheduler")(**(config | changes)).save_pretrained(folder)


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
