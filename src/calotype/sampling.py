"""Samplers: the loops that turn noise into latents, without the network.

A sampler is a generator that alternately yields an Eval ("run the network here") and, once the network's output has
been sent in, the Update that follows from it. Three lines drive one:

    for ev in sampler:
        update = sampler.send(network(ev.x, ev.t))

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
import torch.nn.functional as F
from torch import Tensor

from calotype.errors import UsageError
from calotype.samplers import SAMPLERS as KINDS
from calotype.schedule import (
    NoiseSchedule,
    boundary_scalings,
    eps_from,
    euler_grid,
    explicit_grid,
    lcm_grid,
    noise_ratios,
    ratios_at,
    respaced,
    spaced_grid,
    x0_from,
)

GAMMA = 0.3  # of "tcd", where nothing is said: the reference's


@dataclass(frozen=True, eq=False)
class Eval:
    """Please run the network on these."""

    index: int  # step number, from 0
    t: Tensor  # (B,) int64; float32 where Euler's grid lies between timesteps
    x: Tensor  # (B, C, h, w), in the dtype of the noise


@dataclass(frozen=True, eq=False)
class Update:
    """What became of it. Both latents are float32 (B, C, h, w)."""

    index: int
    t: Tensor  # that of the Eval
    x: Tensor  # after the update: what the next Eval holds; the last one is the result
    x0: Tensor  # the denoised latents, which a preview decodes


@dataclass(frozen=True, eq=False)
class Source:
    """The picture that image to image and inpainting begin with."""

    x0: Tensor  # its latents (B, C, h, w)
    mask: Tensor | None = None  # (B, 1, h, w): 1 is to be painted; the rest is put back after each step
    noised: bool = True  # begin with the picture under noise; False: with noise alone


# Yields Eval, Update, Eval, Update, ...; takes the network's output in answer to each Eval.
Sampler = Generator[Any, Any, None]


def lcm(
    schedule: NoiseSchedule, grid: Sequence[float], noise: Sequence[Tensor], source: Source | None = None
) -> Sampler:
    """Multistep latent consistency sampling (Luo et al. 2023, arXiv 2310.04378, Algorithm 3).

    noise: one draw (B, C, h, w) a step; noise[0] is where it begins, the others are added between steps.
    """
    assert len(noise) >= len(grid), "latent consistency sampling takes one draw of noise a step"
    dtype, batch, times = noise[0].dtype, len(noise[0]), _times(grid, noise[0].device)
    schedule = schedule.to(times.device)
    alpha, sigma = _levels(schedule, times)
    x = _start(noise[0], source, alpha[0], sigma[0])
    c_skip, c_out = boundary_scalings(times, schedule.timestep_scaling)
    for i in range(len(grid)):
        t = times[i].expand(batch)
        out = yield Eval(i, t, x.to(dtype))
        x0 = c_out[i] * _clipped(schedule, schedule.to_x0(x, out, t)) + c_skip[i] * x
        last = i + 1 == len(grid)
        x = x0 if last else alpha[i + 1] * x0 + sigma[i + 1] * noise[i + 1].float()
        x = _kept(x, noise[0], source, alpha[i + 1], sigma[i + 1])
        yield Update(i, t, x, x0)


def tcd(
    schedule: NoiseSchedule,
    grid: Sequence[float],
    noise: Sequence[Tensor],
    source: Source | None = None,
    gamma: float = GAMMA,
) -> Sampler:
    """Strategic stochastic sampling (Zheng et al. 2024, Trajectory consistency distillation, arXiv 2402.19159, Alg. 4).

    Each step goes down to (1 - gamma) of the next timestep, and with fresh noise up again to the next: gamma 0 is
    deterministic, 1 is the multistep sampling of consistency models. noise: as for `lcm`; gamma 0 takes one draw.
    """
    assert gamma == 0 or len(noise) >= len(grid), "gamma above 0 takes one draw of noise a step"
    dtype, batch, times = noise[0].dtype, len(noise[0]), _times(grid, noise[0].device)
    schedule = schedule.to(times.device)
    # The last step arrives at timestep 0, where a trace of noise is left: so the released models are run.
    after = torch.cat([times[1:], times.new_zeros(1)])
    down = torch.floor((1 - gamma) * after).long()
    alpha, sigma = _levels(schedule, times)
    alpha_next, alpha_down, sigma_down = schedule.alpha[after.long()], schedule.alpha[down], schedule.sigma[down]
    x = _start(noise[0], source, alpha[0], sigma[0])
    for i in range(len(grid)):
        t = times[i].expand(batch)
        out = (yield Eval(i, t, x.to(dtype))).float()
        x0, eps = _clipped(schedule, schedule.to_x0(x, out, t)), schedule.to_eps(x, out, t)
        x = alpha_down[i] * x0 + sigma_down[i] * eps
        if gamma > 0 and i + 1 < len(grid):
            ratio = alpha_next[i] / alpha_down[i]
            x = ratio * x + (1 - ratio**2).sqrt() * noise[i + 1].float()
        x = _kept(x, noise[0], source, alpha[i + 1], sigma[i + 1])
        yield Update(i, t, x, x0)


def ddim(
    schedule: NoiseSchedule, grid: Sequence[float], noise: Sequence[Tensor], source: Source | None = None
) -> Sampler:
    """Deterministic DDIM (Song et al. 2020, arXiv 2010.02502, Eq. 12 with eta = 0). noise: one draw (B, C, h, w)."""
    alpha, sigma = schedule.alpha.cpu(), schedule.sigma.cpu()
    # One more level at index -1, for the step past the last timestep.
    beyond = (torch.ones(1), torch.zeros(1)) if schedule.set_alpha_to_one else (alpha[:1], sigma[:1])
    alpha, sigma = torch.cat([alpha, beyond[0]]), torch.cat([sigma, beyond[1]])
    here, after = torch.tensor([int(t) for t in grid]), torch.tensor(_ddim_targets(schedule, grid))
    levels = (alpha[here], sigma[here]), (alpha[after], sigma[after])
    return _deterministic(schedule, grid, noise[0], 1.0, source, *levels)


def euler(
    schedule: NoiseSchedule, grid: Sequence[float], noise: Sequence[Tensor], source: Source | None = None
) -> Sampler:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, arXiv 2206.00364, Algorithm 1 without churn).

    In its own coordinates, x / alpha against s = sigma / alpha, a step is x0 + (s' / s)(x - x0). In ours that is DDIM's
    update, so only the noise levels differ: s is interpolated between timesteps, and ends at 0 or at timestep 0's.
    noise: one draw (B, C, h, w), a standard normal that is scaled here.
    """
    s = np.append(ratios_at(schedule, grid), noise_ratios(schedule)[0] if schedule.to_least_noise else 0.0)
    alpha = torch.from_numpy(1 / np.sqrt(s**2 + 1)).float()
    sigma = torch.from_numpy(s / np.sqrt(s**2 + 1)).float()
    if schedule.to_least_noise:  # the result is in Euler's own coordinates: the reference decodes it as it is
        alpha[-1], sigma[-1] = 1.0, s[-1]
    # From pure noise, the reference starts a leading grid at scale 1, the others without the signal's share.
    scale = 1.0 if schedule.spacing == "leading" else float(sigma[0])
    schedule = dataclasses.replace(schedule, clip_sample=None)  # the reference's Euler never clips
    levels = (alpha[:-1], sigma[:-1]), (alpha[1:], sigma[1:])
    return _deterministic(schedule, grid, noise[0], scale, source, *levels)


