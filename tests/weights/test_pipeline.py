"""model_index.json and calotype.json: allow-lists, and the model's own defaults."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calotype.errors import CheckpointError
from calotype.families import CUSTOM, SD15, SDXL
from calotype.nn.unet import UNetConfig
from calotype.schedule import NoiseSchedule
from calotype.weights.pipeline import read_defaults, read_pipeline

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
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet is"),
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
    return dataclasses.asdict(read_defaults(folder, family, unet, schedule, 8))


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
