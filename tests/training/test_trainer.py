"""Distillation end to end on a tiny teacher: what it writes, that it resumes exactly, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import calotype
from calotype.errors import CalotypeWarning, CheckpointError, UsageError
from calotype.nn.unet import Conditioning
from calotype.training.data import Example, load_picture, pick, read_folder
from calotype.training.students import LoraStudent, student_of
from calotype.training.trainer import Settings, TrainStep, newest_checkpoint
from calotype.weights.load import load_parts

WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")
SMALL: dict[str, Any] = {"train_batch_size": 2, "resolution": 64, "checkpointing_steps": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for i, (colour, text) in enumerate({"red": ["a fox", "a red fox"], "blue": "a cat", "green": "snow"}.items()):
        Image.new("RGBA", (70 + 10 * i, 64), colour).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def run(teacher: Path, data: Path, output: Path, **settings: Any) -> list[TrainStep]:
    return list(calotype.distill(teacher, data, output, **(SMALL | settings)))


def test_distils_a_model_that_loads_and_draws(tiny_sd15: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "lcm"
    steps = run(tiny_sd15, pictures, out, max_train_steps=3, w_min=2.0, w_max=8.0)
    assert [step.step for step in steps if step.stage == "train"] == [1, 2, 3]
    assert steps[-1].stage == "done"
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in logged] == [step.loss for step in steps if step.stage == "train"]

    engine = calotype.load(out)
    assert engine.parts.defaults.sampler == "lcm"
    assert engine.parts.defaults.guidance_range == (3.0, 9.0)
    assert engine.parts.unet.config.guidance_dim == 256
    assert engine("a fox", seed=0).image.size == (64, 64)
    teacher = load_parts(tiny_sd15)
    moved = sum(
        float((tensor - engine.parts.unet.state_dict()[name]).abs().sum())
        for name, tensor in teacher.unet.state_dict().items()
    )
    assert moved > 0


def test_the_student_starts_as_the_teacher(tiny_sd15: Path) -> None:
    teacher = load_parts(tiny_sd15).unet
    student = student_of(teacher)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 259])
    context = torch.randn(2, 77, 32)
    wanted = teacher(x, t, Conditioning(context))
    torch.testing.assert_close(student(x, t, Conditioning(context, w=torch.tensor([3.0, 8.0]))), wanted)


def test_resuming_is_exact(tiny_sd15: Path, pictures: Path, tmp_path: Path) -> None:
    """Stopped at a checkpoint and resumed, or in one go: the same weights, bit for bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tiny_sd15, pictures, whole, max_train_steps=5)
    for step in calotype.distill(tiny_sd15, pictures, parts, max_train_steps=5, **SMALL):
        if step.step == 3 and step.stage == "train":
            break  # after the checkpoint at 2: step 3 is lost and done again
    assert newest_checkpoint(parts) == parts / "checkpoints" / "step-00000002"
    resumed = run(tiny_sd15, pictures, parts, max_train_steps=5, resume=True)
    assert [step.step for step in resumed if step.stage == "train"] == [3, 4, 5]
    one, other = load_file(whole / WEIGHTS), load_file(parts / WEIGHTS)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


LORA_FILE = "pytorch_lora_weights.safetensors"


