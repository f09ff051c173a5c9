"""Devices and dtypes to compute in. Not all multiply bfloat16 themselves: on others PyTorch emulates it, slowly."""

from __future__ import annotations

import platform
import warnings

import torch

from calotype.errors import CalotypeWarning, UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = 10**8  # parameters
X86 = ("x86_64", "AMD64")


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one. Raises UsageError where it cannot be used."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"device is {name!r}: not usable here ({str(error).splitlines()[0]})", hint="try auto or cpu"
        ) from None
    return device


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is worth using on a device: on a GPU, and on processors with AMX, AVX-512 BF16 or ARM's BF16."""
    if device.type != "cpu":
        return True
    if platform.machine() in X86:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    found = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(found and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def automatic(device: torch.device, parameters: int) -> torch.dtype:
    """The dtype for a U-Net of so many parameters: of a small one, converting takes longer than the steps save."""
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if parameters >= SMALL and multiplies_bfloat16(device) else torch.float32


def warn_of_emulation(device: torch.device, setting: str, instead: str) -> None:
    """A CalotypeWarning where bfloat16, as `setting` asks for it, is slower than `instead`."""
    if not multiplies_bfloat16(device):
        why = "this processor has no bfloat16 products and emulates them slowly"
        warnings.warn(f"{setting}: {why}; {instead} is faster here", CalotypeWarning, stacklevel=3)
