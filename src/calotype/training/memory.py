"""How much memory a piece of work takes at its peak, beyond what was held before it began."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, PEAK_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """bytes: what the work took; None while it runs, and where nobody can tell."""

    bytes: int | None = None


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Measures what is done inside it.

    On CUDA: what PyTorch allocated on the device (max_memory_allocated) beyond what it held at the beginning. On a CPU
    under Linux: how far the resident memory of the whole process grew (VmHWM, reset through /proc/self/clear_refs; see
    proc_pid_status(5)), after what was freed before has been given back, in which the growth would go unseen. Mapped
    files count when they are first read. Elsewhere, as on macOS, or where the kernel does not let: None.
    """
    found = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    resident = _reset() if device.type == "cpu" else None
    yield found
    if resident is not None:
        found.bytes = max(_status("VmHWM") - resident, 0)


def _reset() -> int | None:
    """Makes the peak of resident memory what it is now, in bytes; None where that cannot be done."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's; others have none
    try:
        PEAK_RESET.write_text("5")
        return _status("VmRSS")
    except (OSError, KeyError):
        return None


def _status(name: str) -> int:
    """A figure of /proc/self/status in bytes. Raises OSError, KeyError."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
