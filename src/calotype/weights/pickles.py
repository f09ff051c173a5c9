"""Reads what torch.save and pickle wrote, and runs nothing of it: every name in a file is looked up in tables here.

A pickle is a program: it names functions and says what to call them with. Here a name means one of a few functions that
make tensors, a plain container, or something inert in the place of an object that no tensor needs. Any other name ends
the reading. Formats, all of torch.serialization: a zip archive (since 1.6), pickles and storages one after another
(since 0.1.12), a tar archive (before).
"""

from __future__ import annotations

import mmap
import pickle
import struct
import tarfile
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from calotype.errors import CheckpointError

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch.save before 1.6
PROTOCOL = 1001
MOST = 4  # times the file's size: no honest file holds more, compressed

DTYPES = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
NUMPY = {
    "f8": torch.float64,
    "f4": torch.float32,
    "f2": torch.float16,
    "i8": torch.int64,
    "i4": torch.int32,
    "i2": torch.int16,
    "i1": torch.int8,
    "u1": torch.uint8,
    "b1": torch.bool,
}


def read(path: Path) -> Any:
    """The object in a file, its tensors views of the mapped file where they can be. Raises CheckpointError."""
    with path.open("rb") as file:
        start = file.read(512)
        file.seek(0)
        try:
            if start[:4] == b"PK\x03\x04":
                return _of_zip(file)
            if start[257:262] == b"ustar":
                return _of_tar(file)
            if start[:1] == pickle.PROTO:
                return _of_stream(file)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle can do all that a program can do wrongly
            raise CheckpointError(f"it is a damaged pickle: {type(error).__name__}: {error}") from None
    known = {b"version https://git-lfs": "a Git LFS pointer: fetch the file with git lfs pull", b"": "empty"}
    if start[8:9] == b"{":
        raise CheckpointError("it is no pickle but a .safetensors file: rename it")
    what = next((what for begin, what in known.items() if start[: max(len(begin), 1)] == begin), None)
    raise CheckpointError("it is no pickle: it " + (f"is {what}" if what else f"begins with {start[:8]!r}"))


# ---- what names mean ----


class Inert:
    """Stands for an object that no tensor needs: it takes everything and does nothing. A class of it for each name."""

    def __new__(cls, *arguments: object, **named: object) -> Inert:
        return super().__new__(cls)

    def build(self, state: object) -> None:
        """What the object's attributes were."""

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        pass

    def extend(self, values: object) -> None:
        pass


class Table(dict[Any, Any]):
    """Any kind of dict."""

    def __init__(self, *arguments: object) -> None:
        super().__init__()
        for argument in arguments:
            if isinstance(argument, Mapping):
                self.update(argument)
            elif isinstance(argument, list):  # of pairs; anything else is what makes missing values
                self.update(tuple(pair) for pair in argument)

    def build(self, state: object) -> None:
        """Attributes that a state dict has beside its items."""


class Parameters(Table):
    """A ParameterDict or ParameterList of torch: its tensors by their names in it."""

    def build(self, state: object) -> None:
        for held in ("_parameters", "_buffers"):
            found = state.get(held) if isinstance(state, dict) else None
            if isinstance(found, dict):
                self.update(found)


