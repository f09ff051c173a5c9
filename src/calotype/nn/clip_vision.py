"""The whole of CLIP (Radford et al. 2021, arXiv 2103.00020): texts and pictures to embeddings in one space.

The half for pictures is a vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) with one more layer norm,
before its first layer. Shapes: B texts or pictures, N patches of a picture, D width, P width of the embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calotype.nn.clip import CLIPEncoder, CLIPText, CLIPTextConfig


@dataclass(frozen=True)
class CLIPVisionConfig:
    """What real checkpoints vary. The defaults are ViT-B/32."""

    width: int = 768
    intermediate: int = 3072
    layers: int = 12
    heads: int = 12
    channels: int = 3
    size: int = 224  # side of the pictures in pixels
    patch: int = 32  # side of a patch in pixels; what remains at the edge is not seen
    activation: str = "quick_gelu"  # or "gelu"
    eps: float = 1e-5

    @property
    def patches(self) -> int:
        return (self.size // self.patch) ** 2


class PatchEmbeddings(nn.Module):
    """Pictures (B, 3, size, size) to a row for the whole and one for each patch: (B, 1 + N, D)."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.patch_embedding = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch, bias=False)
        self.position_embedding = nn.Embedding(1 + config.patches, config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([whole, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """Everything but the projection; checkpoints prefix it with `vision_model.`."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width, eps=config.eps)  # so misspelt in every checkpoint
        self.encoder = CLIPEncoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """The row (B, D) of the whole picture, normalised."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:
            x = layer(x)
        out: Tensor = self.post_layernorm(x[:, 0])
        return out


class CLIP(CLIPText):
    """The text encoder with its other half. The embeddings are not normalised."""

    def __init__(self, text: CLIPTextConfig, vision: CLIPVisionConfig) -> None:
        super().__init__(text)
        assert text.projection_dim is not None, "texts and pictures meet in the projections' space"
        self.vision_config = vision
        self.vision_model = VisionTransformer(vision)
        self.visual_projection = nn.Linear(vision.width, text.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))  # of the training's loss; it changes no embedding

    def embed_texts(self, ids: Tensor) -> Tensor:
        """Embeddings (B, P) of token ids (B, L)."""
        out: Tensor = self(ids).pooled
        return out

    def embed_pictures(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, P) of pictures (B, 3, size, size), scaled to CLIP's mean and deviation."""
        out: Tensor = self.visual_projection(self.vision_model(pixels))
        return out
