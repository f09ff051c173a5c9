"""model_index.json and calotype.json: allow-lists, and the model's own defaults."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calotype.errors import CalotypeWarning, CheckpointError
from calotype.families import CUSTOM, SD15, SDXL
from calotype.nn.unet import UNetConfig
from calotype.schedule import NoiseSchedule
from calotype.weights.files import read_json
from calotype.weights.inspect import inspect_model
from calotype.weights.load import load_parts
from calotype.weights.pipeline import defaults_of, read_pipeline
from checkpoints import write_unet

INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.35.0",
    "_name_or_path": "org/name",
    "requires_safety_checker": True,
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
XL = INDEX | {
    "_class_name": "StableDiffusionXLPipeline",
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}
SCHEDULE = NoiseSchedule.from_config({"_class_name": "DDIMScheduler", "clip_sample": False})
LCM_SCHEDULE = NoiseSchedule.from_config({"_class_name": "LCMScheduler"})


def write(folder: Path, content: object, name: str = "model_index.json") -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder


def test_a_real_index(tmp_path: Path) -> None:
    pipeline = read_pipeline(write(tmp_path, INDEX))
    assert pipeline.kind == "StableDiffusionPipeline"
    assert set(pipeline.classes) == {"scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    assert pipeline.text_parts == (("tokenizer", "text_encoder"),)
    assert not pipeline.zero_empty_negative


def test_sdxl_zeroes_an_empty_negative_prompt_unless_told_not_to(tmp_path: Path) -> None:
    pipeline = read_pipeline(write(tmp_path, XL))
    assert pipeline.zero_empty_negative
    assert pipeline.text_parts == (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
    assert not read_pipeline(write(tmp_path, XL | {"force_zeros_for_empty_prompt": False})).zero_empty_negative


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FluxPipeline"}, "_class_name is 'FluxPipeline'"),
        ({"_class_name": "FlaxStableDiffusionPipeline"}, "_class_name"),
        ({"_class_name": ["pipeline", "MyPipeline"]}, "_class_name"),  # diffusers would run pipeline.py
        ({"_class_name": None}, "_class_name"),
        ({"unet": ["diffusers", "FlaxUNet2DConditionModel"]}, "unet is .*Flax weights cannot be read"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "unet is"),
        ({"unet": ["my_module", "UNet2DConditionModel"]}, "unet is"),  # so would a library of that name
        ({"unet": ["os", "system"]}, "unet is"),
        ({"unet": ["diffusers"]}, "unet is"),
        ({"unet": [["diffusers"], "UNet2DConditionModel"]}, "unet is"),
        ({"unet": ["diffusers", {"a": 1}]}, "unet is"),
        ({"unet": [None, None]}, "lists no unet"),
        ({"vae": "AutoencoderKL", "tokenizer": 3}, "lists no vae and no tokenizer"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder is"),
        ({"transformer": ["diffusers", "SD3Transformer2DModel"]}, "transformer is .*known parts are"),
        ({"unet_2": ["diffusers", "UNet2DConditionModel"]}, "unet_2 is .*known parts are"),
        ({"_class_name": "StableDiffusion3Pipeline"}, "a diffusion transformer, which is another architecture"),
        ({"_class_name": "StableDiffusionUpscalePipeline"}, "its U-Net takes a small picture as well"),
        ({"_class_name": "StableDiffusionLatentUpscalePipeline"}, "its U-Net takes a small picture as well"),
        ({"_class_name": "StableDiffusionDepth2ImgPipeline"}, "its U-Net takes a map of depths as well"),
        ({"_class_name": "StableDiffusionXLInstructPix2PixPipeline"}, "takes the latents of a picture as well"),
        ({"_class_name": "StableDiffusionGLIGENPipeline"}, "takes places of things as well"),
        ({"_class_name": "StableDiffusionLDM3DPipeline"}, "makes depths as well"),
        ({"_class_name": "StableUnCLIPPipeline"}, "_class_name is 'StableUnCLIPPipeline'"),
        ({"_class_name": "StableVideoDiffusionPipeline"}, "supported here are StableDiffusion"),
        ({"_class_name": "OnnxStableDiffusionPipeline"}, "supported here are StableDiffusion"),
        ({"tokenizer_2": ["transformers", "CLIPTokenizer"]}, "one of text_encoder_2 and tokenizer_2"),
    ],
)
def test_an_index_outside_the_allow_lists_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_pipeline(write(tmp_path, INDEX | changes))
    assert len(caught.value.message.splitlines()) == 1


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_index\.json is missing"):
        read_pipeline(tmp_path)


# ---- defaults ----


def defaults(
    folder: Path, unet: UNetConfig, schedule: NoiseSchedule = SCHEDULE, family: Any = CUSTOM
) -> dict[str, Any]:
    path = folder / "calotype.json"
    raw = read_json(path) if path.is_file() else {}
    return dataclasses.asdict(defaults_of(raw, str(path), family, unet, schedule, 8))


def test_without_calotype_json_the_network_and_the_scheduler_say(tmp_path: Path) -> None:
    base = {"sampler": "ddim", "steps": 25, "guidance": 7.5, "width": 512, "height": 512, "guidance_range": None}
    lcm = {"sampler": "lcm", "steps": 4, "guidance": 8.5, "guidance_range": (3.0, 15.0)}
    assert defaults(tmp_path, UNetConfig(), family=SD15) == base
    sdxl = defaults(tmp_path, UNetConfig(sample_size=128), family=SDXL)
    assert sdxl == base | {"guidance": 5.0, "width": 1024, "height": 1024}
    assert defaults(tmp_path, UNetConfig(guidance_dim=256), LCM_SCHEDULE) == base | lcm
    assert defaults(tmp_path, UNetConfig(guidance_dim=256), SCHEDULE) == base | lcm
    plain = defaults(tmp_path, UNetConfig(), LCM_SCHEDULE)
    assert plain == base | {"sampler": "lcm", "steps": 4, "guidance": 1.0}


def test_calotype_json_wins(tmp_path: Path) -> None:
    given = {
        "sampler": "euler", "steps": 2, "guidance": 0, "width": 64, "height": 128, "guidance_range": [1, 2.5],
    }  # fmt: skip
    found = defaults(write(tmp_path, given, "calotype.json"), UNetConfig(guidance_dim=256))
    assert found == given | {"guidance_range": (1.0, 2.5)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepps": 4}, "'stepps'; known are sampler, steps"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "steps is 1001"),
        ({"steps": 4.5}, "steps"),
        ({"steps": True}, "steps"),
        ({"guidance": -1}, "guidance"),
        ({"guidance": "8"}, "guidance"),
        ({"width": 100}, "width is 100; a multiple of 8"),
        ({"height": 10**9}, "height"),
        ({"sampler": "magic"}, "sampler is 'magic'; allowed are lcm, tcd, ddim, euler"),
        ({"guidance_range": [3]}, "guidance_range"),
        ({"guidance_range": [15, 3]}, "guidance_range"),
        ({"guidance_range": [3, "x"]}, "guidance_range"),
    ],
)
def test_a_wrong_default_is_refused_by_its_field(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        defaults(write(tmp_path, changes, "calotype.json"), UNetConfig(guidance_dim=256))


def test_defaults_of_a_model_folder_are_loaded(tiny_sd15: Path, copy_of: Callable[[Path], Path]) -> None:
    from calotype.weights.load import load_parts

    folder = write(copy_of(tiny_sd15), {"steps": 7, "width": 128}, "calotype.json")
    found = load_parts(folder).defaults
    assert (found.steps, found.width, found.height) == (7, 128, 64)


# ---- what other pipelines save ----

CONTROL = {"controlnet": ["diffusers", "ControlNetModel"]}


@pytest.mark.parametrize(
    ("changes", "unused"),
    [
        ({"_class_name": "StableDiffusionControlNetPipeline", **CONTROL}, {"controlnet"}),
        ({"_class_name": "StableDiffusionXLControlNetUnionPipeline", "controlnet": [None, None]}, set()),
        ({"_class_name": "StableDiffusionAdapterPipeline", "adapter": ["diffusers", "T2IAdapter"]}, {"adapter"}),
        ({"_class_name": "AnimateDiffPipeline", "motion_adapter": ["diffusers", "MotionAdapter"]}, {"motion_adapter"}),
        (
            {"_class_name": "StableDiffusionPipelineSafe", "image_processor": ["transformers", "CLIPImageProcessor"]},
            set(),
        ),
        ({"_class_name": "StableDiffusionKDiffusionPipeline"}, set()),
        ({"_class_name": "StableDiffusionXLPAGImg2ImgPipeline"}, set()),
        ({"_class_name": ["lpw_stable_diffusion", "StableDiffusionLongPromptWeightingPipeline"]}, set()),
        ({"_class_name": "CLIPGuidedStableDiffusion", "clip_model": ["transformers", "CLIPModel"]}, {"clip_model"}),
        (
            {"_class_name": "StableDiffusionOfNextYearPipeline", "novelty": ["x.y", "Novelty"], "none": None},
            {"novelty"},
        ),
    ],
    ids=lambda value: str(value.get("_class_name")) if isinstance(value, dict) else "",
)
def test_any_pipeline_with_our_parts_is_read(changes: dict[str, Any], unused: set[str], tmp_path: Path) -> None:
    pipeline = read_pipeline(write(tmp_path, INDEX | changes))
    assert pipeline.unused.keys() == unused
    assert set(pipeline.classes) == {"scheduler", "text_encoder", "tokenizer", "unet", "vae"}


def test_what_is_not_used_is_named_with_what_loads_it(tiny_sd15: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(tiny_sd15)
    index = json.loads((folder / "model_index.json").read_text())
    control = {"_class_name": "StableDiffusionControlNetPipeline", "controlnet": ["a.b", "MultiControlNetModel"]}
    write(folder, index | control | {"novelty": ["x.y", "Novelty"]})
    with pytest.warns(CalotypeWarning) as caught:
        load_parts(folder)
    assert [str(warning.message).removeprefix(f"{folder}: ") for warning in caught] == [
        "controlnet is not used: MultiControlNetModel, load it by add_control(FOLDER, subfolder='controlnet')",
        "novelty is not used: Novelty is not supported",
    ]
    report = inspect_model(folder)
    assert report["problems"] == []
    assert [entry.partition(" ")[0] for entry in report["not_used"]] == ["controlnet", "novelty"]


@pytest.mark.parametrize(
    ("channels", "message"), [(5, "a map of depths"), (7, "a small picture"), (8, "the latents of a picture")]
)
def test_unets_with_other_inputs_are_named(
    tiny_sd15: Path, copy_of: Callable[[Path], Path], channels: int, message: str
) -> None:
    folder = copy_of(tiny_sd15)
    shutil.rmtree(folder / "unet")
    write_unet(folder / "unet", in_channels=channels)
    with pytest.raises(CheckpointError, match=f"the U-Net has {channels} channels in: beside the 4 .* takes {message}"):
        load_parts(folder)


@pytest.mark.parametrize("given", [None, "CLIPTextModel"])
def test_a_text_encoder_takes_its_class_from_the_index(
    tiny_sdxl: Path, copy_of: Callable[[Path], Path], given: str | None
) -> None:
    folder = copy_of(tiny_sdxl)
    for part in ("text_encoder", "text_encoder_2"):
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": given and [given]}))
    parts = load_parts(folder)
    assert [model.config.projection_dim is not None for model in parts.text.models] == [False, True]
    assert inspect_model(folder)["problems"] == []
    assert "text_projection.weight" in parts.text.models[1].state_dict()
