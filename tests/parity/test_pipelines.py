"""The whole way from a prompt to a picture against diffusers' pipelines, for every topology."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import topologies
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, TCDScheduler
from reference import LATENTS, SHIPPED, Agreement, Pair, distance, share_off

import calotype

Pairs = Callable[[str], Pair]

FOX: dict[str, Any] = {"prompt": "a red fox in the snow", "seed": 3, "width": 96, "height": 96}
CONSISTENT = ["sd15-lcm", "sdxl-lcm", "ssd1b-lcm"]

# diffusers' Euler hands tensors to numpy in a way that numpy 2 dislikes.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning",
    "ignore:__array_wrap__ must accept context:DeprecationWarning",
)


def check(pair: Pair, agree: Agreement, **request: Any) -> None:
    ours, theirs = pair.ours(**request), pair.theirs(**request)
    agree.pictures(pair.name, ours, theirs)
    assert np.asarray(ours.images[0]).std() > 20, "a flat or clipped picture proves little"


def check_the_prompt_matters(pair: Pair, **request: Any) -> None:
    """Else the comparisons would prove little."""
    made = [pair.ours(**{**request, "prompt": prompt}).latents for prompt in ("a red fox", "dogs, an astronaut")]
    assert distance(made[0], made[1]) > 1e-2


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("model", [SHIPPED, *CONSISTENT])
def test_consistency_models(pairs: Pairs, agree: Agreement, model: str, steps: int) -> None:
    """The guidance is embedded; the folder's own scheduler, noise drawn between the steps."""
    check(pairs(model), agree, **FOX, steps=steps, guidance=6.0)
    check_the_prompt_matters(pairs(model), **FOX, steps=steps, guidance=6.0)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_shipped_model_by_the_other_sampler(pairs: Pairs, agree: Agreement, steps: int) -> None:
    """Its folder says strategic stochastic sampling, with gamma 0.3 in ours; LCM's own takes another pipeline there."""
    pair = pairs(SHIPPED)
    assert pair.engine.parts.defaults.sampler == pair.engine.parts.schedule.default_sampler == "tcd"
    assert isinstance(pair.pipeline.scheduler, TCDScheduler)
    parts = pair.pipeline.components | {"scheduler": LCMScheduler.from_config(pair.pipeline.scheduler.config)}
    theirs = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    request = {name: FOX[name] for name in ("prompt", "width", "height")}
    wanted = theirs(
        **request,
        num_inference_steps=steps,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(FOX["seed"]),
        output_type="latent",
    ).images
    made = pair.ours(**FOX, steps=steps, guidance=6.0, sampler="lcm").latents
    assert agree.note(SHIPPED, "lcm", distance(made, wanted)) < LATENTS


# What may differ between requests, on the models where it means something.
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "portrait": (SHIPPED, {"width": 72, "height": 104}),
    "low guidance": (SHIPPED, {"guidance": 2.0}),
    "empty prompt": (SHIPPED, {"prompt": ""}),
    "seed 0": ("sd15-lcm", {"seed": 0}),
    "odd levels": ("sd15-lcm", {"width": 88, "height": 72}),
    "guidance 1": ("sd15-lcm", {"guidance": 1.0}),  # w is 0
    "guidance 0": ("sd15-lcm", {"guidance": 0.0}),  # w is -1
    "clip skip": ("sd15-lcm", {"clip_skip": 1}),
    "odd levels, two encoders": ("sdxl-lcm", {"width": 72, "height": 88}),
    "clip skip, two encoders": ("sdxl-lcm", {"clip_skip": 1}),
    "odd levels, uneven depths": ("ssd1b-lcm", {"width": 88, "height": 104}),
}


@pytest.mark.parametrize(("model", "changes"), REQUESTS.values(), ids=REQUESTS)
@pytest.mark.filterwarnings("ignore:guidance .* is outside:calotype.CalotypeWarning")
def test_requests(pairs: Pairs, agree: Agreement, model: str, changes: dict[str, Any]) -> None:
    check(pairs(model), agree, **{**FOX, "steps": 2, "guidance": 4.0, **changes})


# ---- base models: real guidance, other schedulers ----


@dataclass(frozen=True)
class Base:
    """A base model beside some scheduler."""

    model: str
    kind: str
    guidance: float = 7.5
    config: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)


