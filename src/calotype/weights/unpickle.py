"""Takes the tensors out of a pickle, in a process of its own that has no more memory, time and disk than they need.

calotype.weights.pickles reads it: tensors and plain containers are made, nothing that the file names is called.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from calotype.errors import CheckpointError
from calotype.weights.files import header, shown

SECONDS, BYTES_A_SECOND = 120, 20_000_000  # the least time, and how fast a slow disk is
SPARE = 2**30  # bytes of memory beside what holds the file
MOST = 4  # times the file's size: more than that is written of no honest file
DEEPEST = 4  # levels of wrappers

# What training runs call the weights among other things; the first counts wherever it is.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "network", "params", "params_ema", "ema")


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
    from calotype.weights import pickles
    from calotype.weights.write import Pending, write_safetensors

    _limit(path.stat().st_size)
    tensors = tensors_of(pickles.read(path))
    if sum(tensor.nbytes for tensor in tensors.values()) > MOST * path.stat().st_size:
        raise CheckpointError("its tensors are far larger than the file")
    write_safetensors(output, {name: Pending.of(tensor) for name, tensor in tensors.items()}, {})


def tensors_of(content: Any) -> dict[str, Any]:
    """The named tensors in what `pickles.read` gives: a state dict, alone or in a training run's checkpoint."""
    import torch

    from calotype.weights.pickles import Array, Inert, Parameters
    from calotype.weights.write import NAMES

    content = _unwrapped(content)
    if isinstance(content.get("string_to_param"), dict):  # a textual inversion: in safetensors it has this name
        content = dict(zip(("emb_params",), content["string_to_param"].values(), strict=False))
    found = {}
    items = list(content.items())
    for name, value in items:
        if isinstance(value, Parameters):
            items += [(f"{name}.{inner}", parameter) for inner, parameter in value.items()]
            continue
        if isinstance(value, int | float | str | bytes | Inert | None):
            continue  # step counts and the like
        tensor = value.tensor if isinstance(value, Array) else value
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{shown(name)} is a {_kind(value)}, not a tensor")
        if tensor.dtype not in NAMES:
            raise CheckpointError(f"{shown(name)} holds {tensor.dtype}, which is not supported")
        found[name] = tensor
    if not found:
        raise CheckpointError("it holds no tensors")
    return found


def _unwrapped(content: Any) -> dict[Any, Any]:
    """The innermost of WRAPPERS, where exactly one of them holds tensors; "state_dict" counts before the others."""
    for _ in range(DEEPEST):
        if not isinstance(content, dict):
            break
        if isinstance(content.get(WRAPPERS[0]), dict):
            content = content[WRAPPERS[0]]
            continue
        holding = [] if _has_tensors(content) else [name for name in WRAPPERS if _holds(content.get(name))]
        if len(holding) > 1:
            raise CheckpointError(
                f"it holds several sets of tensors, and does not say which counts: {', '.join(holding)}"
            )
        if not holding:
            break
        content = content[holding[0]]
    if not isinstance(content, dict):
        raise CheckpointError(f"it holds a {_kind(content)}, not tensors by name")
    return content


def _holds(value: Any, depth: int = DEEPEST) -> bool:
    """Whether a dict has tensors, or a wrapper that has."""
    return (
        isinstance(value, dict)
        and depth > 0
        and (_has_tensors(value) or any(_holds(value.get(name), depth - 1) for name in WRAPPERS))
    )


def _has_tensors(value: dict[Any, Any]) -> bool:
    import torch

    from calotype.weights.pickles import Array, Parameters

    return any(isinstance(each, torch.Tensor | Array | Parameters) for each in value.values())


def _kind(value: object) -> str:
    return "dict" if isinstance(value, dict) else type(value).__name__


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
