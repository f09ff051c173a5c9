"""Attention by a kernel of our own, where somebody has built it: products of matrices and softmax side by side."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.nn.attention import Attention
from calotype.optimize import native
from calotype.optimize.step import Optimization
from calotype.parts import Stored

SMALL = 128  # queries: with fewer, PyTorch's is as fast
MULTIPLE, LARGEST = 8, 256  # of a head's width


class NativeAttention(Optimization):
    """How each attention weighs its values is replaced."""

    name = "attention"

    @staticmethod
    def fits(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu" or dtype != torch.bfloat16:
            return "its kernel is for processors, in bfloat16"
        if (why := native.unusable()) is not None:
            return why
        return None if native.kernel() is not None else "its kernel is not built: calotype native build"

    def apply(self, network: nn.Module, stored: Stored | None = None) -> None:
        for module in network.modules():
            if isinstance(module, Attention):
                vars(module)["weigh"] = weigh

    def refresh(self, network: nn.Module, parameters: Collection[str]) -> None:
        pass  # it has none

    def undo(self, network: nn.Module) -> None:
        for module in network.modules():
            vars(module).pop("weigh", None)


def weigh(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As nn.attention.Attention.weigh; without gradients where the kernel computes it."""
    kernel = native.kernel()
    if kernel is None or not _suits(queries, keys, values):
        return F.scaled_dot_product_attention(queries, keys, values)
    return native.attention(kernel, queries, keys, values)


def _suits(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    width = queries.shape[-1]
    return (
        queries.shape[2] >= SMALL
        and width % MULTIPLE == 0
        and width <= LARGEST
        and not torch.is_grad_enabled()
        and all(each.dtype == torch.bfloat16 and each.stride(-1) == 1 for each in (queries, keys, values))
    )