def test_a_lora_loads_and_draws(tiny_sd15: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    steps = run(tiny_sd15, pictures, out, lora=True, lora_rank=4, max_train_steps=3)
    assert steps[-1].stage == "done"
    engine = calotype.load(tiny_sd15)
    before = engine("a fox", seed=0, sampler="lcm", steps=2, guidance=1.0).image
    engine.add_lora(out / LORA_FILE, name="lcm")
    assert engine("a fox", seed=0, sampler="lcm", steps=2, guidance=1.0).image != before
    named = {name for name, _ in load_parts(tiny_sd15).unet.named_parameters()}
    keys = [key.removeprefix("unet.").rsplit(".lora_", 1)[0] for key in load_file(out / LORA_FILE)]
    assert {f"{key}.weight" for key in keys} <= named
    for wanted in ("conv1", "conv_shortcut", "downsamplers.0.conv", "time_emb_proj", "to_q", "ff.net.2", "proj_in"):
        assert any(key.endswith(wanted) for key in keys), wanted


def test_a_lora_starts_as_the_teacher_and_leaves_it_alone(tiny_sd15: Path) -> None:
    parts = load_parts(tiny_sd15)
    before = {name: tensor.clone() for name, tensor in parts.unet.state_dict().items()}
    student = LoraStudent(parts, rank=4)
    x, t, conditioning = torch.randn(2, 4, 8, 8), torch.tensor([999, 259]), Conditioning(torch.randn(2, 77, 32))
    wanted = student.teacher(x, t, conditioning)
    torch.testing.assert_close(student.network(x, t, replace(conditioning, w=torch.ones(2))), wanted)
    optimizer = torch.optim.SGD(student.parameters, lr=1.0)
    for _ in range(2):  # the first only moves the zeros
        optimizer.zero_grad()
        student.network(x, t, conditioning).square().mean().backward()
        assert all(tensor.grad is not None for tensor in student.parameters)
        optimizer.step()
    assert all(bool((tensor.grad != 0).any()) for tensor in student.parameters if tensor.grad is not None)
    assert (student.network(x, t, conditioning) - wanted).abs().max() > 1e-3
    torch.testing.assert_close(student.teacher(x, t, conditioning), wanted, rtol=0, atol=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in parts.unet.state_dict().items())


def test_resuming_a_lora_is_exact(tiny_sd15: Path, pictures: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lora": True, "lora_rank": 4, "max_train_steps": 5}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tiny_sd15, pictures, whole, **settings)
    for step in calotype.distill(tiny_sd15, pictures, parts, **SMALL, **settings):
        if step.step == 3 and step.stage == "train":
            break
    run(tiny_sd15, pictures, parts, **settings, resume=True)
    one, other = load_file(whole / LORA_FILE), load_file(parts / LORA_FILE)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(UsageError, match="lora_rank is 8, and the run in this folder has 4"):
        run(tiny_sd15, pictures, parts, **settings | {"lora_rank": 8}, resume=True)


def test_the_loss_falls(tiny_sd15: Path, pictures: Path, tmp_path: Path) -> None:
    steps = run(tiny_sd15, pictures, tmp_path / "o", max_train_steps=60, train_batch_size=4, lr_warmup_steps=1)
    losses = [step.loss for step in steps if step.stage == "train"]
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_train_steps": 0}, "max_train_steps is 0"),
        ({"train_batch_size": -1}, "train_batch_size is -1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"w_min": 5.0, "w_max": 3.0}, "w_min 5.0 and w_max 3.0"),
        ({"w_max": float("inf")}, "w_min"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"skipping_step": 0}, "skipping_step is 0"),
        ({"lr_scheduler": "linear"}, "lr_scheduler is 'linear'"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'"),
        ({"resolution": 100}, "resolution is 100"),
        ({"steps": 3}, "steps"),
        ({"lora": True, "student": "x"}, "a LoRA has no student to go on from"),
        ({"lora_rank": 0}, "lora_rank is 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        next(calotype.distill("nowhere", tmp_path, tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_a_distilled_teacher_is_refused(tiny_sd15_lcm: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already a latent consistency model"):
        run(tiny_sd15_lcm, pictures, tmp_path / "out")


def test_a_folder_in_use_is_refused(tiny_sd15: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        run(tiny_sd15, pictures, tmp_path)
    assert (tmp_path / "theirs.txt").read_text() == "mine"


def test_resuming_with_other_settings_is_said_and_recorded(tiny_sd15: Path, pictures: Path, tmp_path: Path) -> None:
    run(tiny_sd15, pictures, tmp_path / "o", max_train_steps=2)
    with pytest.warns(CalotypeWarning, match=r"from step 2 on .*: w_max 15.0 -> 9.0"):
        run(tiny_sd15, pictures, tmp_path / "o", max_train_steps=4, w_max=9.0, resume=True)
    history = json.loads((tmp_path / "o" / "distillation.json").read_text())
    assert [(stage["from_step"], stage["w_max"]) for stage in history] == [(0, 15.0), (2, 9.0)]


# ---- data ----


def test_captions_from_text_files(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "no-caption.png")
    (tmp_path / "a.txt").write_text("a fox\n")
    assert read_folder(tmp_path) == [Example(tmp_path / "a.png", ("a fox",))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not a caption"),
        ('{"file_name": "a.png"}', "line 1 is not a caption"),
        ('{"file_name": 3, "text": "x"}', "line 1 is not a caption"),
        ('{"file_name": "a.png", "text": []}', "line 1 is not a caption"),
        ('{"file_name": "a.png", "text": [1]}', "line 1 is not a caption"),
        ('["a.png", "x"]', "line 1 is not a caption"),
        ('{"file_name": "gone.png", "text": "x"}', "names gone.png, which is not there"),
        ("", "has no captioned pictures"),
    ],
)
def test_bad_captions(line: str, message: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(UsageError, match=message):
        read_folder(tmp_path)


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(UsageError, match=r"a\.png cannot be read as a picture"):
        load_picture(tmp_path / "a.png", 64)


def test_pictures_are_square_on_white(tmp_path: Path) -> None:
    wide = Image.new("RGBA", (300, 100), (0, 0, 0, 0))
    wide.paste((255, 0, 0, 255), (100, 0, 200, 100))
    wide.save(tmp_path / "wide.png")
    picture = load_picture(tmp_path / "wide.png", 50)
    assert picture.size == (50, 50)
    assert picture.getpixel((25, 25)) == (255, 0, 0)
    wide.paste((0, 0, 0, 0), (0, 0, 300, 100))
    wide.save(tmp_path / "clear.png")
    assert load_picture(tmp_path / "clear.png", 50).getpixel((25, 25)) == (255, 255, 255)


def test_each_pass_sees_every_picture_once() -> None:
    from calotype.training.data import Dataset

    dataset = Dataset(torch.zeros(10, 4, 8, 8), torch.zeros(3, 4, 2), None, ((0, 1),) * 10, 2)
    seen = torch.cat([pick(dataset, 7, step, 4)[0] for step in range(10)])  # four passes
    for lap in seen.split(10):
        assert sorted(lap.tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:20].tolist()
    captions = torch.cat([pick(dataset, 7, step, 4)[1] for step in range(10)])
    assert set(captions.tolist()) == {0, 1}


def test_the_rate_warms_up_and_falls() -> None:
    settings = Settings(max_train_steps=100, learning_rate=1.0, lr_warmup_steps=10, lr_scheduler="cosine")
    rates = [settings.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(rates[9], rel=0.02)
    assert rates[-1] < 0.001
    assert Settings(learning_rate=1.0).rate(500) == 1.0
