"""What distillation leaves behind, in both programs: every family's model, and a LoRA's two files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from matrix.world import picture
from PIL import Image
from reference import LATENTS, Agreement, Pair, Picture
from torch import Tensor

import calotype
from calotype.training.card import Run
from calotype.training.export import KOHYA_FILE, export
from calotype.training.settings import Settings
from calotype.training.students import LoraStudent, student_of
from calotype.weights.convert import write_single_file
from calotype.weights.folder import Folder
from calotype.weights.load import load_parts
from checkpoints import write_model

SIDE, STEPS = 64, 4
TEACHERS: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sd21": {"sd2": True},
    "sdxl": {"xl": True},
    "ssd1b": {"xl": True, "slim": True},
    "inpainting": {"channels": 9},
    "sdxl inpainting": {"xl": True, "channels": 9},
}
FILES = ("pytorch_lora_weights.safetensors", KOHYA_FILE)
REQUEST: dict[str, Any] = {"steps": STEPS, "seed": 3, "width": SIDE, "height": SIDE}

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own

Teachers = Callable[[str], Path]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Teachers:
    """Each family's tiny model, written once."""
    root = tmp_path_factory.mktemp("teachers")

    def teacher(name: str) -> Path:
        return root / name if (root / name).exists() else write_model(root / name, **TEACHERS[name])

    return teacher


def shake(network: Any) -> None:
    """Changes every number so that it shows in the picture; what is zero as well."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            size = parameter.std() if parameter.any() and parameter.numel() > 1 else 0.1
            parameter += 0.3 * size * torch.randn(parameter.shape, generator=generator)


def run(teacher: Path, **changes: Any) -> Run:
    settings = Settings(resolution=SIDE, **changes)
    return Run(str(teacher), [{"from_step": 0, **vars(settings)}], settings.max_train_steps)


def export_student(teacher: Path, output: Path, **changes: Any) -> Path:
    parts = load_parts(teacher)
    student = student_of(parts.unet)
    shake(student)
    output.mkdir()
    return export(parts, student, output, run(teacher, **changes))


def export_lora(teacher: Path, output: Path) -> Path:
    parts = load_parts(teacher)
    student = LoraStudent(parts, rank=4)
    shake(student.module)
    output.mkdir()
    return export(parts, student.outcome(), output, run(teacher, lora=True, lora_rank=4))


def drawn(pair: Pair, guidance: float, sampler: str = "lcm", gamma: float = 0.3) -> tuple[Picture, Picture]:
    """One picture in both programs. Of an inpainting model, what is painted, without what is kept."""
    if pair.engine.parts.unet.config.in_channels == 4:
        return (
            pair.ours("a red fox", guidance=guidance, sampler=sampler, gamma=gamma, **REQUEST),
            pair.theirs("a red fox", guidance=guidance, gamma=gamma, **REQUEST),
        )
    photo, mask = picture(0).resize((SIDE, SIDE)), Image.new("L", (SIDE, SIDE))
    mask.paste(255, (8, 16, 48, 64))
    request = calotype.Request("a red fox", guidance=guidance, sampler=sampler, image=photo, mask=mask, **REQUEST)
    *_, last = pair.engine.stream(request)
    arguments: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": guidance, "output_type": "latent"}
    theirs: Tensor = pair.pipeline(
        "a red fox",
        image=photo,
        mask_image=mask,
        width=SIDE,
        height=SIDE,
        strength=1.0,
        generator=torch.Generator("cpu").manual_seed(3),
        **arguments,
    ).images
    return Picture(last.x, [photo]), Picture(theirs, [photo])


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_draws_the_same_in_both(name: str, teachers: Teachers, tmp_path: Path, agree: Agreement) -> None:
    pair = Pair(name, export_student(teachers(name), tmp_path / "out"))
    ours, theirs = drawn(pair, guidance=7.5)
    agree.pictures("distilled", ours, theirs)
    inpaint, xl = "Inpaint" if "inpainting" in name else "", "XL" if TEACHERS[name].get("xl") else ""
    wanted = f"StableDiffusion{xl}{inpaint}Pipeline" if xl or inpaint else "LatentConsistencyModelPipeline"
    assert type(pair.pipeline).__name__ == wanted
    assert pair.pipeline.unet.config.time_cond_proj_dim == 256
    other, _ = drawn(pair, guidance=12.0)
    assert (other.latents - ours.latents).norm() > 100 * LATENTS * ours.latents.norm()  # the embedding is at work


@pytest.mark.parametrize(("objective", "sampler"), [("tcd", "tcd"), ("pcm", "ddim")])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_other_objectives(
    objective: str, sampler: str, name: str, teachers: Teachers, tmp_path: Path, agree: Agreement
) -> None:
    grid = {"num_ddim_timesteps": 40, "skipping_step": 25} if objective == "pcm" else {}
    pair = Pair(name, export_student(teachers(name), tmp_path / "out", objective=objective, **grid))
    assert pair.engine.parts.defaults.sampler == sampler
    for gamma in (0.0, 0.3):  # which means something to tcd alone
        agree.pictures("distilled", *drawn(pair, guidance=7.5, sampler=sampler, gamma=gamma))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_student_of_a_single_file(name: str, teachers: Teachers, tmp_path: Path, agree: Agreement) -> None:
    single = tmp_path / "teacher.safetensors"
    write_single_file(Folder(teachers(name)), single)
    pair = Pair(name, export_student(single, tmp_path / "out"))
    agree.pictures("distilled", *drawn(pair, guidance=7.5))


@pytest.mark.parametrize("name", TEACHERS)
def test_both_files_of_a_lora_draw_the_same_in_both(
    name: str, teachers: Teachers, tmp_path: Path, agree: Agreement
) -> None:
    teacher = teachers(name)
    out = export_lora(teacher, tmp_path / "out")
    pair = Pair(name, teacher)
    pair.pipeline.scheduler = LCMScheduler.from_config(pair.pipeline.scheduler.config)
    plain, _ = drawn(pair, guidance=1.0)
    made: list[Picture] = []
    for file in FILES:
        pair.engine.add_lora(out / file, name=file)
        pair.pipeline.load_lora_weights(out, weight_name=file)
        ours, theirs = drawn(pair, guidance=1.0)
        agree.pictures("its LoRA", ours, theirs)
        assert (ours.latents - plain.latents).norm() > 100 * LATENTS * plain.latents.norm()
        made.append(ours)
        pair.engine.set_loras({})
        pair.pipeline.unload_lora_weights()
    assert torch.equal(made[0].latents, made[1].latents)
    pair.engine.add_lora(out, name="folder")  # of which both programs take the first
    pair.pipeline.load_lora_weights(out)
    agree.pictures("its LoRA", *drawn(pair, guidance=1.0))
