"""The distillation loss and every gradient of it, against the loops of diffusers' scripts on the same numbers.

In float64, where a difference is one of formulas: in float32 the gradients differ by up to 4e-5, all of it rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lcm_scripts as scripts
import pytest
import topologies
import torch
from diffusers import DDPMScheduler
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from lcm_scripts import Draw, Predict
from peft import get_peft_model
from reference import Agreement
from torch import Tensor, nn

from calotype.nn.unet import Conditioning
from calotype.schedule import NoiseSchedule
from calotype.training.loss import Batch, Objective, consistency_loss
from calotype.training.students import FullStudent, LoraStudent, Student
from calotype.weights.load import load_parts, load_unet
from checkpoints import randomise, write_model

BOUND = 1e-5  # relative L2, of the loss and of each gradient; the tables of both programs are float32
RANK = 4
DTYPE = torch.float64
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}

# Norms of several channels: with one each, the gradients of what is added before a norm are nothing but rounding.
SD15 = {"attention_head_dim": 8, "cross_attention_dim": 32, "block_out_channels": (32, 64, 96, 96)}
SDXL = {
    "block_out_channels": (32, 64, 96),
    "cross_attention_dim": 32 + 32,
    "attention_head_dim": [2, 4, 8],
    "transformer_layers_per_block": [1, 2, 3],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 32 + 6 * 16,
}
LEVELS = {"sd15": ((True, True, True, False), SD15), "sdxl": ((False, True, True), SDXL)}


@dataclass(frozen=True)
class Sides:
    """The same networks in both programs, and what they are asked."""

    ours: Student
    theirs: tuple[Predict, Predict, Predict]  # student, target, teacher
    trained: nn.Module  # the one of theirs that has the gradients
    averaged: nn.Module | None
    batch: Batch

    def gradients(self) -> dict[str, Tensor]:
        """Theirs."""
        found = {plain(name): each.grad for name, each in self.trained.named_parameters() if each.requires_grad}
        return {name: gradient for name, gradient in found.items() if gradient is not None}


def full(folder: Path) -> Sides:
    """A network with a guidance embedding, its moving average as the target, and the teacher: three different ones."""
    ours, batch = FullStudent(load_unet(folder / "unet", dtype=DTYPE)), sd15_batch()
    teacher = unet(folder)
    student, target = (scripts.with_guidance(teacher).to(DTYPE) for _ in range(2))
    files = ours.files()
    for network, saved in ((student, files["student"]), (target, files["ema"])):
        randomise(network)
        fill(saved, network.state_dict())
    theirs = scripts.predict(student, batch.w), scripts.predict(target, batch.w), scripts.predict(teacher)
    return Sides(ours, theirs, student, target, batch)


def lora(folder: Path, *, recomputed: bool = False) -> Sides:
    """A teacher and a second network with PEFT's adapters; ours is one network, which may compute activations anew."""
    ours = LoraStudent(load_parts(folder, dtype=DTYPE), RANK)
    student = get_peft_model(unet(folder), scripts.lora_config(RANK)).to(DTYPE)
    share_factors(ours, student)
    if recomputed:
        ours.checkpoint_activations()
    theirs = scripts.predict(student), scripts.predict(student), scripts.predict(unet(folder))
    return Sides(ours, theirs, student, None, sd15_batch())


def sdxl_lora(folder: Path) -> Sides:
    """One network on both sides; each picture has a size and a crop of its own, no text is zeros."""
    ours, student = LoraStudent(load_parts(folder, dtype=DTYPE), RANK), unet(folder)
    student.add_adapter(scripts.lora_config(RANK))
    student.to(DTYPE)
    share_factors(ours, student)
    theirs = scripts.predict(student), scripts.predict(student), scripts.without_adapters(student)
    return Sides(ours, theirs, student, None, sdxl_batch())


MAKERS: dict[str, Callable[[Path], Sides]] = {
    "sd15": full,
    "sd15-lora": lora,
    "sd15-lora-recomputed": partial(lora, recomputed=True),
    "sdxl-lora": sdxl_lora,
}


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sides]:
    """A teacher is written once, and the networks of a kind made once."""
    folders: dict[str, Path] = {}
    made: dict[str, Sides] = {}

    def pair(kind: str) -> Sides:
        family = kind.split("-")[0]
        if family not in folders:
            attention, config = LEVELS[family]
            folders[family] = write_model(tmp_path_factory.mktemp("teacher") / family, xl=family == "sdxl")
            place = folders[family] / "unet"
            topologies.write_unet(place, attention, layers_per_block=1, norm_num_groups=8, **config)
        if kind not in made:
            with torch.random.fork_rng():
                torch.manual_seed(1)
                made[kind] = MAKERS[kind](folders[family])
        return made[kind]

    return pair


