"""Samplers: the loops that turn noise into latents, without the network.

A sampler is a generator that alternately yields an Eval ("run the network here") and, once the network's output has
been sent in, the Step that follows from it. Three lines drive one:

    for ev in sampler:
        step = sampler.send(network(ev.x, ev.t))

It knows no network and shares nothing, so one round of network calls can serve many samplers at different steps. All
arithmetic is in float32 whatever the dtype of the noise; all coefficients are on the device before the first Eval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calotype.errors import UsageError
from calotype.schedule import (
    NoiseSchedule,
    boundary_scalings,
    eps_from,
    euler_grid,
    explicit_grid,
    lcm_grid,
    spaced_grid,
    x0_from,
)


@dataclass(frozen=True, eq=False)
class Eval:
    """Please run the network on these."""

    index: int  # step number, from 0
    t: Tensor  # (B,) int64; float32 where Euler's grid lies between timesteps
    x: Tensor  # (B, C, h, w), in the dtype of the noise


@dataclass(frozen=True, eq=False)
class Step:
    """What became of it. Both latents are float32 (B, C, h, w)."""

    index: int
    t: Tensor  # that of the Eval
    x: Tensor  # after the update: what the next Eval holds; the last one is the result
    x0: Tensor  # the denoised latents, which a preview decodes


# Yields Eval, Step, Eval, Step, ...; takes the network's output in answer to each Eval.
Sampler = Generator[Any, Any, None]


def lcm(schedule: NoiseSchedule, grid: Sequence[float], noise: Sequence[Tensor]) -> Sampler:
    """Multistep latent consistency sampling (Luo et al. 2023, arXiv 2310.04378, Algorithm 3).

    noise: one draw (B, C, h, w) a step; noise[0] is where it begins, the others are added between steps.
    """
    assert len(noise) >= len(grid), "latent consistency sampling takes one draw of noise a step"
    dtype, batch, x = noise[0].dtype, len(noise[0]), noise[0].float()
    schedule, times = schedule.to(x.device), _times(grid, x.device)
    c_skip, c_out = boundary_scalings(times, schedule.timestep_scaling)
    for i in range(len(grid)):
        t = times[i].expand(batch)
        out = yield Eval(i, t, x.to(dtype))
        x0 = c_out[i] * _clipped(schedule, schedule.to_x0(x, out, t)) + c_skip[i] * x
        last = i + 1 == len(grid)
        x = x0 if last else schedule.add_noise(x0, noise[i + 1].float(), times[i + 1].expand(batch))
        yield Step(i, t, x, x0)


def ddim(schedule: NoiseSchedule, grid: Sequence[float], noise: Sequence[Tensor]) -> Sampler:
    """Deterministic DDIM (Song et al. 2020, arXiv 2010.02502, Eq. 12 with eta = 0). noise: one draw (B, C, h, w)."""
    alpha, sigma = schedule.alpha.cpu(), schedule.sigma.cpu()
    # One more level at index -1, for the step past the last timestep.
    beyond = (torch.ones(1), torch.zeros(1)) if schedule.set_alpha_to_one else (alpha[:1], sigma[:1])
    alpha, sigma = torch.cat([alpha, beyond[0]]), torch.cat([sigma, beyond[1]])
    here, after = torch.tensor([int(t) for t in grid]), torch.tensor(_ddim_targets(schedule, grid))
    x = noise[0].float()
    return _deterministic(schedule, grid, noise[0].dtype, x, (alpha[here], sigma[here]), (alpha[after], sigma[after]))


def euler(schedule: NoiseSchedule, grid: Sequence[float], noise: Sequence[Tensor]) -> Sampler:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, arXiv 2206.00364, Algorithm 1 without churn).

    In its own coordinates, x / alpha against s = sigma / alpha, a step is x0 + (s' / s)(x - x0). In ours that is DDIM's
    update, so only the noise levels differ: s is interpolated between timesteps and ends at exactly 0.
    noise: one draw (B, C, h, w), a standard normal that is scaled here.
    """
    signal = schedule.alpha.cpu()
    # With zero terminal SNR, s is infinite: the reference puts alpha^2 = 2^-24 there, and so do we.
    ratios = (schedule.sigma.cpu() / torch.where(signal == 0, 2.0**-12, signal)).numpy()
    s = np.append(np.interp(grid, np.arange(schedule.T), ratios), 0.0)
    alpha = torch.from_numpy(1 / np.sqrt(s**2 + 1)).float()
    sigma = torch.from_numpy(s / np.sqrt(s**2 + 1)).float()
    x = noise[0].float()
    if schedule.spacing != "leading":  # the reference starts those grids from pure noise without the signal's share
        x = x * sigma[0].to(x.device)
    schedule = dataclasses.replace(schedule, clip_sample=None)  # the reference's Euler never clips
    return _deterministic(schedule, grid, noise[0].dtype, x, (alpha[:-1], sigma[:-1]), (alpha[1:], sigma[1:]))


