"""Memory kept: what a feature map took stays with the process for the next one.

glibc asks the system for each large piece and gives it back at once, so every tensor of megabytes begins with page
faults: a third of the autoencoder's time. It is the whole process that keeps its memory then.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Collection

import torch
from torch import nn

from calotype.optimize.step import Optimization
from calotype.parts import Stored

TRIM, MMAP = -1, -3  # mallopt's M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (malloc.h)
KEPT, LARGEST = 2**31 - 1, 2**30  # bytes at the heap's end that are kept; of a piece that is taken from the heap
DEFAULT = 128 * 2**10  # of both


class Heap(Optimization):
    """Of the process, so undone for all of it."""

    name = "heap"

    @staticmethod
    def fits(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return "it is for processors"
        return None if platform.libc_ver()[0] == "glibc" else "it is for glibc, which is not used here"

    def begin(self) -> None:
        _set(KEPT, LARGEST)

    def apply(self, network: nn.Module, stored: Stored | None = None) -> None:
        pass  # it has begun

    def refresh(self, network: nn.Module, parameters: Collection[str]) -> None:
        pass  # it has none

    def undo(self, network: nn.Module) -> None:
        _set(DEFAULT, DEFAULT)


def _set(trim: int, mmap: int) -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(TRIM, trim)
    libc.mallopt(MMAP, mmap)
