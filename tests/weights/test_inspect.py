"""`calotype inspect` says what a checkpoint is, and all that is wrong with it at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calotype import cli
from calotype.errors import ModelNotFoundError, UnsafeFileError
from calotype.weights.detect import kind_of, looks_like
from calotype.weights.inspect import inspect_model
from checkpoints import write_tiny_vae

Copy = Callable[[Path], Path]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_a_sound_model(tiny_sd15_lcm: Path) -> None:
    report = inspect_model(tiny_sd15_lcm)
    assert report["problems"] == []
    assert report["family"] == "custom"
    assert report["pipeline"] == "LatentConsistencyModelPipeline"
    assert report["guidance_embedding"]
    assert report["scheduler"]["class"] == "LCMScheduler"
    assert report["scheduler"]["prediction"] == "epsilon"
    assert report["defaults"]["steps"] == 4
    unet = report["parts"]["unet"]
    tensors = load_file(tiny_sd15_lcm / "unet" / WEIGHTS)
    assert unet["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert unet["dtypes"] == ["F32"]
    assert unet["files"] == {WEIGHTS: (tiny_sd15_lcm / "unet" / WEIGHTS).stat().st_size}
    assert json.loads(json.dumps(report))["parts"]["tokenizer"]["length"] == 77


def test_two_text_encoders_are_reported(tiny_sdxl: Path) -> None:
    report = inspect_model(tiny_sdxl)
    assert report["problems"] == []
    assert {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"} <= set(report["parts"])


def test_every_fault_is_listed(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    tensors = load_file(folder / "unet" / WEIGHTS)
    tensors["conv_in.weight"][0] = float("nan")
    tensors["extra"] = torch.zeros(1)
    save_file(tensors, folder / "unet" / "new.safetensors")
    (folder / "unet" / "new.safetensors").replace(folder / "unet" / WEIGHTS)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    (folder / "vae" / WEIGHTS).write_bytes(b"short")
    (folder / "text_encoder" / "config.json").unlink()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "MagicScheduler"}')
    (folder / "tokenizer" / "merges.txt").unlink()
    problems = inspect_model(folder)["problems"]
    expected = (
        "1 unexpected (extra)", "1 tensors have NaN or infinite values, the first is 'conv_in.weight'",
        "pickles beside the safetensors", "vae/" + WEIGHTS + " is a text of", "text_encoder/config.json is missing",
        "MagicScheduler", "tokenizer holds no tokenizer",
    )  # fmt: skip
    for phrase in expected:
        assert sum(phrase in problem for problem in problems) == 1, (phrase, problems)
    assert len(problems) == len(expected)
    assert all(len(problem.splitlines()) == 1 for problem in problems)


def test_a_missing_part_is_a_problem(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    assert "lists no vae" in inspect_model(folder)["problems"][0]


def test_variants_are_listed(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    half = {name: tensor.half() for name, tensor in load_file(folder / "unet" / WEIGHTS).items()}
    save_file(half, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert inspect_model(folder)["parts"]["unet"]["variants"] == ["fp16"]


def test_lone_parts(tiny_sd15: Path, tiny_sd15_lcm: Path, tmp_path: Path) -> None:
    report = inspect_model(tiny_sd15_lcm / "unet")
    assert (report["problems"], report["family"], report["guidance_embedding"]) == ([], "custom", True)
    assert report["parts"]["unet"]["kind"] == "unet"
    assert inspect_model(tiny_sd15 / "text_encoder")["looks_like"] == "a CLIP text encoder of width 32"
    assert inspect_model(tiny_sd15 / "vae")["looks_like"] == "an autoencoder (AutoencoderKL)"
    write_tiny_vae(tmp_path / "taesd")
    assert inspect_model(tmp_path / "taesd")["looks_like"] == "a tiny autoencoder (TAESD)"
    assert inspect_model(tmp_path / "taesd")["problems"] == []


def test_a_single_file(tiny_sd15: Path, tmp_path: Path) -> None:
    report = inspect_model(tiny_sd15 / "unet" / WEIGHTS)
    assert report["looks_like"] == "a U-Net of no known family"
    assert report["problems"] == []
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 100)
    assert "claims a header" in inspect_model(tmp_path / "x.safetensors")["problems"][0]
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x02")
    with pytest.raises(UnsafeFileError):
        inspect_model(tmp_path / "x.ckpt")
    with pytest.raises(ModelNotFoundError):
        inspect_model(tmp_path / "none")


UNET_NAMES = {"conv_in.weight": (320, 4, 3, 3), "time_embedding.linear_1.weight": (1280, 320)}
MID = {"mid_block.attentions.0.norm.weight": (1280,)}
ADDED = {"add_embedding.linear_1.weight": (1280, 2816)}


def attention(width: int) -> dict[str, tuple[int, ...]]:
    return {"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, width)}


@pytest.mark.parametrize(
    ("shapes", "phrase", "kind"),
    [
        (UNET_NAMES | MID | attention(768), "Stable Diffusion 1.x's U-Net", "unet"),
        (UNET_NAMES | MID | attention(1024), "Stable Diffusion 2.x's U-Net", "unet"),
        (UNET_NAMES | MID | ADDED | attention(2048), "SDXL's U-Net", "unet"),
        (UNET_NAMES | ADDED | attention(2048), "SSD-1B's U-Net", "unet"),
        (
            UNET_NAMES | MID | attention(768) | {"time_embedding.cond_proj.weight": (320, 256)},
            "Stable Diffusion 1.x's U-Net with guidance embedding (LCM)",
            "unet",
        ),
        (UNET_NAMES | {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, "a ControlNet", None),
        ({"unet.down_blocks.0.lora_A.weight": (4, 320)}, "a LoRA", None),
        ({"lora_unet_down_blocks_0.lora_up.weight": (4, 320)}, "a LoRA", None),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "a single-file (LDM) checkpoint", None),
        ({"text_model.embeddings.token_embedding.weight": (49408, 768)}, "CLIP L's text encoder", "text_encoder"),
        ({"embeddings.token_embedding.weight": (49408, 1280)}, "OpenCLIP bigG's text encoder", "text_encoder"),
        ({"x": ()}, "nothing known", None),
        ({}, "nothing known", None),
        ({"conv_in.weight": (), "time_embedding.linear_1.weight": ()}, "a U-Net of no known family", "unet"),
        (
            {"token_embedding.weight": (), "embeddings.token_embedding.weight": ()},
            "a CLIP text encoder of width 0",
            "text_encoder",
        ),
    ],
)
def test_files_are_recognised_by_names_and_shapes(
    shapes: dict[str, tuple[int, ...]], phrase: str, kind: str | None
) -> None:
    assert looks_like(shapes).startswith(phrase)
    assert kind_of(shapes) == kind


# ---- the command ----


def test_the_command_prints_facts(tiny_sd15_lcm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tiny_sd15_lcm)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "LCM with guidance embedding" in out
    assert "793,476 parameters, F32" in out
    assert out.count("scheduler:") == 1
    assert out.rstrip().endswith("none")


def test_the_command_prints_json(tiny_sd15: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tiny_sd15), "--json", "--offline"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(inspect_model(tiny_sd15)))


def test_the_command_fails_where_there_are_problems(
    tiny_sd15: Path, copy_of: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(tiny_sd15)
    (folder / "vae" / "config.json").unlink()
    assert cli.main(["inspect", str(folder)]) == 1
    assert "config.json is missing" in capsys.readouterr().out
    assert cli.main(["inspect", str(folder / "nothing")]) == 3
