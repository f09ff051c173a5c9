"""How much noise there is at each timestep, and at which timesteps to look.

A noisy latent is x = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1; timestep 0 is almost clean, T-1 almost
pure noise. A scheduler config (diffusers' `scheduler_config.json`) becomes one frozen NoiseSchedule: every field that
changes the pictures is honoured or refused. The grids choose the few timesteps of a short run.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calotype.errors import CheckpointError, UsageError
from calotype.rules import Choice, Flag, Number, Rule, Whole, shown

T = TypeVar("T")
Floats = npt.NDArray[np.floating[Any]]
Prediction = Literal["epsilon", "v_prediction", "sample"]
Spacing = Literal["leading", "linspace", "trailing"]
NoiseSpacing = Literal["karras", "exponential"]

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SIGMA_DATA = 0.5  # the consistency models' standard deviation of the data


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise levels of a model and what its network predicts.

    `from_config` makes one, `dataclasses.replace` varies it. alpha and sigma are float32 (T,), the signal and the noise
    at each training timestep; with zero terminal SNR alpha[T-1] is exactly 0.
    """

    alpha: Tensor = field(repr=False)
    sigma: Tensor = field(repr=False)
    prediction: Prediction = "epsilon"
    kind: str = "LCMScheduler"  # the scheduler class in the model's config
    original_steps: int = 50  # LCM: length of the grid that the model was distilled on
    timestep_scaling: float = 10.0  # LCM: of the boundary scalings
    spacing: Spacing = "leading"
    steps_offset: int = 0  # added to a "leading" grid
    set_alpha_to_one: bool = True  # DDIM's last step goes to a clean latent; otherwise to timestep 0
    clip_sample: float | None = None  # LCM and DDIM clip x0 to +- this
    noise_spacing: NoiseSpacing | None = None  # Euler's levels between its grid's ends; None: those of the timesteps
    to_least_noise: bool = False  # Euler's last step goes to the noise of timestep 0 instead of none
    lacking: Mapping[str, str] = field(default_factory=dict)  # sampler -> what the config asks of it, and it cannot do

    @property
    def T(self) -> int:
        return len(self.alpha)

    @property
    def default_sampler(self) -> str:
        return _KINDS[self.kind].sampler

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its tables on `device`."""
        return dataclasses.replace(self, alpha=self.alpha.to(device), sigma=self.sigma.to(device))

    def at(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at the timesteps t (B,) int64, on x's device, shaped (B, 1, ..., 1) to multiply x."""
        t = t.to(x.device)
        shape = (-1,) + (1,) * (x.ndim - 1)
        return self.alpha.to(x.device)[t].view(shape), self.sigma.to(x.device)[t].view(shape)

    def to_x0(self, x: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """The clean latents that a network output implies. x, out: (B, ...); t: (B,) int64. At least float32."""
        return x0_from(self.prediction, x, out, *self.at(t, x))

    def to_eps(self, x: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """The noise that a network output implies. x, out: (B, ...); t: (B,) int64. At least float32."""
        return eps_from(self.prediction, x, out, *self.at(t, x))

    def to_output(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The network output that would imply the clean latents x0. x, x0: (B, ...); t: (B,) int64."""
        alpha, sigma = self.at(t, x)
        eps = (x - alpha * x0) / sigma
        if self.prediction == "epsilon":
            return eps
        return x0 if self.prediction == "sample" else alpha * eps - sigma * x0

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """alpha x0 + sigma noise at the timesteps t (B,) int64. At least float32."""
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * noise

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> NoiseSchedule:
        """Reads a scheduler config; fields that it lacks take diffusers' defaults for its class.

        A field counts for the samplers that use it, whatever class it was written for, as where diffusers makes one
        scheduler from another's config. Raises CheckpointError, naming the field, for values out of range.
        """
        kind = _kind(config)
        defaults = _KINDS[kind]
        T = _read(config, "num_train_timesteps", 1000, Whole(10, 100_000))
        prediction = cast(Prediction, _read(config, "prediction_type", "epsilon", Choice(PREDICTIONS)))
        alpha_bar = torch.cumprod(1.0 - _betas(config, defaults, T), dim=0)
        if not (alpha_bar[:-1] > 0).all() or not (alpha_bar >= 0).all():
            raise CheckpointError(f"scheduler config: these betas leave no signal before the last of {T} timesteps")
        if prediction == "epsilon" and alpha_bar[-1] == 0:
            raise CheckpointError(
                "scheduler config: prediction_type 'epsilon' cannot start from pure noise (zero terminal SNR)",
                hint="such models predict 'v_prediction' or 'sample', or have rescale_betas_zero_snr false",
            )
        clip = _read(config, "clip_sample", defaults.clip_sample, Flag())
        clip_range = _read(config, "clip_sample_range", 1.0, Number(1e-3, 1e6))
        return NoiseSchedule(
            alpha=alpha_bar.sqrt(),
            sigma=(1.0 - alpha_bar).sqrt(),
            prediction=prediction,
            kind=kind,
            original_steps=_read(config, "original_inference_steps", min(50, T), Whole(1, T)),
            timestep_scaling=_read(config, "timestep_scaling", 10.0, Number(1e-3, 1e6)),
            spacing=cast(Spacing, _read(config, "timestep_spacing", defaults.spacing, Choice(SPACINGS))),
            steps_offset=_read(config, "steps_offset", 0, Whole(0, T - 1)),
            set_alpha_to_one=_read(config, "set_alpha_to_one", defaults.set_alpha_to_one, Flag()),
            clip_sample=clip_range if clip else None,
            noise_spacing=_noise_spacing(config),
            to_least_noise=config.get("final_sigmas_type") == "sigma_min",
            lacking=_lacking(config),
        )


# ---- conversions between what networks predict ----


def x0_from(prediction: Prediction, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents, given a network output; v = alpha eps - sigma x0 (Salimans & Ho, arXiv 2202.00512, App. D)."""
    if prediction == "epsilon":
        return (x - sigma * out) / alpha
    if prediction == "v_prediction":
        return alpha * x - sigma * out
    return out.to(torch.promote_types(out.dtype, alpha.dtype))


def eps_from(prediction: Prediction, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise, given a network output."""
    if prediction == "epsilon":
        return out.to(torch.promote_types(out.dtype, alpha.dtype))
    if prediction == "v_prediction":
        return alpha * out + sigma * x
    return (x - alpha * out) / sigma


def boundary_scalings(t: Tensor, scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """c_skip and c_out, shaped like t: a consistency function is c_skip x + c_out x0, which is x itself at t = 0.

    Song et al. 2023, arXiv 2303.01469, App. C, on timesteps instead of noise levels. c_out lacks that paper's factor
    sigma_data, as in the released latent consistency models.
    """
    scaled = t.float() * scaling
    total = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / total.sqrt()


# ---- grids: which timesteps a short run visits, descending ----


def lcm_grid(steps: int, original_steps: int = 50, strength: float = 1.0, T: int = 1000) -> list[int]:
    """The timesteps of a latent consistency model, evenly picked from the grid that it was distilled on.

    strength in (0, 1] keeps that share of the grid, the less noisy one. Raises UsageError where `steps` does not fit.
    """
    if not 0 < strength <= 1:
        raise UsageError(f"strength is {strength}: allowed are numbers above 0 and up to 1", field="strength")
    if not 1 <= original_steps <= T:
        raise UsageError(f"original_steps is {original_steps}: allowed are 1 to {T}")
    usable = int(original_steps * strength)  # truncated in floats, as the reference does: int(50 * 0.58) is 28
    if usable < 1:
        raise UsageError(
            f"strength is {strength}, which leaves none of the {original_steps} timesteps",
            hint=f"use a strength of at least {1 / original_steps:g}",
            field="strength",
        )
    if not 1 <= steps <= usable:
        hint = "use fewer steps" if strength == 1 else "use fewer steps or a higher strength"
        raise UsageError(f"steps is {steps}: allowed are 1 to {usable}", hint=hint, field="steps")
    distilled = np.arange(1, usable + 1) * (T // original_steps) - 1
    # The float arithmetic matters: i * usable // steps gives another grid at usable 30 and steps 22.
    picked = np.floor(np.linspace(0, usable, steps, endpoint=False)).astype(np.int64)
    return [int(t) for t in distilled[::-1][picked]]


def spaced_grid(steps: int, T: int = 1000, spacing: Spacing = "trailing", offset: int = 0) -> list[int]:
    """The timesteps of a sampler that works on the whole schedule (Lin et al. 2023, arXiv 2305.08891, Table 2).

    `offset` is added to a "leading" grid only. Raises UsageError where `steps` does not fit.
    """
    if not 1 <= steps <= T:
        raise UsageError(f"steps is {steps}: allowed are 1 to {T}", field="steps")
    if spacing == "linspace":
        grid = np.linspace(0, T - 1, steps).round()[::-1]
    elif spacing == "leading":
        grid = np.arange(steps, dtype=np.float64)[::-1] * (T // steps) + offset
    elif spacing == "trailing":
        # Cut to length: where T / steps is rounded down, the float range has one value too many, near 0.
        grid = np.round(np.arange(T, 0, -T / steps))[:steps] - 1
    else:
        raise UsageError(f"timestep spacing is {spacing!r}: allowed are {', '.join(SPACINGS)}")
    if grid[0] >= T:
        raise UsageError(
            f"steps is {steps}, which with steps_offset {offset} begins at timestep {int(grid[0])} of {T}",
            hint="use fewer steps or another timestep spacing",
            field="steps",
        )
    return [int(t) for t in grid]


def euler_grid(steps: int, T: int = 1000, spacing: Spacing = "trailing", offset: int = 0) -> list[float]:
    """Like `spaced_grid`, but "linspace" is not rounded: Euler's sampler interpolates between timesteps."""
    grid = spaced_grid(steps, T, spacing, offset)
    if spacing != "linspace":
        return [float(t) for t in grid]
    return [float(t) for t in np.linspace(0, T - 1, steps, dtype=np.float32)[::-1]]


def noise_ratios(schedule: NoiseSchedule) -> Floats:
    """sigma / alpha at each training timestep, (T,): the noise level in Euler's own coordinates."""
    signal = schedule.alpha.cpu()
    # With zero terminal SNR it is infinite: the reference puts alpha^2 = 2^-24 there, and so do we.
    ratios: Floats = (schedule.sigma.cpu() / torch.where(signal == 0, 2.0**-12, signal)).numpy()
    return ratios


def respaced(schedule: NoiseSchedule, grid: Sequence[float]) -> list[float]:
    """Timesteps between the ends of Euler's `grid`, at noise levels that are spaced as the schedule says: evenly by
    their 7th roots (Karras et al. 2022, arXiv 2206.00364, Equation 5 with rho = 7), or by their logarithms.

    Between training timesteps the logarithm of the noise is interpolated; `ratios_at` is the way back.
    """
    if schedule.noise_spacing is None:
        return list(grid)
    ratios = noise_ratios(schedule)
    most, least = np.interp([grid[0], grid[-1]], np.arange(schedule.T), ratios)
    ramp = np.linspace(0, 1, len(grid))
    if schedule.noise_spacing == "karras":
        levels = (most ** (1 / 7) + ramp * (least ** (1 / 7) - most ** (1 / 7))) ** 7
    else:
        levels = np.exp(np.log(most) + ramp * (np.log(least) - np.log(most)))
    return [float(t) for t in np.interp(np.log(levels), np.log(ratios), np.arange(schedule.T))]


def ratios_at(schedule: NoiseSchedule, grid: Sequence[float]) -> Floats:
    """The noise level sigma / alpha at timesteps, which may lie between the training's."""
    ratios, every = noise_ratios(schedule), np.arange(schedule.T)
    if schedule.noise_spacing is None:
        return np.interp(grid, every, ratios)
    return np.exp(np.interp(grid, every, np.log(ratios)))


def explicit_grid(timesteps: list[int], T: int = 1000) -> list[int]:
    """A grid that the user gives: whole numbers from T-1 to 0, descending. Raises UsageError otherwise."""
    if not timesteps:
        raise UsageError("timesteps is empty: at least one is needed", field="timesteps")
    for t in timesteps:
        if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < T:
            raise UsageError(f"timesteps has {t!r}: allowed are whole numbers from 0 to {T - 1}", field="timesteps")
    for before, after in itertools.pairwise(timesteps):
        if after >= before:
            raise UsageError(f"timesteps has {after} after {before}: they must descend", field="timesteps")
    return list(timesteps)


# ---- reading a scheduler config ----


@dataclass(frozen=True)
class _Kind:
    """diffusers' defaults of one scheduler class, and the sampler of ours that stands for it."""

    sampler: str = "ddim"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    spacing: str = "linspace"
    clip_sample: bool = False
    set_alpha_to_one: bool = True


_KINDS: dict[str, _Kind] = {
    "LCMScheduler": _Kind("lcm", 0.00085, 0.012, "scaled_linear", "leading"),
    "TCDScheduler": _Kind("tcd", 0.00085, 0.012, "scaled_linear", "leading"),
    "DDIMScheduler": _Kind(spacing="leading", clip_sample=True),
    "DDIMParallelScheduler": _Kind(spacing="leading", clip_sample=True),
    "DDPMScheduler": _Kind(spacing="leading", clip_sample=True),
    "DDPMParallelScheduler": _Kind(spacing="leading", clip_sample=True),
    "PNDMScheduler": _Kind(spacing="leading", set_alpha_to_one=False),
    "EulerDiscreteScheduler": _Kind("euler"),
    "EulerAncestralDiscreteScheduler": _Kind("euler"),
    "LMSDiscreteScheduler": _Kind(),
    "DPMSolverMultistepScheduler": _Kind(),
    "DPMSolverSinglestepScheduler": _Kind(),
    "UniPCMultistepScheduler": _Kind(),
    "DEISMultistepScheduler": _Kind(),
    "SASolverScheduler": _Kind(),
    "HeunDiscreteScheduler": _Kind(beta_start=0.00085, beta_end=0.012),
    "KDPM2DiscreteScheduler": _Kind(beta_start=0.00085, beta_end=0.012),
    "KDPM2AncestralDiscreteScheduler": _Kind(beta_start=0.00085, beta_end=0.012),
    "DPMSolverSDEScheduler": _Kind(beta_start=0.00085, beta_end=0.012),
}

# Fields that only some samplers use: (the values that those can do, beside null; the samplers). One that cannot do what
# it is told refuses when it is asked for: what a sampler does not use cannot stop it.
_USED_BY_SOME: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "thresholding": ((False,), ("lcm", "tcd", "ddim")),
    "use_karras_sigmas": ((False, True), ("euler",)),
    "use_exponential_sigmas": ((False, True), ("euler",)),
    "use_beta_sigmas": ((False,), ("euler",)),
    "final_sigmas_type": (("zero", "sigma_min"), ("euler",)),
    "interpolation_type": (("linear",), ("euler",)),
    "timestep_type": (("discrete",), ("euler",)),
    "sigma_min": ((), ("euler",)),
    "sigma_max": ((), ("euler",)),
}


def _kind(config: Mapping[str, Any]) -> str:
    if not isinstance(config, Mapping):
        raise CheckpointError(f"scheduler config: is {shown(config)}, not a JSON object")
    name = config.get("_class_name")
    if isinstance(name, str) and name in _KINDS:
        return name
    flow = isinstance(name, str) and "flow" in name.lower()
    known = f"known are {', '.join(_KINDS)}"
    raise CheckpointError(
        f"scheduler config: _class_name is {shown(name)}; {known}",
        hint="flow-matching models are another family, which calotype does not run" if flow else None,
    )


def _lacking(config: Mapping[str, Any]) -> dict[str, str]:
    """Sampler -> the field that it cannot honour, and its value."""
    found: dict[str, str] = {}
    for name, (values, samplers) in _USED_BY_SOME.items():
        value = config.get(name)
        if value is not None and value not in values:
            found |= dict.fromkeys(samplers, f"{name} is {shown(value)}")
    if config.get("use_karras_sigmas") is True and config.get("use_exponential_sigmas") is True:
        found["euler"] = "use_karras_sigmas and use_exponential_sigmas are both true"
    return found


def _noise_spacing(config: Mapping[str, Any]) -> NoiseSpacing | None:
    if config.get("use_karras_sigmas") is True:
        return "karras"
    return "exponential" if config.get("use_exponential_sigmas") is True else None


def _betas(config: Mapping[str, Any], defaults: _Kind, T: int) -> Tensor:
    """The variance that each timestep adds, float32 (T,), in the reference's order of operations, for parity."""
    start = _read(config, "beta_start", defaults.beta_start, Number(1e-8, 0.999))
    end = _read(config, "beta_end", defaults.beta_end, Number(1e-8, 0.999))
    schedule = _read(config, "beta_schedule", defaults.beta_schedule, Choice(BETA_SCHEDULES))
    if config.get("trained_betas") is not None:
        betas = _trained_betas(config["trained_betas"], T)
    elif schedule == "linear":
        betas = torch.linspace(start, end, T, dtype=torch.float32)
    elif schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, T, dtype=torch.float32) ** 2
    else:
        betas = _cosine_betas(T)
    return _zero_terminal_snr(betas) if _read(config, "rescale_betas_zero_snr", False, Flag()) else betas


def _trained_betas(values: object, T: int) -> Tensor:
    if not isinstance(values, list | tuple) or len(values) != T:
        count = f"{len(values)} values" if isinstance(values, list | tuple) else shown(values)
        raise CheckpointError(f"scheduler config: trained_betas has {count}: num_train_timesteps says {T}")
    for value in values:
        if not Number(0, 1).plain(value):  # nor may it be 0
            message = f"scheduler config: trained_betas has {shown(value)}"
            raise CheckpointError(f"{message}: must be numbers above 0 and up to 1")
    return torch.tensor(values, dtype=torch.float32)


def _cosine_betas(T: int, most: float = 0.999) -> Tensor:
    """Nichol & Dhariwal 2021, arXiv 2102.09672, Eq. 17."""

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), most) for i in range(T)]
    return torch.tensor(betas, dtype=torch.float32)


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """Lin et al. 2023, arXiv 2305.08891, Algorithm 1: shift and scale sqrt(alpha_bar) so that the last one is 0."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    alpha_bar = root**2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def _read(config: Mapping[str, Any], name: str, default: T, rule: Rule[T]) -> T:
    """A field that may be absent, and must not be null."""
    try:
        return rule(name, config.get(name, default))
    except UsageError as error:
        raise CheckpointError(f"scheduler config: {error.message}", error.hint) from None
