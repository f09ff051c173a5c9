"""Weights packed ahead: convolutions and linear layers hand oneDNN their weights in the order in which it multiplies.

PyTorch's own layers have them reordered in every call. The packed copy is made in a layer's first call, and made anew
once its weight was written. Convolutions give feature maps whose channels lie side by side, as oneDNN reads them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.optimize.step import Optimization

ops: Any = torch.ops.mkldnn
DTYPES = (torch.float32, torch.bfloat16)


class Packed(Optimization):
    """Each layer's `forward` is replaced; what is hooked to the layer, such as a live LoRA, goes on around it."""

    name = "packed"

    @staticmethod
    def fits(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return "it is for processors"
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return "this PyTorch has no oneDNN"
        return None if dtype in DTYPES else "oneDNN packs float32 and bfloat16"

    def apply(self, network: nn.Module) -> None:
        for layer in network.modules():
            if "forward" not in vars(layer):
                if type(layer) is nn.Linear:
                    vars(layer)["forward"] = PackedLinear(layer)
                elif type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple):
                    vars(layer)["forward"] = PackedConv(layer)

    def undo(self, network: nn.Module) -> None:
        for layer, _ in _packed(network):
            del vars(layer)["forward"]

    def refresh(self, network: nn.Module, parameters: Collection[str]) -> None:
        for _, forward in _packed(network, {name.rpartition(".")[0] for name in parameters}):
            forward.packed = None


def _packed(network: nn.Module, names: Collection[str] | None = None) -> Iterator[tuple[nn.Module, PackedLayer]]:
    for name, layer in network.named_modules():
        forward = vars(layer).get("forward")
        if isinstance(forward, PackedLayer) and (names is None or name in names):
            yield layer, forward


class PackedLayer:
    """A layer's forward with a packed copy of its weight."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.packed: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayer:
        """A copied network packs its own weights, which may be of another dtype then."""
        return type(self)(memo[id(self.layer)])


def packs(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies these; its products have no gradients."""
    return x.dtype == weight.dtype and x.dtype in DTYPES and not torch.is_grad_enabled()


class PackedLinear(PackedLayer):
    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not packs(x, layer.weight):
            return F.linear(x, layer.weight, layer.bias)
        if self.packed is None:
            self.packed = ops._reorder_linear_weight(layer.weight.detach(), x.numel() // x.shape[-1])
        y: Tensor = ops._linear_pointwise(x, self.packed, layer.bias, "none", [], "")
        return y


class PackedConv(PackedLayer):
    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        shape = layer.padding, layer.stride, layer.dilation, layer.groups
        if not packs(x, layer.weight):
            return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        x = x.contiguous(memory_format=torch.channels_last)
        if self.packed is None:
            self.packed = ops._reorder_convolution_weight(layer.weight.detach(), *shape, list(x.shape))
        y: Tensor = ops._convolution_pointwise(x, self.packed, layer.bias, *shape, "none", [], "")
        return y
