"""Every hint of an error about files leads somewhere: following them one after the other ends in a model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calotype import cli
from calotype.errors import CalotypeError, CheckpointError, UnsafeFileError
from calotype.lora import load_lora
from calotype.text.inversion import load_inversion
from calotype.weights import convert
from calotype.weights.control import load_control
from calotype.weights.files import STEMS, header, pickles
from calotype.weights.folder import Folder
from calotype.weights.load import load_parts
from calotype.weights.motion import load_motion
from calotype.weights.source import choose_file, needed
from calotype.weights.unpickle import tensors_of
from checkpoints import CONTROLNET

Copy = Callable[[Path], Path]
DIFFUSERS = "diffusion_pytorch_model"


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles are read here, not in a process of their own: seconds for each are saved."""

    def unpickle(path: Path, output: Path) -> None:
        save_file(tensors_of(torch.load(path, weights_only=True)), output)

    monkeypatch.setattr(convert, "unpickle", unpickle)


def follow(load: Callable[[], Any], most: int = 12) -> tuple[Any, list[CalotypeError]]:
    """What `load` gives once the commands in the hints of its errors were run; and those errors."""
    errors: list[CalotypeError] = []
    while True:
        try:
            return load(), errors
        except CalotypeError as error:
            found = error
        assert "\n" not in str(found)
        assert str(found) not in [str(before) for before in errors], "a hint led back to where it came from"
        errors.append(found)
        assert len(errors) <= most
        obey(str(found.hint))


def obey(hint: str) -> None:
    """Runs the commands of a hint: mv, and calotype convert."""
    done = False
    if match := re.search(r"\bmv .*?(?=\) and |$)", hint):
        _, old, new = shlex.split(match[0])
        Path(old).rename(new)
        done = True
    if match := re.search(r"\bcalotype convert .*", hint):
        assert cli.main(shlex.split(match[0])[1:]) == 0
        done = True
    assert done, f"a dead end: {hint}"


def pickle(file: Path, name: str, parts: int = 1) -> None:
    """A safetensors file as one or several pickles of another name in its folder."""
    tensors = load_file(file)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    file.unlink()
    names = sorted(tensors)
    for number in range(parts):
        held = {key: tensors[key] for key in names[number::parts]}
        torch.save(held, file.with_name(name.format(f"-{number + 1:05}-of-{parts:05}" if parts > 1 else "")))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_folder_of_pickles(tiny_sd15: Path, copy_of: Copy, variant: str | None, shards: int) -> None:
    """As diffusers and transformers wrote them until 2023; of several files the numbers are behind the variant."""
    folder, dotted = copy_of(tiny_sd15), "" if variant is None else f".{variant}"
    pickle(folder / f"unet/{DIFFUSERS}.safetensors", f"{DIFFUSERS}{dotted}{{}}.bin", shards)
    pickle(folder / f"vae/{DIFFUSERS}.safetensors", f"{DIFFUSERS}{dotted}{{}}.bin")
    pickle(folder / "text_encoder/model.safetensors", f"pytorch_model{dotted}{{}}.bin", shards)
    (folder / "unet" / f"{DIFFUSERS}.bin.index.json").write_text('{"weight_map": {}}')
    (folder / "unet" / "optimizer.bin").write_bytes(b"\x80\x02")
    parts, errors = follow(lambda: load_parts(folder, variant=variant))
    assert torch.equal(parts.unet.conv_in.weight, load_parts(tiny_sd15).unet.conv_in.weight)
    assert len(errors) == 1 + 2 * shards
    assert all(isinstance(error, UnsafeFileError) for error in errors)


def test_an_error_says_what_else_is_left(tiny_sd15: Path, copy_of: Copy) -> None:
    """Of a folder that is half converted."""
    folder = copy_of(tiny_sd15)
    pickle(folder / f"vae/{DIFFUSERS}.safetensors", f"{DIFFUSERS}.bin")
    pickle(folder / "text_encoder/model.safetensors", "pytorch_model{}.bin", 2)
    messages = [error.message for error in follow(lambda: load_parts(folder))[1]]
    assert [message.partition(" is a pickle")[0].rpartition("/")[2] for message in messages] == [
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
        f"{DIFFUSERS}.bin",
    ]
    left = f"vae/{DIFFUSERS}.bin"
    assert messages[0].endswith(f"2 more are left: text_encoder/pytorch_model-00002-of-00002.bin, {left}")
    assert messages[1].endswith(f"1 more is left: {left}")
    assert messages[2].endswith("files are read")


