"""What this machine is: its processor, its memory, and how fast it multiplies."""

from __future__ import annotations

import math
import os
import platform
import re
import time
from pathlib import Path

import torch

SIDE = 2048  # of the matrices
ENOUGH = 1.0  # seconds of multiplying; the best of them counts


def memory() -> float:
    """Bytes of this machine's memory; without end where the system does not tell."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def processor() -> str:
    """The processor's name, as the system has it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def instructions() -> tuple[str, ...]:
    """The processor's instruction sets that matter here, the widest last."""
    known = {
        "AVX2": torch.cpu._is_avx2_supported,
        "AVX-512": torch.cpu._is_avx512_supported,
        "VNNI": torch.cpu._is_vnni_supported,
        "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported,
        "AMX": torch.cpu._is_amx_tile_supported,
    }
    return tuple(name for name, has in known.items() if has())


def ceiling(dtype: torch.dtype, device: torch.device | None = None, seconds: float = ENOUGH) -> float:
    """FLOP a second of the best of this device's products of two matrices: what no network can surpass."""
    a, b = torch.randn(2, SIDE, SIDE).to(device or torch.device("cpu"), dtype)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        clock = time.perf_counter()
        a @ b
        if a.device.type == "cuda":
            torch.cuda.synchronize(a.device)
        best = min(best, time.perf_counter() - clock)
    return 2 * SIDE**3 / best