class NumpyType:
    """numpy.dtype."""

    def __init__(self, code: object = None, *arguments: object) -> None:
        self.dtype = NUMPY.get(_text(code).lstrip("<|="))

    def build(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and _text(state[1]) == ">":
            self.dtype = None


class Array:
    """numpy.ndarray. `tensor` stays None where its numbers are of another kind than tensors have."""

    tensor: Tensor | None = None

    def __init__(self, *arguments: object) -> None:
        pass

    def build(self, state: Any) -> None:
        """(version, shape, dtype, whether it is in Fortran's order, bytes)"""
        _, shape, kind, by_columns, data = state
        self.fill(data, kind, shape, by_columns)

    def fill(self, data: object, kind: object, shape: tuple[int, ...], by_columns: bool) -> None:
        if isinstance(kind, NumpyType) and kind.dtype is not None and isinstance(data, bytes | bytearray | str):
            raw = data.encode("latin-1") if isinstance(data, str) else data  # Python 2 wrote bytes as text
            flat = _raw(raw).view(kind.dtype)
            backwards = tuple(reversed(range(len(shape))))
            self.tensor = flat.reshape(shape[::-1]).permute(backwards) if by_columns else flat.reshape(shape)

    @staticmethod
    def of_buffer(data: object, kind: object, shape: tuple[int, ...], order: object) -> Array:
        array = Array()
        array.fill(data, kind, shape, _text(order) == "F")
        return array


@dataclass(frozen=True, eq=False)
class Storage:
    """The bytes behind tensors."""

    raw: Tensor  # uint8
    dtype: torch.dtype


def _tensor(
    storage: Storage,
    offset: int,
    size: Iterable[int],
    stride: Iterable[int],
    requires_grad: object = None,
    hooks: object = None,
    dtype: object = None,
    metadata: object = None,
) -> Tensor:
    """torch._utils._rebuild_tensor, _v2 and (with a dtype) _v3. Raises where it would lie outside the storage."""
    kind = dtype if isinstance(dtype, torch.dtype) else storage.dtype
    raw = storage.raw[: storage.raw.numel() // kind.itemsize * kind.itemsize]
    if raw.data_ptr() % kind.itemsize:
        raw = raw.clone()
    flat = raw.view(kind)
    return flat.as_strided(tuple(size), tuple(stride), flat.storage_offset() + offset)


def _tensor_v2(storage: Storage, offset: int, size: Iterable[int], stride: Iterable[int], *rest: object) -> Tensor:
    return _tensor(storage, offset, size, stride)


def _first(data: Any, *rest: object) -> Any:
    """A parameter is its tensor."""
    return data


class Parameter:
    """torch.nn.Parameter, as a class."""

    def __new__(cls, data: Any = None, *rest: object) -> Any:
        return data


def _with_attributes(make: Callable[..., Any], kind: object, arguments: tuple[Any, ...], state: object) -> Any:
    """torch._tensor._rebuild_from_type_v2"""
    return make(*arguments)


def _object(kind: Callable[..., Any], base: object, state: object) -> Any:
    """copyreg._reconstructor"""
    return kind()


def _bytes(text: str, encoding: object = "latin-1") -> bytes:
    """_codecs.encode, by which protocol 2 writes bytes."""
    return text.encode("latin-1")


def _no_bytes() -> bytes:
    """builtins.bytes, by which protocol 2 writes none."""
    return b""


NAMES: dict[str, Any] = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.nn.parameter.Parameter": Parameter,
    "torch.nn.parameter.Buffer": Parameter,
    "torch.nn.modules.container.ParameterDict": Parameters,
    "torch.nn.modules.container.ParameterList": Parameters,
    "torch.Size": tuple,
    "collections.OrderedDict": Table,
    "collections.defaultdict": Table,
    "collections.Counter": Table,
    "builtins.dict": Table,
    "diffusers.configuration_utils.FrozenDict": Table,
    "_codecs.encode": _bytes,
    "builtins.bytes": _no_bytes,
    "copyreg._reconstructor": _object,
    **dict.fromkeys(("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"), Array),
    **dict.fromkeys(("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"), Array.of_buffer),
    "numpy.dtype": NumpyType,
}

# What training leaves in checkpoints beside tensors: classes, and packages of which any class may be there.
INERT = {
    "argparse": "Namespace",
    "builtins": "bool bytearray complex float frozenset int list object range set slice str tuple",
    "collections": "deque",
    "datetime": "date datetime timedelta",
    "decimal": "Decimal",
    "numpy": "bool bool_ float16 float32 float64 int16 int32 int64 int8 ndarray str_ uint8",
    "numpy._core.multiarray": "scalar",
    "numpy.core.multiarray": "scalar",
    "pathlib": "Path PosixPath PurePosixPath PureWindowsPath WindowsPath",
    "pathlib._local": "Path PosixPath PurePosixPath PureWindowsPath WindowsPath",
    "pytorch_lightning.utilities.apply_func": "move_data_to_device",
    "torch": "Tensor device dtype layout strided",
    "torch.serialization": "_get_layout",
    "torch.torch_version": "TorchVersion",
    "types": "SimpleNamespace",
    "typing": "Any",
    "uuid": "UUID",
}
INERT_PACKAGES = ("omegaconf.", "pytorch_lightning.", "lightning.", "lightning_fabric.", "numpy.random.")


def meaning(module: str, name: str) -> Any:
    """What a name in a file stands for. Raises CheckpointError for all that is not known to be harmless."""
    full = f"{module}.{name}"
    if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGES:
        return STORAGES[name]
    if full in DTYPES:
        return DTYPES[full]
    if full in NAMES:
        return NAMES[full]
    tensor_type = module in ("torch", "torch.cuda") and name.removesuffix("Tensor") + "Storage" in STORAGES
    class_of_package = full.startswith(INERT_PACKAGES) and name.isidentifier() and name[0].isupper()
    if name in INERT.get(module, "").split() or tensor_type or class_of_package:
        return type(name, (Inert,), {})
    raise CheckpointError(f"it is no pickle of tensors alone: it asks for {full[:100]}")


class Unpickler(pickle._Unpickler):  # the one in C has no `dispatch`
    """Python's own, in Python, whose every way out is closed: names, attributes of objects, objects kept elsewhere."""

    proto: int
    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: IO[bytes], persistent: Callable[[Any], Any] | None = None) -> None:
        super().__init__(file, encoding="latin-1")
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        if self.proto < 3:  # as Python 2 called it
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return meaning(module, name)

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise CheckpointError("it is no pickle of tensors alone: it asks for an object of another file")
        return self._persistent(pid)

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Inert | Table | NumpyType | Array):
            raise CheckpointError(f"it is no pickle of tensors alone: it changes a {type(target).__name__}")
        target.build(state)

    dispatch[pickle.BUILD[0]] = load_build


