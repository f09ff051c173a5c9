"""Folders that diffusers' pipelines save, of whatever class: the base model of each loads, its adapters one by one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    MotionAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
)
from torch import Tensor

import calotype
from calotype.errors import CalotypeWarning, CheckpointError
from calotype.weights.inspect import inspect_model
from calotype.weights.load import load_parts
from checkpoints import CONTROLNET, randomise

MOTION: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "motion_layers_per_block": 1,
    "motion_norm_num_groups": 8,
    "motion_num_attention_heads": 4,
    "motion_max_seq_length": 8,
}


def saved(model: Path, folder: Path, pipeline: Any, **parts: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own
        pipeline.from_pretrained(model, **parts, safety_checker=None).save_pretrained(folder)
    return folder


def drawn(network: Any) -> Any:
    randomise(network)
    return network


def equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_controlnets_beside_a_model(tiny_sd15: Path, tmp_path: Path) -> None:
    networks = [drawn(ControlNetModel(**CONTROLNET)) for _ in range(2)]
    folder = saved(tiny_sd15, tmp_path / "m", StableDiffusionControlNetPipeline, controlnet=networks)
    with pytest.warns(CalotypeWarning, match="controlnet is not used: MultiControlNetModel, load it by add_control"):
        engine = calotype.load(folder, device="cpu")
    assert equal(engine.parts.unet.state_dict(), load_parts(tiny_sd15).unet.state_dict())
    for name, network in zip(("controlnet", "controlnet_1"), networks, strict=True):
        engine.add_control(folder, name, subfolder=name)
        assert equal(engine.parts.controls[name].state_dict(), network.state_dict())


def test_a_t2i_adapter_beside_a_model(tiny_sd15: Path, tmp_path: Path) -> None:
    adapter = drawn(diffusers.T2IAdapter(channels=[32, 64]))
    folder = saved(tiny_sd15, tmp_path / "m", StableDiffusionAdapterPipeline, adapter=adapter)
    with pytest.warns(CalotypeWarning, match="adapter is not used: T2IAdapter"):
        load_parts(folder)


def test_motion_modules_within_a_unet(tiny_sd15: Path, tmp_path: Path) -> None:
    """AnimateDiff's pipelines save a UNetMotionModel, and the adapter once more."""
    folder = saved(tiny_sd15, tmp_path / "m", AnimateDiffPipeline, motion_adapter=drawn(MotionAdapter(**MOTION)))
    assert json.loads((folder / "unet/config.json").read_text())["_class_name"] == "UNetMotionModel"
    with pytest.warns(CalotypeWarning, match=r"motion_adapter is not used: MotionAdapter, load it by set_motion"):
        engine = calotype.load(folder, device="cpu")
    base = load_parts(tiny_sd15)
    assert equal(engine.parts.unet.state_dict(), base.unet.state_dict())
    assert engine.parts.unet.config == base.unet.config
    assert equal(dict(engine.parts.stored["unet"]()), base.unet.state_dict())
    assert inspect_model(folder)["problems"] == []
    engine.set_motion(folder)
    assert len(engine("a fox", frames=2, steps=1).frames) == 2


def test_a_motion_unet_of_another_make(tiny_sd15: Path, tmp_path: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(tiny_sd15)
    path = folder / "unet/config.json"
    raw = json.loads(path.read_text()) | {"_class_name": "UNetMotionModel", "mid_block_layers": 2}
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="mid_block_layers is 2"):
        load_parts(folder)
