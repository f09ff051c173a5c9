"""calotype convert: folders, single files and pickles into each other, whole or not at all."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calotype import cli
from calotype.errors import CalotypeWarning, CheckpointError, OutputError, UsageError
from calotype.text.tokenizer import TABLES, clip_tables
from calotype.weights import unpickle as unpickling
from calotype.weights import write
from calotype.weights.convert import convert
from calotype.weights.load import load_parts
from calotype.weights.write import Pending, write_safetensors


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def listing(folder: Path) -> list[str]:
    """All that is in a folder, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def single(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tiny_sdxl, tmp_path_factory.mktemp("single") / "model.safetensors")


# ---- folders and single files ----


def test_there_and_back(tiny_sdxl: Path, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    assert cli.main(["convert", str(single), str(folder)]) == 0
    assert capsys.readouterr() == (f"{folder}\n", "")
    a, b = load_parts(tiny_sdxl), load_parts(folder)
    assert same(a.unet, b.unet)
    assert same(a.vae, b.vae)
    assert all(same(mine, other) for mine, other in zip(a.text.models, b.text.models, strict=True))
    assert (a.defaults, a.scheduler, a.family) == (b.defaults, b.scheduler, b.family)
    assert listing(tmp_path) == sorted(["model", *(f"model/{name}" for name in listing(folder))])  # and nothing beside
    for name in ("unet/config.json", "model_index.json", "tokenizer_2/special_tokens_map.json"):
        assert json.loads((folder / name).read_text()) == json.loads((tiny_sdxl / name).read_text())
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*.safetensors")} == {0o644}


def test_diffusers_loads_the_folder(single: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(convert(single, tmp_path / "model"))
    theirs, ours = pipeline.unet.state_dict(), load_parts(single).unet.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    assert pipeline.tokenizer_2("a red fox").input_ids == pipeline.tokenizer("a red fox").input_ids


def test_the_shipped_model_in_one_file(tmp_path: Path) -> None:
    """Its tokenizer is its own, so that the file carries it."""
    file = convert("icons", tmp_path / "icons.safetensors")
    a, b = load_parts(), load_parts(file)
    assert same(a.unet, b.unet)
    assert a.defaults == b.defaults
    assert a.text.tokenizers[0].ids("a red fox") == b.text.tokenizers[0].ids("a red fox")


def test_clips_own_tables_are_left_out_and_put_back(tiny_sd15: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd15, tmp_path / "model"))
    for name, text in clip_tables().items():
        (folder / "tokenizer" / name).write_text(text, encoding="utf-8")
    file = convert(folder, tmp_path / "model.safetensors")
    assert b"vocab.json" not in file.read_bytes()[:100_000]
    back = convert(file, tmp_path / "back")
    assert {name: (back / "tokenizer" / name).read_text("utf-8") for name in clip_tables()} == clip_tables()
    assert TABLES[0] not in listing(back / "tokenizer")


@pytest.mark.parametrize(("option", "dtype"), [("--half", torch.float16), ("--dtype=bfloat16", torch.bfloat16)])
def test_dtypes(option: str, dtype: torch.dtype, tiny_sd15: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "model.safetensors", tmp_path / "model"
    assert cli.main(["convert", str(tiny_sd15), str(file), option]) == 0
    assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}
    assert cli.main(["convert", str(file), str(folder), "--dtype", "float32"]) == 0
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert weights["conv_in.weight"].dtype == torch.float32
    assert torch.equal(weights["conv_in.weight"], load_parts(tiny_sd15).unet.conv_in.weight.to(dtype).float())


def test_any_file_in_another_dtype(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "ids": torch.arange(3)}, tmp_path / "x.safetensors", {"alpha": "8"})
    convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", dtype=torch.float16)
    found = load_file(tmp_path / "y.safetensors")
    assert (found["a"].dtype, found["ids"].dtype) == (torch.float16, torch.int64)
    assert b'"alpha":"8"' in (tmp_path / "y.safetensors").read_bytes()


# ---- whole or not at all ----


