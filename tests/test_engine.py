"""The public object on tiny models: what it fills in, refuses and warns of, and what its pictures depend on."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import calotype
from calotype import latents, video
from calotype.errors import CalotypeError, UsageError
from calotype.latents import decode
from calotype.prepare import prepare
from calotype.request import Request
from calotype.resolve import resolve
from calotype.stills import SUFFIXES, read_metadata
from checkpoints import write_unet


@pytest.fixture(scope="module")
def lcm(tiny_sd15_lcm: Path) -> calotype.Engine:
    """A consistency model with a guidance embedding."""
    return calotype.load(tiny_sd15_lcm, device="cpu")


@pytest.fixture(scope="module")
def base(tiny_sd15: Path) -> calotype.Engine:
    """A base model: real guidance."""
    return calotype.load(tiny_sd15, device="cpu")


@pytest.fixture(scope="module")
def xl(tiny_sdxl: Path) -> calotype.Engine:
    return calotype.load(tiny_sdxl, device="cpu")


def apart(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of two pictures, of 255."""
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


# ---- what is filled in ----


def test_an_open_request_gets_the_models_defaults(lcm: calotype.Engine, base: calotype.Engine) -> None:
    request = lcm.resolve(Request("a fox"))
    assert (request.sampler, request.steps, request.guidance) == ("lcm", 4, 8.5)
    assert (request.width, request.height) == (64, 64)
    request = base.resolve(Request("a fox"))
    assert (request.sampler, request.steps, request.guidance) == ("ddim", 25, 7.5)


def test_what_is_given_is_kept_zeros_too(base: calotype.Engine) -> None:
    given = Request("", steps=1, guidance=0.0, seed=0, width=56, height=64, sampler="euler", guidance_steps=0)
    assert base.resolve(given) == given


