"""Distillation end to end on a tiny teacher: what it writes, that it resumes exactly, and what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import calotype
from calotype.errors import CalotypeError, CalotypeWarning, CheckpointError, UsageError
from calotype.lora import LoRA
from calotype.nn.unet import Conditioning
from calotype.training import checkpoint
from calotype.training.dataset import Dataset, Samples
from calotype.training.settings import Settings, TrainStep
from calotype.training.students import LoraStudent, student_of
from calotype.training.trainer import make_batch, make_student
from calotype.training.validate import Reading, Validation, is_hopeless, kept
from calotype.weights.load import load_parts

WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")
SMALL: dict[str, Any] = {
    "train_batch_size": 2,
    "resolution": 64,
    "checkpointing_steps": 2,
    "learning_rate": 1e-3,
    "validation_steps": 0,
}


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
    assert checkpoint.newest(parts / "checkpoints") == parts / "checkpoints" / "step-00000002"
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


@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_the_target_of_a_lora_follows_it(decay: float, tiny_sd15: Path) -> None:
    """The result too. With no decay both are the student as it is."""
    student = make_student(load_parts(tiny_sd15), Settings(lora=True, lora_rank=4, ema_decay=decay))
    first = [parameter.detach().clone() for parameter in student.parameters]
    for parameter in student.parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    last = [parameter.detach().clone() for parameter in student.parameters]
    for _ in range(2):
        student.follow(decay)
    wanted = [old * decay**2 + new * (1 - decay**2) for old, new in zip(first, last, strict=True)]
    outcome = student.outcome()
    assert isinstance(outcome, LoRA)
    found = [factor for delta in outcome.deltas["unet"].values() for factor in delta.tensors()]
    torch.testing.assert_close(found, wanted)

    x, t, conditioning = torch.randn(2, 4, 8, 8), torch.tensor([999, 259]), Conditioning(torch.randn(2, 77, 32))
    with torch.no_grad():
        target = student.target(x, t, conditioning)
        assert (target - student.network(x, t, conditioning)).abs().max() < 1e-4 or decay
        for parameter, average in zip(student.parameters, wanted, strict=True):
            parameter.copy_(average)
        torch.testing.assert_close(student.network(x, t, conditioning), target, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_resuming_a_lora_is_exact(decay: float, tiny_sd15: Path, pictures: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lora": True, "lora_rank": 4, "max_train_steps": 5, "ema_decay": decay}
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
        ({"objective": "ecm"}, "objective is 'ecm': must be one of lcd, lcf, pcm, tcd"),
        ({"objective": "pcm"}, "phases is 4, which does not divide num_ddim_timesteps, 50"),
        ({"objective": "pcm", "phases": 5, "sampler": "lcm"}, "sampler is 'lcm': must be one of ddim"),
        ({"loss_type": "l1"}, "loss_type is 'l1'"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'"),
        ({"dtype": "float8"}, "dtype is 'float8': must be one of float32, bfloat16, float16"),
        ({"validation_samples": 2}, "validation_samples is 2"),
        ({"patience": -1}, "patience is -1"),
        ({"samples": 0}, "samples is 0"),
        ({"lora": True, "fsdp": True}, "fsdp cuts up full students"),
        ({"fsdp": True}, "fsdp takes several processes"),
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


def test_the_rate_warms_up_and_falls() -> None:
    settings = Settings(max_train_steps=100, learning_rate=1.0, lr_warmup_steps=10, lr_scheduler="cosine")
    rates = [settings.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(rates[9], rel=0.02)
    assert rates[-1] < 0.001
    assert Settings(learning_rate=1.0).rate(500) == 1.0


# ---- what is trained, and on what ----


def test_every_setting_has_an_option_with_its_default() -> None:
    from dataclasses import fields
    from inspect import signature

    from calotype.cli.distill import distill

    options = signature(distill).parameters
    raw = {each.name: each.default for each in fields(Settings)}
    assert {name: options[name].default for name in raw} == raw


@pytest.mark.parametrize(
    ("objective", "more", "sampler"),
    [
        ("pcm", {"num_ddim_timesteps": 40, "skipping_step": 25}, "ddim"),
        ("tcd", {}, "tcd"),
        ("lcd", {"loss_type": "l2", "solver_substeps": 2}, "lcm"),
    ],
)
@pytest.mark.parametrize("lora", [False, True])
def test_other_objectives(
    objective: str, more: dict[str, Any], sampler: str, lora: bool, tiny_sd15: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = {"objective": objective, "lora": lora, "lora_rank": 4, **more}
    steps = run(tiny_sd15, pictures, out, max_train_steps=2, **settings)
    assert steps[-1].stage == "done"
    if lora:
        engine = calotype.load(tiny_sd15)
        engine.add_lora(out / LORA_FILE, name="few")
    else:
        engine = calotype.load(out)
        assert engine.parts.defaults.sampler == sampler
    assert engine("a fox", seed=0, steps=4, sampler=sampler, guidance=1.0 if lora else None).image.size == (64, 64)


def test_tuning_a_consistency_model_on_pictures(tiny_sd15_lcm: Path, pictures: Path, tmp_path: Path) -> None:
    """lcf: no teacher's step is asked for, and what comes out is a consistency model again."""
    steps = run(tiny_sd15_lcm, pictures, tmp_path / "o", max_train_steps=2, objective="lcf")
    assert steps[-1].stage == "done"
    tuned, before = load_parts(tmp_path / "o").unet, load_parts(tiny_sd15_lcm).unet
    assert tuned.config == before.config
    moved = [(one - other).abs().max() for one, other in zip(tuned.parameters(), before.parameters(), strict=True)]
    assert 0 < max(map(float, moved)) < 0.1


