"""CLIP as a judge of pictures, where the user gives one: do they fit their prompts, and embeddings to compare sets by.

docs/notes/eval.md says what these figures add and what they cannot see. Shapes: n pictures or prompts, P the width of
CLIP's embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from calotype.errors import CheckpointError
from calotype.nn.clip_vision import CLIP
from calotype.text.prompt import chunk
from calotype.text.tokenizer import Tokenizer
from calotype.training.distance import Estimate, mean
from calotype.weights.load import load_clip

# Of the pictures that CLIP was trained on, by channel (github.com/openai/CLIP, clip.py, `_transform`).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
BATCH = 32  # pictures or prompts at a time


@dataclass(frozen=True, eq=False)
class Judge:
    """A CLIP and its tokenizer."""

    network: CLIP
    tokenizer: Tokenizer

    @staticmethod
    def load(folder: Path, device: torch.device) -> Judge:
        """A folder with config.json, weights and tokenizer, as transformers writes a CLIPModel. CheckpointError."""
        network, tokenizer = load_clip(folder, device=device), Tokenizer.load(folder)
        config = network.config
        if tokenizer.size > config.vocab_size or tokenizer.length > config.positions:
            raise CheckpointError(
                f"{folder}: the tokenizer knows {tokenizer.size} tokens and gives {tokenizer.length} a text,"
                f" the network takes {config.vocab_size} and {config.positions}",
                "the two are from different models",
            )
        return Judge(network, tokenizer)

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (n, P), float32 on the CPU. What does not fit into CLIP's 77 tokens is cut off."""
        ids = torch.tensor([chunk(self.tokenizer, prompt)[0].ids for prompt in prompts])
        pieces = torch.split(ids.to(self._device), BATCH)
        return torch.cat([self.network.embed_texts(piece).float().cpu() for piece in pieces])

    @torch.inference_mode()
    def pictures(self, pictures: Tensor) -> Tensor:
        """Embeddings (n, P), float32 on the CPU, of pictures (n, 3, H, W) in uint8."""
        size = self.network.vision_config.size
        pieces = (prepared(piece, size).to(self._device) for piece in torch.split(pictures, BATCH))
        return torch.cat([self.network.embed_pictures(piece).float().cpu() for piece in pieces])

    @property
    def _device(self) -> torch.device:
        return self.network.logit_scale.device


def prepared(pictures: Tensor, size: int) -> Tensor:
    """Pictures (n, 3, H, W) in uint8 as CLIP sees them (n, 3, size, size): shorter side resized, the middle cut out.

    With Pillow's bicubic filter, rounded to bytes, as CLIP was trained and as transformers does it: scores depend on
    the filter (Parmar et al. 2022, arXiv 2104.11222).
    """
    height, width = pictures.shape[-2:]
    shorter = min(height, width)
    height, width = size * height // shorter, size * width // shorter
    top, left = (height - size) // 2, (width - size) // 2
    rows = []
    for picture in pictures.permute(0, 2, 3, 1).numpy():
        resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
        rows.append(np.asarray(resized)[top : top + size, left : left + size])
    pixels = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def clip_score(texts: Tensor, pictures: Tensor) -> Estimate:
    """How well pictures fit their prompts: the mean of 100 max(cos, 0) over embeddings (n, P) of both.

    Hessel et al. 2021, arXiv 2104.08718, section 3, which has 2.5 for the 100, and "A photo depicts" before each text;
    neither is done where text-to-image models are compared.
    """
    return mean(100 * F.cosine_similarity(texts.double(), pictures.double()).clamp(min=0))
