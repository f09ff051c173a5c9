"""Adapters that come and go in one engine: what stays, what is forgotten, and that the model is itself in the end."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MotionAdapter
from matrix.cells import Cell
from matrix.compare import Matrix
from matrix.world import seeded
from safetensors.torch import load_file, save_file

import calotype
from calotype import generate
from calotype.errors import CalotypeError, CalotypeWarning, CheckpointError, UsageError
from calotype.nn.controlnet import ControlNet
from calotype.nn.windows import context_windows

STILL, CLIP = Cell("sd15", "lora", "text", "none", "off"), Cell("sd15", "lora", "text", "motion", "off")


def weights(engine: calotype.Engine) -> dict[str, torch.Tensor]:
    networks = (engine.parts.unet, engine.parts.vae, *engine.parts.text.models)
    return {
        f"{i} {name}": tensor.clone() for i, net in enumerate(networks) for name, tensor in net.state_dict().items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def latents(engine: calotype.Engine, request: calotype.Request) -> torch.Tensor:
    *_, last = engine.stream(request)
    return last.x


@pytest.fixture
def engine(matrix: Matrix) -> calotype.Engine:
    return calotype.load(matrix.world.model("sd15", "lora", 4), device="cpu", dtype="float32")


def without_middle(matrix: Matrix, folder: Path, **config: Any) -> Path:
    """A motion adapter as versions 1 and 3 are."""
    given = MotionAdapter.from_pretrained(matrix.world.motion("sd15")).config
    names = ("block_out_channels", "motion_num_attention_heads", "motion_max_seq_length")
    with seeded("without middle"):
        network = MotionAdapter(**{name: given[name] for name in names} | config, use_motion_mid_block=False)
        for name, parameter in network.named_parameters():
            if ".proj_out." in name:
                torch.nn.init.normal_(parameter, std=0.1)
        network.save_pretrained(folder)
    return folder


def test_motion_goes_and_everything_is_as_it_was(matrix: Matrix, engine: calotype.Engine) -> None:
    before, request = weights(engine), matrix.ours.request(CLIP)
    engine.add_lora(matrix.world.lora("sd15", "style", "kohya"), "style", scale=0.5)
    engine.set_motion(matrix.world.motion("sd15"))
    engine.add_lora(matrix.world.lora("sd15", "motion", "diffusers"), "zoom", scale=1.2)
    moving = latents(engine, request)

    engine.set_motion(matrix.world.motion("sd15"))  # the same once more: what fits it stays
    assert engine.loras == {"style": 0.5, "zoom": 1.2}
    assert torch.equal(latents(engine, request), moving)

    with pytest.warns(CalotypeWarning, match="the LoRA 'zoom' goes with the motion adapter that it changes"):
        engine.set_motion(None)
    assert engine.loras == {"style": 0.5}
    with pytest.raises(UsageError, match="no motion adapter"):
        engine(request)
    engine.set_loras({})
    assert same(weights(engine), before)
    assert "motion" not in engine.describe()


def test_a_motion_lora_of_version_2_on_version_1(matrix: Matrix, engine: calotype.Engine, tmp_path: Path) -> None:
    """As the released ones are used: what they change in the middle has no place there."""
    zoom = matrix.world.lora("sd15", "motion", "diffusers")
    engine.set_motion(without_middle(matrix, tmp_path / "v1"))
    request = matrix.ours.request(CLIP)
    before = latents(engine, request)
    with pytest.warns(CalotypeWarning, match=r"motion modules in the middle block, .*: those 8 layers are left out"):
        engine.add_lora(zoom, "zoom")
    after = latents(engine, request)
    assert not torch.equal(before, after)
    engine.set_loras({})
    kept = {key: value for key, value in load_file(zoom).items() if "mid_block" not in key}
    save_file(kept, tmp_path / "kept.safetensors")
    engine.add_lora(tmp_path / "kept.safetensors")
    assert torch.equal(latents(engine, request), after)


def test_a_lora_of_ssd1b_is_not_sdxls(matrix: Matrix, tmp_path: Path) -> None:
    """It names nothing that SDXL lacks: what it leaves out gives it away."""
    made = load_file(matrix.world.lora("ssd1b", "lcm", "kohya"))
    fits = {
        key: value
        for key, value in load_file(matrix.world.lora("sdxl", "lcm", "kohya")).items()
        if any(name in key for name in ("down_blocks_0", "mid_block_resnets_0", "down_blocks_1_attentions_0"))
    }
    assert any("mid_block_resnets_0" in key for key in made)
    save_file(fits, tmp_path / "ssd1b.safetensors")
    engine = calotype.load(matrix.world.model("sdxl", "lora", 4), device="cpu", dtype="float32")
    before = weights(engine)
    with pytest.raises(CheckpointError, match="it looks made for SSD-1B"):
        engine.add_lora(tmp_path / "ssd1b.safetensors")
    assert same(weights(engine), before)
    engine.add_lora(matrix.world.lora("sdxl", "lcm", "kohya"))


def test_what_is_added_can_be_taken_out(matrix: Matrix, engine: calotype.Engine) -> None:
    before, described = weights(engine), engine.describe()
    engine.add_lora(matrix.world.lora("sd15", "style", "kohya"), "style")
    engine.add_control(matrix.world.control("sd15", 1), "edges")
    with pytest.raises(UsageError, match="there is a control 'edges' already"):
        engine.add_control(matrix.world.t2i("sd15", 1), "edges")
    engine.remove_lora("style")
    engine.remove_control("edges")
    assert same(weights(engine), before)
    assert engine.describe() == described
    for remove in (engine.remove_lora, engine.remove_control):
        with pytest.raises(UsageError, match=r"no (adapter|control) 'style'"):
            remove("style")
    engine.add_control(matrix.world.t2i("sd15", 1), "edges")


def test_adapters_of_another_family_change_nothing(matrix: Matrix, engine: calotype.Engine) -> None:
    engine.add_lora(matrix.world.lora("sd15", "style", "kohya"), "style", scale=0.5)
    engine.set_motion(matrix.world.motion("sd15"))
    before, described = weights(engine), engine.describe()
    world = matrix.world
    for add, ref in (
        (engine.add_lora, world.lora("sdxl", "style", "kohya")),
        (engine.add_lora, world.lora("sdxl", "lcm", "kohya")),
        (engine.add_control, world.control("sdxl", 1)),
        (engine.add_control, world.t2i("sdxl", 1)),
        (engine.set_motion, world.motion("sdxl")),
    ):
        with pytest.raises(CalotypeError) as caught:
            add(ref)
        assert "\n" not in str(caught.value)
        assert same(weights(engine), before)
        assert engine.describe() == described


def test_live_loras_are_the_merged_ones(matrix: Matrix, engine: calotype.Engine) -> None:
    request = matrix.ours.request(STILL)
    plain = latents(engine, request)
    engine.add_lora(matrix.world.lora("sd15", "lcm", "kohya"), "lcm", scale=0.7)
    merged = latents(engine, request)
    engine.set_loras({})
    before = weights(engine)
    with engine.live_loras({"lcm": 0.7}):
        live = latents(engine, request)
    assert same(weights(engine), before)
    assert float((live - merged).norm() / merged.norm()) < 1e-4
    assert torch.equal(latents(engine, request), plain)


def test_long_clips_are_controlled_in_pieces_and_say_what_they_cost(
    matrix: Matrix, engine: calotype.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.set_motion(without_middle(matrix, tmp_path / "short", motion_max_seq_length=4))
    engine.add_control(matrix.world.control("sd15", 1), "control")
    pictures = [matrix.world.pictures[i % 6] for i in range(10)]
    control = calotype.Control("control", pictures)
    request = calotype.Request(
        "a fox", frames=10, controls=(control,), steps=1, guidance=1.5, seed=0, width=96, height=64, sampler="lcm"
    )
    whole = latents(engine, request)
    seen: list[int] = []
    forward = ControlNet.forward

    def counted(self: ControlNet, x: torch.Tensor, *rest: Any) -> Any:
        seen.append(len(x))
        return forward(self, x, *rest)

    monkeypatch.setattr(ControlNet, "forward", counted)
    monkeypatch.setattr(generate, "ROWS", 8)
    result = engine(request)
    assert seen == [8, 8, 4]  # of twenty rows, for guidance doubles them
    assert float((latents(engine, request) - whole).norm() / whole.norm()) < 1e-5
    windows = context_windows(10, 4, 3)
    assert result.timings["evaluations"] == pytest.approx(2 * sum(map(len, windows)) / 10)


def finish(stream: Generator[object, None, calotype.Result]) -> calotype.Result:
    while True:
        try:
            next(stream)
        except StopIteration as end:
            result: calotype.Result = end.value
            return result


def with_two(matrix: Matrix, engine: calotype.Engine) -> tuple[calotype.Request, calotype.Request]:
    """A request with one LoRA and one with two; the engine's own mix is neither."""
    engine.add_lora(matrix.world.lora("sd15", "lcm", "kohya"), "lcm", scale=0.3)
    engine.add_lora(matrix.world.lora("sd15", "style", "kohya"), "style", scale=0.0)
    request = matrix.ours.request(STILL)
    return replace(request, loras={"lcm": 1.0}), replace(request, loras={"lcm": 0.5, "style": -1.0})