def test_a_models_own_defaults(tiny_sd15_lcm: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(tiny_sd15_lcm)
    own = {"steps": 2, "guidance": 5.0, "width": 72, "height": 48, "guidance_range": [4.0, 6.0]}
    (folder / "calotype.json").write_text(json.dumps(own))
    engine = calotype.load(folder, device="cpu")
    result = engine("a fox")
    assert result.image.size == (72, 48)
    assert (result.request.steps, result.request.guidance) == (2, 5.0)
    (note,) = engine("a fox", guidance=6.5).notes
    assert re.match(r"guidance 6.5 is outside .* \(4 to 6\)", note)


def test_seeds_count_up_and_an_open_one_is_drawn(lcm: calotype.Engine) -> None:
    assert lcm("a fox", steps=1, seed=5, n=3).seeds == [5, 6, 7]
    assert lcm("a fox", steps=1, seed=0).seeds == [0]
    drawn = [lcm("a fox", steps=1) for _ in range(2)]
    assert drawn[0].seeds != drawn[1].seeds
    again = lcm(drawn[0].request)
    assert again.image.tobytes() == drawn[0].image.tobytes()


def test_timesteps_are_the_steps(lcm: calotype.Engine) -> None:
    request = Request("a fox", timesteps=(999, 500, 20), seed=1)
    steps = list(lcm.stream(request))
    assert lcm.resolve(request).steps == 3
    assert [int(step.t[0]) for step in steps] == [999, 500, 20]


def test_a_request_may_be_changed_in_the_call(lcm: calotype.Engine) -> None:
    result = lcm(Request("a fox", seed=3), steps=2, seed=4)
    assert (result.request.prompt, result.request.steps, result.request.seed) == ("a fox", 2, 4)


# ---- steps and results ----


def test_stream_yields_each_step(lcm: calotype.Engine) -> None:
    request = Request("a fox", steps=3, seed=1, n=2, width=48, height=64)
    steps = []
    for step in lcm.stream(request):
        assert not torch.is_inference_mode_enabled(), "the caller's code runs in the caller's mode"
        steps.append(step)
    assert [step.index for step in steps] == [0, 1, 2]
    assert [step.total for step in steps] == [3, 3, 3]
    assert [step.t.tolist() for step in steps] == [[999, 999], [679, 679], [339, 339]]
    for step in steps:
        assert step.x.shape == step.x0.shape == (2, 4, 8, 6)
        assert step.x.dtype == step.x0.dtype == torch.float32
        assert isinstance(step, calotype.Step)
    assert torch.equal(steps[-1].x, steps[-1].x0)
    assert not torch.equal(steps[0].x, steps[0].x0)


def test_previews_end_in_the_picture(lcm: calotype.Engine) -> None:
    request = Request("a fox", steps=3, seed=1)
    previews = [step.preview() for step in lcm.stream(request)]
    assert {preview.size for preview in previews} == {(64, 64)}
    assert apart(previews[0], previews[-1]) > 1
    assert previews[-1].tobytes() == lcm(request).image.tobytes()


def test_previews_of_ddim_end_in_the_picture(base: calotype.Engine) -> None:
    """Its last update leaves a little noise where the schedule says set_alpha_to_one false, and that is the picture."""
    request = Request("a fox", steps=3, seed=1)
    *_, last = base.stream(request)
    assert last.preview().tobytes() == base(request).image.tobytes()


def test_the_preview_of_several_is_one_sheet(lcm: calotype.Engine) -> None:
    step = next(lcm.stream(Request("a fox", steps=1, seed=1, n=3)))
    sheet = step.preview()
    assert sheet.width > 2 * 64
    assert sheet.height > 2 * 64


def test_a_result(lcm: calotype.Engine, tiny_sd15_lcm: Path) -> None:
    result = lcm("a fox", steps=2, seed=1, n=2)
    assert isinstance(result, calotype.Result)
    assert len(result.images) == 2
    assert result.image is result.images[0]
    assert (result.image.mode, result.image.size) == ("RGB", (64, 64))
    assert result.request == lcm.resolve(Request("a fox", steps=2, seed=1, n=2))
    stages = ("prepare", "denoise", "decode")
    assert set(result.timings) == {*stages, "total", "evaluations"}
    assert result.timings["evaluations"] == 2
    assert all(seconds > 0 for seconds in result.timings.values())
    assert result.timings["total"] == pytest.approx(sum(result.timings[stage] for stage in stages))
    assert result.model == {
        "model": str(tiny_sd15_lcm),
        "unet": None,
        "vae": None,
        "tiny_vae": None,
        "variant": None,
        "revision": None,
        "prediction": None,
        "device": "cpu",
        "dtype": "float32",
        "optimize": "auto",
        "decoder": "full",
        "family": "custom",
    }


def test_what_is_saved_repeats_the_picture(lcm: calotype.Engine, tmp_path: Path) -> None:
    result = lcm("a (red:1.2) fox, señor 🦊", steps=2, seed=11, n=2, emphasis=True, width=48, clip_skip=1)
    paths = result.save(tmp_path / "fox.png")
    assert [path.name for path in paths] == ["fox-1.png", "fox-2.png"]
    for i, path in enumerate(paths):
        metadata = read_metadata(path)
        assert metadata["index"] == i
        request = Request.from_json(metadata["request"])
        assert request == result.request
        engine = calotype.load(**{key: metadata["model"][key] for key in ("model", "device", "dtype")})
        again = engine(request)
        assert again.request == request
        with Image.open(path) as image:
            assert again.images[i].tobytes() == image.tobytes()
    assert lcm("a fox", steps=1).save(tmp_path / "one.png") == [tmp_path / "one.png"]


def test_what_is_saved_is_what_is_encoded(lcm: calotype.Engine, tmp_path: Path) -> None:
    result = lcm("a fox", steps=1, seed=1, n=2)
    for suffix, kind in SUFFIXES.items():
        for i, path in enumerate(result.save(tmp_path / f"fox{suffix}")):
            assert path == tmp_path / f"fox-{i + 1}{suffix}"
            assert path.read_bytes() == result.encode(i, kind)
            assert read_metadata(path) == result.metadata(i)
    with pytest.raises(UsageError, match="must be one of PNG, JPEG, WEBP"):
        result.encode(0, "GIF")
    clip = replace(result, request=replace(result.request, frames=2), images=result.images * 2)
    for kind in ("GIF", "WEBP"):
        (tmp_path / "clip").write_bytes(clip.encode(1, kind))
        assert len(video.load_frames(tmp_path / "clip")) == 2
        assert video.read_metadata(tmp_path / "clip") == clip.metadata(1)
    with pytest.raises(UsageError, match="must be one of GIF, WEBP, MP4, for a clip"):
        clip.encode(0, "PNG")


# ---- what is refused, what is warned of ----

NOT_DRAWN: dict[str, tuple[dict[str, Any], str]] = {
    "no steps": ({"steps": 0}, "steps is 0"),
    "more steps than the grid has": ({"steps": 51}, "steps is 51: allowed are 1 to 50"),
    "no width": ({"width": 0}, "width is 0"),
    "width off the grid": ({"width": 100}, "width is 100: must be a multiple of 8"),
    "absurd height": ({"height": 80_000}, "height is 80000"),
    "absurd area": ({"width": 8192, "height": 8192}, "8192x8192"),
    "guidance that is no number": ({"guidance": float("nan")}, "guidance is nan"),
    "unknown field": ({"step": 4}, "no field 'step'"),
    "unknown sampler": ({"sampler": "plms"}, "sampler is 'plms'"),
    "timesteps beyond the schedule": ({"timesteps": [1000, 3]}, "timesteps has 1000"),
    "more layers skipped than there are": ({"clip_skip": 40}, "clip_skip is 40"),
    "enormous prompt": ({"prompt": "fox " * 10_000}, "prompt has 40000 characters"),
    "more tokens than are read": ({"prompt": "@" * 10_000}, "chunks"),
    "no text": ({"prompt": None}, "prompt is of type NoneType"),
}


@pytest.mark.parametrize(("fields", "message"), NOT_DRAWN.values(), ids=NOT_DRAWN)
def test_refused_in_one_line(lcm: calotype.Engine, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        lcm(**({"prompt": "a fox"} | fields))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stream_is_refused_before_its_first_step(lcm: calotype.Engine) -> None:
    with pytest.raises(UsageError, match="steps is 51"):
        lcm.stream(Request("a fox", steps=51))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float8"}, "dtype is 'float8': allowed are auto, float32, bfloat16, float16"),
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"device": "cuda:99"}, "device is 'cuda:99'"),
    ],
)
def test_not_loaded(tiny_sd15_lcm: Path, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        calotype.load(tiny_sd15_lcm, **arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_inpainting_unet_is_told_from_others(tiny_sd15: Path, tmp_path: Path) -> None:
    write_unet(tmp_path / "inpainting", in_channels=9)
    engine = calotype.load(tiny_sd15, unet=tmp_path / "inpainting", device="cpu")
    with pytest.raises(UsageError, match="takes 9 channels: it is made for inpainting"):
        engine("a fox")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guidance": 40.0}, r"guidance 40 is outside what this model was trained for \(3 to 15\)"),
        ({"guidance": 1.0}, "guidance 1 is outside"),
        ({"negative_prompt": "dog"}, "the negative prompt has no effect: .* as an embedding"),
        ({"guidance_steps": 1}, "guidance_steps has no effect"),
    ],
)
def test_notes_of_an_embedded_guidance(lcm: calotype.Engine, fields: dict[str, Any], message: str) -> None:
    (note,) = lcm("a fox", steps=1, **fields).notes
    assert re.match(message, note)


