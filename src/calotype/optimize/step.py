"""What a step of the optimisation is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

import torch
from torch import nn

from calotype.parts import Stored


class Optimization(ABC):
    """One change of how a network computes. It keeps the names of all parameters, and the values of what they are."""

    name: str  # as `calotype.load(optimize=[...])` takes it

    @staticmethod
    @abstractmethod
    def fits(device: torch.device, dtype: torch.dtype) -> str | None:
        """What keeps it from being of use there, as a phrase; None where it is."""

    def begin(self) -> None:
        """What it does before there is a network."""
        return

    def unread(self, network: nn.Module) -> frozenset[str]:
        """Parameters that need not be in memory when it is applied: it reads them itself."""
        return frozenset()

    @abstractmethod
    def apply(self, network: nn.Module, stored: Stored | None = None) -> None:
        """Changes a network; again, where modules were put into it since. `stored` reads what was left unread."""

    def expect(self, network: nn.Module, parameters: Collection[str]) -> None:
        """Makes ready for parameters to be written in place."""
        return

    @abstractmethod
    def undo(self, network: nn.Module) -> None:
        """The network as it was."""

    @abstractmethod
    def refresh(self, network: nn.Module, parameters: Collection[str]) -> None:
        """Takes notice of parameters that were written in place."""
