"""Requests: what is accepted, what is refused and how it is said, and the way to JSON and back."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import random
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calotype.errors import UsageError
from calotype.request import Control, Request, adapter_name
from calotype.rules import Number, Whole

RED, WIDE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (16, 8))


def test_defaults() -> None:
    request = Request("a fox")
    assert request.prompt == "a fox"
    assert request.negative_prompt == ""
    assert request.n == 1
    assert request.emphasis is False
    rest = ("steps", "guidance", "seed", "width", "height", "sampler", "timesteps", "guidance_steps", "clip_skip")
    assert all(getattr(request, name) is None for name in rest)


def test_frozen_hashable_and_by_keyword() -> None:
    request = Request("a fox", timesteps=[999, 499])
    assert hash(request) == hash(Request(prompt="a fox", timesteps=(999, 499)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.steps = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Request("a fox", "blurry")  # type: ignore[misc]


GOOD: list[dict[str, Any]] = [
    {"prompt": ""},
    {"prompt": "x" * 20_000},
    {"prompt": "\x00\x1b\n", "negative_prompt": "مرحبا 👩‍🚀 \U0010ffff"},
    {"steps": 1},
    {"steps": 1000},
    {"guidance": 0},
    {"guidance": 1},
    {"guidance": 100.0},
    {"guidance": 7.5},
    {"seed": 0},
    {"seed": 2**64 - 1},
    {"seed": 2**64 - 64, "n": 64},
    {"n": 64},
    {"sampler": "tcd", "gamma": 0},
    {"sampler": "ddim", "spacing": "trailing"},
    {"image": RED},
    {"image": RED, "strength": 1, "mask": RED, "mask_feather": 3, "mask_crop": 0},
    {"image": (RED, RED), "frames": 2, "strength": 0.3},
    {"frames": 16, "n": 2, "fps": 60},
    {"frames": 2, "controls": (Control("canny", (RED, RED), scale=0, start=0.25, end=0.5),)},
    {"guidance_mode": "once", "resize": "pad"},
    {"loras": {}},
    {"loras": {"lcm": 1, "paper cut": -0.5}},
    {"width": 8, "height": 8192},
    {"width": 8192},
    {"width": 4096, "height": 4096},
    {"width": 8192, "height": 2048},
    {"sampler": "lcm"},
    {"sampler": "ddim"},
    {"sampler": "euler"},
    {"timesteps": (0,)},
    {"timesteps": (999, 499, 0)},
    {"timesteps": tuple(range(999, -1, -1))},
    {"timesteps": (999, 499), "steps": 2},
    {"guidance_steps": 0},
    {"guidance_steps": 1000},
    {"clip_skip": 0},
    {"clip_skip": 2},
    {"emphasis": True},
]


@pytest.mark.parametrize("values", GOOD, ids=range(len(GOOD)))
def test_accepted(values: dict[str, Any]) -> None:
    request = Request(**({"prompt": "a fox"} | values))
    for name, value in values.items():
        assert getattr(request, name) == value
    again = Request.from_json(json.loads(json.dumps(request.to_json())))
    assert again == request
    assert hash(again) == hash(request)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"steps": np.int64(4)}, {"steps": 4}),
        ({"seed": np.uint64(2**64 - 1)}, {"seed": 2**64 - 1}),
        ({"width": np.int32(64)}, {"width": 64}),
        ({"guidance": np.float32(7.5)}, {"guidance": 7.5}),
        ({"guidance": 4}, {"guidance": 4.0}),
        ({"guidance": Fraction(1, 2)}, {"guidance": 0.5}),
        ({"timesteps": [999, np.int64(5)]}, {"timesteps": (999, 5)}),
        ({"timesteps": range(9, -1, -3)}, {"timesteps": (9, 6, 3, 0)}),
        ({"prompt": np.str_("a cat")}, {"prompt": "a cat"}),
    ],
)
def test_numbers_of_other_libraries_become_plain_ones(given: dict[str, Any], kept: dict[str, Any]) -> None:
    request = Request(**({"prompt": "a fox"} | given))
    for name, value in kept.items():
        assert getattr(request, name) == value
        assert type(getattr(request, name)) is type(value)
    json.dumps(request.to_json())


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt is of type NoneType: must be text", ""),
    ({"prompt": b"a fox"}, "prompt is of type bytes: must be text", ""),
    ({"prompt": 7}, "prompt is of type int: must be text", ""),
    ({"prompt": ["a fox"]}, "prompt is of type list: must be text", ""),
    ({"prompt": "x" * 20_001}, "prompt has 20001 characters: must be at most 20000", ""),
    (
        {"prompt": "ab\ud83d"},
        "prompt has a lone surrogate at character 2: must be valid Unicode",
        "half of a character",
    ),
    ({"negative_prompt": None}, "negative_prompt is of type NoneType", ""),
    ({"negative_prompt": "\udc00"}, "negative_prompt has a lone surrogate at character 0", ""),
    ({"steps": 0}, "steps is 0: must be a whole number between 1 and 1000", ""),
    ({"steps": -4}, "steps is -4", ""),
    ({"steps": 1001}, "steps is 1001", ""),
    ({"steps": True}, "steps is True", ""),
    ({"steps": 4.0}, "steps is 4.0: must be a whole number", ""),
    ({"steps": "4"}, "steps is '4': must be a whole number", ""),
    ({"steps": math.nan}, "steps is nan", ""),
    ({"steps": [4]}, r"steps is \[4\]", ""),
    ({"steps": np.bool_(True)}, "steps is", ""),
    ({"steps": 10**5000}, "steps is a number of thousands of digits", ""),
    ({"guidance": math.nan}, "guidance is nan: must be a number between 0 and 100", "1 is no guidance"),
    ({"guidance": math.inf}, "guidance is inf", ""),
    ({"guidance": -0.5}, "guidance is -0.5", ""),
    ({"guidance": 100.5}, "guidance is 100.5", ""),
    ({"guidance": True}, "guidance is True", ""),
    ({"guidance": "8"}, "guidance is '8'", ""),
    ({"guidance": Decimal("8")}, "guidance is Decimal", ""),
    ({"guidance": 1j}, "guidance is 1j", ""),
    ({"guidance": np.array([1.0, 2.0])}, "guidance is array", ""),
    ({"guidance": 10**400}, "guidance is 1000", ""),
    ({"guidance": 10**5000}, "guidance is a number of thousands of digits", ""),
    ({"seed": -1}, "seed is -1: must be a whole number between 0 and 18446744073709551615", "leave seed out"),
    ({"seed": 2**64}, "seed is 18446744073709551616", ""),
    ({"seed": 2**64 - 1, "n": 2}, "must be a whole number between 0 and 18446744073709551614", r"seed \+ i"),
    ({"seed": False}, "seed is False", ""),
    ({"seed": 1.5}, "seed is 1.5", ""),
    ({"n": 0}, "n is 0: must be a whole number between 1 and 64", "memory"),
    ({"n": 65}, "n is 65: must be a whole number between 1 and 64", "memory"),
    ({"n": None}, "n is None", ""),
    ({"n": True}, "n is True", ""),
    ({"width": 100}, "width is 100: must be a multiple of 8 between 8 and 8192", "104 is the nearest"),
    ({"width": 99}, "width is 99", "96 is the nearest"),
    ({"width": 0}, "width is 0", "8 is the nearest"),
    ({"width": -64}, "width is -64", "8 is the nearest"),
    ({"height": 8200}, "height is 8200", "8192 is the nearest"),
    ({"height": 10**5000}, "height is a number of thousands of digits", "8192 is the nearest"),
    ({"height": 512.0}, "height is 512.0: must be a multiple of 8", ""),
    ({"height": "512"}, "height is '512'", ""),
    ({"height": True}, "height is True", ""),
    ({"width": 8192, "height": 8192}, "8192x8192: must be at most 16777216 pixels", "height of at most 2048"),
    ({"width": 4096, "height": 4104}, "4096x4104: must be at most", "height of at most 4096"),
    ({"sampler": "LCM"}, "sampler is 'LCM': must be one of lcm, tcd, ddim, euler", ""),
    ({"sampler": "eular"}, "sampler is 'eular'", "did you mean euler?"),
    ({"sampler": ""}, "sampler is ''", ""),
    ({"sampler": 3}, "sampler is 3", ""),
    ({"sampler": ["lcm"]}, r"sampler is \['lcm'\]", ""),
    ({"sampler": np.array([1, 2])}, "sampler is array", ""),
    ({"timesteps": ()}, "timesteps has 0 entries: must have 1 to 1000", ""),
    ({"timesteps": range(2000, 0, -1)}, "timesteps has 2000 entries", ""),
    ({"timesteps": (499, 999)}, "timesteps has 999 after 499: must descend", "999 comes first"),
    ({"timesteps": (999, 999)}, "timesteps has 999 after 999: must descend", ""),
    ({"timesteps": (999, -1)}, "timesteps has -1: must be whole numbers of at least 0", ""),
    ({"timesteps": (999.0,)}, "timesteps has 999.0", ""),
    ({"timesteps": (True,)}, "timesteps has True", ""),
    ({"timesteps": (999, None)}, "timesteps has None", ""),
    ({"timesteps": "999"}, "timesteps is '999': must be a list", ""),
    ({"timesteps": 999}, "timesteps is 999: must be a list", ""),
    ({"timesteps": {999, 499}}, "timesteps is {", ""),
    ({"timesteps": (10**5000, 10**5000)}, "timesteps has a number of thousands of digits after", ""),
    ({"timesteps": (999, 499), "steps": 4}, "steps is 4: must be the number of timesteps, 2", "leave steps out"),
    ({"guidance_steps": -1}, "guidance_steps is -1", ""),
    ({"guidance_steps": 0.5}, "guidance_steps is 0.5", ""),
    ({"clip_skip": -1}, "clip_skip is -1", ""),
    ({"clip_skip": True}, "clip_skip is True", ""),
    ({"emphasis": 1}, "emphasis is 1: must be true or false", ""),
    ({"emphasis": None}, "emphasis is None", ""),
    ({"emphasis": "yes"}, "emphasis is 'yes'", ""),
    ({"gamma": 1.5}, "gamma is 1.5: must be a number between 0 and 1", ""),
    ({"gamma": math.nan}, "gamma is nan", ""),
    ({"spacing": "karras"}, "spacing is 'karras': must be one of leading, linspace, trailing", ""),
    ({"guidance_mode": "one"}, "guidance_mode is 'one': must be one of full, once", "did you mean once?"),
    ({"resize": "fit"}, "resize is 'fit': must be one of stretch, crop, pad", ""),
    ({"frames": 0}, "frames is 0: must be a whole number between 1 and 512", ""),
    ({"frames": 300, "n": 2}, "frames is 300: must be a whole number between 1 and 256", ""),
    ({"fps": 0}, "fps is 0", ""),
    ({"image": "photo.png"}, "image is 'photo.png': must be a data URI", "data:image/png"),
    ({"image": "data:image/png;base64,####"}, "image is a data URI that is not base64", ""),
    ({"image": "data:image/png;base64,AAAA"}, "picture", ""),
    ({"image": 3}, "image is of type int: must be a picture", "open_image"),
    ({"image": []}, "image is a list of 0 pictures", ""),
    ({"image": [RED, RED]}, "image has 2 pictures and no frames are asked for", "frames=2"),
    ({"image": [RED, RED], "frames": 3}, "image has 2 pictures and 3 frames are asked for", "frames=2"),
    ({"image": [RED, WIDE], "frames": 2}, "image has pictures of different sizes", ""),
    ({"strength": 0.5}, "there is a strength but no image", "give the picture"),
    ({"mask": RED}, "there is a mask but no image", "give the picture"),
    ({"image": RED, "strength": 0}, "strength is 0: must be above 0", "nothing would be painted"),
    ({"image": RED, "strength": 1.1}, "strength is 1.1: must be a number between 0 and 1", ""),
    ({"image": RED, "mask": WIDE}, "the mask is 16x8 and the image 8x8: must be equal", "resize"),
    ({"image": RED, "mask": [RED]}, "mask is a list of pictures", ""),
    ({"image": RED, "mask_feather": 4}, "there is a mask_feather but no mask", "white"),
    ({"image": RED, "mask_crop": 4}, "there is a mask_crop but no mask", "white"),
    ({"image": [RED], "frames": 1, "mask": RED, "mask_crop": 4}, "mask_crop works on one picture", ""),
    ({"controls": RED}, "controls is <PIL", ""),
    ({"controls": ["canny"]}, "controls has 'canny': must be a Control", ""),
    ({"controls": [{"name": "", "image": RED}]}, "a control's name is ''", ""),
    ({"controls": [{"name": "canny", "image": None}]}, "control 'canny': image is of type NoneType", ""),
    ({"controls": [{"name": "canny", "image": RED, "scale": -1}]}, "control 'canny': scale is -1", ""),
    ({"loras": ["lcm"]}, r"loras is \['lcm'\]: must be names with their scales", "papercut"),
    ({"loras": {1: 0.5}}, "loras is {1: 0.5}: must be names", "papercut"),
    ({"loras": {"lcm": "1"}}, "loras: 'lcm' is '1': must be a number", ""),
    ({"loras": {"lcm": math.nan}}, "loras: 'lcm' is nan: must be a number", ""),
    ({"controls": [{"name": "c", "image": RED, "start": 0.5, "end": 0.5}]}, "start is 0.5 and end 0.5", ""),
    ({"controls": [Control("c", [RED, RED])]}, "control 'c' has 2 pictures and no frames", "frames=2"),
    ({"controls": [Control("c", RED)] * 17}, "there are 17 controls: must be at most 16", ""),
]


@pytest.mark.parametrize(("values", "message", "hint"), BAD, ids=range(len(BAD)))
def test_refused_in_one_line(values: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Request(**({"prompt": "a fox"} | values))
    error = caught.value
    assert "\n" not in str(error)
    assert len(str(error)) < 250
    assert error.exit_code == 2
    if hint:
        assert error.hint is not None
        assert re.search(hint, error.hint)


def test_replace_checks_again() -> None:
    request = Request("a fox", width=8192)
    with pytest.raises(UsageError, match="8192x4096"):
        dataclasses.replace(request, height=4096)
    assert dataclasses.replace(request, height=64).height == 64


# ---- JSON ----


def test_pictures_go_through_json_pixel_by_pixel() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    picture, mask = Image.fromarray(noise), Image.new("L", (8, 8), 200)
    request = Request("a fox", image=[picture] * 2, mask=mask, frames=2, controls=[Control("canny", picture, 0.5)])
    back = Request.from_json(json.loads(json.dumps(request.to_json())))
    assert isinstance(back.image, tuple)
    assert all(np.array_equal(each, noise) for each in back.image)
    assert np.array_equal(back.mask.convert("L"), mask)  # type: ignore[union-attr]
    assert (back.controls[0].name, back.controls[0].scale) == ("canny", 0.5)
    assert np.array_equal(back.controls[0].image, noise)


def test_pictures_are_checked_as_files_are() -> None:
    """Whatever the caller opened: turned upright, decoded here, and refused in one line."""
    turned, exif = Image.new("RGB", (16, 8), "red"), Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=exif)
    request = Request("", image=Image.open(io.BytesIO(buffer.getvalue())))
    assert isinstance(request.image, Image.Image)
    assert request.image.size == (8, 16)
    assert dataclasses.replace(request, seed=1).image is request.image, "once is enough"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    with pytest.raises(UsageError, match="image is damaged"):
        Request("", image=Image.open(io.BytesIO(buffer.getvalue()[:4000])))
    with pytest.raises(UsageError, match="image is 0x5: it has no pixels"):
        Request("", image=Image.new("RGB", (0, 5)))
    for mode in ("1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"):
        assert Request("", image=Image.new(mode, (8, 8))).image is not None


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"name": "c"}, "a control must have an image"),
        ({"image": RED}, "a control must have a name"),
        ({"name": "c", "image": RED, "scael": 1}, "a control has no field 'scael'"),
        (3, "controls has 3: must be a Control"),
    ],
)
def test_json_that_is_no_control(control: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Request.from_json({"prompt": "x", "controls": [control]})


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("lllyasviel/sd-controlnet-canny", "sd-controlnet-canny"),
        ("diffusers/controlnet-canny-sdxl-1.0", "controlnet-canny-sdxl-1.0"),
        ("org/style@v1.0", "style"),
        ("loras/paper.cut.safetensors", "paper.cut"),
        (Path("loras") / "paper", "paper"),
        ("loras/paper/", "paper"),
    ],
)
def test_adapters_have_names(ref: object, name: str) -> None:
    assert adapter_name(ref) == name


def test_without_pictures_json_tells_them_apart_and_asks_for_them() -> None:
    short = Request("a fox", image=RED, controls=[Control("c", WIDE)]).to_json(pictures=False)
    assert short["image"].startswith("sha256:")
    assert short["image"] != short["controls"][0]["image"]
    assert len(json.dumps(short)) < 400
    with pytest.raises(UsageError, match="image was a picture that is not in the file"):
        Request.from_json({**short, "controls": []})
    assert Request.from_json({**short, "image": RED, "controls": []}).image is RED


def test_to_json_leaves_out_defaults() -> None:
    assert Request("").to_json() == {"prompt": ""}
    request = Request("a fox", seed=0, guidance=0.0, timesteps=(999,), clip_skip=0, emphasis=True)
    assert request.to_json() == {
        "prompt": "a fox",
        "seed": 0,
        "guidance": 0.0,
        "timesteps": [999],
        "clip_skip": 0,
        "emphasis": True,
    }
    assert Request("a fox", n=1, negative_prompt="").to_json() == {"prompt": "a fox"}


def test_any_request_comes_back_from_json() -> None:
    chance = random.Random(3)
    choices: dict[str, list[Any]] = {
        "prompt": ["", "a fox", "é😀\n\x00"],
        "negative_prompt": ["", "blurry"],
        "guidance": [None, 0, 1.5, 0.1 + 0.2, 1e-9],
        "seed": [None, 0, 2**62],
        "n": [1, 2, 64],
        "width": [None, 8, 1024],
        "height": [None, 8, 1024],
        "sampler": [None, "lcm", "ddim", "euler"],
        "timesteps": [None, (999, 0), (3, 2, 1)],
        "guidance_steps": [None, 0, 3],
        "clip_skip": [None, 0, 1],
        "emphasis": [False, True],
    }
    for _ in range(300):
        request = Request(**{name: chance.choice(values) for name, values in choices.items()})
        assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({}, "must have a prompt", "the empty text is a prompt"),
        ({"steps": 4}, "must have a prompt", None),
        ({"prompt": "x", "step": 4}, "no field 'step'", "did you mean steps?"),
        ({"prompt": "x", "guidance_scale": 4}, "no field 'guidance_scale'", "did you mean guidance?"),
        ({"prompt": "x", "zzz": 4}, "no field 'zzz': it has prompt, negative_prompt, steps", None),
        ({"prompt": "x", "_": 4}, "no field '_'", None),
        ({"prompt": "x", "a\nb\ud800": 4}, "no field", None),
        ({"prompt": "x", "y" * 10**6: 4}, "no field", None),
        ({"prompt": "x", 3: 4}, "no field 3", None),
        ({"prompt": "x", "n": None}, "n is None", None),
        ([], r"a request is \[\]: must be an object", None),
        (None, "a request is None", None),
        ("prompt", "a request is 'prompt'", None),
    ],
)
def test_json_that_is_no_request(values: Any, message: str, hint: str | None) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Request.from_json(values)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    if hint is not None:
        assert caught.value.hint == hint


def test_null_is_the_default_where_the_default_is_none() -> None:
    assert Request.from_json({"prompt": "x", "steps": None, "timesteps": None}) == Request("x")


# ---- every field: a new one without a check or a line of help is noticed ----


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(Request)])
def test_a_bad_value_blames_its_field(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        Request(**{"prompt": "a fox", name: object()})  # type: ignore[arg-type]
    assert caught.value.field == name


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(Control)])
def test_a_bad_value_blames_a_controls_field(name: str) -> None:
    good = {"name": "canny", "image": Image.new("RGB", (8, 8))}
    with pytest.raises(UsageError) as caught:
        Request("a fox", controls=(good, {**good, name: object()}))  # type: ignore[arg-type]
    assert caught.value.field == f"controls.1.{name}"


@pytest.mark.parametrize("kind", [Request, Control])
def test_every_field_has_its_line_of_help(kind: type) -> None:
    lines = (kind.__doc__ or "").splitlines()
    for each in dataclasses.fields(kind):
        (line,) = [line for line in lines if line.startswith(f"    {each.name} ")]
        assert len(line.removeprefix(f"    {each.name}").strip()) > 10


def test_a_rule_without_an_upper_end_says_so() -> None:
    assert str(Whole(1)) == "a whole number of at least 1"
    assert str(Number(0)) == "a number of at least 0"
    assert str(Whole(8, step=8)) == "a multiple of 8 of at least 8"
    assert str(Whole(1, 64)) == "a whole number between 1 and 64"
