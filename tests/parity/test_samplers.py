"""Schedules, grids and samplers against diffusers' schedulers, step by step, with a network that needs no weights."""

from __future__ import annotations

import inspect
import json
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from calotype.sampling import SAMPLERS, Update, draw_noise, draws_needed, grid_for
from calotype.schedule import _KINDS, NoiseSchedule, lcm_grid, spaced_grid

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (4, 8, 8)
SEEDS = [11, 12]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["trailing", "leading", "linspace"]

# Some of diffusers' schedulers hand tensors to numpy in a way that numpy 2 dislikes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]
# diffusers has these two only where scipy and torchsde are installed, which nothing else of ours needs.
COMPARABLE = sorted(set(_KINDS) - {"LMSDiscreteScheduler", "DPMSolverSDEScheduler"})


def network(x: Tensor, t: Tensor) -> Tensor:
    """Between a noise and a data prediction, smooth, and different at every timestep."""
    t = t.reshape(-1, 1, 1, 1) / 1000
    return t * x + (1 - t) * torch.tanh(0.5 * x) + 0.2 * torch.cos(7 * t)


def ours(name: str, config: dict[str, object], steps: int, timesteps: list[int] | None = None) -> list[Update]:
    levels = NoiseSchedule.from_config(config)
    noise = draw_noise(SEEDS, SHAPE, draws_needed(name, steps))
    sampler, made = SAMPLERS[name](levels, grid_for(name, levels, steps, timesteps), noise), []
    for ev in sampler:
        made.append(sampler.send(network(ev.x, ev.t)))
    return made


def reference(scheduler: Any, steps: int, timesteps: list[int] | None = None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(t, x after the step in the convention of the scheduler, x0) as a diffusers pipeline computes them."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    scheduler.set_timesteps(**({"num_inference_steps": steps} if timesteps is None else {"timesteps": timesteps}))
    x = randn_tensor((len(SEEDS), *SHAPE), generator=generators, dtype=torch.float32) * scheduler.init_noise_sigma
    made = []
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(x, t), t)
        arguments = {} if isinstance(scheduler, EulerDiscreteScheduler) else {"generator": generators}
        step = scheduler.step(out, t, x, **arguments)
        x = step.prev_sample
        made.append((t, x, step.denoised if isinstance(scheduler, LCMScheduler) else step.pred_original_sample))
    return made