def _raw(data: bytes | bytearray) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _storage_of(pid: Any) -> tuple[torch.dtype, Any, int, Any]:
    """dtype, key, count of elements, view of a storage that a pickle refers to."""
    if not isinstance(pid, tuple) or len(pid) < 5 or _text(pid[0]) != "storage" or not isinstance(pid[1], torch.dtype):
        what = _text(pid[0]) if isinstance(pid, tuple) and pid else type(pid).__name__
        raise CheckpointError(f"it is no pickle of tensors alone: it refers to a {what[:40]}")
    _, dtype, key, _, count, *view = pid
    return dtype, key, count, view[0] if view else None


# ---- files ----


def _of_zip(file: IO[bytes]) -> Any:
    with zipfile.ZipFile(file) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        entry = next((name for name in infos if name.split("/", 1)[-1] == "data.pkl"), None)
        if entry is None:
            raise CheckpointError("it is a zip archive that torch.save did not write")
        root = entry.removesuffix("data.pkl")
        if f"{root}constants.pkl" in infos:
            raise CheckpointError("it is a TorchScript program, not a pickle of tensors")
        if sum(info.file_size for info in infos.values()) > MOST * file.seek(0, 2):
            raise CheckpointError("what it holds is far larger than the file")
        if f"{root}byteorder" in infos and archive.read(f"{root}byteorder") != b"little":
            raise CheckpointError("it was written by a machine of the other byte order")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        storages: dict[str, Tensor] = {}

        def load(pid: Any) -> Storage:
            dtype, key, count, _ = _storage_of(pid)
            if key not in storages:
                info = infos[f"{root}data/{key}"]
                if info.compress_type == zipfile.ZIP_STORED:
                    storages[key] = _mapped(mapped, _content_of(mapped, info.header_offset), info.file_size)
                else:
                    storages[key] = _raw(archive.read(info))
            if count * dtype.itemsize > storages[key].numel():
                raise CheckpointError(f"storage {key} has {storages[key].numel()} bytes, fewer than are asked for")
            return Storage(storages[key], dtype)

        with archive.open(entry) as pickled:
            return Unpickler(pickled, load).load()


