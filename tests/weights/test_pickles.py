"""Pickles of tensors, old and new: what is taken of them, and that nothing of theirs is run."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import sys
import tarfile
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calotype.errors import CheckpointError
from calotype.text.inversion import load_inversion
from calotype.weights import pickles
from calotype.weights.convert import convert
from calotype.weights.unpickle import tensors_of

BASE = torch.arange(24.0).reshape(4, 6)
TENSORS = {
    "plain": BASE,
    "columns": BASE.t(),
    "part": BASE[1:3, 2:5],
    "half": torch.randn(5).half(),
    "odd": torch.tensor([1], dtype=torch.uint8),  # what follows it in a stream is not aligned
    "bfloat16": torch.randn(3, 3).bfloat16(),
    "float8": torch.randn(4).to(torch.float8_e4m3fn),
    "whole": torch.arange(5),
    "flags": torch.tensor([True, False]),
    "number": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "parameter": nn.Parameter(torch.ones(2)),
    "buffer": nn.Buffer(torch.ones(2)),
}


def taken(path: Path) -> dict[str, Tensor]:
    return tensors_of(pickles.read(path))


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        one.dtype == found[name].dtype
        and one.shape == found[name].shape
        and torch.equal(one.float(), found[name].float())
        for name, one in expected.items()
    )


# ---- formats ----


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "stream"])
def test_what_torch_save_writes(new: bool, protocol: int, tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.pt", _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    assert agree(taken(tmp_path / "x.pt"), TENSORS)
    torch.save(OrderedDict(TENSORS), tmp_path / "x.pt", _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    assert agree(taken(tmp_path / "x.pt"), TENSORS)


def test_a_network_s_state_dict(tmp_path: Path) -> None:
    """It has an attribute, _metadata."""
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save(network.state_dict(), tmp_path / "x.pt")
    assert agree(taken(tmp_path / "x.pt"), network.state_dict())


def test_a_zip_that_was_packed_again(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert agree(taken(tmp_path / "y.pt"), TENSORS)


def old_tar(path: Path, kind: bytes = tarfile.REGTYPE) -> Path:
    """As PyTorch 0.1.11 and older wrote: one storage, a part of it as another, a tensor of each."""
    storages, tensors, told = io.BytesIO(), io.BytesIO(), io.BytesIO()

    def put(file: io.BytesIO, value: object) -> None:
        text = pickle.dumps(value, protocol=2)
        for name in (b"FloatStorage", b"FloatTensor"):  # a global where a marker stands, which pickle cannot write
            marker = b"X" + struct.pack("<I", len(name)) + name
            for memo in (b"q\x00", b"q\x01", b"q\x02", b"q\x03", b""):
                text = text.replace(marker + memo, b"ctorch\n" + name + b"\n" + memo)
        file.write(text)

    put(storages, 1)
    put(storages, (7, "cpu", "FloatStorage"))
    storages.write(struct.pack("<q", 24) + BASE.numpy().tobytes())
    put(storages, [(8, 7, 6, 12)])
    put(tensors, 2)
    for key, storage, offset, size, stride in ((1, 7, 0, (4, 6), (6, 1)), (2, 8, 2, (2, 3), (6, 1))):
        put(tensors, (key, storage, "FloatTensor"))
        tensors.write(struct.pack("<i4x4qq", 2, *size, *stride, offset))

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> int | None:
            return value.number if isinstance(value, Kept) else None

    class Kept:
        def __init__(self, number: int) -> None:
            self.number = number

    Pickler(told, protocol=2).dump(OrderedDict(all=Kept(1), part=Kept(2)))
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as tar:
        for name, file in (("storages", storages), ("tensors", tensors), ("pickle", told)):
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(file.getvalue()), kind, __file__
            tar.addfile(info, io.BytesIO(file.getvalue()))
    return path


def test_the_oldest_format(tmp_path: Path) -> None:
    path = old_tar(tmp_path / "x.pt")
    expected = torch.load(path, weights_only=False)
    assert torch.equal(expected["part"], BASE[1:3, 2:5])
    assert agree(taken(path), expected)
    with pytest.raises(CheckpointError, match=r"it is a tar archive that torch\.save did not write"):
        taken(old_tar(tmp_path / "link.pt", tarfile.SYMTYPE))


# ---- content ----


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": TENSORS, "ema": TENSORS, "epoch": 3},
        {"model": {"state_dict": TENSORS}, "optimizer": {"state": {0: BASE}}},
        {"model": TENSORS, "ema": {}, "module": None},
        {"ema": OrderedDict(TENSORS), "args": Counter("ab"), "seen": defaultdict(list, a=[1])},
        {"params_ema": TENSORS},
        {"params": TENSORS, "step": 4, "size": torch.Size([1])},
        {"module": TENSORS, "loss": np.float64(0.5), "mean": np.float32(1)},
        {
            "network": TENSORS,
            "ids": {1, 2},
            "raw": b"\x00\xff",
            "box": bytearray(b"x"),
            "z": 1j,
            "size": torch.Size([1]),
        },
        {**TENSORS, "step": 3, "device": torch.device("cpu"), "dtype": torch.device("cpu"), "path": Path("x")},
    ],
    ids=range(9),
)
def test_tensors_among_other_things(content: object, tmp_path: Path) -> None:
    for protocol in (2, 4):
        torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
        assert agree(taken(tmp_path / "x.pt"), TENSORS)


def test_sets_of_tensors_among_which_none_is_the_one(tmp_path: Path) -> None:
    torch.save({"params": TENSORS, "params_ema": TENSORS}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"several sets of tensors, .* counts: params, params_ema"):
        taken(tmp_path / "x.pt")


def test_a_state_dict_of_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["state_dict"] = content["model"] = content
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not a tensor"):
        taken(tmp_path / "x.pt")


FOREIGN = (
    "argparse.Namespace",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.base.ContainerMetadata",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "lightning.fabric.utilities.data.AttributeDict",
    "pathlib.PosixPath",
)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", FOREIGN)
def test_harmless_objects_are_passed_over(
    name: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, own = name.rpartition(".")
    kind = type(own, (), {"__module__": module, "__qualname__": own})
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), type(sys)(".".join(parts[:i])))
    monkeypatch.setattr(sys.modules[module], own, kind, raising=False)
    one = kind()
    vars(one).update(a=1, itself=one)
    torch.save(
        {"state_dict": TENSORS, "hparams": one, "callbacks": {kind: one}}, tmp_path / "x.pt", pickle_protocol=protocol
    )
    monkeypatch.undo()
    assert agree(taken(tmp_path / "x.pt"), TENSORS)


def test_parameters_by_name_and_in_a_list(tmp_path: Path) -> None:
    both = {"a": nn.ParameterDict({"x": torch.ones(2), "y": torch.zeros(3)}), "b": nn.ParameterList([BASE])}
    torch.save(both, tmp_path / "x.pt")
    found = taken(tmp_path / "x.pt")
    assert agree(found, {"a.x": torch.ones(2), "a.y": torch.zeros(3), "b.0": BASE})


@pytest.mark.parametrize(
    ("content", "token"),
    [
        ({"<cat-toy>": torch.ones(1, 8)}, "<cat-toy>"),  # diffusers' learned_embeds.bin
        ({"<cat-toy>": nn.Parameter(torch.ones(1, 8))}, "<cat-toy>"),
        (
            {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": nn.ParameterDict({"*": torch.ones(1, 8)})},
            "x",
        ),
        (
            {
                "string_to_token": {"*": 265},
                "string_to_param": {"*": torch.ones(1, 8)},
                "name": "x",
                "step": 9,
                "sd": None,
            },
            "x",
        ),
    ],
    ids=["diffusers", "parameter", "original", "webui"],
)
def test_textual_inversions(content: object, token: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.bin")
    learnt = load_inversion(convert(tmp_path / "x.bin", tmp_path / "x.safetensors"))
    assert learnt.token == token


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", ["f8", "f4", "f2", "i8", "i4", "u1", "b1"])
def test_arrays_are_tensors(kind: str, protocol: int, tmp_path: Path) -> None:
    array = np.arange(6).reshape(2, 3).astype(kind)
    content = {
        "rows": array,
        "columns": np.asfortranarray(array),
        "part": array[:, 1:],
        "none": array[:0],
        "one": array[1, 1],
    }
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
    expected = {name: torch.from_numpy(np.ascontiguousarray(each)) for name, each in content.items() if name != "one"}
    assert agree(taken(tmp_path / "x.pt"), expected)
    (tmp_path / "y.pkl").write_bytes(pickle.dumps(content, protocol=protocol))  # without torch
    assert agree(taken(tmp_path / "y.pkl"), expected)


@pytest.mark.parametrize(
    "array", [np.array([None, "x"]), np.ones(2, dtype=">f4"), np.array(["x"]), np.ones(1, dtype="c8")]
)
def test_arrays_of_other_kinds(array: np.ndarray, tmp_path: Path) -> None:
    torch.save({"a": array}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="'a' is a Array, not a tensor"):
        taken(tmp_path / "x.pt")


# ---- attacks ----


def by_name(name: str, protocol: int) -> bytes:
    """A pickle that calls NAME('/nowhere')."""
    module, _, own = name.rpartition(".")
    if protocol == 2:
        return b"\x80\x02c" + f"{module}\n{own}\n".encode() + b"X\x08\x00\x00\x00/nowhere\x85R."
    texts = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, own))
    return b"\x80\x04" + texts + b"\x93\x8c\x08/nowhere\x85R."


UNKNOWN = """
    os.system posix.system builtins.eval builtins.exec builtins.getattr builtins.open builtins.__import__
    subprocess.Popen importlib.import_module numpy.load numpy.fromfile torch.load torch.hub.load torch.jit.load
    torch.storage._load_from_bytes torch._utils._import_dotted_name torch.serialization.load operator.attrgetter
    functools.partial pickle.loads shutil.rmtree pathlib.Path.touch pathlib.Path.unlink omegaconf.OmegaConf.load
    omegaconf.dictconfig.os pytorch_lightning.callbacks.os.system torch.nn.modules.linear.Linear torch.FloatStorage.x
    numpy.core.multiarray.fromfile codecs.decode runpy.run_path webbrowser.open torch.utils.model_zoo.load_url