def test_notes_of_a_real_guidance(base: calotype.Engine) -> None:
    (note,) = base("a fox", steps=1, guidance=1.0, negative_prompt="dog").notes
    assert note == "the negative prompt has no effect at guidance 1: give more than 1"
    assert base("a fox", steps=1, guidance=40.0, negative_prompt="dog", guidance_steps=1).notes == ()


def test_numbers_that_are_not_finite_are_an_error(lcm: calotype.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lcm.parts.vae, "decode", lambda latents: torch.full((1, 3, 64, 64), torch.inf))
    with pytest.raises(CalotypeError, match="not finite in float32") as caught:
        lcm("a fox", steps=1)
    assert caught.value.hint is not None


# ---- what a picture depends on ----


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "a dog"},
        {"prompt": ""},
        {"seed": 2},
        {"steps": 3},
        {"guidance": 12.0},
        {"sampler": "ddim"},
        {"clip_skip": 1},
        {"prompt": "a (red:1.5) fox", "emphasis": True},
        {"timesteps": [999, 300], "steps": None},
    ],
    ids=str,
)
def test_each_field_changes_the_picture(lcm: calotype.Engine, changes: dict[str, Any]) -> None:
    request: dict[str, Any] = {"prompt": "a red fox", "steps": 2, "seed": 1, "guidance": 4.0}
    assert apart(lcm(**request).image, lcm(**(request | changes)).image) > 0.05


