"""Strangers' requests in one batch: a call of the network serves all that fit, and each gets what it would alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import calotype
from adapters import chosen, kohya_names, layers, low_rank, save
from calotype import Request, Result, Step
from calotype.errors import UsageError
from calotype.nn.call import Call
from calotype.nn.unet import Conditioning, Residuals

SIZE: dict[str, Any] = {"width": 64, "height": 48}


@pytest.fixture(scope="module")
def engine(tiny_sd15_lcm: Path) -> calotype.Engine:
    return calotype.load(tiny_sd15_lcm, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def base(tiny_sd15: Path) -> calotype.Engine:
    return calotype.load(tiny_sd15, device="cpu", dtype="float32")


@pytest.fixture
def calls(engine: calotype.Engine, base: calotype.Engine) -> Iterator[list[int]]:
    """How many rows each call of a network had."""
    seen: list[int] = []

    def note(_: object, arguments: tuple[Tensor, ...]) -> None:
        seen.append(len(arguments[0]))

    hooks = [each.parts.unet.register_forward_pre_hook(note) for each in (engine, base)]
    yield seen
    for hook in hooks:
        hook.remove()


def together(engine: calotype.Engine, *requests: Request, rows: int = 32) -> list[tuple[list[Step], Result]]:
    """The steps and the result of each."""
    batch = engine.batch(rows=rows)
    numbers = [batch.add(request) for request in requests]
    steps: dict[int, list[Step]] = {number: [] for number in numbers}
    results: dict[int, Result] = {}
    for number, made in batch:
        if isinstance(made, Step):
            steps[number].append(made)
        else:
            assert isinstance(made, Result), made
            results[number] = made
    assert len(batch) == 0
    return [(steps[number], results[number]) for number in numbers]


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def apart(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def alone(engine: calotype.Engine, request: Request) -> Tensor:
    *_, last = engine.stream(request)
    return last.x0


def check(engine: calotype.Engine, *requests: Request, rows: int = 32) -> None:
    """That each comes out as alone: the latents of each step, the pictures, and all else that the result says."""
    for request, (steps, result) in zip(requests, together(engine, *requests, rows=rows), strict=True):
        own = list(engine.stream(request))
        assert [(step.index, step.total) for step in steps] == [(step.index, step.total) for step in own]
        for step, other in zip(steps, own, strict=True):
            assert distance(step.x, other.x) < 1e-5
            assert distance(step.x0, other.x0) < 1e-5
        wanted = engine(request)
        assert (result.seeds, result.request, result.notes) == (wanted.seeds, wanted.request, wanted.notes)
        assert result.model == wanted.model
        assert result.timings["evaluations"] == wanted.timings["evaluations"]
        assert max(apart(a, b) for a, b in zip(result.images, wanted.images, strict=True)) <= 1


def test_two_requests_share_a_call_a_round_and_equal_themselves_alone(
    engine: calotype.Engine, calls: list[int]
) -> None:
    requests = [
        Request("a red fox", steps=4, guidance=4.0, seed=1, **SIZE),
        Request("the astronaut in snow", steps=2, guidance=6.0, seed=7, **SIZE),
    ]
    together(engine, *requests)
    assert calls == [2, 2, 1, 1]
    check(engine, *requests)


def test_what_differs_between_them_matters(engine: calotype.Engine) -> None:
    """Else the test above would not notice a batch that mixes requests up."""
    request = Request("a red fox", steps=2, guidance=4.0, seed=1, **SIZE)
    found = alone(engine, request)
    for changes in ({"prompt": "the astronaut in snow"}, {"guidance": 6.0}, {"seed": 7}, {"steps": 4}):
        other = Request.from_json(request.to_json() | changes)
        assert distance(alone(engine, other), found) > 1e-3, changes


def test_requests_of_several_pictures_and_samplers_share_calls(engine: calotype.Engine, calls: list[int]) -> None:
    requests = [
        Request("a red fox", steps=3, guidance=4.0, seed=1, n=2, **SIZE),
        Request("", steps=1, guidance=8.0, seed=7, **SIZE),
        Request("a dog", steps=2, guidance=3.0, seed=0, sampler="ddim", **SIZE),
    ]
    together(engine, *requests)
    assert calls == [4, 3, 2]
    check(engine, *requests)


def test_guided_and_unguided_share_calls(base: calotype.Engine, calls: list[int]) -> None:
    """A guided one has two rows, an unguided one; Euler's timesteps may lie between whole ones."""
    requests = [
        Request("a red fox", steps=4, guidance=7.5, seed=1, sampler="ddim", **SIZE),
        Request("a dog", steps=3, guidance=1.0, seed=2, sampler="ddim", **SIZE),
        Request(
            "snow", steps=6, guidance=5.0, negative_prompt="dog", guidance_steps=2, seed=3, sampler="euler", **SIZE
        ),
    ]
    together(base, *requests)
    assert calls == [5, 5, 4, 3, 1, 1]
    check(base, *requests, Request("a cat", steps=3, guidance=3.0, guidance_mode="once", seed=4, **SIZE))