def test_streams_with_loras_of_their_own_may_be_interleaved(matrix: Matrix, engine: calotype.Engine) -> None:
    first, second = with_two(matrix, engine)
    before = weights(engine)
    alone = [latents(engine, first), latents(engine, second)]
    assert same(weights(engine), before)
    assert engine.loras == {"lcm": 0.3, "style": 0.0}
    assert float((alone[0] - alone[1]).norm() / alone[0].norm()) > 0.01
    steps = [step for pair in zip(engine.stream(first), engine.stream(second), strict=True) for step in pair]
    for step, expected in zip(steps[-2:], alone, strict=True):
        assert torch.equal(step.x, expected)
    assert same(weights(engine), before)
    drawn = engine(second)
    scales = {name: lora["scale"] for name, lora in drawn.model["loras"].items()}
    assert scales == second.loras == calotype.Request.from_json(drawn.metadata(0)["request"]).loras
    engine.set_loras(scales)
    assert torch.equal(latents(engine, replace(second, loras=None)), alone[1])


def test_a_stream_keeps_the_loras_that_it_began_with(matrix: Matrix, engine: calotype.Engine) -> None:
    first, _ = with_two(matrix, engine)
    own = replace(first, loras=None)
    expected, told = engine(own).images[0], engine.describe()
    stream = engine.stream(own)
    engine.set_loras({"style": 1.0})
    next(stream)
    engine.set_loras({"style": 2.0})
    after = weights(engine)
    engine.add_lora(matrix.world.lora("sd15", "style", "kohya"), "again", scale=0.0)
    result = finish(stream)
    assert result.images[0].tobytes() == expected.tobytes()
    assert result.model == told
    assert same(weights(engine), after)
    assert engine.loras == {"style": 2.0, "again": 0.0}


