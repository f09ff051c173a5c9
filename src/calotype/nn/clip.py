"""CLIP's text encoder (Radford et al. 2021, arXiv 2103.00020): L for SD 1.x and SDXL, H for SD 2.x, bigG for SDXL.

Shapes: B texts, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class CLIPTextConfig:
    """What real checkpoints vary. The defaults are CLIP L, as in Stable Diffusion 1.5."""

    vocab_size: int = 49408
    width: int = 768
    intermediate: int = 3072
    layers: int = 12
    heads: int = 12
    positions: int = 77
    activation: str = "quick_gelu"  # or "gelu"
    projection_dim: int | None = None  # of the pooled embedding, where the checkpoint projects it
    eos_token_id: int = 49407
    eps: float = 1e-5


class TowerConfig(Protocol):
    """What a layer must know of its transformer; CLIP has another one for pictures (nn.clip_vision)."""

    @property
    def width(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def activation(self) -> str: ...
    @property
    def eps(self) -> float: ...


@dataclass(frozen=True)
class CLIPOutput:
    """What one text gives."""

    hidden: tuple[Tensor, ...]  # (B, L, D): the embeddings, then each layer's output
    last: Tensor  # (B, L, D): the last layer's output, normalised
    pooled: Tensor  # (B, D) or (B, projection_dim): the end-of-text token's row of `last`


class SelfAttention(nn.Module):
    """Multi-head self-attention; where it is causal, each token sees those before it alone."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, L, D) -> (B, heads, L, D / heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = self.out_proj(out.transpose(1, 2).flatten(2))
        return x


class MLP(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.quick = config.activation == "quick_gelu"
        self.fc1 = nn.Linear(config.width, config.intermediate)
        self.fc2 = nn.Linear(config.intermediate, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        # quick_gelu: the sigmoid approximation of GELU that OpenAI's CLIP was trained with
        x = x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x)
        out: Tensor = self.fc2(x)
        return out


class CLIPLayer(nn.Module):
    def __init__(self, config: TowerConfig, *, causal: bool) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config.width, config.heads, causal=causal)
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class Embeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.positions, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        out: Tensor = self.token_embedding(ids) + self.position_embedding(positions)
        return out


class CLIPEncoder(nn.Module):
    def __init__(self, config: TowerConfig, *, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(config, causal=causal) for _ in range(config.layers))


class TextTransformer(nn.Module):
    """Everything but the projection; a module of its own because checkpoints prefix it with `text_model.`."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = CLIPEncoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.eps)


class CLIPText(nn.Module):
    """Token ids to a row of features for each token, and one for the whole text."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        self.text_projection = None
        if config.projection_dim is not None:
            self.text_projection = nn.Linear(config.width, config.projection_dim, bias=False)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The final layer norm, for features taken from an earlier layer (CLIP skip)."""
        out: Tensor = self.text_model.final_layer_norm(hidden)
        return out

    def forward(self, ids: Tensor) -> CLIPOutput:
        """Features of token ids (B, L), L at most `config.positions`, start, end and padding tokens included."""
        hidden = [self.text_model.embeddings(ids)]
        for layer in self.text_model.encoder.layers:
            hidden.append(layer(hidden[-1]))
        last = self.final_norm(hidden[-1])
        pooled = last[torch.arange(len(ids), device=ids.device), self.end_of_text(ids)]
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        return CLIPOutput(tuple(hidden), last, pooled)

    def end_of_text(self, ids: Tensor) -> Tensor:
        """The position (B,) of each row's end-of-text token.

        Old configs say eos_token_id 2, which is wrong: there the highest id is taken, which in CLIP's vocabulary is
        the end of text (rows behind the vocabulary, of textual inversions, are none). Others pad with the end-of-text
        token or with "!": the first one counts.
        """
        if self.config.eos_token_id == 2:
            return torch.where(ids < self.config.vocab_size, ids, -1).argmax(dim=-1)
        return (ids == self.config.eos_token_id).int().argmax(dim=-1)
