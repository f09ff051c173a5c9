"""The text that other programs read in a picture's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import calotype
from calotype.parameters import parameters
from calotype.request import Request


def values(metadata: dict[str, Any]) -> dict[str, str]:
    """The last line, as those programs take it apart."""
    return dict(part.split(": ") for part in parameters(metadata).splitlines()[-1].split(", "))


def test_what_is_unknown_is_left_out() -> None:
    assert parameters({}) == "\nVersion: calotype"
    assert parameters({"request": {"prompt": "a\0b"}}) == "ab\nVersion: calotype"


@pytest.mark.parametrize(("family", "none"), [("sd15", 1), ("sd21", 1), ("custom", 1), ("sdxl", 2), ("ssd1b", 2)])
def test_clip_skip_counts_as_there(family: str, none: int) -> None:
    for skip in (0, 1, 2):
        metadata = {"request": Request("a", clip_skip=skip).to_json(), "model": {"family": family}}
        assert values(metadata)["Clip skip"] == str(none + skip)
    assert "Clip skip" not in values({"request": Request("a").to_json(), "model": {"family": family}})


def test_every_sampler_has_its_name_there() -> None:
    assert values({"request": {"sampler": "euler"}})["Sampler"] == "Euler"


def test_the_seed_is_the_pictures_own() -> None:
    assert values({"request": {"seed": 7}, "index": 2})["Seed"] == "9"


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("/people/ann/secret, really/my: model.safetensors", "my model"),
        ("C:\\ann\\model.v2.safetensors", "model.v2"),
        ("models/folder/", "folder"),
        ("SimianLuo/LCM_Dreamshaper_v7@main", "LCM_Dreamshaper_v7"),
    ],
)
def test_a_model_is_a_name(ref: str, name: str) -> None:
    assert values({"model": {"model": ref}}) == {"Model": name, "Version": "calotype"}


@pytest.mark.parametrize("ref", [".", "..", "/"])
def test_a_place_without_a_name(ref: str) -> None:
    assert values({"model": {"model": ref}}) == {"Version": "calotype"}


def test_loras_stand_in_the_prompt() -> None:
    loras = {
        "a": {"ref": "/home-of/ann/paper.safetensors", "weight_name": None, "scale": 0.8},
        "b": {"ref": "owner/lcm-lora", "weight_name": "sub/pytorch_lora.safetensors", "scale": 1.0},
    }
    text = parameters({"request": {"prompt": "a fox", "negative_prompt": "blur"}, "model": {"loras": loras}})
    assert text == "a fox <lora:paper:0.8> <lora:pytorch_lora:1>\nNegative prompt: blur\nVersion: calotype"


def test_the_hash_is_the_described_files() -> None:
    model = {"model": "m.safetensors", "files": {"model": {"name": "m.safetensors", "sha256": "0123456789abcdef"}}}
    assert values({"model": model})["Model hash"] == "0123456789"
    model["files"]["model"]["sha256"] = None  # type: ignore[index]
    assert values({"model": model}) == {"Model": "m", "Version": "calotype"}


def test_a_picture_of_the_shipped_model(tmp_path: Path) -> None:
    result = calotype.load()("red heart", steps=1, seed=3, n=2, clip_skip=1)
    result.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a-2.png") as picture:
        assert picture.info["parameters"] == (
            "red heart\nSteps: 1, Sampler: TCD, CFG scale: 5.0, Seed: 4, Size: 128x128, Clip skip: 2, Version: calotype"
        )