@pytest.mark.parametrize(
    "changes",
    [{"negative_prompt": "dog"}, {"negative_prompt": "dog, cat " * 60}, {"guidance": 1.0}, {"guidance_steps": 1}],
    ids=lambda changes: str(changes)[:40],
)
@pytest.mark.parametrize("model", ["base", "xl"])
def test_real_guidance_changes_the_picture(model: str, changes: dict[str, Any], request: pytest.FixtureRequest) -> None:
    engine: calotype.Engine = request.getfixturevalue(model)
    fields: dict[str, Any] = {"prompt": "a red fox", "steps": 3, "seed": 1, "guidance": 7.5}
    assert apart(engine(**fields).image, engine(**(fields | changes)).image) > 0.05


def test_guidance_for_no_step_is_none(base: calotype.Engine) -> None:
    fields: dict[str, Any] = {"prompt": "a red fox", "steps": 3, "seed": 1}
    made = [base(**fields, guidance=1.0), base(**fields, guidance=7.5, guidance_steps=0)]
    assert apart(made[0].image, made[1].image) < 0.01


@pytest.mark.parametrize("model", ["lcm", "base", "xl"])
def test_long_prompts_are_read_to_the_end(model: str, request: pytest.FixtureRequest) -> None:
    engine: calotype.Engine = request.getfixturevalue(model)
    short, long = "a red fox in the snow " * 12, "a red fox in the snow " * 60
    fields: dict[str, Any] = {"steps": 2, "seed": 1, "guidance": 5.0}
    job = prepare(engine.parts, resolve(engine.parts, Request(long, **fields))[0])
    chunks = engine.parts.text.chunks(long)
    assert chunks == 5
    for conditioning in (job.conditioning, job.guidance.negative):
        assert conditioning is None or conditioning.context.shape[1] == 77 * chunks
    made = [engine(prompt, **fields).image for prompt in (short, long, long + "dog")]
    assert apart(made[0], made[1]) > 0.05
    assert made[1].tobytes() != made[2].tobytes()


# ---- many pictures, many requests ----


@pytest.mark.parametrize("model", ["lcm", "base", "xl"])
def test_a_picture_of_several_is_that_of_its_seed(model: str, request: pytest.FixtureRequest) -> None:
    engine: calotype.Engine = request.getfixturevalue(model)
    fields: dict[str, Any] = {"prompt": "a fox", "steps": 2, "guidance": 5.0}
    *_, together = engine.stream(Request(**fields, seed=4, n=3))
    for i in range(3):
        *_, alone = engine.stream(Request(**fields, seed=4 + i))
        assert ((together.x0[i] - alone.x0[0]).norm() / alone.x0.norm()).item() < 1e-5


