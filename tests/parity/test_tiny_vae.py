"""The tiny autoencoder (TAESD layout) against diffusers' AutoencoderTiny."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from reference import NETWORK, Agreement

from calotype.weights.load import load_vae
from checkpoints import write_tiny_vae

CONFIGS: dict[str, dict[str, Any]] = {
    "as released": {"encoder_block_out_channels": (64,) * 4, "decoder_block_out_channels": (64,) * 4},
    "other depths": {
        "encoder_block_out_channels": (16, 16, 16),
        "decoder_block_out_channels": (24, 24, 24),
        "num_encoder_blocks": (1, 2, 1),
        "num_decoder_blocks": (2, 1, 1),
    },
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tiny_autoencoder(tmp_path: Path, agree: Agreement, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    write_tiny_vae(tmp_path / "vae", **config)
    theirs, ours = AutoencoderTiny.from_pretrained(tmp_path / "vae").eval(), load_vae(tmp_path / "vae")
    images, latents = torch.randn(2, 3, 72, 88).clamp(-1, 1), 3 * torch.randn(2, 4, 9, 11)
    with torch.inference_mode():
        mean, logvar = ours.encode(images)
        assert logvar is None
        agree.tensors("tiny VAE", "encode", mean, theirs.encode(images).latents, NETWORK)
        agree.tensors("tiny VAE", "decode", ours.decode(latents), theirs.decode(latents).sample, NETWORK)
