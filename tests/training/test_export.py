"""What a run leaves behind: which files, that they are whole or not there, what their headers and the card say."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import calotype
from calotype.errors import CheckpointError, OutputError
from calotype.lora import LoRA
from calotype.lora.formats import METADATA
from calotype.nn.unet import UNet
from calotype.parts import Parts
from calotype.text.tokenizer import TABLES
from calotype.training import export as exporting
from calotype.training.card import Facts, Run, card, portable, settings_of
from calotype.training.export import KOHYA_FILE, STAGE, export, name_of
from calotype.training.settings import Settings
from calotype.training.students import LoraStudent, student_of
from calotype.weights import write
from calotype.weights.convert import write_single_file
from calotype.weights.files import metadata
from calotype.weights.folder import Folder
from calotype.weights.load import load_parts
from calotype.weights.single_file import SingleFile
from checkpoints import write_model

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PEFT_FILE = "pytorch_lora_weights.safetensors"


def history(**changes: Any) -> list[dict[str, Any]]:
    settings = {"lora": False, "max_train_steps": 10, "resolution": 64, "checkpointing_steps": 5} | changes
    if settings.get("objective") == "pcm":
        settings |= {"num_ddim_timesteps": 40, "skipping_step": 25}
    made = Settings(**settings)
    return [{"from_step": 0, "processes": 1, **{name: getattr(made, name) for name in made.__dataclass_fields__}}]


def run_of(teacher: str | Path, **changes: Any) -> Run:
    return Run(str(teacher), history(**changes), 10)


def distilled(parts: Parts) -> UNet:
    """A student that is not its teacher."""
    return shaken(student_of(parts.unet))


def shaken(network: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            size = parameter.std() if parameter.numel() > 1 and parameter.any() else torch.tensor(0.05)
            parameter += 0.1 * size * torch.randn(parameter.shape, generator=generator)
    return network


def adapter(parts: Parts, rank: int = 4) -> LoRA:
    student = LoraStudent(parts, rank)
    shaken(student.module)
    return student.outcome()


def output(path: Path) -> Path:
    path.mkdir()
    return path


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


# ---- a model's folder ----


def test_the_other_parts_are_copied_byte_for_byte(
    tiny_sdxl: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    """And nothing that lies beside what was loaded: no pickles, no other formats, no other variants."""
    teacher = copy_of(tiny_sdxl)
    for name in ("pytorch_model.bin", "flax_model.msgpack", "model.fp16.safetensors", "model.onnx", "notes.txt"):
        (teacher / "text_encoder" / name).write_bytes(b"stray")
    (teacher / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"stray")
    (teacher / "safety_checker").mkdir()
    index = json.loads((teacher / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (teacher / "model_index.json").write_text(json.dumps(index))
    parts = load_parts(teacher)
    out = export(parts, distilled(parts), output(tmp_path / "out"), run_of(teacher))
    others = [f"{part}/model.safetensors" for part in ("text_encoder", "text_encoder_2")]
    others += [f"{part}/config.json" for part in ("text_encoder", "text_encoder_2", "vae")]
    others += [f"vae/{Path(WEIGHTS).name}"]
    others += [name for name in listing(teacher) if name.startswith("tokenizer")]
    ours = ["README.md", "calotype.json", "distillation.json", "model_index.json", "scheduler/scheduler_config.json"]
    assert listing(out) == sorted([*others, *ours, WEIGHTS, "unet/config.json"])
    for name in others:
        assert (out / name).read_bytes() == (teacher / name).read_bytes(), name
    written = json.loads((out / "model_index.json").read_text())
    assert written["_class_name"] == "StableDiffusionXLPipeline"
    assert "feature_extractor" not in written


def test_the_unet_is_float16_with_a_guidance_embedding(tiny_sd15: Path, tmp_path: Path) -> None:
    parts = load_parts(tiny_sd15)
    student = distilled(parts)
    out = export(parts, student, output(tmp_path / "out"), run_of(tiny_sd15, w_min=2.0, w_max=8.0))
    weights = load_file(out / WEIGHTS)
    assert all(torch.equal(weights[name], tensor.half()) for name, tensor in student.state_dict().items())
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {0o644}
    made = load_parts(out)
    assert made.unet.config.guidance_dim == 256
    assert made.defaults.guidance_range == (3.0, 9.0)
    assert (made.defaults.guidance, made.defaults.steps, made.defaults.width) == (7.5, 4, 64)
    assert torch.equal(made.schedule.alpha, parts.schedule.alpha)
    assert json.loads((out / "distillation.json").read_text()) == history(w_min=2.0, w_max=8.0)


@pytest.mark.parametrize("layout", ["plain", "middle", "behind"])
def test_variants_and_shards_get_plain_names(
    layout: str, tiny_sd15: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    teacher = copy_of(tiny_sd15)
    variant = None if layout == "plain" else "fp16"
    if variant is not None:
        for name in ("vae/diffusion_pytorch_model", "unet/diffusion_pytorch_model"):
            half = {key: tensor.half() for key, tensor in load_file(teacher / f"{name}.safetensors").items()}
            save_file(half, teacher / f"{name}.fp16.safetensors", {"format": "pt"})
    whole = load_file(teacher / "text_encoder" / "model.safetensors")
    held: dict[str, str] = {}
    for number, keys in enumerate((list(whole)[::2], list(whole)[1::2]), start=1):
        numbers = f"-{number:05d}-of-00002"
        name = {"plain": f"model{numbers}", "middle": f"model.fp16{numbers}", "behind": f"model{numbers}.fp16"}[layout]
        held |= dict.fromkeys(keys, f"{name}.safetensors")
        save_file({key: whole[key] for key in keys}, teacher / "text_encoder" / f"{name}.safetensors", {"format": "pt"})
    index = "model.safetensors.index" + ("" if variant is None else f".{variant}") + ".json"
    (teacher / "text_encoder" / index).write_text(json.dumps({"metadata": {}, "weight_map": held}))
    parts = load_parts(teacher, variant=variant)
    run = replace(run_of(teacher), variant=variant)
    out = export(parts, distilled(parts), output(tmp_path / "out"), run)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert listing(out / "text_encoder") == ["config.json", *names]
    made = load_parts(out)
    assert same(made.text.models[0], parts.text.models[0])
    assert same(made.vae, parts.vae)
    assert load_file(out / "vae" / "diffusion_pytorch_model.safetensors")["decoder.conv_in.weight"].dtype == (
        torch.float32 if variant is None else torch.float16
    )
    from transformers import CLIPTextModel

    theirs = dict(CLIPTextModel.from_pretrained(out / "text_encoder").named_parameters())
    assert len(theirs) == len(whole)


def test_the_links_of_a_hub_cache_are_followed(tiny_sd15: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--tiny"
    snapshot = cache / "snapshots" / "abc"
    (cache / "blobs").mkdir(parents=True)
    for number, name in enumerate(listing(tiny_sd15)):
        blob = Path(shutil.copyfile(tiny_sd15 / name, cache / "blobs" / str(number)))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    parts = load_parts(snapshot)
    out = export(parts, distilled(parts), output(tmp_path / "out"), run_of(snapshot))
    shutil.rmtree(cache)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert load_parts(out).unet.config.guidance_dim == 256
    assert 'base_model: "org/tiny"' in (out / "README.md").read_text()


@pytest.mark.parametrize("kind", [{}, {"xl": True}, {"channels": 9}], ids=["sd15", "sdxl", "inpainting"])
def test_a_teacher_in_a_single_file(kind: dict[str, Any], tmp_path: Path) -> None:
    teacher = write_model(tmp_path / "folder", **kind)
    single = tmp_path / "single.safetensors"
    write_single_file(Folder(teacher), single, torch.float16)
    parts, whole = load_parts(single), load_parts(teacher)
    student = distilled(whole)
    (a, b) = (
        export(each, student, output(tmp_path / name), run_of(single))
        for name, each in (("of-file", parts), ("of-folder", whole))
    )
    ours, theirs = load_parts(a), load_parts(b)
    assert same(ours.unet, theirs.unet)
    assert same(ours.vae, parts.vae)
    assert [same(x, y) for x, y in zip(ours.text.models, parts.text.models, strict=True)] == [True] * len(
        parts.text.models
    )
    assert load_file(a / "text_encoder" / "model.safetensors")["text_model.final_layer_norm.weight"].dtype == (
        torch.float16
    )
    assert (ours.defaults, ours.family) == (theirs.defaults, theirs.family)
    kinds = [json.loads((each / "model_index.json").read_text()) for each in (a, b)]
    assert kinds[0] == kinds[1]
    assert [tokenizer.ids("a red fox!") for tokenizer in ours.text.tokenizers] == [
        tokenizer.ids("a red fox!") for tokenizer in theirs.text.tokenizers
    ]


def test_clips_own_tables_are_put_into_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the real families brings no tokenizer."""
    teacher = write_model(tmp_path / "folder")
    single = tmp_path / "single.safetensors"
    write_single_file(Folder(teacher), single)
    parts = load_parts(single)
    texts = SingleFile.texts

    def without(self: SingleFile) -> dict[str, str]:
        return {name: text for name, text in texts(self).items() if Path(name).name not in TABLES}

    monkeypatch.setattr(SingleFile, "texts", without)
    out = export(parts, distilled(parts), output(tmp_path / "out"), run_of(single))
    assert len(json.loads((out / "tokenizer" / "vocab.json").read_text("utf-8"))) == 49408