def test_decoding_takes_no_more_memory_for_more_pictures(lcm: calotype.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = lcm.parts.vae.decode

    def counted(latents: torch.Tensor) -> torch.Tensor:
        decoded.append(len(latents))
        return decode(latents)

    monkeypatch.setattr(lcm.parts.vae, "decode", counted)
    made = [lcm("a fox", steps=1, seed=1, n=5)]
    monkeypatch.setattr(latents, "DECODE_PIXELS", 2 * 64 * 64 + 1)
    made.append(lcm("a fox", steps=1, seed=1, n=5))
    monkeypatch.setattr(latents, "DECODE_PIXELS", 1)  # even one is larger: one at a time
    made.append(lcm("a fox", steps=1, seed=1, n=5))
    assert decoded == [5, 2, 2, 1, 1, 1, 1, 1, 1]
    for one in made[1:]:
        assert all(apart(a, b) < 0.01 for a, b in zip(one.images, made[0].images, strict=True))


def test_streams_of_one_engine_interleave(lcm: calotype.Engine) -> None:
    requests = [Request("a fox", steps=3, seed=1), Request("snow", steps=3, seed=2, n=2, width=48)]
    serial = [lcm(request) for request in requests]
    finals = [steps[-1].x0 for steps in zip(*(zip(*map(lcm.stream, requests), strict=True)), strict=True)]
    for x0, result in zip(finals, serial, strict=True):
        images = list(decode(lcm.parts.vae, x0))
        assert [image.tobytes() for image in images] == [image.tobytes() for image in result.images]


def test_two_threads_share_an_engine(lcm: calotype.Engine) -> None:
    """In step with each other, so that each request's calls fall between the other's."""
    requests = [Request("a fox", steps=4, seed=1), Request("snow", steps=4, seed=2, guidance=4.0, width=48)]
    serial = [lcm(request) for request in requests]
    barrier = threading.Barrier(2, timeout=60)
    made: dict[int, calotype.Result] = {}

    def draw(i: int) -> None:
        stream = lcm.stream(requests[i])
        while True:
            try:
                barrier.wait()
                next(stream)
            except StopIteration as end:
                made[i] = end.value
                return

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, result in enumerate(serial):
        assert made[i].image.tobytes() == result.image.tobytes()


def test_what_the_model_cannot_do_names_its_field(lcm: calotype.Engine, base: calotype.Engine) -> None:
    """As a request's own faults do (tests/test_request.py): a page marks the field."""
    photo = Image.new("RGB", (64, 64))
    black, thin = Image.new("L", (64, 64)), Image.new("L", (64, 64))
    thin.putpixel((1, 1), 255)
    cases: list[tuple[calotype.Engine, str, dict[str, Any]]] = [
        (lcm, "steps", {"steps": 51}),
        (base, "steps", {"steps": 1000, "sampler": "ddim"}),
        (lcm, "strength", {"image": photo, "strength": 0.01}),
        (lcm, "steps", {"image": photo, "strength": 0.1, "steps": 6}),
        (lcm, "timesteps", {"timesteps": (1000, 1)}),
        (lcm, "mask", {"image": photo, "mask": black}),
        (lcm, "mask_feather", {"image": photo, "mask": thin, "mask_feather": 8}),
        (lcm, "frames", {"frames": 2}),
        (lcm, "controls.0.name", {"controls": (calotype.Control("canny", photo),)}),
        (lcm, "loras", {"loras": {"papercut": 1.0}}),
        (lcm, "clip_skip", {"clip_skip": 99}),
        (lcm, "mask", {"image": photo, "mask": thin}),
    ]
    for engine, field, fields in cases:
        with pytest.raises(UsageError) as caught:
            engine("a fox", **fields)
        assert caught.value.field == field, fields