@pytest.mark.parametrize("loss", ["huber", "l2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", MAKERS)
def test_loss_and_gradients(
    sides: Callable[[str], Sides], agree: Agreement, kind: str, prediction: str, loss: str
) -> None:
    both = sides(kind)
    ours = both.ours
    for parameter in (*ours.parameters, *both.trained.parameters()):
        parameter.grad = None
    schedule = NoiseSchedule.from_config({"_class_name": "DDPMScheduler", "prediction_type": prediction, **BETAS})
    objective = Objective(loss=loss)
    mine = consistency_loss(ours.network, ours.target, ours.teacher, schedule, both.batch, objective).mean()
    mine.backward()
    scheduler = DDPMScheduler(prediction_type=prediction, **BETAS)
    wanted = scripts.loss_of(*both.theirs, scheduler, drawn(both.batch), kind=loss)
    wanted.backward()

    assert mine.dtype == wanted.dtype == DTYPE
    assert agree.note(kind, "loss", relative(mine, wanted)) < BOUND
    gradients, expected = gradients_of(ours), both.gradients()
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert agree.note(kind, "gradient", relative(gradients[name], gradient)) < BOUND


def test_average(sides: Callable[[str], Sides], agree: Agreement) -> None:
    both = sides("sd15")
    assert both.averaged is not None
    both.ours.follow(0.9)
    scripts.average(both.averaged, both.trained, 0.9)
    ours = both.ours.files()["ema"]
    for name, parameter in both.averaged.named_parameters():
        assert agree.note("sd15", "average", relative(ours[name], parameter)) < BOUND


# ---- the same numbers on both sides ----


def unet(folder: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=DTYPE)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


def sd15_batch() -> Batch:
    return Batch(
        x0=normal(6, 4, 12, 12, seed=0),
        noise=normal(6, 4, 12, 12, seed=1),
        index=torch.tensor([0, 1, 12, 25, 48, 49]),  # from the boundary to the noisiest
        w=torch.linspace(3, 14, 6),
        conditioning=Conditioning(normal(6, 7, 32, seed=2)),
        null=Conditioning(normal(1, 7, 32, seed=3).expand(6, -1, -1)),
    )


def sdxl_batch() -> Batch:
    sizes, corners = [(96, 128), (512, 300), (96, 96), (700, 1024), (128, 97), (160, 96)], [(0, 16), (208, 0)] * 3
    numbers = scripts.time_ids(sizes, corners, 96).to(DTYPE)
    text, pooled = normal(6, 7, 64, seed=4), normal(6, 32, seed=5)
    return replace(
        sd15_batch(),
        conditioning=Conditioning(text, pooled, numbers),
        null=Conditioning(torch.zeros_like(text), torch.zeros_like(pooled), numbers),
    )


def drawn(batch: Batch) -> Draw:
    text, none = batch.conditioning, batch.null
    added, not_added = (
        None if each.pooled is None else {"text_embeds": each.pooled, "time_ids": each.time_ids}
        for each in (text, none)
    )
    return Draw(batch.x0, batch.noise, batch.index, batch.w, text.context, none.context, added, not_added)


@torch.no_grad()
def share_factors(ours: LoraStudent, theirs: nn.Module) -> None:
    """Random factors, the same in both; `up` too, which is zero at first and would hide the gradients of `down`."""
    factors = {plain(name): each for name, each in theirs.named_parameters() if each.requires_grad}
    for factor in factors.values():
        factor.normal_(std=factor[0].numel() ** -0.5 / 2)
    fill({plain(name): tensor for name, tensor in ours.files()["student"].items()}, factors)


def fill(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        tensor.copy_(theirs[name])


def gradients_of(student: Student) -> dict[str, Tensor]:
    """By the names of files(), whose tensors are those of the parameters."""
    gradients = {parameter.data_ptr(): parameter.grad for parameter in student.parameters}
    found = {plain(name): gradients.pop(tensor.data_ptr()) for name, tensor in student.files()["student"].items()}
    assert not gradients
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def plain(name: str) -> str:
    """A parameter's name without what PEFT and we put around it: LAYER.down and LAYER.up for an adapter's factors."""
    name = name.replace("/", ".").replace(".lora_A.default.weight", ".down").replace(".lora_B.default.weight", ".up")
    return name.removeprefix("base_model.model.")


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()
