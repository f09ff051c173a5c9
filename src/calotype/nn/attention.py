"""Attention over pixels and text, and the transformer that the U-Net puts between its convolutions.

Shapes: B pictures, N = h * w pixels, L text tokens, C channels, D text width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]  # of one attention, each (B, heads, L, C / heads)
Context = Tensor | dict[nn.Module, KeysValues]  # the text (B, L, D), or what each attention makes of it


class Attention(nn.Module):
    """Multi-head attention from x (B, N, C) to a context, or to itself when there is none."""

    def __init__(self, channels: int, heads: int, context_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        context_dim = channels if context_dim is None else context_dim
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_dim, channels, bias=bias)
        self.to_v = nn.Linear(context_dim, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list because checkpoints say `to_out.0`

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        if isinstance(context, dict):
            return self.attend(x, *context[self])
        return self.attend(x, *self.keys_values(x if context is None else context))

    def keys_values(self, context: Tensor) -> KeysValues:
        """Those of a context (B, L, D): a text's are the same in every step."""
        return self._heads(self.to_k(context)), self._heads(self.to_v(context))

    def attend(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The output (B, N, C) for the queries of x."""
        out = self.weigh(self._heads(self.to_q(x)), keys, values)
        x = self.to_out[0](out.transpose(1, 2).flatten(2))
        return x

    @staticmethod
    def weigh(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The values (B, heads, L, d), weighed for each query (B, heads, N, d)."""
        return F.scaled_dot_product_attention(queries, keys, values)

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.heads, -1).transpose(1, 2)  # (B, N, C) -> (B, heads, N, C / heads)


class GEGLU(nn.Module):
    """Linear layer gated by the GELU of its second half (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The middle entry was dropout; it keeps the checkpoints' numbering (`net.0`, `net.2`).
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each behind a layer norm, each residual."""

    def __init__(self, channels: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class Transformer2D(nn.Module):
    """`depth` transformer blocks over the pixels of a feature map (B, C, h, w); residual as a whole.

    SD 1.x projects in and out by 1x1 convolutions, SD 2.x and SDXL by linear layers: the same mathematics, but the
    checkpoints' weights have other shapes.
    """

    def __init__(
        self, channels: int, heads: int, depth: int, context_dim: int, groups: int, linear_projection: bool
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in: nn.Module
        self.proj_out: nn.Module
        if linear_projection:
            self.proj_in, self.proj_out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        else:
            self.proj_in, self.proj_out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, context_dim) for _ in range(depth))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        residual = x
        x = self.norm(x)
        if self.linear_projection:
            x = self.proj_in(x.flatten(2).transpose(1, 2))  # (B, C, h, w) -> (B, N, C)
        else:
            x = self.proj_in(x).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            x = block(x, context)
        if self.linear_projection:
            x = self.proj_out(x).transpose(1, 2).reshape(residual.shape)  # (B, N, C) -> (B, C, h, w)
        else:
            x = self.proj_out(x.transpose(1, 2).reshape(residual.shape))
        return x + residual