def test_files_without_an_index(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    file = folder / f"unet/{DIFFUSERS}.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.unlink()
    for number in (1, 2):
        held = {name: tensors[name] for name in sorted(tensors)[number - 1 :: 2]}
        save_file(held, file.with_name(f"{DIFFUSERS}-{number:05}-of-00002.safetensors"))
    assert load_parts(folder).unet.config == load_parts(tiny_sd15).unet.config
    files = ["model_index.json", *(f"unet/{path.name}" for path in (folder / "unet").iterdir())]
    assert set(needed(files, "x", None, None)) == set(files)
    for number in (1, 2):  # another variant, which nobody asked for
        (folder / f"unet/{DIFFUSERS}.fp16-{number:05}-of-00002.bin").write_bytes(b"\x80\x02")
    load_parts(folder)
    for path in (*folder.glob("unet/*.bin"), file.with_name(f"{DIFFUSERS}-00002-of-00002.safetensors")):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"unet lacks 1 of 2 files of its weights: diffusion_pytorch_model-00002"):
        load_parts(folder)


def test_a_pickle_that_is_called_safetensors(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    pickle(folder / f"unet/{DIFFUSERS}.safetensors", f"{DIFFUSERS}.safetensors")
    pickle(folder / "text_encoder/model.safetensors", "model.safetensors")
    _, errors = follow(lambda: load_parts(folder))
    assert len(errors) == 2


@pytest.mark.parametrize("name", ["model.ckpt", "v1-5 pruned.ckpt", "model.pt", "pytorch_model.bin"])
def test_a_whole_checkpoint(tiny_sd15: Path, tmp_path: Path, name: str) -> None:
    convert.write_single_file(Folder(tiny_sd15), tmp_path / "x.safetensors")
    texts = header_texts(tmp_path / "x.safetensors")
    torch.save({"state_dict": load_file(tmp_path / "x.safetensors"), "global_step": 3}, tmp_path / name)
    with pytest.raises(UnsafeFileError) as e:
        load_parts(tmp_path / name)
    obey(str(e.value.hint))
    made = Path(shlex.split(str(e.value.hint))[-1])
    save_file({key: t.clone() for key, t in load_file(made).items()}, made, texts)  # a tiny model needs its configs
    assert load_parts(made).family == "custom"
    with pytest.raises(UnsafeFileError) as e:  # once more
        load_parts(tmp_path / name)
    assert str(e.value.hint).endswith(f"give {made}")


def header_texts(path: Path) -> dict[str, str]:
    from calotype.weights.files import metadata

    return metadata(path)


def test_a_lone_autoencoder(tiny_sd15: Path, tmp_path: Path) -> None:
    path = tmp_path / "vae-ft-mse.vae.pt"
    torch.save({"state_dict": load_file(tiny_sd15 / f"vae/{DIFFUSERS}.safetensors")}, path)
    with pytest.raises(UnsafeFileError) as e:
        load_parts(tiny_sd15, vae=path)
    obey(str(e.value.hint))
    made = Path(shlex.split(str(e.value.hint))[-1])
    assert load_parts(tiny_sd15, vae=made).vae.config == load_parts(tiny_sd15).vae.config


def test_a_control(tmp_path: Path) -> None:
    """As a folder, inside another, and alone."""
    from diffusers import ControlNetModel

    ControlNetModel(**CONTROLNET).save_pretrained(tmp_path / "repo/canny")
    file = tmp_path / f"repo/canny/{DIFFUSERS}.safetensors"
    torch.save(load_file(file), tmp_path / "control_v11p_sd15_canny.pth")
    pickle(file, f"{DIFFUSERS}{{}}.bin")
    _, errors = follow(lambda: load_control(tmp_path / "repo", subfolder="canny"))
    assert len(errors) == 1
    with pytest.raises(UnsafeFileError) as e:
        load_control(tmp_path / "control_v11p_sd15_canny.pth")
    obey(str(e.value.hint))
    load_control(Path(shlex.split(str(e.value.hint))[-1]))
    with pytest.raises(CheckpointError, match="inside are canny") as caught:
        load_control(tmp_path / "repo")
    load_control(re.search(r"such as (\S+),", str(caught.value.hint))[1])  # type: ignore[index]


def test_a_motion_module(tmp_path: Path) -> None:
    from calotype.nn.motion import MotionAdapter, MotionConfig

    adapter = MotionAdapter(MotionConfig((32, 64), (1, 1), (1, 1), 1, (8, 8), 32, 8))
    torch.save(
        {"epoch": 1, "state_dict": {f"module.{k}": t for k, t in adapter.state_dict().items()}}, tmp_path / "mm.ckpt"
    )
    with pytest.raises(UnsafeFileError) as e:
        load_motion(tmp_path / "mm.ckpt")
    obey(str(e.value.hint))
    assert load_motion(tmp_path / "mm.safetensors").config == adapter.config


def test_adapters_in_a_folder(tiny_sd15: Path, tmp_path: Path) -> None:
    """The weights are found beside what a training run leaves behind."""
    parts = load_parts(tiny_sd15)
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(32, 2)}
    for name in ("optimizer.bin", "random_states_0.pkl", "scheduler.bin", "a.ckpt"):
        (tmp_path / name).write_bytes(b"\x80\x02")
    torch.save(lora, tmp_path / "pytorch_lora_weights.bin")
    _, errors = follow(lambda: load_lora(tmp_path, parts))
    assert [error.message.partition(" is")[0] for error in errors] == [str(tmp_path / "pytorch_lora_weights.bin")]
    (tmp_path / "words").mkdir()
    torch.save({"<toy>": torch.ones(32)}, tmp_path / "words/learned_embeds.bin")
    learnt, errors = follow(lambda: load_inversion(tmp_path / "words"))
    assert (learnt.token, len(errors)) == ("<toy>", 1)