def test_two_encoders_share_calls(tiny_sdxl: Path) -> None:
    """Pooled text and size numbers are rows of the batch as well."""
    engine = calotype.load(tiny_sdxl, device="cpu", dtype="float32")
    check(engine, *[Request("a red fox", steps=2 + i, seed=i, guidance=1.0 + i, width=64, height=64) for i in range(3)])


def test_what_does_not_fit_together_has_calls_of_its_own(engine: calotype.Engine, calls: list[int]) -> None:
    long = Request("a red fox in the snow " * 20, steps=2, seed=1, **SIZE)
    wide = Request("a red fox", steps=2, seed=2, width=48, height=64)
    together(engine, long, wide)
    assert calls == [1, 1, 1, 1]
    check(engine, long, wide)


def test_a_call_has_no_more_rows_than_it_may(engine: calotype.Engine, calls: list[int]) -> None:
    """But a single request may: it would have them alone, too."""
    requests = [Request("a fox", steps=1, seed=i, n=n, **SIZE) for i, n in enumerate((1, 2, 1, 5))]
    together(engine, *requests, rows=3)
    assert calls == [3, 1, 5]
    check(engine, *requests, rows=3)


def test_controls_of_other_kinds_have_calls_of_their_own() -> None:
    """Residuals are of one layout in a call: none, a ControlNet's, a T2I-Adapter's, a pooled ControlNet's."""
    x, t, text = torch.zeros(1, 4, 8, 8), torch.zeros(1), Conditioning(torch.zeros(1, 77, 32))
    full, pooled = torch.zeros(1, 32, 8, 8), torch.zeros(1, 32, 1, 1)
    kinds = [Residuals(), Residuals((full,), full), Residuals((pooled,), pooled), Residuals(level=(full,))]
    kinds += [Residuals((full,)), Residuals(mid=full)]
    layouts = {Call(x, t, text, residuals).layout for residuals in kinds}
    assert len(layouts) == len(kinds)
    assert Call(x.repeat(3, 1, 1, 1), t.long().repeat(3), text.select(torch.zeros(3).long())).layout in layouts


# ---- LoRAs ----


@pytest.fixture
def mixed(tiny_sd15: Path, tmp_path: Path) -> calotype.Engine:
    """With two LoRAs on U-Net and text, and both at nothing."""
    engine = calotype.load(tiny_sd15, device="cpu", dtype="float32")
    for seed, name in enumerate(("one", "other")):
        networks = {"lora_unet_": engine.parts.unet, "lora_te_": engine.parts.text.models[0]}
        tensors: dict[str, Tensor] = {}
        for prefix, network in networks.items():
            attention = chosen(layers(network), ("to_q", "to_k", "to_v", "q_proj", "v_proj"))
            tensors |= kohya_names(low_rank(attention, seed=100 * seed), prefix, None)
        engine.add_lora(save(tmp_path / f"{name}.safetensors", tensors), name)
    engine.set_loras({})
    return engine


def test_each_has_loras_of_its_own(mixed: calotype.Engine) -> None:
    """In the same calls, with guidance and without, and on the text as well; no weight is changed by it."""
    before = {name: weight.clone() for name, weight in mixed.parts.unet.named_parameters()}
    fields: dict[str, Any] = {"steps": 2, "seed": 1, "sampler": "ddim", **SIZE}
    requests = [
        Request("a fox", loras={"one": 1.0}, guidance=4.0, **fields),
        Request("a fox", loras={"one": -0.5, "other": 0.8}, guidance=1.0, **fields),
        Request("a fox", guidance=4.0, **fields),
    ]
    ends = [alone(mixed, request) for request in requests]
    assert min(distance(ends[0], ends[2]), distance(ends[1], ends[2])) > 1e-3
    check(mixed, *requests)
    assert mixed.loras == {}
    for name, weight in mixed.parts.unet.named_parameters():
        assert torch.equal(weight, before[name])