def _deterministic(
    schedule: NoiseSchedule,
    grid: Sequence[float],
    noise: Tensor,
    scale: float,
    source: Source | None,
    here: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
) -> Sampler:
    """x' = alpha' x0 + sigma' eps. noise: (B, C, h, w), to be scaled; here, after: alpha, sigma (n,) around a step."""
    times = _times(grid, noise.device)
    alpha, sigma, next_alpha, next_sigma = (table.to(noise.device) for table in (*here, *after))
    x = _start(noise, source, alpha[0], sigma[0], scale)
    for i in range(len(grid)):
        t = times[i].expand(len(x))
        out = (yield Eval(i, t, x.to(noise.dtype))).float()
        x0 = x0_from(schedule.prediction, x, out, alpha[i], sigma[i])
        eps = eps_from(schedule.prediction, x, out, alpha[i], sigma[i])  # of the unclipped x0, as in the reference
        x0 = _clipped(schedule, x0)
        x = next_alpha[i] * x0 + next_sigma[i] * eps
        clean = i + 1 == len(grid)
        x = _kept(x, noise, source, 1.0 if clean else alpha[i + 1], 0.0 if clean else sigma[i + 1])
        yield Update(i, t, x, x0)


def _start(
    noise: Tensor, source: Source | None, alpha: Tensor | float, sigma: Tensor | float, scale: float = 1.0
) -> Tensor:
    """Where a sampler begins, in float32: noise, or the source's picture under it."""
    if source is None or not source.noised:
        return noise.float() * scale
    return alpha * source.x0.float() + sigma * noise.float()


