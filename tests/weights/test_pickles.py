"""Pickles of tensors, old and new: what is taken of them, and that nothing of theirs is run."""

from __future__ import annotations

import sys
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
from calotype.weights.convert import convert
from calotype.weights.unpickle import MARKS, Array, Inert, NumpyType, Parameters, read, tensors_of

BASE = torch.arange(24.0).reshape(4, 6)
TENSORS = {
    "plain": BASE,
    "columns": BASE.t(),
    "part": BASE[1:3, 2:5],
    "half": torch.randn(5).half(),
    "odd": torch.tensor([1], dtype=torch.uint8),  # what follows it in a stream is not aligned
    "bfloat16": torch.randn(3, 3).bfloat16(),
    "whole": torch.arange(5),
    "flags": torch.tensor([True, False]),
    "number": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "parameter": nn.Parameter(torch.ones(2)),
    "buffer": nn.Buffer(torch.ones(2)),
}


def taken(path: Path) -> dict[str, Tensor]:
    return tensors_of(read(path))


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        one.dtype == found[name].dtype
        and one.shape == found[name].shape
        and torch.equal(one.float(), found[name].float())
        for name, one in expected.items()
    )


# ---- formats ----


@pytest.mark.parametrize("new", [True, False], ids=["zip", "stream"])
def test_what_torch_save_writes(new: bool, tmp_path: Path) -> None:
    tensors = TENSORS | ({"float8": torch.randn(4).to(torch.float8_e4m3fn)} if new else {})
    torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    assert agree(taken(tmp_path / "x.pt"), tensors)
    torch.save(OrderedDict(tensors), tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    assert agree(taken(tmp_path / "x.pt"), tensors)


def test_a_network_s_state_dict(tmp_path: Path) -> None:
    """It has an attribute, _metadata."""
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save(network.state_dict(), tmp_path / "x.pt")
    assert agree(taken(tmp_path / "x.pt"), network.state_dict())


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
    for new in (True, False):
        torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
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


@pytest.mark.parametrize("name", FOREIGN)
def test_harmless_objects_are_passed_over(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, own = name.rpartition(".")
    kind = type(own, (), {"__module__": module, "__qualname__": own})
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), type(sys)(".".join(parts[:i])))
    monkeypatch.setattr(sys.modules[module], own, kind, raising=False)
    one = kind()
    vars(one).update(a=1, itself=one)
    torch.save({"state_dict": TENSORS, "hparams": one, "callbacks": {kind: one}}, tmp_path / "x.pt")
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


@pytest.mark.parametrize("kind", ["f8", "f4", "f2", "i8", "i4", "u1", "b1"])
def test_arrays_are_tensors(kind: str, tmp_path: Path) -> None:
    array = np.arange(6).reshape(2, 3).astype(kind)
    content = {
        "rows": array,
        "columns": np.asfortranarray(array),
        "part": array[:, 1:],
        "none": array[:0],
        "one": array[1, 1],
    }
    torch.save(content, tmp_path / "x.pt")
    expected = {name: torch.from_numpy(np.ascontiguousarray(each)) for name, each in content.items() if name != "one"}
    assert agree(taken(tmp_path / "x.pt"), expected)


@pytest.mark.parametrize(
    "array", [np.array([None, "x"]), np.ones(2, dtype=">f4"), np.array(["x"]), np.ones(1, dtype="c8")]
)
def test_arrays_of_other_kinds(array: np.ndarray, tmp_path: Path) -> None:
    torch.save({"a": array}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="'a' is an array, not a tensor"):
        taken(tmp_path / "x.pt")


# ---- attacks ----


def by_name(name: str) -> bytes:
    """A pickle that calls NAME('/nowhere')."""
    module, _, own = name.rpartition(".")
    return b"\x80\x02c" + f"{module}\n{own}\n".encode() + b"X\x08\x00\x00\x00/nowhere\x85R."


UNKNOWN = """
    os.system posix.system builtins.eval builtins.exec builtins.getattr builtins.open builtins.__import__
    subprocess.Popen importlib.import_module numpy.load numpy.fromfile torch.load torch.hub.load torch.jit.load
    torch.storage._load_from_bytes torch._utils._import_dotted_name torch.serialization.load operator.attrgetter
    functools.partial pickle.loads shutil.rmtree pathlib.Path.touch pathlib.Path.unlink omegaconf.OmegaConf.load
    omegaconf.dictconfig.os pytorch_lightning.callbacks.os.system torch.nn.modules.linear.Linear torch.FloatStorage.x
    numpy.core.multiarray.fromfile codecs.decode runpy.run_path webbrowser.open torch.utils.model_zoo.load_url
"""


@pytest.mark.parametrize("name", UNKNOWN.split())
def test_names_that_are_not_known_are_refused(name: str, tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "z.pt")
    with zipfile.ZipFile(tmp_path / "z.pt") as old, zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
        for entry in old.namelist():
            new.writestr(entry, by_name(name) if entry.endswith("data.pkl") else old.read(entry))
    with pytest.raises(CheckpointError, match=rf"^it is no pickle of tensors alone: it asks for {name}$"):
        taken(tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(by_name(name))
    with pytest.raises(CheckpointError, match=r"^it is no pickle of tensors alone"):
        taken(tmp_path / "y.pt")


def test_stand_ins_take_everything_and_do_nothing() -> None:
    for kind in (Inert, Parameters, Array, NumpyType):
        one = kind("os.system") if kind is not Parameters else kind()
        one.__setstate__({"__class__": str, "x": 1} if kind is not Array else (1, (1,), "f4", False, b"abcd"))
        assert type(one) is kind
        assert vars(one).keys() <= {"code", "tensor"}


def test_a_mark_that_is_a_number_is_kept(tmp_path: Path) -> None:
    """A ControlNet that is a difference says so by its key alone."""
    torch.save({**TENSORS, "difference": 1, "lora_controlnet": True, "step": 3}, tmp_path / "x.pt")
    assert agree(taken(tmp_path / "x.pt"), {**TENSORS, **dict.fromkeys(MARKS, torch.tensor(1.0))})


def test_a_whole_network_is_refused_by_its_name(tmp_path: Path) -> None:
    for new in (True, False):
        torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "x.pt", _use_new_zipfile_serialization=new)
        with pytest.raises(CheckpointError, match=r"asks for torch\.nn\.modules\.container\.Sequential"):
            taken(tmp_path / "x.pt")
    torch.save({"unet": nn.Linear(2, 2)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        taken(tmp_path / "x.pt")


# ---- what is no pickle ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is no pickle of tensors alone"),
        (b"<!DOCTYPE html>", "it is no pickle of tensors alone"),
        (b"\x80\x04\x95", "it is no pickle of tensors alone"),
        (b"PK\x03\x04nothing", "it is no pickle of tensors alone"),
    ],
)
def test_files_of_other_kinds(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        taken(tmp_path / "model.bin")
    assert "\n" not in caught.value.message


def test_files_that_end_too_early(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "x.pt").read_bytes()
    for length in range(1, len(whole) - 1, 137):
        (tmp_path / "x.pt").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            taken(tmp_path / "x.pt")