V = {"prediction_type": "v_prediction"}
TRAILING, LEADING = {"timestep_spacing": "trailing"}, {"timestep_spacing": "leading", "steps_offset": 1}
NEGATIVE = {"negative_prompt": "dog, cat"}
BASES = {
    "ddim": Base("sd21", "DDIM", config=V),
    "ddim, negative": Base("sd21", "DDIM", config=V, request=NEGATIVE),
    "ddim, negative, clip skip": Base("sd21", "DDIM", config=V, request=NEGATIVE | {"clip_skip": 1}),
    "ddim, no guidance": Base("sd21", "DDIM", 1.0, config=V),
    "ddim, trailing, zero SNR": Base("sd21", "DDIM", config=V | TRAILING | {"rescale_betas_zero_snr": True}),
    "euler, trailing": Base("sd21", "EulerDiscrete", config=V | TRAILING),
    "euler, leading, negative": Base("sd21", "EulerDiscrete", config=V | LEADING, request=NEGATIVE),
    "lcm, no guidance": Base("sd21", "LCM", 1.0, config=V),
    "lcm, guidance 2": Base("sd21", "LCM", 2.0, config=V, request={"width": 72, "height": 88}),
    "xl, euler": Base("sdxl", "EulerDiscrete", config=LEADING),  # an empty negative prompt: zeros
    "xl, euler, negative": Base("sdxl", "EulerDiscrete", config=LEADING, request=NEGATIVE | {"clip_skip": 1}),
    "xl, euler, trailing": Base("sdxl", "EulerDiscrete", config=TRAILING, request={"width": 72, "height": 88}),
    "xl, lcm": Base("sdxl", "LCM", 1.0),
}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_base_models(pairs: Pairs, agree: Agreement, tmp_path: Path, base: Base) -> None:
    folder = topologies.with_scheduler(pairs(base.model).folder, tmp_path / "model", base.kind, **base.config)
    pair = Pair(base.model, folder)
    for steps in (1, 2, 4, 8):
        check(pair, agree, **{**FOX, **base.request}, steps=steps, guidance=base.guidance)
    check_the_prompt_matters(pair, **FOX, steps=8, guidance=base.guidance)


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
def test_outdated_schedulers_are_repaired_as_in_diffusers(pairs: Pairs, agree: Agreement, tmp_path: Path) -> None:
    """Stable Diffusion's pipelines overrule steps_offset 0 and clip_sample; SDXL's do not."""
    outdated = {"timestep_spacing": "leading", "steps_offset": 0, "clip_sample": True, "clip_sample_range": 0.5}
    for model, config in (("sd21", V | outdated), ("sdxl", outdated)):
        folder = topologies.with_scheduler(pairs(model).folder, tmp_path / model, "DDIM", **config)
        check(Pair(model, folder), agree, **FOX, steps=4, guidance=5.0)


# ---- promises of our own, on whole models ----


@pytest.mark.parametrize("model", [SHIPPED, *CONSISTENT, "sd21", "sdxl"])
def test_a_picture_of_several_is_that_of_its_seed(pairs: Pairs, model: str) -> None:
    pair = pairs(model)
    request = {**FOX, "steps": 2, "guidance": 4.0}
    together = pair.ours(**request, n=3)
    for i in range(3):
        alone = pair.ours(**{**request, "seed": FOX["seed"] + i})
        assert distance(together.latents[i : i + 1], alone.latents) < 1e-5
        assert share_off([together.images[i]], alone.images) == 0
    assert distance(together.latents[:1], together.latents[1:2]) > 0.1


@pytest.mark.parametrize("model", [SHIPPED, "sdxl"])
def test_streaming_and_calling_agree(pairs: Pairs, model: str) -> None:
    pair = pairs(model)
    request = {**FOX, "steps": 3, "guidance": 4.0, "sampler": "lcm"}
    streamed, called = pair.ours(**request), pair.engine(**request)
    assert [np.asarray(image).tobytes() for image in streamed.images] == [
        np.asarray(image).tobytes() for image in called.images
    ]


@pytest.mark.filterwarnings("ignore:.* no bfloat16 products:calotype.CalotypeWarning")
@pytest.mark.parametrize("model", [SHIPPED, *CONSISTENT, "sd21", "sdxl"])
def test_bfloat16(pairs: Pairs, model: str) -> None:
    """Finite, and near to float32 for one step, before rounding has had time to choose another picture."""
    pair = pairs(model)
    engine = calotype.load(pair.folder, device="cpu", dtype="bfloat16")
    assert next(engine.parts.unet.parameters()).dtype == torch.bfloat16
    request = {**FOX, "steps": 1, "guidance": 4.0}
    step = next(engine.stream(calotype.Request(**request)))
    assert torch.isfinite(step.x0).all()
    assert distance(step.x0, pair.ours(**request).latents) < 0.1
    assert engine(**{**request, "steps": 4}).image.size == (96, 96)


def test_the_bounds_can_be_broken(pairs: Pairs) -> None:
    """A guidance that is off by one, which a confusion of w and guidance would be, is far outside."""
    pair = pairs("sd15-lcm")
    made = [pair.ours(**FOX, steps=2, guidance=guidance).latents for guidance in (4.0, 5.0)]
    assert distance(made[0], made[1]) > 10 * LATENTS
