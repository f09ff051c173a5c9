"""Takes the tensors out of a pickle, in a process of its own that has no more memory, time and disk than they need.

PyTorch reads it with weights_only=True: tensors and plain containers are made, nothing that the file names is called. A
few harmless names that real checkpoints carry along are answered with something inert.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from calotype.errors import CheckpointError
from calotype.weights.files import header, shown

SECONDS, BYTES_A_SECOND = 120, 20_000_000  # the least time, and how fast a slow disk is
SPARE = 2**30  # bytes of memory beside what holds the file
MOST = 4  # times the file's size: more than that is written of no honest file

# What checkpoints of training runs refer to beside tensors. It is never imported: it becomes nothing.
INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.utilities.apply_func.move_data_to_device",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


def unpickle(path: Path, output: Path) -> None:
    """Writes the tensors of a pickle to a .safetensors file, under their names. Raises CheckpointError."""
    size = path.stat().st_size
    command = [sys.executable, "-P", "-m", "calotype.weights.unpickle", str(path), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    seconds = SECONDS + size / BYTES_A_SECOND
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{path} could not be read within {seconds:.0f} seconds") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"the process that read it ended with {done.returncode}"
        raise CheckpointError(f"{path} cannot be converted: {ascii(reason)[1:-1][:300]}", "nothing was written of it")
    header(output)


# ---- in the other process ----


def main(path: Path, output: Path) -> None:
    import torch

    from calotype.weights.write import Pending, write_safetensors

    _limit(path.stat().st_size)
    torch.serialization.add_safe_globals([(_Inert, name) for name in INERT])
    try:
        with path.open("rb") as file:  # for a path that ends in .safetensors PyTorch would take another reader
            mapped = zipfile.is_zipfile(path) and path.suffix != ".safetensors"
            source = path if mapped else file
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # it raises all sorts, and says in several lines how to be less careful
        refused = re.search(r"GLOBAL ([\w.]{1,100})|Unsupported operand \d+", str(error))
        reason = "" if refused is None else f": it asks for {refused[1]}" if refused[1] else f": {refused[0].lower()}"
        raise CheckpointError(f"it is no pickle of tensors alone{reason}") from None
    tensors = tensors_of(content)
    if sum(tensor.nbytes for tensor in tensors.values()) > MOST * path.stat().st_size:
        raise CheckpointError("its tensors are far larger than the file")
    write_safetensors(output, {name: Pending.of(tensor.detach()) for name, tensor in tensors.items()}, {})


class _Inert:
    """Stands for an object that no tensor needs."""

    def __init__(self, *arguments: object) -> None:
        pass


def tensors_of(content: Any) -> dict[str, Any]:
    """The named tensors in what torch.save has saved: a state dict, alone or in a training run's checkpoint."""
    import torch

    from calotype.weights.write import NAMES

    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"it holds a {type(content).__name__}, not tensors by name")
    if isinstance(content.get("string_to_param"), dict):  # a textual inversion: in safetensors it has this name
        content = dict(zip(("emb_params",), content["string_to_param"].values(), strict=False))
    found = {}
    for name, value in content.items():
        if isinstance(value, int | float | str | None):
            continue  # step counts and the like
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            raise CheckpointError(f"{shown(name)} is a {type(value).__name__}, not a tensor")
        if value.dtype not in NAMES:
            raise CheckpointError(f"{shown(name)} holds {value.dtype}, which is not supported")
        found[name] = value
    if not found:
        raise CheckpointError("it holds no tensors")
    return found


def _limit(size: int) -> None:
    """Bounds what this process may take for a file of `size` bytes, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = SPARE
    status = Path("/proc/self/statm")
    if status.is_file():
        used = int(status.read_text().split()[0]) * resource.getpagesize()
    seconds = int(SECONDS + size / BYTES_A_SECOND)
    for limit, most in (
        (resource.RLIMIT_AS, used + 3 * size + SPARE),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, MOST * size + SPARE),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(limit, (most, most))
        except (ValueError, OSError):  # macOS has no RLIMIT_AS below what is taken
            continue


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:
        sys.exit(str(error) or type(error).__name__)