def test_a_stream_whose_adapters_are_gone_says_so(matrix: Matrix, engine: calotype.Engine) -> None:
    first, _ = with_two(matrix, engine)
    with pytest.raises(UsageError, match="no adapter 'other': there are lcm, style"):
        engine.stream(replace(first, loras={"other": 1.0}))
    stream = engine.stream(first)
    next(stream)
    engine.remove_lora("lcm")
    engine.add_lora(matrix.world.lora("sd15", "style", "kohya"), "lcm")
    with pytest.raises(UsageError, match="the LoRA 'lcm' was taken away while a request was drawn"):
        next(stream)
    stream = engine.stream(replace(first, loras={}))
    next(stream)
    engine.set_motion(matrix.world.motion("sd15"))
    with pytest.raises(UsageError, match="the motion adapter was taken away while a request was drawn"):
        next(stream)
    assert engine.loras == {"style": 0.0, "lcm": 1.0}


def test_live_scales_of_each_picture_with_guidance(matrix: Matrix, engine: calotype.Engine) -> None:
    with_two(matrix, engine)
    engine.set_loras({})
    request = replace(matrix.ours.request(STILL), n=2, guidance=4.0, negative_prompt="blurry")
    with engine.live_loras({"lcm": torch.tensor([0.0, 0.7])}, only=("unet",)):
        both = latents(engine, request)
    for i, scale in enumerate((0.0, 0.7)):
        with engine.live_loras({"lcm": scale}, only=("unet",)):
            each = latents(engine, request)[i]
        assert float((both[i] - each).norm() / each.norm()) < 1e-5