def _content_of(mapped: mmap.mmap, header: int) -> int:
    """Where a stored member begins: behind its local header, whose name and extra field have lengths of their own."""
    name, extra = struct.unpack("<HH", mapped[header + 26 : header + 30])
    return int(header + 30 + name + extra)


def _mapped(mapped: mmap.mmap, begin: int, length: int) -> Tensor:
    if length == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(mapped, dtype=torch.uint8, offset=begin, count=length)


def _of_stream(file: IO[bytes]) -> Any:
    """Pickles: a magic number, a protocol, facts of the system, the object, keys; then the storages by these keys."""
    first = Unpickler(file).load()
    if first != MAGIC:
        return first  # a plain pickle
    if Unpickler(file).load() != PROTOCOL:
        raise CheckpointError("it was written by an unknown version of torch.save")
    system = Unpickler(file).load()
    if isinstance(system, dict) and not system.get("little_endian", True):
        raise CheckpointError("it was written by a machine of the other byte order")
    size = Path(file.name).stat().st_size
    storages: dict[Any, Storage] = {}

    def load(pid: Any) -> Storage:
        dtype, key, count, view = _storage_of(pid)
        if key not in storages:
            if not 0 <= count * dtype.itemsize <= size:
                raise CheckpointError("its tensors are far larger than the file")
            storages[key] = Storage(torch.empty(count * dtype.itemsize, dtype=torch.uint8), dtype)
        if view is None:
            return storages[key]
        _, begin, length = view
        return Storage(storages[key].raw[begin * dtype.itemsize : (begin + length) * dtype.itemsize], dtype)

    content = Unpickler(file, load).load()
    for key in Unpickler(file).load():
        _fill(file, storages[key])
    return content


def _fill(file: IO[bytes], storage: Storage) -> None:
    """A storage in a stream: how many elements, then they."""
    (count,) = struct.unpack("<q", file.read(8))
    if count * storage.dtype.itemsize != storage.raw.numel():
        raise CheckpointError(f"a storage has {count} elements in one place and others in another")
    if file.readinto(storage.raw.numpy()) != storage.raw.numel():  # type: ignore[attr-defined]
        raise CheckpointError("it is truncated")


def _of_tar(file: IO[bytes]) -> Any:
    """Members "storages", "tensors" and "pickle", each a stream."""
    storages: dict[Any, Storage] = {}
    tensors: dict[Any, Tensor] = {}
    with tarfile.open(fileobj=file, mode="r:") as archive:
        members = {member.name: archive.extractfile(member) for member in archive if member.isreg()}
        if not members.keys() >= {"storages", "tensors", "pickle"}:
            raise CheckpointError("it is a tar archive that torch.save did not write")
        stream = members["storages"]
        assert stream is not None
        for _ in range(Unpickler(stream).load()):
            key, _, dtype = Unpickler(stream).load()
            (count,) = struct.unpack("<q", stream.read(8))
            storages[key] = Storage(_raw(stream.read(max(count, 0) * dtype.itemsize)), dtype)
        for key, root, begin, length in Unpickler(stream).load():
            whole = storages[root]
            width = whole.dtype.itemsize
            storages[key] = Storage(whole.raw[begin * width : (begin + length) * width], whole.dtype)
        stream = members["tensors"]
        assert stream is not None
        for _ in range(Unpickler(stream).load()):
            key, storage, _ = Unpickler(stream).load()
            (dimensions,) = struct.unpack("<i4x", stream.read(8))
            size = struct.unpack(f"<{dimensions}q", stream.read(8 * dimensions))
            stride = struct.unpack(f"<{dimensions}q", stream.read(8 * dimensions))
            (offset,) = struct.unpack("<q", stream.read(8))
            tensors[key] = _tensor(storages[storage], offset, size, stride)
        stream = members["pickle"]
        assert stream is not None
        return Unpickler(stream, lambda pid: tensors[int(pid)]).load()
