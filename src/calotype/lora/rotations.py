"""OFT (Qiu et al. 2023, arXiv 2306.07280): changes that turn a weight's outputs, or its inputs, block by block.

What is trained is a skew matrix Q = -Q^T for each block of n of them; Cayley's transform of it is the rotation R. Who
wrote a file decides how Q is stored, how R is computed and from which side it acts: see `cayley` and `neumann`, and
layers.py. A scale is linear in the difference from the base, as in kohya's scripts, A1111 and LyCORIS' OFT: at scales
other than 0 and 1 that is no rotation. (ComfyUI has the scale in it twice, LyCORIS' BOFT once for each factor.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from calotype.lora.deltas import Delta, Shape, require


@dataclass(frozen=True, eq=False)
class Rotated(Delta):
    """The weight with its outputs, or its inputs (of a convolution each with its pixels), turned."""

    blocks: Tensor  # (k, n, n): each outputs' block times it from the left, each inputs' block from the right
    side: Literal["outputs", "inputs"]
    lengths: Tensor | None = None  # (O, 1, ...): what each output is multiplied by after that

    @property
    def shape(self) -> Shape:
        count, size, *_ = self.blocks.shape
        require(self.blocks.ndim == 3 and self.blocks.shape[2] == size)
        return (count * size,)

    def fits(self, shape: Shape) -> bool:
        turned = math.prod(shape[:1] if self.side == "outputs" else shape[1:])
        return len(shape) > 1 and self.shape == (turned,) and _are_lengths(self.lengths, shape)

    def __call__(self, base: Tensor, scale: float) -> Tensor:
        base = base.to(torch.float32)
        blocks, (count, size) = self.blocks.to(base.device, torch.float32), self.blocks.shape[:2]
        if self.side == "outputs":
            turned = (blocks @ base.reshape(count, size, -1)).reshape(base.shape)
        else:
            turned = torch.einsum("okn,knm->okm", base.reshape(-1, count, size), blocks).reshape(base.shape)
        return scale * (_times(turned, self.lengths) - base)


@dataclass(frozen=True, eq=False)
class Butterfly(Delta):
    """BOFT (Liu et al. 2023, arXiv 2311.06243): the outputs turned several times, in other blocks each time,
    so that all come together with few numbers.
    """

    factors: Tensor  # (m, k, n, n): n k = O
    lengths: Tensor | None = None  # (O, 1, ...), as in `Rotated`

    @property
    def shape(self) -> Shape:
        count, blocks, size, *_ = self.factors.shape
        require(self.factors.ndim == 4 and self.factors.shape[3] == size and size % 2 == 0 < self.factors.numel())
        require(blocks * size % (2 ** (count - 1) * size) == 0)
        return (blocks * size,)

    def fits(self, shape: Shape) -> bool:
        return len(shape) > 1 and self.shape == shape[:1] and _are_lengths(self.lengths, shape)

    def __call__(self, base: Tensor, scale: float) -> Tensor:
        base = base.to(torch.float32)
        turned, (blocks, size) = base.flatten(1), self.factors.shape[1:3]
        for step, factor in enumerate(self.factors.to(base.device, torch.float32)):
            half, width = 2**step * size // 2, turned.shape[1]  # outputs so far apart come into a block together
            paired = turned.reshape(-1, 2, half, width).transpose(1, 2).reshape(blocks, size, width)
            turned = (factor @ paired).reshape(-1, half, 2, width).transpose(1, 2).reshape(-1, width)
        return scale * (_times(turned.reshape(base.shape), self.lengths) - base)


def _are_lengths(lengths: Tensor | None, shape: Shape) -> bool:
    return lengths is None or tuple(lengths.shape) == (shape[0], *[1] * (len(shape) - 1))


def _times(weight: Tensor, lengths: Tensor | None) -> Tensor:
    return weight if lengths is None else weight * lengths.to(weight.device, torch.float32)


# ---- from what is stored to skew matrices, and from those to rotations ----


def skew(blocks: Tensor) -> Tensor:
    """Q of blocks (..., n, n) that are stored whole: B - B^T, in float32."""
    require(blocks.ndim > 2 and blocks.shape[-1] == blocks.shape[-2])
    wide = blocks.to(torch.float32)
    return wide - wide.mT


def unpacked(packed: Tensor) -> Tensor:
    """Q (k, n, n) of blocks whose upper triangles are stored, row by row: (k, n (n - 1) / 2)."""
    require(packed.ndim == 2)
    size = (1 + math.isqrt(1 + 8 * packed.shape[1])) // 2
    require(size * (size - 1) // 2 == packed.shape[1])
    rows, columns = torch.triu_indices(size, size, 1)
    found = torch.zeros(len(packed), size, size)
    found[:, rows, columns] = packed.to(torch.float32)
    return found - found.mT


def limited(q: Tensor, most: float) -> Tensor:
    """The norm of all of Q at most `most` (COFT as kohya's scripts and LyCORIS have it)."""
    norm = q.norm()
    return q if norm <= most else q * (most / norm)


def projected(q: Tensor, most: float) -> Tensor:
    """The norm of each block of Q at most `most` / sqrt(k) (COFT as PEFT has it)."""
    norm = torch.linalg.matrix_norm(q)[:, None, None]
    shrunk: Tensor = q * (most / math.sqrt(len(q)) / norm.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1.0)
    return shrunk


def cayley(q: Tensor) -> Tensor:
    """(I + Q) (I - Q)^-1; of -Q it is the transpose. The inverse exists: a skew matrix has no real eigenvalue but 0."""
    eye = torch.eye(q.shape[-1])
    found: Tensor = torch.linalg.solve(eye - q, eye + q, left=False)
    return found


def neumann(q: Tensor, terms: int) -> Tensor:
    """`cayley` by the first terms of its series, I + 2 Q + 2 Q^2 + ..., the last of them once, as PEFT computes it from
    0.18 on (Qiu et al. 2025, arXiv 2506.19847).
    """
    found = torch.eye(q.shape[-1]).expand_as(q)
    if terms == 1:
        return found
    found = found + 2 * q
    if terms == 2:
        return found
    power = q @ q
    found = found + 2 * power
    for _ in range(3, terms - 1):
        power = power @ q
        found = found + 2 * power
    return found + power @ q
