"""Latent consistency distillation as one pure function (Luo et al. 2023, arXiv 2310.04378, Algorithm 1).

Shapes: B pictures, latents (B, C, h, w). A network is anything called as `network(x, t, conditioning)`; it returns what
its schedule says it predicts (noise, velocity or the clean latent). Paper and code use the same letters: w is the
guidance scale of the paper (diffusers' guidance_scale is w + 1), k the skipping step, c the pseudo-Huber constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calotype.nn.unet import Conditioning
from calotype.schedule import NoiseSchedule, boundary_scalings

Network = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True)
class Batch:
    """One batch of training examples, every random choice already made."""

    x0: Tensor  # clean latents (B, C, h, w), scaled
    noise: Tensor  # standard normal, of the same shape
    index: Tensor  # (B,) int64: which step of the teacher's solver, 0 to N - 1 from clean to noisy
    w: Tensor  # (B,) guidance scales
    conditioning: Conditioning  # of the captions
    null: Conditioning  # of the empty caption


def consistency_function(
    network: Network, schedule: NoiseSchedule, x: Tensor, t: Tensor, conditioning: Conditioning
) -> Tensor:
    """f(x, t): the clean latent that x at t leads to (Equation 9), exactly x itself at t = 0."""
    c_skip, c_out = (expand(c, x) for c in boundary_scalings(t))
    return c_skip * x + c_out * schedule.to_x0(x, network(x, t, conditioning).float(), t)


def solver_grid(schedule: NoiseSchedule, solver_steps: int) -> Tensor:
    """The timesteps (solver_steps,) of distillation: k - 1, 2 k - 1, ..., T - 1 with k = T / solver_steps."""
    k = schedule.T // solver_steps
    return torch.arange(1, solver_steps + 1) * k - 1


def teacher_step(
    teacher: Network, schedule: NoiseSchedule, x: Tensor, t: Tensor, t_next: Tensor, batch: Batch
) -> Tensor:
    """One DDIM step of the guided teacher from t to t_next (Equations 13, 14; Song et al. 2020, 2010.02502, Eq. 12).

    Guidance is applied to the clean latent and to the noise alike, as the released models were trained. Noise is found
    from the clean latent, so that velocity teachers are right too (the authors' script took any output for noise).
    """
    size = len(x)
    both = Conditioning.cat([batch.conditioning, batch.null])
    out = teacher(torch.cat([x, x]), torch.cat([t, t]), both).float()
    x0_text, x0_null = schedule.to_x0(x, out[:size], t), schedule.to_x0(x, out[size:], t)
    eps_text, eps_null = schedule.to_eps(x, out[:size], t), schedule.to_eps(x, out[size:], t)
    w = expand(batch.w, x)
    x0 = x0_text + w * (x0_text - x0_null)  # the paper's guidance: w = 0 is none
    eps = eps_text + w * (eps_text - eps_null)
    return schedule.add_noise(x0, eps, t_next)


def consistency_loss(
    student: Network,
    target: Network,
    teacher: Network,
    schedule: NoiseSchedule,
    batch: Batch,
    *,
    solver_steps: int = 50,
    skip: int = 20,
    substeps: int = 1,
    huber_c: float = 0.001,
) -> Tensor:
    """The distillation loss of each example (B,): the student at t must agree with the target one solver step on.

    `target` is the student's moving average (or the student itself), `teacher` the guided model; gradients flow through
    the student alone. `skip` is the paper's k, how many timesteps the solver jumps: the further, the sooner what is
    known near the clean end reaches the noisy end, and the coarser the path, unless the solver goes it in several
    `substeps`. Pseudo-Huber distance of Song and Dhariwal 2023 (arXiv 2310.14189, Equation 8), averaged over the
    latent's numbers as the released models were trained, not summed.
    """
    grid = solver_grid(schedule, solver_steps).to(batch.index.device)
    t = grid[batch.index]
    t_next = (t - skip).clamp(min=0)  # at 0, f(x, 0) = x: the one place where the loss sees the boundary
    conditioning = replace(batch.conditioning, w=batch.w)

    x = schedule.add_noise(batch.x0, batch.noise, t)
    predicted = consistency_function(student, schedule, x, t, conditioning)
    with torch.no_grad():
        x_next, here = x, t
        for i in range(1, substeps + 1):
            after = t + (t_next - t) * i // substeps
            x_next, here = teacher_step(teacher, schedule, x_next, here, after, batch), after
        wanted = consistency_function(target, schedule, x_next, t_next, conditioning)
    distance = torch.sqrt((predicted - wanted) ** 2 + huber_c**2) - huber_c
    return distance.flatten(1).mean(dim=1)


def expand(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1), to multiply latents."""
    return values.view(-1, *([1] * (like.ndim - 1)))