def test_prompts_alone(tiny_sd15: Path, tmp_path: Path) -> None:
    """The teacher draws the pictures of a list of prompts; a second run finds them in the cache."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n\na cat\nsnow\n")
    settings: dict[str, Any] = {"lora": True, "lora_rank": 4, "samples": 5, "teacher_steps": 2, "max_train_steps": 2}
    settings["cache"] = tmp_path / "cache"
    steps = run(tiny_sd15, prompts, tmp_path / "one", **settings)
    assert max(step.step for step in steps if step.stage == "encode") == 5
    run(tiny_sd15, prompts, tmp_path / "two", **settings)
    one, two = (load_file(tmp_path / name / LORA_FILE) for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_sdxl_students_load_and_draw(tiny_sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    for lora in (False, True):
        out = tmp_path / f"lora-{lora}"
        run(tiny_sdxl, pictures, out, max_train_steps=2, lora=lora, lora_rank=4, random_flip=True)
        engine = calotype.load(tiny_sdxl if lora else out)
        if lora:
            engine.add_lora(out / "kohya_lora_weights.safetensors", name="lcm")
        assert engine("a fox", seed=0, sampler="lcm", steps=2, guidance=1.0 if lora else 8.0).image.size == (64, 64)


def test_recomputed_activations_give_the_same_gradients(tiny_sd15: Path) -> None:
    found = []
    for recomputed in (False, True):
        parts = load_parts(tiny_sd15)
        student = make_student(parts, Settings(lora=True, lora_rank=4, gradient_checkpointing=recomputed, ema_decay=0))
        generator = torch.Generator().manual_seed(0)
        x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator)
        for parameter in student.parameters:  # away from the zeros that it starts at
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        conditioning = Conditioning(context)
        with torch.no_grad():
            wanted = student.target(x, torch.tensor([999, 259]), conditioning)
        out = student.network(x, torch.tensor([999, 259]), conditioning)
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)  # merged or not
        out.square().mean().backward()
        found.append([parameter.grad for parameter in student.parameters])
    for stored, anew in zip(*found, strict=True):
        torch.testing.assert_close(anew, stored)


def test_recomputed_activations_are_of_the_network_that_was_called(tiny_sd15: Path) -> None:
    """Whoever else uses the U-Net before the backward pass; and to them it is the teacher."""
    parts = load_parts(tiny_sd15)
    student = make_student(parts, Settings(lora=True, lora_rank=4, gradient_checkpointing=True, ema_decay=0))
    for parameter in student.parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, conditioning = torch.randn(2, 4, 8, 8), torch.tensor([999, 259]), Conditioning(torch.randn(2, 77, 32))
    found = []
    for others in (False, True):
        out = student.network(x, t, conditioning)
        if others:
            with torch.no_grad():
                own = parts.unet(x, t, conditioning)
                torch.testing.assert_close(own, student.teacher(x, t, conditioning), rtol=0, atol=0)
                assert not torch.equal(own, student.target(x, t, conditioning))
        found.append(torch.autograd.grad(out.square().mean(), student.parameters))
    for alone, between in zip(*found, strict=True):
        torch.testing.assert_close(between, alone, rtol=0, atol=0)


def test_an_optimizer_that_is_not_installed(tiny_sd15: Path, pictures: Path, tmp_path: Path) -> None:
    assert find_spec("bitsandbytes") is None
    with pytest.raises(UsageError, match="adamw8bit needs bitsandbytes, which is not installed"):
        run(tiny_sd15, pictures, tmp_path / "o", max_train_steps=1, optimizer="adamw8bit")


@pytest.mark.filterwarnings("ignore:.* no bfloat16 products:calotype.CalotypeWarning")
@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16_trains_near_float32(lora: bool, tiny_sd15: Path, pictures: Path, tmp_path: Path) -> None:
    losses = []
    for precision in ("no", "bf16"):
        settings = {"mixed_precision": precision, "lora": lora, "lora_rank": 4, "max_train_steps": 2}
        steps = run(tiny_sd15, pictures, tmp_path / precision, **settings)
        losses.append([step.loss for step in steps if step.stage == "train"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("lora", [False, True])
def test_compiled_networks_train_alike(
    lora: bool, tiny_sd15: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, with an adapter that is switched on and off; not turned into machine code, which takes minutes."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    losses = []
    for compiled in (False, True):
        settings = {"compile": compiled, "lora": lora, "lora_rank": 4, "max_train_steps": 2}
        steps = run(tiny_sd15, pictures, tmp_path / str(compiled), **settings)
        losses.append([step.loss for step in steps if step.stage == "train"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# ---- trust ----

VALIDATED: dict[str, Any] = {"validation_steps": 2, "validation_samples": 3, "teacher_steps": 2}


def test_held_out_captions_are_drawn_and_the_readings_kept(tiny_sd15: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    steps = run(tiny_sd15, pictures, out, max_train_steps=4, **VALIDATED, lora=True, lora_rank=4)
    readings = [step for step in steps if step.stage == "validate" and step.distance == step.distance]
    assert [reading.step for reading in readings] == [2, 4]
    assert all(reading.distance_error > 0 for reading in readings)
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["distance"] for row in logged if "distance" in row] == [reading.distance for reading in readings]
    for name in ("contact-sheet.png", "validation/step-00000002.png", "validation/step-00000004.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 64
    events = EventAccumulator(str(out / "logs"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("distance")] == pytest.approx([each.distance for each in readings])
    before = (out / "validation" / "teacher.safetensors").stat().st_mtime_ns
    assert run(tiny_sd15, pictures, out, max_train_steps=4, **VALIDATED, lora=True, lora_rank=4, resume=True)
    assert (out / "validation" / "teacher.safetensors").stat().st_mtime_ns == before
    assert str(readings[0].step) in (out / "README.md").read_text()


def test_too_few_captions_to_validate_with(tiny_sd15: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\na cat\n")
    with pytest.warns(CalotypeWarning, match="2 captions are too few to validate with"):
        steps = run(tiny_sd15, tmp_path / "prompts.txt", tmp_path / "o", max_train_steps=1, **VALIDATED, lora=True)
    assert steps[-1].stage == "done"


def test_a_resumed_run_remembers_its_readings(
    tiny_sd15: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(self: Validation, step: int) -> Any:
        yield Reading(step, 10.0 + step / 8, 0.5)

    monkeypatch.setattr(Validation, "measure", measure)
    settings = {**VALIDATED, "validation_steps": 1, "checkpointing_steps": 1, "lora": True, "lora_rank": 4}
    run(tiny_sd15, pictures, tmp_path / "o", max_train_steps=2, **settings)
    run(tiny_sd15, pictures, tmp_path / "o", max_train_steps=3, **settings, resume=True)
    newest = checkpoint.newest(tmp_path / "o" / "checkpoints")
    assert newest is not None
    readings = checkpoint.state_of(newest)["readings"]
    assert [(reading["step"], reading["distance"]) for reading in readings] == [(1, 10.125), (2, 10.25), (3, 10.375)]


def test_a_power_moves_timesteps_down() -> None:
    """Example i's timestep is that of its uniform number to the power: 2 sees half of all below a quarter."""
    samples = Samples(
        latents=torch.zeros(400, 4, 2, 2),
        conditioning=Conditioning(torch.zeros(400, 1, 8)),
        null=Conditioning(torch.zeros(400, 1, 8)),
        masked=None,
        names=("x",) * 400,
    )
    plain, squared = (
        make_batch(samples, replace(Settings(), timestep_power=power, num_ddim_timesteps=1000), 0, torch.zeros(1)).index
        for power in (1.0, 2.0)
    )
    assert (squared < 250).float().mean() > 1.5 * (plain < 250).float().mean() > 0.15
    torch.testing.assert_close(squared.float(), (plain / 1000) ** 2 * 1000, atol=2.1, rtol=0)