@pytest.mark.parametrize(
    ("objective", "kind", "scheduler", "steps"),
    [
        ("lcd", {}, "LatentConsistencyModelPipeline LCMScheduler", 4),
        ("lcd", {"sampler": "tcd"}, "StableDiffusionPipeline TCDScheduler", 4),
        ("tcd", {}, "StableDiffusionPipeline TCDScheduler", 4),
        ("pcm", {"phases": 8}, "StableDiffusionPipeline DDIMScheduler", 8),
    ],
)
def test_the_scheduler_is_the_samplers(
    objective: str, kind: dict[str, Any], scheduler: str, steps: int, tiny_sd15: Path, tmp_path: Path
) -> None:
    parts = load_parts(tiny_sd15)
    run = run_of(tiny_sd15, objective=objective, **kind)
    out = export(parts, distilled(parts), output(tmp_path / "out"), run)
    index = json.loads((out / "model_index.json").read_text())
    config = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert f"{index['_class_name']} {index['scheduler'][1]}" == scheduler
    assert config["_class_name"] == index["scheduler"][1]
    assert calotype.load(out).parts.defaults.steps == steps
    if objective != "pcm":
        assert config["original_inference_steps"] == 50


def test_a_grid_of_another_length_is_the_one_that_is_sampled(tiny_sd15: Path, tmp_path: Path) -> None:
    parts = load_parts(tiny_sd15)
    out = export(parts, distilled(parts), output(tmp_path / "out"), run_of(tiny_sd15, num_ddim_timesteps=25))
    assert load_parts(out).schedule.original_steps == 25