def worst(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance."""
    return ((a - b).norm() / b.norm()).item()


def compare(name: str, scheduler: Any, steps: int, bound: float, timesteps: list[int] | None = None) -> None:
    """Every x and x0 on the way."""
    made = ours(name, {"_class_name": type(scheduler).__name__, **scheduler.config}, steps, timesteps)
    expected = reference(scheduler, steps, timesteps)
    assert len(made) == len(expected) == steps
    for i, (step, (t, x, x0)) in enumerate(zip(made, expected, strict=True)):
        if name == "euler" and i + 1 < steps:  # our x is what the network sees next, its x that times sqrt(s^2 + 1)
            x = x / (scheduler.sigmas[i + 1] ** 2 + 1) ** 0.5
        assert step.t[0].item() == pytest.approx(t.item(), rel=1e-7 if t == t.round() else 1e-6)
        assert worst(step.x0, x0) < bound, (i, worst(step.x0, x0))
        assert worst(step.x, x) < bound, (i, worst(step.x, x))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 22, 50])
def test_lcm(prediction: str, steps: int) -> None:
    compare("lcm", LCMScheduler(prediction_type=prediction), steps, 1e-6)


def test_lcm_with_clipping_zero_snr_and_another_scaling() -> None:
    scheduler = LCMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        clip_sample=True,
        clip_sample_range=0.8,
        timestep_scaling=0.01,
        original_inference_steps=100,
    )
    compare("lcm", scheduler, 6, 1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 8, 30, 50])
def test_ddim(prediction: str, spacing: str, to_one: bool, steps: int) -> None:
    scheduler = DDIMScheduler(
        **LATENT,
        prediction_type=prediction,
        timestep_spacing=spacing,
        set_alpha_to_one=to_one,
        steps_offset=1,
        clip_sample=False,
    )
    compare("ddim", scheduler, steps, 2e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_clips_with_the_unclipped_noise(spacing: str) -> None:
    compare("ddim", DDIMScheduler(**LATENT, timestep_spacing=spacing, clip_sample_range=0.7), 5, 2e-6)


@pytest.mark.parametrize("fields", [
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"final_sigmas_type": "sigma_min"},
    {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
], ids=lambda fields: "+".join(fields))  # fmt: skip
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 5, 25])
def test_euler_with_levels_of_its_own(fields: dict[str, Any], prediction: str, spacing: str, steps: int) -> None:
    scheduler = EulerDiscreteScheduler(
        **LATENT, prediction_type=prediction, timestep_spacing=spacing, steps_offset=1, **fields
    )
    compare("euler", scheduler, steps, 3e-6)


def euler_in_float64(scheduler: EulerDiscreteScheduler, steps: int) -> Tensor:
    """Karras et al. 2022, Algorithm 1, over diffusers' noise levels and timesteps of a trailing grid."""
    scheduler.set_timesteps(steps)
    ratios = ((1 - scheduler.alphas_cumprod.double()) / scheduler.alphas_cumprod.double()).sqrt()
    levels = torch.cat([ratios[scheduler.timesteps.long()], torch.zeros(1)])
    x = draw_noise(SEEDS, SHAPE, 1)[0].double() * levels[0]
    for t, s, after in zip(scheduler.timesteps, levels, levels[1:], strict=False):
        scale = (s**2 + 1).sqrt()
        out = network((x / scale).float(), t).double()
        x0 = x / scale**2 - s / scale * out if scheduler.config.prediction_type == "v_prediction" else out
        x = x0 + after / s * (x - x0)
    return x.float()


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_zero_terminal_snr(prediction: str, steps: int) -> None:
    fields = {**LATENT, "prediction_type": prediction, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    compare("ddim", DDIMScheduler(**fields, clip_sample=False), steps, 2e-6)
    # The reference begins at 4096 times the noise and cancels it in float32, which costs it three digits ...
    compare("euler", EulerDiscreteScheduler(**fields), steps, 3e-4)
    # ... that we keep: in float64 its own formulas give our result.
    scheduler = EulerDiscreteScheduler(**fields)
    made = ours("euler", {"_class_name": "EulerDiscreteScheduler", **scheduler.config}, steps)
    assert worst(made[-1].x, euler_in_float64(scheduler, steps)) < 2e-6


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 30, 50])
def test_euler(prediction: str, spacing: str, steps: int) -> None:
    scheduler = EulerDiscreteScheduler(**LATENT, prediction_type=prediction, timestep_spacing=spacing, steps_offset=1)
    compare("euler", scheduler, steps, 2e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_explicit_timesteps(spacing: str) -> None:
    timesteps = [999, 801, 433, 100, 3]
    compare("lcm", LCMScheduler(), 5, 1e-6, timesteps)
    compare("euler", EulerDiscreteScheduler(**LATENT, timestep_spacing=spacing), 5, 2e-6, timesteps)


@pytest.mark.parametrize("original", [10, 50, 64, 100])
def test_every_lcm_grid(original: int) -> None:
    for percent in (1, 10, 29, 50, 57, 58, 60, 99, 100):
        scheduler, strength = LCMScheduler(), percent / 100
        for steps in range(1, int(original * strength) + 1):
            scheduler.set_timesteps(steps, original_inference_steps=original, strength=strength)
            assert lcm_grid(steps, original, strength) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spaced_grid(spacing: str) -> None:
    """All lengths up to 1000. diffusers' trailing grids of 61, 103 and some others end in a timestep -1 too many."""
    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=0)
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.tolist()
        if len(theirs) > steps:
            assert spacing == "trailing"
            assert theirs.pop() == -1
        assert spaced_grid(steps, spacing=spacing) == theirs  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
        {"num_train_timesteps": 10, "trained_betas": [0.05 * i for i in range(1, 11)]},
        {"num_train_timesteps": 4000, "beta_end": 0.005},
    ],
)
def test_noise_levels_bit_for_bit(fields: dict[str, object]) -> None:
    fields = {"prediction_type": "v_prediction", **fields}
    levels = NoiseSchedule.from_config({"_class_name": "DDIMScheduler", **fields})
    alpha_bar = DDIMScheduler(**fields).alphas_cumprod  # type: ignore[arg-type]
    assert torch.equal(levels.alpha, alpha_bar.sqrt())
    assert torch.equal(levels.sigma, (1 - alpha_bar).sqrt())


@pytest.mark.parametrize("kind", COMPARABLE)
def test_defaults_of_each_scheduler_class(kind: str) -> None:
    """A config that says nothing means what that class of diffusers means."""
    levels = NoiseSchedule.from_config({"_class_name": kind})
    theirs = getattr(diffusers, kind)
    signature = {name: each.default for name, each in inspect.signature(theirs.__init__).parameters.items()}
    assert signature["num_train_timesteps"] == levels.T
    assert levels.prediction == signature["prediction_type"]
    assert levels.spacing == signature.get("timestep_spacing", "linspace")
    assert levels.steps_offset == signature.get("steps_offset", 0)
    assert levels.set_alpha_to_one == signature.get("set_alpha_to_one", True)
    assert levels.clip_sample == (1.0 if signature.get("clip_sample", False) else None)
    assert levels.original_steps == signature.get("original_inference_steps", 50)
    assert levels.timestep_scaling == signature.get("timestep_scaling", 10.0)
    assert torch.equal(levels.alpha, theirs().alphas_cumprod.sqrt())


@pytest.mark.parametrize("kind", COMPARABLE)
def test_a_default_config_that_diffusers_writes_is_read(kind: str) -> None:
    """Schedulers write all their fields, other solvers' too: nothing neutral may be refused."""
    written = json.loads(getattr(diffusers, kind)().to_json_string())
    assert NoiseSchedule.from_config(written).kind == kind


def test_noise_is_drawn_as_a_pipeline_draws_it() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    for draw in draw_noise(SEEDS, SHAPE, 3):
        assert torch.equal(draw, randn_tensor((2, *SHAPE), generator=generators))
