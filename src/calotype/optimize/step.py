"""What a step of the optimisation is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

import torch
from torch import nn


class Optimization(ABC):
    """One change of how a network computes. It keeps the names and the values of all parameters."""

    name: str  # as `calotype.load(optimize=[...])` takes it

    @staticmethod
    @abstractmethod
    def fits(device: torch.device, dtype: torch.dtype) -> str | None:
        """What keeps it from being of use there, as a phrase; None where it is."""

    def begin(self) -> None:
        """What it does before there is a network."""
        return

    @abstractmethod
    def apply(self, network: nn.Module) -> None:
        """Changes a network; again, where modules were put into it since."""

    @abstractmethod
    def undo(self, network: nn.Module) -> None:
        """The network as it was."""

    @abstractmethod
    def refresh(self, network: nn.Module, parameters: Collection[str]) -> None:
        """Takes notice of parameters that were written in place."""