"""


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", UNKNOWN.split())
def test_names_that_are_not_known_are_refused(name: str, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(by_name(name, protocol))
    pickletools.dis(path.read_bytes(), out=io.StringIO())  # it is a sound pickle
    with pytest.raises(CheckpointError, match=rf"asks for {name}"):
        taken(path)
    torch.save(TENSORS, tmp_path / "z.pt")
    with zipfile.ZipFile(tmp_path / "z.pt", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("z/data.pkl", path.read_bytes())
    with pytest.raises(CheckpointError, match=rf"asks for {name}"):
        taken(tmp_path / "z.pt")


def test_chains_of_what_is_known_lead_nowhere(tmp_path: Path) -> None:
    """The tables' own functions, called and changed in ways that no honest file does."""
    known = b"cargparse\nNamespace\n"
    for text, message in {
        b"\x80\x02" + known + b")\x81)R.": "not callable",  # an inert object is no function
        b"\x80\x02" + known + b"}X\x01\x00\x00\x00aK\x01sb.": "it changes a type",  # a class gets no attributes
        b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.": "it changes a type",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.": "it changes a function",
        b"\x80\x02(X\x06\x00\x00\x00module" + known + b"X\x01\x00\x00\x00aX\x01\x00\x00\x00btQ.": "of another file",
        b"\x80\x02\x82\x01.": "unregistered extension code",
    }.items():
        (tmp_path / "x.pt").write_bytes(text)
        with pytest.raises(CheckpointError, match=message):
            taken(tmp_path / "x.pt")


