"""Takes the tensors out of a pickle, in a process of its own that has no more memory, time and disk than they need.

PyTorch reads it with weights_only=True: tensors and plain containers are made, nothing that the file names is called. A
name that is known to be harmless is answered with a stand-in: a parameter container with what it holds, an array with
its numbers, and what training left there with nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from calotype.errors import CheckpointError
from calotype.rules import shown
from calotype.weights.files import header

SECONDS, BYTES_A_SECOND = 120, 20_000_000  # the least time, and how fast a slow disk is
SPARE = 2**30  # bytes of memory beside what holds the file
MOST = 4  # times the file's size: more than that is written of no honest file
DEEPEST = 4  # levels of wrappers
MOST_NAMES = 100  # harmless ones in a file
MARKS = ("difference", "lora_controlnet")  # keys that say by being there what a file is

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
    from calotype.weights.write import Pending, write_safetensors

    _limit(path.stat().st_size)
    tensors = tensors_of(read(path))
    if sum(tensor.nbytes for tensor in tensors.values()) > MOST * path.stat().st_size:
        raise CheckpointError("its tensors are far larger than the file")
    write_safetensors(output, {name: Pending.of(tensor.detach()) for name, tensor in tensors.items()}, {})


class Inert:
    """Stands for an object that no tensor needs: it takes everything and does nothing."""

    def __new__(cls, *arguments: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class Parameters(dict[str, Any]):
    """A ParameterDict or ParameterList of torch: its tensors by their names in it."""

    def __setstate__(self, state: object) -> None:
        for held in ("_parameters", "_buffers"):
            found = state.get(held) if isinstance(state, dict) else None
            if isinstance(found, dict):
                self.update(found)


class NumpyType(Inert):
    """numpy.dtype. `code` is None for what is stored in the other byte order."""

    def __init__(self, code: object = None, *arguments: object) -> None:
        self.code: str | None = _text(code).lstrip("<|=")

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and _text(state[1]) == ">":
            self.code = None


class Array(Inert):
    """numpy.ndarray. `tensor` is None where its numbers are of another kind than tensors have."""

    tensor: Any = None

    def __setstate__(self, state: Any) -> None:
        """(version, shape, dtype, whether it is in Fortran's order, bytes)"""
        import torch

        _, shape, kind, by_columns, data = state
        if isinstance(kind, NumpyType) and kind.code in NUMPY and isinstance(data, bytes):
            flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            flat = flat.view(getattr(torch, NUMPY[kind.code]))
            backwards = tuple(reversed(range(len(shape))))
            self.tensor = flat.reshape(shape[::-1]).permute(backwards) if by_columns else flat.reshape(shape)


def _table(*arguments: object) -> OrderedDict[Any, Any]:
    """A defaultdict begins empty; its items follow."""
    return OrderedDict()


def _no_bytes() -> bytes:
    """builtins.bytes, by which protocol 2 writes none."""
    return b""


NUMPY = {
    "f8": "float64",
    "f4": "float32",
    "f2": "float16",
    "u1": "uint8",
    "b1": "bool",
    "i8": "int64",
    "i4": "int32",
    "i2": "int16",
    "i1": "int8",
}
# What a name in a pickle stands for, beside what PyTorch knows.
STAND_INS: dict[str, Any] = {
    "torch.nn.modules.container.ParameterDict": Parameters,
    "torch.nn.modules.container.ParameterList": Parameters,
    "collections.defaultdict": _table,
    "builtins.bytes": _no_bytes,
    "numpy.dtype": NumpyType,
    "numpy.core.multiarray._reconstruct": Array,
    "numpy._core.multiarray._reconstruct": Array,
}
# What training leaves in checkpoints beside tensors. None of it is imported: it becomes nothing.
HARMLESS = re.compile(
    r"numpy\.(_?core\.multiarray\.scalar|(bool_?|u?int\d+|float\d+|str_|ndarray))|torch\.(device|Size|Tensor|dtype)"
    r"|torch\.nn\.parameter\.Buffer|torch\.torch_version\.TorchVersion|torch\.serialization\._get_layout"
    r"|builtins\.(set|frozenset|slice|complex|range|bytearray|object|int|float|str|bool|list|dict|tuple)"
    r"|collections\.deque|argparse\.Namespace|types\.SimpleNamespace|uuid\.UUID|decimal\.Decimal|typing\.Any"
    r"|datetime\.(date|datetime|timedelta)|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
    r"|pytorch_lightning\.utilities\.apply_func\.move_data_to_device"
    r"|(omegaconf|pytorch_lightning|lightning|lightning_fabric)\.([a-z_]+\.)+[A-Z]\w*"
)


def read(path: Path) -> Any:
    """The object that torch.save has saved. Raises CheckpointError."""
    import torch

    for _ in range(MOST_NAMES):
        try:
            with path.open("rb") as file:  # for a path that ends in .safetensors PyTorch would take another reader
                mapped = zipfile.is_zipfile(path) and path.suffix != ".safetensors"
                return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # it raises all sorts, and says in several lines how to be less careful
            name = _refused(str(error))
            stand_in = Inert if name is not None and HARMLESS.fullmatch(name) else STAND_INS.get(name or "")
            if name is None or stand_in is None:
                raise CheckpointError(f"it is no pickle of tensors alone{_reason(path, str(error), name)}") from None
            torch.serialization.add_safe_globals([(stand_in, name)])
    raise CheckpointError("it is no pickle of tensors alone: it asks for more than a hundred names")


def _refused(error: str) -> str | None:
    """The name that a file asks for, and PyTorch does not give."""
    match = re.search(r"GLOBAL ([\w.]{1,200})", error)
    if match is None:
        return None
    return match[1] if "." in match[1] else f"builtins.{match[1]}"


def _reason(path: Path, error: str, name: str | None) -> str:
    if name is not None:
        return f": it asks for {name}"
    if zipfile.is_zipfile(path) and "TorchScript" in error:
        return ": it is a TorchScript program"
    if (operand := re.search(r"Unsupported operand \d+", error)) is not None:
        return f": {operand[0].lower()}, which torch.save does not write"
    return ""


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def tensors_of(content: Any) -> dict[str, Any]:
    """The named tensors in what `read` gives: a state dict, alone or in a training run's checkpoint."""
    import torch

    from calotype.weights.write import NAMES

    passed_over = (int, float, str, bytes, type(None), Inert, torch.device, torch.dtype, torch.Size)
    content = _unwrapped(content)
    if isinstance(content.get("string_to_param"), dict):  # a textual inversion: in safetensors it has this name
        content = dict(zip(("emb_params",), content["string_to_param"].values(), strict=False))
    found = {}
    items = list(content.items())
    for name, value in items:
        if isinstance(value, Parameters):
            items += [(f"{name}.{inner}", parameter) for inner, parameter in value.items()]
            continue
        if name in MARKS and isinstance(value, int | float):
            value = torch.tensor(float(value))
        tensor = value.tensor if isinstance(value, Array) else value
        if not isinstance(value, Array) and isinstance(value, passed_over):
            continue
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            raise CheckpointError(f"{shown(name)} is {_kind(value)}, not a tensor")
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
        raise CheckpointError(f"it holds {_kind(content)}, not tensors by name")
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

    return any(isinstance(each, torch.Tensor | Array | Parameters) for each in value.values())


def _kind(value: object) -> str:
    if isinstance(value, Array):
        return "an array"
    return f"a {'dict' if isinstance(value, dict) else type(value).__name__}"


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