def test_a_gradient_is_no_longer_than_it_may_be(tiny_sd15: Path, pictures: Path, tmp_path: Path) -> None:
    """Adam's first step is as long for any gradient, but for one that was cut below its epsilon."""
    largest = []
    for name, most in (("free", 1e3), ("cut", 1e-14)):
        out = tmp_path / name
        run(tiny_sd15, pictures, out, max_train_steps=1, lora=True, lora_rank=4, ema_decay=0.0, max_grad_norm=most)
        found = load_file(out / LORA_FILE)
        largest.append(max(float(tensor.abs().max()) for key, tensor in found.items() if "lora_B" in key))
    assert largest[0] > 1e-5
    assert largest[1] < largest[0] / 50


def test_which_reading_is_kept() -> None:
    def readings(*values: float) -> list[Reading]:
        return [Reading(step, value, 1.0) for step, value in enumerate(values, start=1)]

    assert kept([]) is None
    assert kept(readings(9, 5, 4, 4.5)) == Reading(4, 4.5, 1.0)  # not measurably worse: the newest
    assert kept(readings(9, 4, 9, 9)) == Reading(2, 4, 1.0)
    assert is_hopeless(readings(4, 9, 9, 9), 3)
    assert not is_hopeless(readings(4, 9, 5, 9), 3)
    assert not is_hopeless(readings(4, 6, 6, 6), 3)  # 2 is 1.4 standard errors of the difference
    assert is_hopeless(readings(4, 6.9, 6.9, 6.9), 3)  # 2.05
    assert not is_hopeless(readings(4, 9, 9, 9), 0)
    assert not is_hopeless(readings(9, 9, 9), 3)


