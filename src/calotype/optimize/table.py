"""Which steps are taken where."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from calotype.errors import UsageError
from calotype.optimize.attention import NativeAttention
from calotype.optimize.channels_last import ChannelsLast
from calotype.optimize.heap import Heap
from calotype.optimize.packed import Packed
from calotype.optimize.step import Optimization
from calotype.parts import Stored
from calotype.precision import SMALL
from calotype.rules import nearest

STEPS: dict[str, type[Optimization]] = {each.name: each for each in (Heap, Packed, ChannelsLast, NativeAttention)}
AUTO = {"cpu": tuple(STEPS), "cuda": ("channels-last",)}  # in this order


def chosen(
    asked: str | Sequence[str], device: torch.device, dtype: torch.dtype, parameters: int
) -> tuple[Optimization, ...]:
    """The steps for a U-Net of so many parameters: "auto", "none", or those that are named. Raises UsageError for an
    unknown one and one that does not fit; "auto" leaves those out.
    """
    if asked == "none":
        return ()
    if asked == "auto":
        names = AUTO.get(device.type, ()) if parameters >= SMALL else ()
        return tuple(STEPS[name]() for name in names if STEPS[name].fits(device, dtype) is None)
    names = tuple(asked.split(",")) if isinstance(asked, str) else tuple(asked)
    for name in names:
        if name not in STEPS:
            raise UsageError(f"optimize has {name!r}: allowed are auto, none, {', '.join(STEPS)}", nearest(name, STEPS))
        if (fault := STEPS[name].fits(device, dtype)) is not None:
            dtype_name = str(dtype).removeprefix("torch.")
            raise UsageError(f"optimize has {name!r}, which is of no use on {device} in {dtype_name}: {fault}")
    return tuple(STEPS[name]() for name in STEPS if name in names)


class Optimized:
    """The networks of an engine with the steps that were taken on them."""

    def __init__(self, steps: Iterable[Optimization]) -> None:
        self.steps = tuple(steps)
        self._networks: dict[str, nn.Module] = {}

    def cover(self, networks: Mapping[str, nn.Module], stored: Mapping[str, Stored]) -> None:
        """Takes the steps on these networks, by their names, and forgets others."""
        for name, network in networks.items():
            for step in self.steps:
                step.apply(network, stored.get(name))
        self._networks = dict(networks)

    def undo(self) -> None:
        """The networks as they were."""
        for network in self._networks.values():
            for step in reversed(self.steps):
                step.undo(network)
        self._networks = {}

    def expect(self, written: Collection[tuple[str, str]]) -> None:
        """Makes ready for parameters to be written: (network, parameter)."""
        for step, network, parameters in self._concerned(written):
            step.expect(network, parameters)

    def refresh(self, written: Collection[tuple[str, str]]) -> None:
        """Takes notice of parameters that were written: (network, parameter)."""
        for step, network, parameters in self._concerned(written):
            step.refresh(network, parameters)

    def _concerned(
        self, written: Collection[tuple[str, str]]
    ) -> Iterator[tuple[Optimization, nn.Module, frozenset[str]]]:
        for name, network in self._networks.items():
            parameters = frozenset(parameter for of, parameter in written if of == name)
            yield from ((step, network, parameters) for step in self.steps if parameters)