def test_a_stream_that_refers_to_a_class_s_source(tmp_path: Path) -> None:
    """torch.load would compare the source, and might write a patch."""
    file = io.BytesIO()
    for value in (pickles.MAGIC, pickles.PROTOCOL, {"little_endian": True}):
        pickle.dump(value, file, protocol=2)
    file.write(b"\x80\x02(X\x06\x00\x00\x00modulecargparse\nNamespace\nX\x01\x00\x00\x00aX\x01\x00\x00\x00bK\x01tQ.")
    (tmp_path / "x.pt").write_bytes(file.getvalue())
    with pytest.raises(CheckpointError, match="it refers to a module"):
        taken(tmp_path / "x.pt")


def test_a_whole_network_is_refused_by_its_name(tmp_path: Path) -> None:
    for new in (True, False):
        torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "x.pt", _use_new_zipfile_serialization=new)
        with pytest.raises(CheckpointError, match=r"asks for torch\.nn\.modules\.container\.Sequential"):
            taken(tmp_path / "x.pt")
    torch.save({"unet": nn.Linear(2, 2)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        taken(tmp_path / "x.pt")


@pytest.mark.parametrize(("offset", "size"), [(1, (4, 6)), (0, (5, 6)), (10**9, (1,)), (-1, (1,)), (0, (-1,))])
def test_tensors_beyond_their_storage(offset: int, size: tuple[int, ...], tmp_path: Path) -> None:
    torch.save({"a": BASE}, tmp_path / "x.pt")
    stride = (6, 1)[-len(size) :]
    content = pickles.Storage(BASE.view(torch.uint8).flatten(), torch.float32)
    with pytest.raises(RuntimeError):
        pickles._tensor(content, offset, size, stride)


# ---- what is no pickle ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is no pickle: it is empty"),
        (b"<!DOCTYPE html>", "it is no pickle: it begins with b'<!DOCTYP'"),
        (b"GGUF\x03\x00\x00\x00", "it is no pickle: it begins with b'GGUF"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer: fetch the file with git lfs pull"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", r"it is no pickle but a \.safetensors file: rename it"),
        (b"\x80\x02", "it is a damaged pickle: EOFError"),
        (b"\x80\x02K\x01.", "it holds a int, not tensors by name"),
        (b"PK\x03\x04nothing", "it is a damaged pickle: BadZipFile"),
    ],
)
def test_files_of_other_kinds(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        taken(tmp_path / "model.bin")
    assert "\n" not in caught.value.message


def test_zips_of_other_kinds(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(CheckpointError, match=r"a zip archive that torch\.save did not write"):
        taken(tmp_path / "x.pt")
    torch.save(TENSORS, tmp_path / "y.pt")
    with zipfile.ZipFile(tmp_path / "y.pt", "a") as archive:
        archive.writestr("y/constants.pkl", "x")
    with pytest.raises(CheckpointError, match="it is a TorchScript program"):
        taken(tmp_path / "y.pt")
    with zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("z/data.pkl", bytes(10_000_000))
    with pytest.raises(CheckpointError, match="far larger than the file"):
        taken(tmp_path / "z.pt")


def test_files_that_end_too_early(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "x.pt").read_bytes()
    for length in range(1, len(whole) - 1, 37):
        (tmp_path / "x.pt").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            taken(tmp_path / "x.pt")