def test_what_exists_is_kept_unless_forced(tiny_sd15: Path, single: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "model.safetensors", tmp_path / "model"
    file.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists") as caught:
        convert(tiny_sd15, file)
    assert "--force" in str(caught.value.hint)
    assert file.read_bytes() == b"mine"
    convert(tiny_sd15, file, force=True)
    assert load_parts(file).vae.config == load_parts(tiny_sd15).vae.config
    folder.mkdir()
    (folder / "holiday.png").write_bytes(b"mine")
    with pytest.raises(OutputError, match="is a folder that is no model's"):
        convert(single, folder, force=True)
    assert listing(folder) == ["holiday.png"]
    (folder / "model_index.json").write_text("{}")
    convert(single, folder, force=True)
    assert not (folder / "holiday.png").exists()
    assert load_parts(folder).zero_empty_negative


@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_half_way_leaves_nothing(
    exists: bool, tiny_sd15: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model.safetensors", "model/model_index.json"):
        if exists:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("before")
    before, content, calls = listing(tmp_path), write._content, [0]

    def full(name: str, pending: Pending) -> Any:
        calls[0] += 1
        if calls[0] % 50 == 0:
            raise OSError(28, "No space left on device")
        return content(name, pending)

    monkeypatch.setattr(write, "_content", full)
    for source, output in ((tiny_sd15, tmp_path / "model.safetensors"), (single, tmp_path / "model")):
        with pytest.raises(OutputError, match="no space left on device"):
            convert(source, output, force=exists)
    assert listing(tmp_path) == before
    if exists:
        assert (
            (tmp_path / "model.safetensors").read_text()
            == (tmp_path / "model/model_index.json").read_text()
            == "before"
        )


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1e6])}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="a has values beyond float16"):
        convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", dtype=torch.float16)
    assert listing(tmp_path) == ["x.safetensors"]
    save_file({"a": torch.tensor([float("inf")])}, tmp_path / "x.safetensors")  # as it was, then
    convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["MODEL", "OUT/model"], 2, "is no name for a single file"),
        (["MODEL", "OUT/model.ckpt"], 2, "would be a pickle"),
        (["FILE", "OUT/x.safetensors"], 2, "is a single file already"),
        (["FILE", "FILE", "--half", "--force"], 2, "is what it would be made of"),
        (["MODEL", "MODEL/x.safetensors"], 2, "is what it would be made of"),
        (["MODEL", "OUT/none/x.safetensors"], 1, "there is no folder"),
        (["MODEL", "OUT/x.safetensors", "--dtype", "int8"], 2, "--dtype must be one of"),
        (["MODEL", "OUT/x.safetensors", "--half", "--dtype", "float32"], 2, "contradict each other"),
        (["MODEL", "OUT/x.safetensors", "--prediction", "v"], 2, "--prediction must be one of"),
        (["nothing", "OUT/x.safetensors"], 3, "no model 'nothing'"),
        (["MODEL/unet", "OUT/x.safetensors"], 1, "holds one part of a model only"),
        (["MODEL/vae/diffusion_pytorch_model.safetensors", "OUT/x"], 1, "it holds an autoencoder only"),
    ],
    ids=range(12),
)
def test_bad_usage_is_one_line(
    arguments: list[str],
    code: int,
    message: str,
    tiny_sd15: Path,
    single: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"MODEL": str(tiny_sd15), "FILE": str(single), "OUT": str(tmp_path)}
    for name, place in places.items():
        arguments = [argument.replace(name, place, 1) for argument in arguments]
    assert cli.main(["convert", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err.splitlines()[0]
    assert listing(tmp_path) == []


# ---- pickles ----

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}


def unpickled(content: object, tmp_path: Path, **save: Any) -> dict[str, Tensor]:
    torch.save(content, tmp_path / "x.ckpt", **save)
    return load_file(convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors"))


@pytest.mark.parametrize("save", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        OrderedDict(WEIGHTS),
        {"state_dict": WEIGHTS, "epoch": 3, "global_step": 470000, "optimizer_states": [{"lr": 1e-4}]},
        {**WEIGHTS, "step": 9},
    ],
    ids=["dict", "ordered", "lightning", "numbers"],
)
def test_the_tensors_of_a_pickle(content: object, save: dict[str, Any], tmp_path: Path) -> None:
    found = unpickled(content, tmp_path, **save)
    assert found.keys() == WEIGHTS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in WEIGHTS.items()
    )


