"""Safetensors and JSON files: what is sound is read without a copy, what is not is refused in one line."""

from __future__ import annotations

import json
import shlex
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from calotype import cli
from calotype.errors import CheckpointError, UnsafeFileError
from calotype.weights import files
from calotype.weights.files import header, is_finite, parse_json, read, read_json, shards, variants

F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def raw(path: Path, head: object, data: bytes = b"\0" * 16) -> Path:
    """A file with this header (JSON text as it is, else dumped) and these data."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_header_says_dtypes_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"b": torch.ones(3, dtype=torch.float16), "a": torch.zeros(2, 5)}, path, metadata={"format": "pt"})
    infos = header(path)
    assert {name: (info.dtype, info.shape, info.bytes) for name, info in infos.items()} == {
        "a": ("F32", (2, 5), 40),
        "b": ("F16", (3,), 6),
    }


def test_empty_and_scalar_tensors_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"none": torch.zeros(0, 3), "one": torch.tensor(2.0)}, path)
    assert header(path)["one"].shape == ()
    assert read([path])["none"].shape == (0, 3)
    save_file({}, path)
    assert header(path) == {}


def test_tensors_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    saved = {"a": torch.randn(300, 1000), "b": torch.randn(7)}
    save_file(saved, path)
    tensors = read([path])
    assert all(torch.equal(tensors[name], saved[name]) for name in saved)
    mapped = Path("/proc/self/maps").read_text()
    ranges = [line.split()[0].split("-") for line in mapped.splitlines() if line.endswith(str(path))]
    address = tensors["a"].data_ptr()
    assert any(int(low, 16) <= address < int(high, 16) for low, high in ranges)
    tensors["a"].zero_()  # a private mapping: the file stays as it is
    assert torch.equal(read([path])["a"], saved["a"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_all_256_numbers_of_float8_are_read_as_what_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    bits = torch.arange(256, dtype=torch.uint8).view(dtype)
    save_file({"a": bits}, tmp_path / "a.safetensors")
    found = read([tmp_path / "a.safetensors"])["a"]
    assert torch.equal(found.float().nan_to_num(), bits.float().nan_to_num())
    assert not is_finite(found)
    assert is_finite(found[bits.float().isfinite()])
    assert not is_finite(found[[-1]])  # NaN alone


def test_flags_and_counts_are_read(tmp_path: Path) -> None:
    saved = {f"{dtype}": torch.tensor([1, 0]).to(dtype) for dtype in (torch.int16, torch.int8, torch.uint8, torch.bool)}
    save_file(saved, tmp_path / "a.safetensors")
    found = read([tmp_path / "a.safetensors"])
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in saved.items())


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="'x', which another file"):
        read([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


# Header, data -> what the error must say. Every one is a file that somebody could put on the Hub.
HOSTILE: dict[str, tuple[object, bytes, str]] = {
    "not json": (b"{oops", b"", "not valid JSON"),
    "not utf-8": (b'{"\xff":1}', b"", "not valid JSON"),
    "no object": (b"[]", b"", "holds a JSON list"),
    "deep": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", "not valid JSON"),
    "duplicate tensor": (b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), b"\0" * 16, "the key 'a' twice"),
    "duplicate field": (b'{"a":{"dtype":"F32","dtype":"F16"}}', b"", "the key 'dtype' twice"),
    "nan": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}', b"", "NaN; numbers must be finite"),
    "infinity": (b'{"a":Infinity}', b"", "numbers must be finite"),
    "overflowing float": (b'{"a":1e999}', b"", "numbers must be finite"),
    "integer of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    "metadata is no text": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "metadata is a list": ({"__metadata__": []}, b"", "__metadata__"),
    "entry is a list": ({"a": []}, b"", "dtype, shape and data_offsets are needed"),
    "field missing": ({"a": {"dtype": "F32", "shape": []}}, b"", "dtype, shape and data_offsets are needed"),
    "field unknown": ({"a": F32 | {"code": "import os"}}, b"\0" * 16, "dtype, shape and data_offsets are needed"),
    "dtype unknown": ({"a": F32 | {"dtype": "F4"}}, b"\0" * 16, "F4.*known are F64, F32"),
    "dtype is a list": ({"a": F32 | {"dtype": ["F32"]}}, b"\0" * 16, "known are"),
    "negative shape": ({"a": F32 | {"shape": [-2, -2]}}, b"\0" * 16, "shape"),
    "bool in shape": ({"a": F32 | {"shape": [True, 4]}}, b"\0" * 16, "shape"),
    "float in shape": ({"a": F32 | {"shape": [2.0, 2]}}, b"\0" * 16, "shape"),
    "shape overflows": ({"a": F32 | {"shape": [2**40, 2**40]}}, b"\0" * 16, "takes"),
    "many dimensions": ({"a": F32 | {"shape": [1] * 100}}, b"\0" * 16, "dimensions"),
    "negative offset": ({"a": F32 | {"data_offsets": [-16, 0]}}, b"\0" * 16, "data_offsets"),
    "offsets reversed": ({"a": F32 | {"data_offsets": [16, 0]}}, b"\0" * 16, "-16 bytes"),
    "three offsets": ({"a": F32 | {"data_offsets": [0, 8, 16]}}, b"\0" * 16, "data_offsets"),
    "shape and length disagree": ({"a": F32 | {"shape": [2, 3]}}, b"\0" * 16, r"16 bytes; \[2, 3\] of F32 takes 24"),
    "overlap": ({"a": F32, "b": F32 | {"data_offsets": [8, 24]}}, b"\0" * 24, "overlaps the tensor before it"),
    "same bytes": ({"a": F32, "b": F32}, b"\0" * 16, "overlaps the tensor before it"),
    "gap": ({"a": F32, "b": F32 | {"data_offsets": [32, 48]}}, b"\0" * 48, "leaves a gap of 16 bytes"),
    "truncated data": ({"a": F32}, b"\0" * 15, "truncated: its tensors take 16 bytes, the file holds 15"),
    "data behind": ({"a": F32}, b"\0" * 17, "1 bytes behind its last tensor"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_in_one_short_line(case: str, tmp_path: Path) -> None:
    head, data, message = HOSTILE[case]
    path = raw(tmp_path / "x.safetensors", head, data)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=message) as caught:
        header(path)
    assert time.monotonic() - started < 1.0
    line = caught.value.message
    assert str(path) in line
    assert len(line.splitlines()) == 1
    assert len(line) < 400 + len(str(path))


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "short": (b"\x10\0\0", "3 bytes"),
    "header longer than the file": (struct.pack("<Q", 1000) + b"{}", "its header takes 1000 bytes, the file holds 2"),
    "header of exabytes": (b"\xff" * 8 + b"{}", "claims a header of 18,446,744,073,709,551,615 bytes"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
    "web page": (b"<!DOCTYPE html><html>Not Found</html>", "is a web page"),
}


@pytest.mark.parametrize("case", FILES)
def test_what_is_no_safetensors_file_is_refused(case: str, tmp_path: Path) -> None:
    content, message = FILES[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        header(path)


def test_a_long_header_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "HEADER_LIMIT", 100)
    with pytest.raises(CheckpointError, match="at most 100 are read"):
        header(raw(tmp_path / "x.safetensors", {"a" * 100: F32}))


def test_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(CheckpointError, match="missing"):
            header(path)


@pytest.mark.parametrize("save", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_a_pickle_is_refused_whatever_its_name(save: dict[str, Any], tmp_path: Path) -> None:
    for name in ("model.bin", "model.ckpt", "model.pt", "model.pth", "disguised.safetensors"):
        torch.save({"a": torch.zeros(3)}, tmp_path / name, **save)
        with pytest.raises(UnsafeFileError, match="pickle") as caught:
            header(tmp_path / name)
        assert "calotype convert" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["model.bin", "a model.ckpt", "disguised.safetensors"])
def test_the_command_in_the_hint_converts(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.arange(3.0)}, tmp_path / name)
    with pytest.raises(UnsafeFileError) as caught:
        header(tmp_path / name)
    command = shlex.split(str(caught.value.hint).partition(": ")[2])
    assert command[:2] == ["calotype", "convert"]
    assert cli.main(command[1:]) == 0
    assert read([Path(capsys.readouterr().out.strip())])["a"].tolist() == [0, 1, 2]


# ---- JSON ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "a": 2}', "key 'a' twice"),
        (b'{"a": {"b": 1, "b": 1}}', "key 'b' twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e400}', "1e400"),
        (b'"text"', "JSON str"),
        (b"", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ],
)
def test_ambiguous_json_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_json(text, "config.json")


def test_a_long_json_file_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(files.JSON_LIMIT + 1)  # a hole: no memory, no disk
    with pytest.raises(CheckpointError, match="at most 10,000,000 are read"):
        read_json(path)


def test_a_value_in_a_message_is_one_short_line() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    for value in (nested, "a\nb" * 10**6, list(range(10**6)), {"a\n": "\ud800"}, 10**4000, b"\n"):
        text = files.shown(value)
        assert len(text) <= 160
        assert text.isprintable()
    while nested:  # take it apart gently: the interpreter frees nested lists by recursion
        nested = nested[0]


# ---- which files ----


def test_variants_of_a_folder() -> None:
    names = [
        "model.safetensors", "model.fp16.safetensors", "model.non_ema.safetensors", "model.bin", "config.json",
        "model-00001-of-00002.safetensors", "model.fp16-00001-of-00002.safetensors", "xmodel.safetensors",
        "model.safetensors.index.bf16.json",
    ]  # fmt: skip
    assert variants(names, "model") == {
        None: "model.safetensors",
        "fp16": "model.fp16.safetensors",
        "non_ema": "model.non_ema.safetensors",
        "bf16": "model.safetensors.index.bf16.json",
    }


def write_shards(folder: Path) -> Path:
    save_file({"a": torch.zeros(1)}, folder / "m-00001-of-00002.safetensors")
    save_file({"b": torch.ones(1)}, folder / "m-00002-of-00002.safetensors")
    index = folder / "m.safetensors.index.json"
    names = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": names}))
    return index


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    paths = shards(tmp_path, write_shards(tmp_path).name)
    assert {name: tensor.item() for name, tensor in read(paths).items()} == {"a": 0, "b": 1}


def spoil_with(weight_map: object) -> Callable[[Path], None]:
    return lambda index: index.write_text(json.dumps({"weight_map": weight_map})) and None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_with({"a": "../m-00001-of-00002.safetensors"}), "in the same folder"),
        (spoil_with({"a": "/etc/passwd"}), "in the same folder"),
        (spoil_with({"a": "m.bin"}), "in the same folder"),
        (spoil_with({"a": ["m.safetensors"]}), "in the same folder"),
        (spoil_with({}), "weight_map"),
        (spoil_with(["a"]), "weight_map"),
        (spoil_with({"a": "m-00003-of-00002.safetensors"}), "m-00003-of-00002.safetensors is missing"),
        (spoil_with({"c": "m-00001-of-00002.safetensors"}), "holds 'c'; it does not"),
    ],
)
def test_a_hostile_index_is_refused(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    spoil(index)
    with pytest.raises(CheckpointError, match=message):
        shards(tmp_path, index.name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_anywhere_is_seen(dtype: torch.dtype, bad: float) -> None:
    for position in (0, 1, 511, 998, 999):
        tensor = torch.linspace(-1, 1, 1000).to(dtype)
        assert is_finite(tensor)
        tensor[position] = bad
        assert not is_finite(tensor)


def test_the_largest_values_are_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert is_finite(torch.full((100_000,), torch.finfo(dtype).max, dtype=dtype))
    assert is_finite(torch.zeros(0))
    assert is_finite(torch.arange(3))