def _deterministic(
    schedule: NoiseSchedule,
    grid: Sequence[float],
    dtype: torch.dtype,
    x: Tensor,
    here: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
) -> Sampler:
    """x' = alpha' x0 + sigma' eps. x: (B, C, h, w) float32; here, after: alpha and sigma (n,) around each step."""
    times = _times(grid, x.device)
    alpha, sigma, next_alpha, next_sigma = (table.to(x.device) for table in (*here, *after))
    for i in range(len(grid)):
        t = times[i].expand(len(x))
        out = (yield Eval(i, t, x.to(dtype))).float()
        x0 = x0_from(schedule.prediction, x, out, alpha[i], sigma[i])
        eps = eps_from(schedule.prediction, x, out, alpha[i], sigma[i])  # of the unclipped x0, as in the reference
        x0 = _clipped(schedule, x0)
        x = next_alpha[i] * x0 + next_sigma[i] * eps
        yield Step(i, t, x, x0)


def _ddim_targets(schedule: NoiseSchedule, grid: Sequence[float]) -> list[int]:
    """The timestep that each step arrives at; -1 is past the last one.

    On the schedule's own grid the reference goes T // n down from wherever it is, even where that misses the next
    timestep (trailing with 7 steps; linspace always). On any other grid it is the next timestep.
    """
    stride, offset = schedule.T // len(grid), schedule.steps_offset if schedule.spacing == "leading" else 0
    fits = (len(grid) - 1) * stride + offset < schedule.T  # else there is no such grid
    if fits and list(grid) == spaced_grid(len(grid), schedule.T, schedule.spacing, offset):
        return [max(int(t) - stride, -1) for t in grid]
    return [int(t) for t in grid[1:]] + [-1]


def _times(grid: Sequence[float], device: torch.device) -> Tensor:
    """The grid on the device: int64 where all timesteps are whole, else float32."""
    whole = all(t == int(t) for t in grid)
    return torch.tensor(list(grid), dtype=torch.int64 if whole else torch.float32, device=device)


def _clipped(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    limit = schedule.clip_sample
    return x0 if limit is None else x0.clamp(-limit, limit)


SAMPLERS: dict[str, Callable[[NoiseSchedule, Sequence[float], Sequence[Tensor]], Sampler]] = {
    "lcm": lcm,
    "ddim": ddim,
    "euler": euler,
}


def grid_for(
    sampler: str, schedule: NoiseSchedule, steps: int, timesteps: Sequence[int] | None = None
) -> Sequence[float]:
    """The timesteps of `steps` steps of a sampler, or the explicit `timesteps` once checked. Raises UsageError."""
    _check_name(sampler)
    if timesteps is not None:
        return explicit_grid(list(timesteps), schedule.T)
    if sampler == "lcm":
        return lcm_grid(steps, schedule.original_steps, T=schedule.T)
    spaced = euler_grid if sampler == "euler" else spaced_grid
    return spaced(steps, schedule.T, schedule.spacing, schedule.steps_offset)


def draws_needed(sampler: str, steps: int) -> int:
    """How many draws of noise a run of `steps` steps takes."""
    _check_name(sampler)
    return steps if sampler == "lcm" else 1


def draw_noise(seeds: Sequence[int], shape: tuple[int, ...], draws: int) -> list[Tensor]:
    """Standard normal noise: `draws` float32 CPU tensors (len(seeds), *shape).

    Row i comes from a generator of its own, seeded with seeds[i], so a picture does not depend on its neighbours. One
    call for each draw, in order: a single long call would give other numbers than the reference.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return [torch.cat([torch.randn((1, *shape), generator=each) for each in generators]) for _ in range(draws)]


def guided(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) with diffusers' scale: 1 is `cond` itself.

    cond, uncond: network outputs (B, ...); scale: a number, or (B,) with one for each picture.
    """
    if isinstance(scale, Tensor):
        scale = scale.to(cond.device).view(-1, *(1,) * (cond.ndim - 1))
    return uncond + scale * (cond - uncond)


def _check_name(sampler: str) -> None:
    if sampler not in SAMPLERS:
        raise UsageError(f"sampler is {sampler!r}: allowed are {', '.join(SAMPLERS)}")