def test_a_textual_inversion_gets_its_name_in_safetensors(tmp_path: Path) -> None:
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 4)}, "name": "x", "step": 1}
    assert unpickled(content, tmp_path)["emb_params"].shape == (2, 4)


def test_what_training_leaves_in_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """Such as Stable Diffusion 1.4's own, which refers to a class of PyTorch Lightning."""
    module = type(sys)("pytorch_lightning.callbacks.model_checkpoint")
    kind = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = kind  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, name, type(sys)(name))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save(
            {"state_dict": WEIGHTS, "callbacks": {kind: {"best": torch.ones(1), "it": kind()}}}, tmp_path / "x.ckpt"
        )
    assert load_file(convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors")).keys() == WEIGHTS.keys()


class Hostile:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("inside", [True, False])
def test_a_hostile_pickle_runs_nothing(inside: bool, tmp_path: Path) -> None:
    hostile = Hostile(tmp_path / "owned")
    if inside:
        torch.save({**WEIGHTS, "x": hostile}, tmp_path / "x.pt")
    else:
        (tmp_path / "x.pt").write_bytes(pickle.dumps(hostile))
    with pytest.raises(CheckpointError, match=r"cannot be converted: it is no pickle of tensors alone: ") as caught:
        convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert "\n" not in caught.value.message
    assert "weights_only" not in caught.value.message  # PyTorch's advice is to be less careful
    assert listing(tmp_path) == ["x.pt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "it holds a list"),
        ({}, "it holds no tensors"),
        ({"a": {"b": torch.ones(1)}}, "'a' is a dict, not a tensor"),
        ({1: torch.ones(1)}, "1 is a Tensor, not a tensor"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "torch.complex64, which is not supported"),
        ({"a": torch.ones(2, 2).to_sparse()}, "'a' is a Tensor, not a tensor"),
        ({"a": torch.ones(1).expand(10**9)}, "far larger than the file"),
    ],
    ids=range(7),
)
def test_other_content_is_refused(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        unpickled(content, tmp_path)
    assert listing(tmp_path) == ["x.ckpt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><title>Sign in</title>", "is a web page, not a model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"GGUF" + bytes(100), "is a GGUF file"),
        (b"\x02" + bytes(7) + b"{}", "is a safetensors file under a pickle's name"),
    ],
)
def test_what_is_no_pickle_is_told_as_what_it_is(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "x.bin", tmp_path / "x.safetensors")
    assert listing(tmp_path) == ["x.bin"]


def test_a_damaged_pickle_is_refused(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:300])
    with pytest.raises(CheckpointError, match="cannot be converted"):
        convert(tmp_path / "x.pth", tmp_path / "x.safetensors")
    assert listing(tmp_path) == ["x.pth"]


def test_the_process_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More memory than a file may take is not to be had, and time runs out."""
    code = (
        "from calotype.weights import unpickle; import torch; unpickle._limit(1000)\n"
        "try: torch.empty(2**33, dtype=torch.uint8)\n"
        "except RuntimeError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "refused\n"
    torch.save(WEIGHTS, tmp_path / "x.pt")
    monkeypatch.setattr(unpickling, "SECONDS", 0.01)
    with pytest.raises(CheckpointError, match="could not be read within"):
        convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert listing(tmp_path) == ["x.pt"]


def test_a_pickled_model_becomes_a_folder(tiny_sd15: Path, tmp_path: Path) -> None:
    """In one go; without the header that calotype writes its family must be known, which a tiny model's is not."""
    torch.save(load_file(convert(tiny_sd15, tmp_path / "x.safetensors")), tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="of no known family"):
        convert(tmp_path / "x.ckpt", tmp_path / "model")
    assert listing(tmp_path) == ["x.ckpt", "x.safetensors"]
    convert(tmp_path / "x.ckpt", tmp_path / "half.safetensors", dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}


