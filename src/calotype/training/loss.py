"""Consistency distillation as one pure function (Luo et al. 2023, Latent consistency models, arXiv 2310.04378, Alg. 1).

Shapes: B pictures, latents (B, C, h, w). A denoiser is anything called as `network(x, t, conditioning)`; it returns
what its schedule says it predicts (noise, velocity or the clean latent). Paper and code use the same letters: w is the
guidance scale of the paper (diffusers' guidance_scale is w + 1), k the skipping step, c the pseudo-Huber constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calotype.nn.unet import Conditioning
from calotype.schedule import NoiseSchedule, boundary_scalings

Denoiser = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True)
class Batch:
    """One batch of training examples, every random choice already made."""

    x0: Tensor  # clean latents (B, C, h, w), scaled
    noise: Tensor  # standard normal, of the same shape
    index: Tensor  # (B,) int64: which step of the teacher's solver, 0 to N - 1 from clean to noisy
    w: Tensor  # (B,) guidance scales
    conditioning: Conditioning  # of the captions
    null: Conditioning  # of the empty caption
    share: Tensor | None = None  # (B,) uniform in [0, 1): how far down the path a trajectory's end is (tcd)
    masked: Tensor | None = None  # (B, 1 + C, h, w): what an inpainting network sees beside x


@dataclass(frozen=True)
class Objective:
    """What is learnt, and how the distance to it is measured."""

    kind: str = "lcd"  # or lcf, pcm, tcd
    phases: int = 4  # of pcm
    loss: str = "huber"  # or l2
    huber_c: float = 0.001
    skip: int = 20  # the paper's k
    substeps: int = 1
    solver_steps: int = 50


def consistency_function(
    network: Denoiser, schedule: NoiseSchedule, x: Tensor, t: Tensor, conditioning: Conditioning
) -> Tensor:
    """f(x, t): the clean latent that x at t leads to (Equation 9), exactly x itself at t = 0."""
    c_skip, c_out = (expand(c, x) for c in boundary_scalings(t))
    return c_skip * x + c_out * schedule.to_x0(x, _wide(network(x, t, conditioning)), t)


def trajectory_function(
    network: Denoiser, schedule: NoiseSchedule, x: Tensor, t: Tensor, s: Tensor, conditioning: Conditioning
) -> Tensor:
    """f(x, t, s): where x at t comes to at the timestep s, in one step of DDIM; exactly x itself at s = t.

    The first-order trajectory consistency function of Zheng et al. 2024 (arXiv 2402.19159, section 4.1), which is also
    how Wang et al. 2024 (Phased consistency models, arXiv 2405.18407, section 3) go to the end of a phase.
    """
    out = _wide(network(x, t, conditioning))
    return schedule.add_noise(schedule.to_x0(x, out, t), schedule.to_eps(x, out, t), s)


def solver_grid(schedule: NoiseSchedule, solver_steps: int) -> Tensor:
    """The timesteps (solver_steps,) of distillation: k - 1, 2 k - 1, ..., T - 1 with k = T / solver_steps."""
    k = schedule.T // solver_steps
    return torch.arange(1, solver_steps + 1) * k - 1


def phase_end(schedule: NoiseSchedule, t: Tensor, phases: int) -> Tensor:
    """The timestep (B,) where the phase of t ends: of T / M - 1, 2 T / M - 1, ... the next below t; 0 in the last."""
    width = schedule.T // phases
    return ((t + width) // width * width - 1 - width).clamp(min=0)  # t = m width - 1 belongs to the phase below it


def teacher_step(
    teacher: Denoiser, schedule: NoiseSchedule, x: Tensor, t: Tensor, t_next: Tensor, batch: Batch
) -> Tensor:
    """One DDIM step of the guided teacher from t to t_next (Equations 13, 14; Song et al. 2020, 2010.02502, Eq. 12).

    Guidance is applied to the clean latent and to the noise alike, as the released models were trained. Noise is found
    from the clean latent, so that velocity teachers are right too (the authors' script took any output for noise).
    """
    size = len(x)
    both = Conditioning.cat([batch.conditioning, batch.null])
    out = _wide(teacher(torch.cat([x, x]), torch.cat([t, t]), both))
    x0_text, x0_null = schedule.to_x0(x, out[:size], t), schedule.to_x0(x, out[size:], t)
    eps_text, eps_null = schedule.to_eps(x, out[:size], t), schedule.to_eps(x, out[size:], t)
    w = expand(batch.w, x)
    x0 = x0_text + w * (x0_text - x0_null)  # the paper's guidance: w = 0 is none
    eps = eps_text + w * (eps_text - eps_null)
    return schedule.add_noise(x0, eps, t_next)


def consistency_loss(
    student: Denoiser,
    target: Denoiser,
    teacher: Denoiser,
    schedule: NoiseSchedule,
    batch: Batch,
    objective: Objective = Objective(),
) -> Tensor:
    """The distillation loss of each example (B,): the student at t must agree with the target one solver step on.

    `target` is the student's moving average (or the student itself), `teacher` the guided model; gradients flow through
    the student alone, which is called once. k (`skip`) is how many timesteps the solver jumps: the further,
    the sooner what is known near the clean end reaches the noisy end, and the coarser the path, unless the solver goes
    it in several `substeps`.

    lcd: both are asked for the clean latent. lcf, consistency fine-tuning (section 4.4): the same without a teacher: a
    picture's own latent under the same noise stands for its step. pcm: both are asked where the path leaves the phase
    of t, which no solver step crosses. tcd: both are asked for a random place further down.

    Pseudo-Huber distance of Song and Dhariwal 2023 (arXiv 2310.14189, Equation 8), or squared, averaged over the
    latent's numbers as the released models were trained, not summed.
    """
    grid = solver_grid(schedule, objective.solver_steps).to(batch.index.device)
    t = grid[batch.index]
    end = phase_end(schedule, t, objective.phases) if objective.kind == "pcm" else torch.zeros_like(t)
    t_next = torch.maximum(t - objective.skip, end)  # at 0, f(x, 0) = x: the one place where the loss sees the boundary
    if objective.kind == "tcd":
        assert batch.share is not None
        end = (batch.share * (t_next + 1)).long()
    conditioning = replace(batch.conditioning, w=batch.w)
    student, target, teacher = (_with_mask(network, batch.masked) for network in (student, target, teacher))

    def ask(network: Denoiser, x: Tensor, t: Tensor) -> Tensor:
        if objective.kind in ("lcd", "lcf"):
            return consistency_function(network, schedule, x, t, conditioning)
        return trajectory_function(network, schedule, x, t, end, conditioning)

    x = schedule.add_noise(batch.x0, batch.noise, t)
    with torch.no_grad():
        if objective.kind == "lcf":
            x_next = schedule.add_noise(batch.x0, batch.noise, t_next)
        else:
            x_next, here = x, t
            for i in range(1, objective.substeps + 1):
                after = t + (t_next - t) * i // objective.substeps
                x_next, here = teacher_step(teacher, schedule, x_next, here, after, batch), after
        wanted = ask(target, x_next, t_next)
    error = (ask(student, x, t) - wanted) ** 2
    if objective.loss == "huber":
        error = torch.sqrt(error + objective.huber_c**2) - objective.huber_c
    return error.flatten(1).mean(dim=1)


def _with_mask(network: Denoiser, masked: Tensor | None) -> Denoiser:
    """The network of an inpainting model: it sees the mask and the masked picture beside x."""
    if masked is None:
        return network

    def seeing(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        copies = len(x) // len(masked)
        return network(torch.cat([x, masked.repeat(copies, 1, 1, 1)], dim=1), t, conditioning)

    return seeing


def _wide(out: Tensor) -> Tensor:
    """At least float32, whatever the network computes in."""
    return out if out.dtype == torch.float64 else out.float()


def expand(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1), to multiply latents."""
    return values.view(-1, *([1] * (like.ndim - 1)))
