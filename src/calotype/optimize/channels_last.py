"""Channels last: a pixel's channels lie side by side, as the processors' convolutions read them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from calotype.optimize.step import Optimization
from calotype.parts import Stored


class ChannelsLast(Optimization):
    """Kernels of convolutions in that order; feature maps follow them, and transformers see their tokens uncopied."""

    name = "channels-last"

    @staticmethod
    def fits(device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def apply(self, network: nn.Module, stored: Stored | None = None) -> None:
        _reorder(network, torch.channels_last)

    def refresh(self, network: nn.Module, parameters: Collection[str]) -> None:
        pass  # what is written in place keeps its order

    def undo(self, network: nn.Module) -> None:
        _reorder(network, torch.contiguous_format)


def _reorder(network: nn.Module, order: torch.memory_format) -> None:
    """The parameters themselves stay: whoever knows them goes on to."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and "forward" not in vars(module):  # packed ones are in an order of their own
            module.weight.data = module.weight.data.contiguous(memory_format=order)