def test_one_mix_for_all_is_merged(mixed: calotype.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As fast as alone, and to the bit the same weights; afterwards the engine's own are there again."""
    mixed.set_loras({"one": 0.3})
    monkeypatch.setattr(mixed._stack, "live", lambda *_, **__: pytest.fail("live"))
    requests = [Request("a fox", steps=2, seed=seed, loras={"other": 1.0}, **SIZE) for seed in range(2)]
    check(mixed, *requests)
    assert mixed.loras == mixed._stack.merged == {"one": 0.3}


def test_one_joins_with_another_mix(mixed: calotype.Engine) -> None:
    """What is merged until then goes on live."""
    first = Request("a fox", steps=3, seed=1, loras={"one": 1.0}, **SIZE)
    second = Request("a dog", steps=2, seed=2, loras={"other": 0.5}, **SIZE)
    batch = mixed.batch()
    number, last = batch.add(first), {}
    for which, made in batch:
        if isinstance(made, Step):
            last[which] = made.x0
            if which == number and made.index == 0:
                batch.add(second)
    assert distance(last[0], alone(mixed, first)) < 1e-5
    assert distance(last[1], alone(mixed, second)) < 1e-5


def test_a_lora_that_is_taken_away_ends_what_needs_it(mixed: calotype.Engine) -> None:
    batch = mixed.batch()
    needs, other = (batch.add(Request("a fox", steps=3, seed=1, loras=loras, **SIZE)) for loras in ({"one": 1.0}, {}))
    batch.round()
    mixed.remove_lora("one")
    ends = {number: made for number, made in batch if not isinstance(made, Step)}
    assert isinstance(ends[needs], UsageError)
    assert "the LoRA 'one' was taken away" in str(ends[needs])
    assert isinstance(ends[other], Result)


# ---- coming and going ----


def test_requests_join_and_leave_between_steps(engine: calotype.Engine, calls: list[int]) -> None:
    requests = [Request("a fox", steps=4, seed=1, **SIZE), Request("a dog", steps=3, seed=2, **SIZE)]
    batch, seen = engine.batch(), list[tuple[int, type]]()
    batch.add(requests[0])
    left = batch.add(Request("snow", steps=4, seed=3, **SIZE))
    for number, made in batch:
        seen.append((number, type(made)))
        if (number, isinstance(made, Step) and made.index) == (0, 1):
            batch.cancel(left)
            batch.add(requests[1])
        if isinstance(made, Result):
            wanted = engine(requests[0 if number == 0 else 1])
            assert apart(made.image, wanted.image) <= 1
    assert calls[:5] == [2, 2, 2, 2, 1]  # two; two; the second left and the third joined
    assert [number for number, kind in seen if kind is Result] == [0, 2]
    assert seen.count((left, Step)) == 1  # its second step was made, and is not said any more


def test_what_fails_ends_alone(engine: calotype.Engine) -> None:
    batch = engine.batch()
    with pytest.raises(UsageError, match="no adapter 'papercut'"):
        batch.add(Request("a fox", loras={"papercut": 1.0}))
    assert len(batch) == 0
    fails, works = (batch.add(Request("a fox", steps=1, seed=1, clip_skip=skip, **SIZE)) for skip in (99, 0))
    ends = {number: made for number, made in batch if not isinstance(made, Step)}
    assert isinstance(ends[fails], UsageError)
    assert "clip_skip is 99" in str(ends[fails])
    assert isinstance(ends[works], Result)


def test_an_error_of_the_network_loses_nothing(engine: calotype.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has too little memory for a call may go on with smaller ones, or later."""
    small, large = Request("a fox", steps=3, seed=1, **SIZE), Request("a dog", steps=3, seed=2, width=64, height=64)
    batch = engine.batch()
    for request in (small, large):
        batch.add(request)
    made = batch.round()
    forward = engine.parts.unet.forward

    def full(x: Tensor, *others: Any) -> Tensor:
        if x.shape[-2:] == (8, 8):
            raise torch.OutOfMemoryError
        output: Tensor = forward(x, *others)
        return output

    monkeypatch.setattr(engine.parts.unet, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        batch.round()
    monkeypatch.setattr(engine.parts.unet, "forward", forward)
    made += batch
    for number, request in enumerate((small, large)):
        own = [each for which, each in made if which == number]
        assert [type(each) for each in own] == [Step, Step, Step, Result]
        assert [each.index for each in own[:-1] if isinstance(each, Step)] == [0, 1, 2]
        assert isinstance(own[-1], Result)
        assert own[-1].image.tobytes() == engine(request).image.tobytes()


def test_a_batch_beside_a_stream(mixed: calotype.Engine) -> None:
    """Both of one engine, with other LoRAs, in turn."""
    streamed = Request("a fox", steps=3, seed=1, loras={"one": 1.0}, **SIZE)
    batched = [Request("a fox", steps=3, seed=1, loras=loras, **SIZE) for loras in ({"other": 1.0}, {"other": -1.0})]
    wanted = [alone(mixed, each) for each in (streamed, *batched)]
    batch, stream = mixed.batch(), mixed.stream(streamed)
    for each in batched:
        batch.add(each)
    for step in stream:
        x0 = [step.x0, *(made.x0 for _, made in batch.round() if isinstance(made, Step))]
    assert all(distance(found, own) < 1e-5 for found, own in zip(x0, wanted, strict=True))


def test_a_picture_is_decoded_between_two_rounds(engine: calotype.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's steps wait for all of somebody's pictures."""
    decoded: list[int] = []
    decode = engine.parts.vae.decode
    monkeypatch.setattr("calotype.latents.DECODE_PIXELS", 1)
    monkeypatch.setattr(engine.parts.vae, "decode", lambda x: decoded.append(len(x)) or decode(x))
    batch = engine.batch()
    batch.add(Request("a fox", steps=1, seed=1, n=3, **SIZE))
    batch.add(Request("a dog", steps=4, seed=2, **SIZE))
    rounds = [[(number, type(made)) for number, made in batch.round()] for _ in range(4)]
    assert rounds == [[(0, Step), (1, Step)], [(1, Step)], [(1, Step), (0, Result)], [(1, Step), (1, Result)]]
    assert decoded == [1, 1, 1, 1]
    assert len(batch) == 0