def test_a_run_that_gets_worse_ends_and_gives_back_its_best(
    tiny_sd15: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With readings that say so: 1 is the best, and 2, 3, 4 are worse."""

    def measure(self: Validation, step: int) -> Any:
        yield Reading(step, float(step), 0.01)

    monkeypatch.setattr(Validation, "measure", measure)
    out, settings = tmp_path / "o", {**VALIDATED, "validation_steps": 1, "lora": True, "lora_rank": 4, "patience": 3}
    with pytest.warns(CalotypeWarning, match="the weights of step 1 are kept"):
        steps = run(tiny_sd15, pictures, out, max_train_steps=50, checkpointing_steps=1, **settings)
    assert [step.step for step in steps if step.stage == "train"] == [1, 2, 3, 4]
    assert steps[-1].stage == "done"
    run(tiny_sd15, pictures, tmp_path / "one", max_train_steps=1, lora=True, lora_rank=4)
    found, wanted = load_file(out / LORA_FILE), load_file(tmp_path / "one" / LORA_FILE)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_it_stops_when_told_and_goes_on(tiny_sd15: Path, pictures: Path, tmp_path: Path) -> None:
    whole, parts, polls = tmp_path / "whole", tmp_path / "parts", iter([False, False, True])
    run(tiny_sd15, pictures, whole, max_train_steps=5)
    settings = SMALL | {"checkpointing_steps": 100, "max_train_steps": 5}
    steps = list(calotype.distill(tiny_sd15, pictures, parts, stop=lambda: next(polls), **settings))
    assert (steps[-1].stage, steps[-1].step) == ("stopped", 3)
    assert not (parts / "model_index.json").exists()
    run(tiny_sd15, pictures, parts, max_train_steps=5, resume=True)
    one, other = load_file(whole / WEIGHTS), load_file(parts / WEIGHTS)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_damaged_checkpoint_is_passed_over(tiny_sd15: Path, pictures: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tiny_sd15, pictures, whole, max_train_steps=5)
    run(tiny_sd15, pictures, parts, max_train_steps=4)
    for shard in (parts / "checkpoints" / "step-00000004").glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.warns(CalotypeWarning, match="step-00000004 is damaged"):
        steps = run(tiny_sd15, pictures, parts, max_train_steps=5, resume=True)
    assert [step.step for step in steps if step.stage == "train"] == [3, 4, 5]
    one, other = load_file(whole / WEIGHTS), load_file(parts / WEIGHTS)
    assert all(torch.equal(one[name], other[name]) for name in one)
    logged = [json.loads(line)["step"] for line in (parts / "log.jsonl").read_text().splitlines()]
    assert logged == [1, 2, 3, 4, 5]  # each once


def test_a_loss_that_is_no_number_names_its_picture(
    tiny_sd15: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = Dataset.samples

    def spoilt(self: Dataset, seed: int, step: int, batch: int, part: slice = slice(None)) -> Samples:
        found = samples(self, seed, step, batch, part)
        if step == 2:
            found.latents[1] = float("nan")
        return found

    monkeypatch.setattr(Dataset, "samples", spoilt)
    with pytest.raises(CalotypeError, match=r"step 3: the loss on '\d\.png' is not a finite number"):
        run(tiny_sd15, pictures, tmp_path / "o", max_train_steps=5)
    assert checkpoint.newest(tmp_path / "o" / "checkpoints") is not None


def test_ctrl_c_and_sigterm_save(tiny_sd15: Path, pictures: Path, tmp_path: Path) -> None:
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        out = tmp_path / str(code)
        options = (
            "--max-train-steps 100000 --train-batch-size 1 --resolution 64 --validation-steps 0 --lora --device cpu"
        )
        command = [sys.executable, "-m", "calotype", "distill", str(tiny_sd15), str(pictures), "-o", str(out)]
        process = subprocess.Popen([*command, *options.split()], stderr=subprocess.PIPE, text=True)
        log = out / "log.jsonl"
        for _ in range(1200):
            if log.exists() and log.read_text().count("\n") >= 2:
                break
            time.sleep(0.1)
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
        assert process.returncode == code, told
        assert "--resume goes on" in told
        path = checkpoint.newest(out / "checkpoints")
        assert path is not None
        assert checkpoint.step_of(path) == len(log.read_text().splitlines())
