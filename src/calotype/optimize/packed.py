"""Weights packed ahead: convolutions and linear layers hand oneDNN their weights in the order in which it multiplies.

PyTorch's own layers have them reordered in every call. The packed copy is made in a layer's first call, and made anew
once its weight was written. It is the only one in memory: a large layer's own weight is a stand-in, and is read from
the model's file, or unpacked, where it is needed. Convolutions give feature maps whose channels lie side by side, as
oneDNN reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.optimize.step import Optimization
from calotype.parts import Stored, without_memory

ops: Any = torch.ops.mkldnn
DTYPES = (torch.float32, torch.bfloat16)
LARGE = 2**16  # numbers of a weight


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

    def unread(self, network: nn.Module) -> frozenset[str]:
        layers = ((name, layer) for name, layer in network.named_modules() if _kind(layer) is not None)
        return frozenset(f"{name}.weight" for name, layer in layers if _large(layer.weight))

    def apply(self, network: nn.Module, stored: Stored | None = None) -> None:
        read = None if stored is None else cache(stored)
        for name, layer in network.named_modules():
            kind = _kind(layer)
            if kind is not None and "forward" not in vars(layer):
                forward = vars(layer)["forward"] = kind(layer)
                if is_stand_in(layer.weight):
                    assert read is not None
                    forward.plain = partial(_of, read, f"{name}.weight")

    def undo(self, network: nn.Module) -> None:
        for layer, forward in _packed(network):
            forward.restore()
            del vars(layer)["forward"]

    def expect(self, network: nn.Module, parameters: Collection[str]) -> None:
        for _, forward in _packed(network, {name.rpartition(".")[0] for name in parameters}):
            forward.restore()

    def refresh(self, network: nn.Module, parameters: Collection[str]) -> None:
        for _, forward in _packed(network, {name.rpartition(".")[0] for name in parameters}):
            forward.packed = None


def _of(read: Stored, name: str) -> Tensor:
    return read()[name]


def _kind(layer: Any) -> type[PackedLayer] | None:
    if type(layer) is nn.Linear:
        return PackedLinear
    fits = type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
    return PackedConv if fits else None


def _large(weight: Tensor) -> bool:
    return weight.numel() >= LARGE


def _packed(network: nn.Module, names: Collection[str] | None = None) -> Iterator[tuple[nn.Module, PackedLayer]]:
    for name, layer in network.named_modules():
        forward = vars(layer).get("forward")
        if isinstance(forward, PackedLayer) and (names is None or name in names):
            yield layer, forward


def is_stand_in(weight: Tensor) -> bool:
    """Whether a weight is one without memory."""
    return weight.numel() > 1 and not any(weight.stride())


class PackedLayer:
    """A layer's forward with a packed copy of its weight."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.packed: Tensor | None = None
        self.plain: Callable[[], Tensor] | None = None  # reads the layer's weight, where that is a stand-in

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayer:
        """A copied network packs its own weights, which may be of another dtype then."""
        copied = type(self)(memo[id(self.layer)])
        copied.plain = self.plain
        return copied

    def restore(self) -> None:
        """The layer's weight in memory again."""
        if self.plain is not None:
            weight = self.layer.weight
            weight.data = self.plain().to(weight.device, weight.dtype, copy=True)
            self.plain = None

    def pack(self, reorder: Callable[[Tensor], Tensor]) -> Tensor:
        """The packed weight."""
        if self.packed is None:
            weight = self.layer.weight
            plain = weight.detach() if self.plain is None else self.plain().to(weight.dtype)
            self.packed = reorder(plain)
            if self.plain is not None or _large(weight):
                weight.data = without_memory(weight.shape, weight.device, weight.dtype)
                self.plain = self.packed.to_dense
        return self.packed


def packs(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies these; its products have no gradients."""
    return x.dtype == weight.dtype and x.dtype in DTYPES and not torch.is_grad_enabled()


class PackedLinear(PackedLayer):
    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not packs(x, layer.weight):
            self.restore()
            return F.linear(x, layer.weight, layer.bias)
        packed = self.pack(lambda weight: ops._reorder_linear_weight(weight, x.numel() // x.shape[-1]))
        y: Tensor = ops._linear_pointwise(x, packed, layer.bias, "none", [], "")
        return y


class PackedConv(PackedLayer):
    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        shape = layer.padding, layer.stride, layer.dilation, layer.groups
        if not packs(x, layer.weight):
            self.restore()
            return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        x = x.contiguous(memory_format=torch.channels_last)
        packed = self.pack(lambda weight: ops._reorder_convolution_weight(weight, *shape, list(x.shape)))
        y: Tensor = ops._convolution_pointwise(x, packed, layer.bias, *shape, "none", [], "")
        return y