# ---- folders of pickles ----


def pickle_weights(folder: Path, variant: str = "", shards: bool = False) -> None:
    """A folder's weights as .bin files, as diffusers and transformers once wrote them."""
    for file in sorted(folder.rglob("*.safetensors")):
        stem = {"model": "pytorch_model"}.get(file.stem, file.stem)
        tensors = load_file(file)
        file.unlink()
        if not shards:
            torch.save(tensors, file.with_name(f"{stem}{variant}.bin"))
            continue
        names, where = sorted(tensors), {}
        for i, some in enumerate((names[::2], names[1::2]), start=1):
            shard = f"{stem}{variant}-0000{i}-of-00002.bin"
            torch.save({name: tensors[name] for name in some}, file.with_name(shard))
            where |= dict.fromkeys(some, shard)
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        file.with_name(f"{stem}.bin.index{variant}.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("variant", "shards"), [("", False), (".fp16", False), ("", True), (".fp16", True)])
def test_a_folder_of_pickles(variant: str, shards: bool, copy_of: Any, tiny_sd15: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_sd15)
    pickle_weights(folder, variant, shards)
    (folder / "safety_checker").mkdir()
    (folder / "v1-5-pruned.ckpt").write_bytes(b"another program's")
    (folder / "unet" / "random_states_0.pkl").write_bytes(b"not tensors")
    with pytest.warns(CalotypeWarning, match=r"left out: unet/random_states_0\.pkl, v1-5-pruned\.ckpt$"):
        convert(folder, tmp_path / "new")
    a, b = load_parts(tiny_sd15), load_parts(tmp_path / "new", variant=variant[1:] or None)
    assert same(a.unet, b.unet)
    assert same(a.vae, b.vae)
    assert same(a.text.models[0], b.text.models[0])
    suffixes = {path.suffix for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert not suffixes & {".bin", ".ckpt", ".pkl"}
    assert (tmp_path / "new" / "model_index.json").read_text() == (tiny_sd15 / "model_index.json").read_text()
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "new" / "unet", variant=variant[1:] or None)
    assert same(theirs, a.unet)


def test_a_folder_with_both(copy_of: Any, tiny_sd15: Path, tmp_path: Path) -> None:
    """A .safetensors file counts before its .bin; --dtype is for all."""
    folder = copy_of(tiny_sd15)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not read")
    text = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(text), text.with_name("pytorch_model.bin"))
    text.unlink()
    convert(folder, tmp_path / "new", dtype=torch.float16)
    found = {p.name: load_file(p) for p in (tmp_path / "new").rglob("*.safetensors")}
    assert found.keys() == {"model.safetensors", "diffusion_pytorch_model.safetensors"}
    for tensors in found.values():
        assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float16}


def test_one_bad_pickle_and_nothing_is_written(copy_of: Any, tiny_sd15: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_sd15)
    pickle_weights(folder)
    torch.save({"a": Hostile(tmp_path / "owned")}, folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"vae/diffusion_pytorch_model\.bin cannot be converted: it is no"):
        convert(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "owned").exists()


def test_a_folder_without_pickles_is_no_folder_of_pickles(tiny_sd15: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no name for a single file"):
        convert(tiny_sd15, tmp_path / "new")


# ---- the writer ----


def test_files_are_written_as_the_library_writes_them(tmp_path: Path) -> None:
    tensors = {
        "b": torch.ones(3, dtype=torch.bfloat16),
        "a": torch.zeros(()),
        "none": torch.zeros(0),
        "i": torch.arange(2),
    }
    write_safetensors(tmp_path / "x.safetensors", {n: Pending.of(t) for n, t in tensors.items()}, {"é": "\n"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    save_file(tensors, tmp_path / "y.safetensors", {"format": "pt", "é": "\n"})
    assert (tmp_path / "x.safetensors").stat().st_size == (tmp_path / "y.safetensors").stat().st_size


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: no such file"):
        write_safetensors(tmp_path / "none" / "x.safetensors", {}, {})
    with pytest.raises(UsageError):
        convert("icons", tmp_path / "x.pth")
