"""The loss in the training loop of diffusers' latent consistency scripts, on diffusers' own networks and schedulers.

Learnt from examples/consistency_distillation of diffusers at 58eb52c: train_lcm_distill_sd_wds.py,
train_lcm_distill_lora_sd_wds.py and train_lcm_distill_lora_sdxl.py. Their order is kept: the student first, the teacher
once for the caption and once for none, the solver by its own table, the target last. Two slips are put right:

* The solver's table comes out as float64, and with it what the solver computes, even among float32: here it is
  float32 like the schedulers'.
* train_lcm_distill_lora_sdxl_wds.py tells the network (width, height): here it is (height, width), as everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, LatentConsistencyModelPipeline, LCMScheduler
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

# What the scripts' --lora_target_modules is when it is not given.
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
GUIDANCE_DIM = 256  # of the full script's student


@dataclass(frozen=True)
class Draw:
    """What a step of the loop draws, and what its encoders say."""

    latents: Tensor
    noise: Tensor
    index: Tensor
    w: Tensor
    text: Tensor
    no_text: Tensor
    added: Mapping[str, Tensor] | None = None  # SDXL: text_embeds, time_ids
    not_added: Mapping[str, Tensor] | None = None


Predict = Callable[[Tensor, Tensor, Tensor, Mapping[str, Tensor] | None], Tensor]  # (x, t, text, added)


def lora_config(rank: int) -> LoraConfig:
    """As the scripts': alpha is the rank where neither is given."""
    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(TARGETS))


def predict(unet: nn.Module, w: Tensor | None = None) -> Predict:
    """A U-Net as the scripts call it; `w` goes to the guidance embedding."""
    embed: Any = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    embedded = None if w is None else embed(None, w, embedding_dim=GUIDANCE_DIM)

    def call(x: Tensor, t: Tensor, text: Tensor, added: Mapping[str, Tensor] | None) -> Tensor:
        guidance = None if embedded is None else embedded.to(x.dtype)
        return unet(x, t, timestep_cond=guidance, encoder_hidden_states=text, added_cond_kwargs=added).sample

    return call


def without_adapters(unet: UNet2DConditionModel) -> Predict:
    """The SDXL script's teacher: the student's own network, its adapters switched off for the while."""
    plain = predict(unet)

    def call(*inputs: Any) -> Tensor:
        unet.disable_adapters()
        try:
            return plain(*inputs)
        finally:
            unet.enable_adapters()

    return call


def with_guidance(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """The full script's student and target: the teacher's weights, and an embedding of w."""
    student = UNet2DConditionModel.from_config(teacher.config, time_cond_proj_dim=GUIDANCE_DIM)
    student.load_state_dict(teacher.state_dict(), strict=False)
    return student


def time_ids(sizes: Sequence[tuple[int, int]], corners: Sequence[tuple[int, int]], resolution: int) -> Tensor:
    """SDXL's numbers: the picture's (height, width), the crop's (top, left), the size that is trained."""
    return torch.tensor([[*size, *corner, resolution, resolution] for size, corner in zip(sizes, corners, strict=True)])


def loss_of(
    student: Predict,
    target: Predict,
    teacher: Predict,
    scheduler: DDPMScheduler,
    draw: Draw,
    *,
    kind: str,
    huber_c: float = 0.001,
    solver_steps: int = 50,
) -> Tensor:
    """One step's loss, a single number."""
    jump = scheduler.config.num_train_timesteps // solver_steps
    bars = scheduler.alphas_cumprod
    visited = torch.arange(1, solver_steps + 1) * jump - 1
    before = torch.cat([bars[:1], bars[visited[:-1]]])  # of where the solver arrives from each
    t = visited[draw.index]
    t_next = (t - jump).clamp(min=0)
    w = draw.w.view(-1, 1, 1, 1)

    x = scheduler.add_noise(draw.latents, draw.noise, t)
    predicted = consistent(student(x, t, draw.text, draw.added), scheduler, x, t)
    with torch.no_grad():
        with_text = teacher(x, t, draw.text, draw.added)
        without = teacher(x, t, draw.no_text, draw.not_added)
        x0, x0_without = (clean(out, scheduler, x, t) for out in (with_text, without))
        eps, eps_without = (noise_in(out, scheduler, x, t) for out in (with_text, without))
        bar = rows(before, draw.index)
        x_next = bar.sqrt() * (x0 + w * (x0 - x0_without)) + (1 - bar).sqrt() * (eps + w * (eps - eps_without))
        wanted = consistent(target(x_next, t_next, draw.text, draw.added), scheduler, x_next, t_next)
    if kind == "l2":
        return F.mse_loss(predicted, wanted)
    return (((predicted - wanted) ** 2 + huber_c**2).sqrt() - huber_c).mean()


def consistent(out: Tensor, scheduler: DDPMScheduler, x: Tensor, t: Tensor) -> Tensor:
    """The consistency function, with the boundary scalings of diffusers' scheduler."""
    c_skip, c_out = LCMScheduler().get_scalings_for_boundary_condition_discrete(t)
    return c_skip.view(-1, 1, 1, 1) * x + c_out.view(-1, 1, 1, 1) * clean(out, scheduler, x, t)


def clean(out: Tensor, scheduler: DDPMScheduler, x: Tensor, t: Tensor) -> Tensor:
    """The original sample that an output implies."""
    bar = rows(scheduler.alphas_cumprod, t)
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    return {
        "epsilon": lambda: (x - sigma * out) / alpha,
        "v_prediction": lambda: alpha * x - sigma * out,
    }[scheduler.config.prediction_type]()


def noise_in(out: Tensor, scheduler: DDPMScheduler, x: Tensor, t: Tensor) -> Tensor:
    """The noise that an output implies."""
    bar = rows(scheduler.alphas_cumprod, t)
    return {
        "epsilon": lambda: out,
        "v_prediction": lambda: bar.sqrt() * out + (1 - bar).sqrt() * x,
    }[scheduler.config.prediction_type]()


def rows(table: Tensor, places: Tensor) -> Tensor:
    return table[places].view(-1, 1, 1, 1)


@torch.no_grad()
def average(target: nn.Module, student: nn.Module, decay: float) -> None:
    """The full script's moving average."""
    for old, new in zip(target.parameters(), student.parameters(), strict=True):
        old.mul_(decay).add_(new, alpha=1 - decay)