def test_other_hints_about_files(tiny_sd15: Path, tmp_path: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    parts = load_parts(folder)
    file = folder / f"unet/{DIFFUSERS}.safetensors"
    for variant in ("fp16", "bf16"):
        shutil.copy(file, file.with_suffix(f".{variant}.safetensors"))
    file.unlink()
    with pytest.raises(CalotypeError, match="only variants") as e:
        load_parts(folder)
    assert e.value.hint == "say which by variant="
    with pytest.warns(UserWarning, match="no fp16"):
        load_parts(folder, variant="fp16")
    with pytest.raises(CalotypeError) as e:
        load_parts(tiny_sd15, variant="fp16")
    assert e.value.hint == "leave the variant out for the plain weights"
    lora = {
        f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("A", (2, 32)), ("B", (32, 2)))
    }
    (tmp_path / "loras").mkdir()
    for name in ("a", "b"):
        save_file(lora, tmp_path / f"loras/{name}.safetensors")
    with pytest.raises(CalotypeError) as e:
        load_lora(tmp_path / "loras", parts)
    assert e.value.hint == "say which by weight_name"
    load_lora(tmp_path / "loras", parts, weight_name="b.safetensors")
    with pytest.raises(CalotypeError, match="one part of a model only") as e:
        load_parts(tiny_sd15 / "unet")
    assert "unet=" in str(e.value.hint)
    load_parts(tiny_sd15, unet=tiny_sd15 / "unet", vae=tiny_sd15 / "vae")


# ---- what is no pickle ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html><head>", "is a web page"),
        (b"\n<html lang='en'>", "is a web page"),
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
        (b"Entry not found", "is a text of 15 bytes, not a model: 'Entry not found'"),
    ],
)
def test_files_that_only_have_the_name(tiny_sd15: Path, copy_of: Copy, content: bytes, message: str) -> None:
    folder = copy_of(tiny_sd15)
    file = folder / f"vae/{DIFFUSERS}.safetensors"
    file.unlink()
    file.with_suffix(".bin").write_bytes(content)
    for load in (lambda: load_parts(folder), lambda: header(file.with_suffix(".bin"))):
        with pytest.raises(CheckpointError, match=message) as e:
            load()
        assert not isinstance(e.value, UnsafeFileError)
        assert "convert" not in str(e.value.hint)


@pytest.mark.parametrize(
    ("content", "message"), [(b"<!DOCTYPE html>", "a web page"), (b"Not Found", "a text of 9 bytes")]
)
def test_what_a_server_said_instead(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        header(tmp_path / "x.safetensors")


def test_safetensors_under_another_name(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    file = folder / "text_encoder/model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))
    _, errors = follow(lambda: load_parts(folder))
    assert [error.message.rpartition(" is ")[2] for error in errors] == ["a safetensors file under a pickle's name"]


# ---- the Hub ----


def test_a_repository_is_to_be_downloaded_first() -> None:
    """A name on the Hub is no file that could be converted."""
    files = ["model_index.json", "vae/config.json", f"vae/{DIFFUSERS}.bin", "vae/training_args.bin"]
    with pytest.raises(UnsafeFileError) as e:
        needed(files, "org/name@v1", None, None)
    assert str(e.value.hint).endswith("give the folder name: hf download org/name --revision v1 --local-dir name")
    with pytest.raises(UnsafeFileError) as e:
        choose_file(["optimizer.bin", "x.pt"], "org/name", None, ())
    assert str(e.value.hint).endswith("hf download org/name x.pt --local-dir name")


def test_which_pickles_are_weights() -> None:
    names = ["optimizer.bin", "rng_state_0.pth", "pytorch_model.bin", "pytorch_model.fp16.bin", "x.pt", "config.json"]
    assert pickles(names) == ["pytorch_model.bin", "pytorch_model.fp16.bin", "x.pt"]
    assert pickles(names, STEMS) == ["pytorch_model.bin"]
    assert pickles(names, STEMS, "fp16") == ["pytorch_model.fp16.bin"]
    assert pickles([*names, "model.safetensors"], STEMS) == []
    assert pickles(["model.ema.ckpt"], STEMS) == ["model.ema.ckpt"]
    numbered = [f"{DIFFUSERS}-0000{i}-of-00002.fp16.bin" for i in (1, 2)]
    assert pickles(numbered, STEMS, "fp16") == numbered
    assert json.dumps(pickles([numbered[1], numbered[0].replace(".bin", ".safetensors")], STEMS)) == json.dumps(
        numbered[1:]
    )
