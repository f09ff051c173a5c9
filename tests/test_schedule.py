"""The noise schedule, its conversions, the grids, and what scheduler configs may say."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

from calotype.errors import CheckpointError, UsageError
from calotype.sampling import SAMPLERS, grid_for
from calotype.schedule import (
    NoiseSchedule,
    boundary_scalings,
    euler_grid,
    explicit_grid,
    lcm_grid,
    ratios_at,
    spaced_grid,
)

# What Stable Diffusion's schedulers have.
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def schedule(kind: str = "LCMScheduler", **fields: object) -> NoiseSchedule:
    return NoiseSchedule.from_config({"_class_name": kind, **LATENT, **fields})


# ---- grids ----


@pytest.mark.parametrize(
    ("steps", "grid"),
    [
        (1, [999]),
        (2, [999, 499]),
        (3, [999, 679, 339]),
        (4, [999, 759, 499, 259]),
        (6, [999, 839, 679, 499, 339, 179]),
        (8, [999, 879, 759, 639, 499, 379, 259, 139]),
        (50, [20 * i - 1 for i in range(50, 0, -1)]),
    ],
)
def test_lcm_grid(steps: int, grid: list[int]) -> None:
    assert lcm_grid(steps) == grid


def test_lcm_grid_with_strength_keeps_all_steps() -> None:
    assert lcm_grid(4, strength=0.5) == [499, 379, 259, 139]


def test_lcm_grid_truncates_in_floats() -> None:
    """50 * 0.58 is 28.999999999999996."""
    assert lcm_grid(1, strength=0.58) == [28 * 20 - 1]


def test_lcm_grid_rounds_in_floats() -> None:
    """Whole-number arithmetic would give another grid of 22 steps out of 30 timesteps."""
    grid = lcm_grid(22, strength=0.6)
    in_whole_numbers = [20 * (30 - i * 30 // 22) - 1 for i in range(22)]
    assert len(grid) == 22
    assert grid != in_whole_numbers


def test_lcm_grid_of_another_training() -> None:
    assert lcm_grid(2, original_steps=100) == [999, 499]
    assert lcm_grid(2, original_steps=10, T=40) == [39, 19]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps is 0: allowed are 1 to 50"),
        ({"steps": -3}, "steps is -3: allowed are 1 to 50"),
        ({"steps": 51}, "steps is 51: allowed are 1 to 50"),
        ({"steps": 26, "strength": 0.5}, "steps is 26: allowed are 1 to 25"),
        ({"steps": 1, "strength": 0.01}, "strength is 0.01, which leaves none of the 50 timesteps"),
        ({"steps": 1, "strength": 0.0}, "strength is 0.0: allowed are numbers above 0 and up to 1"),
        ({"steps": 1, "strength": 1.5}, "strength is 1.5"),
        ({"steps": 1, "strength": float("nan")}, "strength is nan"),
        ({"steps": 1, "original_steps": 0}, "original_steps is 0: allowed are 1 to 1000"),
        ({"steps": 1, "original_steps": 2000}, "original_steps is 2000"),
    ],
)
def test_lcm_grid_refuses(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        lcm_grid(**arguments)  # type: ignore[arg-type]
    assert caught.value.message.startswith(message)


def test_spaced_grids() -> None:
    assert spaced_grid(4, spacing="trailing") == [999, 749, 499, 249]
    assert spaced_grid(7, spacing="trailing") == [999, 856, 713, 570, 428, 285, 142]
    assert spaced_grid(4, spacing="leading", offset=1) == [751, 501, 251, 1]
    assert spaced_grid(4, spacing="linspace") == [999, 666, 333, 0]
    assert spaced_grid(1, spacing="trailing") == [999]
    assert euler_grid(3, spacing="linspace") == [999.0, 499.5, 0.0]
    assert euler_grid(2, spacing="leading", offset=1) == [501.0, 1.0]


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("T", [10, 1000])
def test_spaced_grids_of_every_length_fit(spacing: str, T: int) -> None:
    """Trailing with 61 steps and others would have one timestep too many, -1, in naive float arithmetic."""
    for steps in range(1, T + 1):
        grid = spaced_grid(steps, T, spacing)  # type: ignore[arg-type]
        assert len(grid) == steps
        assert 0 <= grid[-1] <= grid[0] < T
        assert all(before > after for before, after in itertools.pairwise(grid))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_spaced_grid_refuses_steps(steps: int) -> None:
    with pytest.raises(UsageError, match=f"steps is {steps}: allowed are 1 to 1000"):
        spaced_grid(steps)


def test_spaced_grid_refuses_what_begins_past_the_schedule() -> None:
    with pytest.raises(UsageError, match="begins at timestep 1000 of 1000"):
        spaced_grid(1000, spacing="leading", offset=1)
    with pytest.raises(UsageError, match="'sideways': allowed are leading, linspace, trailing"):
        spaced_grid(4, spacing="sideways")  # type: ignore[arg-type]


def test_explicit_grid() -> None:
    assert explicit_grid([999, 500, 0]) == [999, 500, 0]
    for timesteps, message in [
        ([], "is empty"),
        ([1000], "1000: allowed are whole numbers from 0 to 999"),
        ([-1], "has -1"),
        ([1.5], "has 1.5"),
        ([True], "has True"),
        ([1, 1], "1 after 1: they must descend"),
        ([1, 2], "2 after 1"),
    ]:
        with pytest.raises(UsageError, match=message):
            explicit_grid(timesteps)  # type: ignore[arg-type]


# ---- the schedule ----


def test_noise_levels_of_stable_diffusion() -> None:
    levels = schedule()
    assert levels.T == 1000
    assert levels.alpha.dtype == levels.sigma.dtype == torch.float32
    torch.testing.assert_close(levels.alpha**2 + levels.sigma**2, torch.ones(1000))
    assert (levels.alpha.diff() < 0).all()
    assert levels.alpha[999].item() ** 2 == pytest.approx(0.00466, abs=5e-6)
    assert levels.alpha[0].item() ** 2 == pytest.approx(1 - 0.00085, abs=1e-7)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("shape", [(3, 7), (3, 4, 5, 6), (3, 4, 2, 5, 6)])
def test_conversions_find_what_was_mixed(prediction: str, shape: tuple[int, ...]) -> None:
    levels = schedule(prediction_type=prediction)
    x0, eps = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([20, 500, 999])
    alpha, sigma = levels.at(t, x0)
    assert alpha.shape == (3,) + (1,) * (len(shape) - 1)
    out = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[prediction]
    x = levels.add_noise(x0, eps, t)
    torch.testing.assert_close(x[1], levels.alpha[500] * x0[1] + levels.sigma[500] * eps[1])
    torch.testing.assert_close(levels.to_x0(x, out, t), x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(levels.to_eps(x, out, t), eps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_conversions_of_half_precision_are_in_float32(prediction: str) -> None:
    levels = schedule(prediction_type=prediction)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    t = torch.tensor([999, 19])
    assert levels.add_noise(x, x, t).dtype == torch.float32
    for convert in (levels.to_x0, levels.to_eps):
        exact = convert(x.float(), x.float(), t)
        torch.testing.assert_close(convert(x, x, t), exact, rtol=0, atol=0)


def test_boundary_scalings() -> None:
    c_skip, c_out = boundary_scalings(torch.tensor([0, 19, 999]))
    assert c_skip[0] == 1
    assert c_out[0] == 0
    assert 0 < c_skip[1] < 7e-6
    assert c_out[1] > 0.99999
    assert c_skip[2].item() == pytest.approx(0.25 / (9990**2 + 0.25), rel=1e-6)
    slower = boundary_scalings(torch.tensor([1]), 1.0)
    assert [each.item() for each in slower] == pytest.approx([0.25 / 1.25, 1 / 1.25**0.5])


def test_zero_terminal_snr() -> None:
    plain, rescaled = (schedule(prediction_type="v_prediction", rescale_betas_zero_snr=on) for on in (False, True))
    assert rescaled.alpha[-1] == 0
    assert rescaled.sigma[-1] == 1
    assert (rescaled.alpha.diff() < 0).all()
    torch.testing.assert_close(rescaled.alpha[0], plain.alpha[0])
    # Algorithm 1 of the paper is linear in alpha.
    share = (plain.alpha[500] - plain.alpha[-1]) / (plain.alpha[0] - plain.alpha[-1])
    torch.testing.assert_close(rescaled.alpha[500], share * plain.alpha[0], rtol=1e-4, atol=0)


def test_epsilon_cannot_have_zero_terminal_snr() -> None:
    with pytest.raises(CheckpointError, match="prediction_type 'epsilon' cannot start from pure noise"):
        schedule("DDIMScheduler", rescale_betas_zero_snr=True)


def test_schedules_are_varied_by_replace() -> None:
    changed = dataclasses.replace(schedule(), prediction="sample", spacing="trailing")
    assert (changed.prediction, changed.spacing, changed.T) == ("sample", "trailing", 1000)


# ---- configs ----


def test_config_fields_are_honoured() -> None:
    levels = NoiseSchedule.from_config(
        {
            "_class_name": "DDIMScheduler",
            "_diffusers_version": "0.42.1",
            "num_train_timesteps": 40,
            "beta_start": 0.01,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "prediction_type": "sample",
            "timestep_spacing": "trailing",
            "steps_offset": 1,
            "set_alpha_to_one": False,
            "clip_sample": True,
            "clip_sample_range": 2,
            "original_inference_steps": 20,
            "timestep_scaling": 5.0,
            "solver_order": 2,
            "lambda_min_clipped": float("-inf"),
        }
    )
    assert (levels.T, levels.prediction, levels.spacing) == (40, "sample", "trailing")
    assert (levels.steps_offset, levels.set_alpha_to_one, levels.clip_sample) == (1, False, 2.0)
    assert (levels.original_steps, levels.timestep_scaling, levels.kind) == (20, 5.0, "DDIMScheduler")
    assert levels.alpha[1].item() ** 2 == pytest.approx(0.99 * (1 - (0.01 + 0.01 / 39)), rel=1e-6)


def test_trained_betas_replace_the_formula() -> None:
    betas = [0.1] * 9 + [0.5]
    levels = schedule(num_train_timesteps=10, trained_betas=betas)
    assert levels.alpha[-1].item() ** 2 == pytest.approx(0.9**9 * 0.5, rel=1e-5)


def test_configs_survive_json() -> None:
    config = json.loads(json.dumps({"_class_name": "PNDMScheduler", **LATENT, "trained_betas": None}))
    assert not NoiseSchedule.from_config(config).set_alpha_to_one


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [
        ("LCMScheduler", "lcm"),
        ("EulerDiscreteScheduler", "euler"),
        ("EulerAncestralDiscreteScheduler", "euler"),
        ("DDIMScheduler", "ddim"),
        ("PNDMScheduler", "ddim"),
        ("DPMSolverMultistepScheduler", "ddim"),
    ],
)
def test_default_sampler(kind: str, sampler: str) -> None:
    assert schedule(kind).default_sampler == sampler


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_train_timesteps", 9),
        ("num_train_timesteps", 10**12),
        ("num_train_timesteps", 1000.0),
        ("num_train_timesteps", True),
        ("num_train_timesteps", None),
        ("beta_start", NAN),
        ("beta_start", 0),
        ("beta_start", -0.1),
        ("beta_start", "0.1"),
        ("beta_end", INF),
        ("beta_end", 1.0),
        ("beta_end", 10**400),
        ("beta_end", True),
        ("beta_schedule", "sigmoid"),
        ("beta_schedule", ["linear"]),
        ("trained_betas", [0.1] * 999),
        ("trained_betas", [0.1] * 999 + [NAN]),
        ("trained_betas", [0.0] * 1000),
        ("trained_betas", [True] * 1000),
        ("trained_betas", "0.1"),
        ("prediction_type", "flow_prediction"),
        ("prediction_type", None),
        ("timestep_spacing", "karras"),
        ("steps_offset", -1),
        ("steps_offset", 1000),
        ("steps_offset", 0.5),
        ("original_inference_steps", 0),
        ("original_inference_steps", 1001),
        ("timestep_scaling", NAN),
        ("timestep_scaling", 0),
        ("set_alpha_to_one", 1),
        ("clip_sample", "yes"),
        ("clip_sample_range", NAN),
        ("rescale_betas_zero_snr", "false"),
    ],
)
def test_bad_fields_are_named(name: str, value: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        schedule("DDIMScheduler", **{name: value})
    assert caught.value.message.startswith(f"scheduler config: {name} ")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("name", "value", "samplers"),
    [
        ("thresholding", True, ["lcm", "tcd", "ddim"]),
        ("thresholding", "yes", ["lcm", "tcd", "ddim"]),
        ("use_karras_sigmas", True, []),
        ("use_karras_sigmas", "yes", ["euler"]),
        ("use_exponential_sigmas", True, []),
        ("use_beta_sigmas", True, ["euler"]),
        ("use_lu_lambdas", True, []),
        ("use_flow_sigmas", True, []),
        ("interpolation_type", "log_linear", ["euler"]),
        ("timestep_type", "continuous", ["euler"]),
        ("final_sigmas_type", "sigma_min", []),
        ("final_sigmas_type", "denoise", ["euler"]),
        ("final_sigmas_type", None, []),
        ("sigma_max", 80.0, ["euler"]),
        ("variance_type", "learned_range", []),
        ("euler_at_final", True, []),
    ],
)
@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "LCMScheduler"])
def test_what_a_sampler_does_not_use_cannot_stop_it(kind: str, name: str, value: object, samplers: list[str]) -> None:
    levels = schedule(kind, **{name: value})
    for sampler in SAMPLERS:
        if sampler not in samplers:
            assert len(grid_for(sampler, levels, 4)) == 4
            continue
        with pytest.raises(UsageError, match=f"^sampler '{sampler}' cannot .*: {name} is ") as caught:
            grid_for(sampler, levels, 4)
        others = [each for each in SAMPLERS if each not in samplers]
        assert caught.value.hint == f"samplers that do not use it: {', '.join(others)}"


def test_two_spacings_at_once_are_refused_by_euler_alone() -> None:
    levels = schedule(use_karras_sigmas=True, use_exponential_sigmas=True)
    assert grid_for("lcm", levels, 4) == [999, 759, 499, 259]
    with pytest.raises(UsageError, match="both true"):
        grid_for("euler", levels, 4)


def test_karras_spacing_is_even_in_the_seventh_root() -> None:
    levels = schedule("EulerDiscreteScheduler", use_karras_sigmas=True)
    grid = grid_for("euler", levels, 9)
    assert (grid[0], grid[-1]) == (999.0, 0.0)
    roots = torch.tensor(ratios_at(levels, grid)) ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(8), rtol=1e-4, atol=0)
    plain = schedule("EulerDiscreteScheduler")
    assert grid_for("euler", levels, 9, timesteps=[999, 5]) == grid_for("euler", plain, 9, timesteps=[999, 5])


def test_betas_that_leave_no_signal() -> None:
    with pytest.raises(CheckpointError, match="leave no signal before the last of 1000 timesteps"):
        schedule(beta_start=0.9, beta_end=0.99)


@pytest.mark.parametrize("config", [{}, {"_class_name": None}, {"_class_name": ["LCMScheduler"]}, [], None])
def test_configs_without_a_known_class(config: object) -> None:
    with pytest.raises(CheckpointError, match="scheduler config"):
        NoiseSchedule.from_config(config)  # type: ignore[arg-type]


def test_unknown_classes_are_answered_with_the_known() -> None:
    with pytest.raises(
        CheckpointError, match=r"_class_name is 'MyScheduler'; known are LCMScheduler, .*UniPC"
    ) as caught:
        schedule("MyScheduler")
    assert caught.value.hint is None
    with pytest.raises(CheckpointError) as caught:
        schedule("FlowMatchEulerDiscreteScheduler")
    assert caught.value.hint == "flow-matching models are another family, which calotype does not run"