def _kept(x: Tensor, noise: Tensor, source: Source | None, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """x with the source's picture where it is not to be painted, under as much noise as x: always the first draw."""
    if source is None or source.mask is None:
        return x
    return source.mask * x + (1 - source.mask) * (alpha * source.x0.float() + sigma * noise.float())


def _levels(schedule: NoiseSchedule, times: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at the timesteps (n,), and once more, for what follows the last: 1 and 0."""
    return F.pad(schedule.alpha[times], (0, 1), value=1.0), F.pad(schedule.sigma[times], (0, 1), value=0.0)


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


SAMPLERS: dict[str, Callable[..., Sampler]] = {name: globals()[name] for name in KINDS}  # each the function of its name


def sampler_for(
    name: str,
    schedule: NoiseSchedule,
    grid: Sequence[float],
    noise: Sequence[Tensor],
    source: Source | None = None,
    gamma: float = GAMMA,
) -> Sampler:
    """The sampler of that name, ready to run. gamma matters to "tcd" alone."""
    return tcd(schedule, grid, noise, source, gamma) if name == "tcd" else SAMPLERS[name](schedule, grid, noise, source)


def grid_for(
    sampler: str,
    schedule: NoiseSchedule,
    steps: int,
    timesteps: Sequence[int] | None = None,
    strength: float = 1.0,
) -> Sequence[float]:
    """The timesteps of `steps` steps of a sampler, or the explicit `timesteps` once checked. Raises UsageError.

    A strength below 1 spreads all steps over that share of the schedule, the less noisy one.
    """
    _check_name(sampler)
    if sampler in schedule.lacking:
        others = [name for name in SAMPLERS if name not in schedule.lacking]
        raise UsageError(
            f"sampler {sampler!r} cannot do what the model's scheduler config says: {schedule.lacking[sampler]}",
            hint=f"samplers that do not use it: {', '.join(others)}" if others else "take the field out of the config",
            field="sampler",
        )
    if timesteps is not None:
        return explicit_grid(list(timesteps), schedule.T)
    if KINDS[sampler].consistency:
        return lcm_grid(steps, schedule.original_steps, strength, schedule.T)
    share = max(int(schedule.T * strength), 1)
    if steps > share:
        raise UsageError(
            f"steps is {steps}: allowed are 1 to {share}", hint="use fewer steps or a higher strength", field="steps"
        )
    if sampler == "euler":
        return respaced(schedule, euler_grid(steps, share, schedule.spacing, schedule.steps_offset))
    return spaced_grid(steps, share, schedule.spacing, schedule.steps_offset)


def draws_needed(sampler: str, steps: int, gamma: float = GAMMA) -> int:
    """How many draws of noise a run of `steps` steps takes."""
    _check_name(sampler)
    return steps if KINDS[sampler].stochastic and (sampler != "tcd" or gamma > 0) else 1


def generators_for(seeds: Sequence[int]) -> list[torch.Generator]:
    """A generator for each seed, so that a picture does not depend on its neighbours."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def draw(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (len(generators), *shape), float32 on the CPU: row i continues the i-th generator.

    One call for each draw, in order: a single long call would give other numbers than the reference.
    """
    return torch.cat([torch.randn((1, *shape), generator=each) for each in generators])


def draw_noise(seeds: Sequence[int], shape: tuple[int, ...], draws: int) -> list[Tensor]:
    """`draws` draws (len(seeds), *shape), one after the other."""
    generators = generators_for(seeds)
    return [draw(generators, shape) for _ in range(draws)]


def guided(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) with diffusers' scale: 1 is `cond` itself.

    cond, uncond: network outputs (B, ...); scale: a number, or (B,) with one for each picture.
    """
    if isinstance(scale, Tensor):
        scale = scale.to(cond.device).view(-1, *(1,) * (cond.ndim - 1))
    return uncond + scale * (cond - uncond)


def _check_name(sampler: str) -> None:
    if sampler not in SAMPLERS:
        raise UsageError(f"sampler is {sampler!r}: allowed are {', '.join(SAMPLERS)}", field="sampler")