def test_what_the_network_predicts_goes_with_it(tmp_path: Path) -> None:
    teacher = write_model(tmp_path / "teacher", sd2=True)
    parts = load_parts(teacher)
    out = export(parts, distilled(parts), output(tmp_path / "out"), run_of(teacher))
    made = load_parts(out).schedule
    assert made.prediction == "v_prediction"
    assert (made.kind, made.steps_offset) == ("LCMScheduler", parts.schedule.steps_offset)
    assert torch.equal(made.alpha, parts.schedule.alpha)


def test_noise_levels_that_the_teacher_leaves_to_its_class(
    tiny_sd15: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    """DDIM's own betas are not LCM's."""
    teacher = copy_of(tiny_sd15)
    (teacher / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    parts = load_parts(teacher)
    out = export(parts, distilled(parts), output(tmp_path / "out"), run_of(teacher))
    assert torch.allclose(load_parts(out).schedule.alpha, parts.schedule.alpha, rtol=1e-5, atol=0)


# ---- whole or not at all ----


def test_numbers_beyond_float16_are_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    parts = load_parts(tiny_sd15)
    student = distilled(parts)
    with torch.no_grad():
        student.conv_in.weight[0, 0, 0, 0] = 1e5
    out = output(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"the trained conv_in\.weight has values beyond float16") as caught:
        export(parts, student, out, run_of(tiny_sd15))
    assert "bfloat16 or float32" in str(caught.value.hint)
    assert listing(out) == []
    export(parts, student, out, run_of(tiny_sd15), torch.bfloat16)
    assert load_file(out / WEIGHTS)["conv_in.weight"].dtype == torch.bfloat16
    with torch.no_grad():
        student.conv_in.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        export(parts, student, out, run_of(tiny_sd15), torch.float32)
    assert load_file(out / WEIGHTS)["conv_in.weight"].dtype == torch.bfloat16  # the older one is as it was


def test_an_adapters_numbers_beyond_float16_are_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    parts = load_parts(tiny_sd15)
    lora = adapter(parts)
    with torch.no_grad():
        next(iter(lora.deltas["unet"].values())).up[0, 0] = -1e5  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"the trained .* has values beyond float16"):
        export(parts, lora, output(tmp_path / "out"), run_of(tiny_sd15, lora=True, lora_rank=4))
    assert listing(tmp_path / "out") == []


def full(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


BREAKS: dict[str, tuple[Any, str]] = {  # where a disk that is full may be met
    "copies": (shutil, "copyfile"),
    "weights": (write, "_content"),
    "texts": (exporting, "_write"),
    "the end": (os, "fsync"),
}


@pytest.mark.parametrize(
    ("lora", "again", "where"),
    [
        *((False, True, where) for where in BREAKS),
        *((True, True, where) for where in BREAKS if where != "copies"),
        (False, False, "the end"),
        (True, False, "the end"),
    ],
)
def test_a_full_disk_leaves_nothing_new(
    lora: bool, again: bool, where: str, tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = load_parts(tiny_sd15)
    result = adapter(parts) if lora else distilled(parts)
    out, run = output(tmp_path / "out"), run_of(tiny_sd15, lora=lora, lora_rank=4)
    (out / "log.jsonl").write_text("theirs")
    if again:
        export(parts, result, out, run)
    before = {name: (out / name).read_bytes() for name in listing(out)}
    monkeypatch.setattr(*BREAKS[where], full)
    with pytest.raises(OutputError, match=r"cannot be written to '.*out': no space left on device") as caught:
        export(parts, result, out, run)
    assert "--resume" in str(caught.value.hint)
    assert {name: (out / name).read_bytes() for name in listing(out)} == before
    assert not (out / STAGE).exists()


def test_what_a_killed_run_left_is_cleared_away(tiny_sd15: Path, tmp_path: Path) -> None:
    parts = load_parts(tiny_sd15)
    out = output(tmp_path / "out")
    (out / STAGE / "unet").mkdir(parents=True)
    (out / STAGE / "old").write_text("half")
    export(parts, distilled(parts), out, run_of(tiny_sd15))
    export(parts, distilled(parts), out, run_of(tiny_sd15))  # and once more, over the result
    assert not (out / STAGE).exists()
    assert not (out / "old").exists()
    assert load_parts(out).unet.config.guidance_dim == 256


def test_the_sign_of_a_whole_result_comes_last(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = load_parts(tiny_sd15)
    moved: list[str] = []
    move = Path.replace

    def noting(self: Path, target: Path) -> Path:
        if self.parent.name == STAGE:
            moved.append(self.name)
        return move(self, target)

    monkeypatch.setattr(Path, "replace", noting)
    export(parts, distilled(parts), output(tmp_path / "model"), run_of(tiny_sd15))
    assert moved[-1] == "model_index.json"
    export(parts, adapter(parts), output(tmp_path / "lora"), run_of(tiny_sd15, lora=True, lora_rank=4))
    assert moved[-1] == PEFT_FILE


def test_between_an_old_result_and_a_new_one_there_is_none(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, out = load_parts(tiny_sd15), output(tmp_path / "out")
    export(parts, distilled(parts), out, run_of(tiny_sd15))
    move = Path.replace

    def failing(self: Path, target: Path) -> Path:
        return full() if self.parent.name == STAGE and self.name == "unet" else move(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OutputError):
        export(parts, distilled(parts), out, run_of(tiny_sd15))
    assert not (out / "model_index.json").exists()


def test_the_same_run_gives_the_same_bytes(tiny_sd15: Path, tmp_path: Path) -> None:
    parts = load_parts(tiny_sd15)
    lora = adapter(parts)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export(parts, lora, output(tmp_path / name / "out"), run_of(tiny_sd15, lora=True, lora_rank=4))
    for name in listing(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# ---- a LoRA's two files ----


@pytest.mark.parametrize(
    ("family", "kind", "version", "architecture", "prediction"),
    [
        ("sd15", {}, "sd_v1", "stable-diffusion-v1/lora", "epsilon"),
        ("sd15", {"channels": 9}, "sd_v1", "stable-diffusion-v1-inpainting/lora", "epsilon"),
        ("sd21", {}, "sd_v2", "stable-diffusion-v2-512/lora", "epsilon"),
        ("sd21", {"sd2": True}, "sd_v2_v", "stable-diffusion-v2-768-v/lora", "v"),
        ("sdxl", {"xl": True}, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "epsilon"),
        ("ssd1b", {"xl": True, "slim": True}, "sdxl_base_v1-0", "ssd-1b/lora", "epsilon"),
        ("custom", {}, None, None, "epsilon"),
    ],
)
def test_kohyas_header(
    family: str,
    kind: dict[str, Any],
    version: str | None,
    architecture: str | None,
    prediction: str,
    tmp_path: Path,
) -> None:
    teacher = write_model(tmp_path / "teacher", **kind)
    parts = replace(load_parts(teacher), family=family)
    run = run_of(teacher, lora=True, lora_rank=4, learning_rate=2e-4, seed=3)
    out = export(parts, adapter(parts), output(tmp_path / "fast"), run)
    said = metadata(out / KOHYA_FILE)
    assert said.get("ss_base_model_version") == version
    assert said.get("modelspec.architecture") == architecture
    assert said["modelspec.prediction_type"] == prediction
    assert said["modelspec.resolution"] == "64x64"
    assert said["modelspec.sai_model_spec"] == "1.0.0"
    assert (said["ss_network_module"], said["ss_network_dim"], said["ss_network_alpha"]) == ("networks.lora", "4", "4")
    assert json.loads(said["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "4"}
    assert (said["ss_learning_rate"], said["ss_steps"], said["ss_max_train_steps"]) == ("0.0002", "10", "10")
    assert (said["ss_seed"], said["ss_output_name"], said["modelspec.title"]) == ("3", "fast", "fast")
    assert "modelspec.date" not in said
    assert not any(str(tmp_path) in value for value in said.values())


@pytest.mark.parametrize("kind", [{}, {"xl": True}], ids=["sd15", "sdxl"])
def test_both_files_hold_the_same_numbers(kind: dict[str, Any], tmp_path: Path) -> None:
    teacher = write_model(tmp_path / "teacher", **kind)
    parts = load_parts(teacher)
    lora = adapter(parts)
    out = export(parts, lora, output(tmp_path / "out"), run_of(teacher, lora=True, lora_rank=4))
    assert listing(out) == ["README.md", KOHYA_FILE, PEFT_FILE, "training.json"]
    peft, kohya = load_file(out / PEFT_FILE), load_file(out / KOHYA_FILE)
    factors = [*peft.values(), *(tensor for key, tensor in kohya.items() if not key.endswith(".alpha"))]
    assert {tensor.dtype for tensor in factors} == {torch.float16}
    alphas = {key: tensor.item() for key, tensor in kohya.items() if key.endswith(".alpha")}
    assert set(alphas.values()) == {4.0}
    assert len(kohya) == 3 * len(alphas) == 3 * len(lora.deltas["unet"])

    def numbers(tensors: dict[str, Tensor]) -> list[float]:
        return sorted(float(tensor.double().sum()) for key, tensor in tensors.items() if ".alpha" not in key)

    assert numbers(peft) == numbers(kohya)
    pattern = (
        r"lora_unet_(input_blocks|middle_block|output_blocks)_\d.*" if kind else r"lora_unet_(down|mid|up)_block.*"
    )
    assert all(re.fullmatch(pattern, key) for key in kohya)
    config = json.loads(metadata(out / PEFT_FILE)[METADATA])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (4, 4)
    assert json.loads((out / "training.json").read_text()) == history(lora=True, lora_rank=4)


# ---- the card ----

FACTS = Facts(
    run=Run(
        "/data/models/sd15",
        history(w_max=9.0, loss_type="l2"),
        8,
        command="calotype distill /data/models/sd15 ~/my/photos -o=/out/fast --w-max 9",
        data="/data/photos",
        pictures=1234,
        loss=0.01234,
        distances=((5, 12.3, 0.4), (8, 10.25, 0.35)),
    ),
    name="fast",
    base="sd15",
    data="photos",
    xl=False,
    steps=4,
    guidance=7.5,
    side=64,
    licence={"license": "creativeml-openrail-m"},
)


def front(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(matter)
    return found


def test_the_card_of_a_model() -> None:
    text = card(FACTS)
    assert text == card(FACTS)
    assert front(text) == {
        "base_model": "sd15",
        "base_model_relation": "finetune",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["latent-consistency-model", "lcm", "stable-diffusion", "calotype"],
        "license": "creativeml-openrail-m",
    }
    for part in (
        "calotype distill sd15 photos -o=fast --w-max 9",
        "1,234 pictures with captions, from `photos`",
        "`loss_type` l2",
        "`w_max` 9.0",
        "8 updates of 12 pictures",
        "Loss at the end: 0.01234",
        "| 8 (this one) | 10.25 ± 0.35 |",
        "from 4 to 10",
    ):
        assert part in text, part
    assert "`sampler`" not in text
    assert "validation_steps" not in text  # it follows checkpointing_steps
    assert not re.search(r"/data|/out|~", text)


def test_the_card_of_a_lora() -> None:
    run = replace(FACTS.run, history=history(lora=True, objective="pcm", lora_rank=8), distances=(), loss=None)
    text = card(replace(FACTS, run=run, base="org/model@v1", guidance=1.0, licence={}, inpaints=True))
    matter = front(text)
    assert matter["base_model"] == "org/model"
    assert {"lcm-lora", "lora", "inpainting", "phased-consistency-model"} <= set(matter["tags"])
    assert "license" not in matter
    assert "## Figures" not in text
    assert 'DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing"' in text
    assert "`lora_rank` 8" in text


def test_a_resumed_runs_settings_are_told_apart() -> None:
    rows = [*history(), {**history(w_max=8.0)[0], "from_step": 5}]
    text = card(replace(FACTS, run=replace(FACTS.run, history=rows)))
    assert "from step 0 on: `max_train_steps` 10" in text
    assert "from step 5 on:" in text
    assert settings_of([{"from_step": 0, "lora": True}])["learning_rate"] == 1e-4  # of a run that knew fewer settings


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("calotype distill org/model data -o out", "calotype distill org/model data -o out"),
        ("/opt/venv/bin/calotype distill '/my data/x y/' -o ~/out", "calotype distill 'x y' -o out"),
        ("calotype distill m d --cache=/tmp/c", "calotype distill m d --cache=c"),
        ("calotype distill '/a/b", "calotype distill 'b"),
    ],
)
def test_commands_lose_the_places_of_a_machine(command: str, shown: str) -> None:
    assert portable(command) == shown


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert name_of("models/mine") == "mine"
    assert name_of("org/model@v1") == "org/model@v1"
    assert name_of("/gone/model") == "model"
    assert name_of(tmp_path / "out") == "out"
    monkeypatch.chdir(tmp_path / "models")
    assert name_of(".") == "models"
    assert name_of(Path("out")) == "out"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: openrail++\ntags: [x]\n---\n# x", {"license": "openrail++"}),
        ('---\nlicense: "mit"\n---\n', {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: mine\nlicense_link: https://x.org/a\n---\n",
            {"license": "other", "license_name": "mine", "license_link": "https://x.org/a"},
        ),
        ("license: mit\n", {}),
        ("---\ntitle: x\n---\nlicense: mit\n", {}),
        ("---\nlicense: [mit, x]\n---\n", {}),
    ],
)
def test_the_teachers_licence(
    text: str, found: dict[str, str], tiny_sd15: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    teacher = copy_of(tiny_sd15)
    (teacher / "README.md").write_text(text)
    parts = load_parts(teacher)
    out = export(parts, adapter(parts), output(tmp_path / "out"), run_of(teacher, lora=True, lora_rank=4))
    matter = front((out / "README.md").read_text())
    assert {name: value for name, value in matter.items() if name.startswith("license")} == found


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("lora", [False, True], ids=["model", "lora"])
@pytest.mark.parametrize(
    ("objective", "kind"),
    [("lcd", {}), ("lcd", {"xl": True}), ("lcd", {"channels": 9}), ("tcd", {"sd2": True}), ("pcm", {})],
    ids=["sd15", "sdxl", "inpainting", "tcd", "pcm"],
)
def test_the_programs_on_the_card_run(
    objective: str, kind: dict[str, Any], lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = write_model(tmp_path / "teacher", **kind)
    parts = load_parts(teacher)
    result = adapter(parts) if lora else distilled(parts)
    export(parts, result, output(tmp_path / "fast"), run_of(teacher, lora=lora, lora_rank=4, objective=objective))
    Image.new("RGB", (64, 64), "red").save("photo.png")
    Image.new("L", (64, 64), 255).save("mask.png")
    programs = re.findall(r"```python\n(.*?)```", (tmp_path / "fast" / "README.md").read_text(), re.DOTALL)
    assert [("diffusers" in program, "calotype" in program) for program in programs] == [(False, True), (True, False)]
    drawn = []
    for program in programs:
        exec(program, {})
        drawn.append(np.asarray(Image.open("fox.png").convert("RGB"), np.int16))
    assert drawn[0].shape == (64, 64, 3)
    assert (np.abs(drawn[0] - drawn[1]) > 1).mean() < 1e-3  # both are the same picture
