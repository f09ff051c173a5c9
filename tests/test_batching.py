"""Strangers' requests in one batch: one network call a round serves all, and each gets what it would get alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import calotype
from calotype.generate import Job
from calotype.latents import decode
from calotype.nn.unet import Conditioning
from calotype.parts import Parts
from calotype.prepare import prepare
from calotype.request import Request
from calotype.sampling import Eval


@pytest.fixture(scope="module")
def engine(tiny_sd15_lcm: Path) -> calotype.Engine:
    return calotype.load(tiny_sd15_lcm, device="cpu", dtype="float32")


class Counted:
    """A U-Net that counts its calls and the pictures in each."""

    def __init__(self, parts: Parts) -> None:
        self.unet = parts.unet
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.batches.append(len(x))
        return self.unet(x, t, conditioning)  # type: ignore[no-any-return]


@torch.inference_mode()
def together(unet: Counted, jobs: Iterable[Job]) -> list[Tensor]:
    """The final latents of each job, all of them driven through one network call a round."""
    found: dict[int, Tensor] = {}
    waiting = dict(enumerate(jobs))
    while waiting:
        evals: dict[int, Eval] = {i: next(job.sampler) for i, job in waiting.items()}
        out = unet(
            torch.cat([ev.x for ev in evals.values()]),
            torch.cat([ev.t for ev in evals.values()]),
            Conditioning.cat([waiting[i].conditioning for i in evals]),
        )
        for (i, ev), part in zip(evals.items(), out.split([len(ev.x) for ev in evals.values()]), strict=True):
            found[i] = waiting[i].sampler.send(part).x
            if ev.index + 1 == len(waiting[i].grid):
                del waiting[i]
    return [found[i] for i in sorted(found)]


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def alone(engine: calotype.Engine, request: Request) -> Tensor:
    *_, last = engine.stream(request)
    return last.x0


def test_two_requests_share_a_call_a_round_and_equal_themselves_alone(engine: calotype.Engine) -> None:
    size = {"width": 64, "height": 48}
    requests = [
        Request("a red fox", steps=4, guidance=4.0, seed=1, **size),
        Request("the astronaut in snow", steps=2, guidance=6.0, seed=7, **size),
    ]
    unet = Counted(engine.parts)
    made = together(unet, [prepare(engine.parts, engine.resolve(request)) for request in requests])
    assert unet.batches == [2, 2, 1, 1]
    for latents, request in zip(made, requests, strict=True):
        assert distance(latents, alone(engine, request)) < 1e-5
        shared, own = (np.asarray(x, int) for x in (decode(engine.parts, latents)[0], engine(request).image))
        assert np.abs(shared - own).max() <= 1


def test_what_differs_between_them_matters(engine: calotype.Engine) -> None:
    """Else the test above would not notice a batcher that mixes requests up."""
    request = Request("a red fox", steps=2, guidance=4.0, seed=1, width=64, height=48)
    found = alone(engine, request)
    for changes in ({"prompt": "the astronaut in snow"}, {"guidance": 6.0}, {"seed": 7}, {"steps": 4}):
        other = Request.from_json(request.to_json() | changes)
        assert distance(alone(engine, other), found) > 1e-3, changes


def test_requests_of_several_pictures_and_samplers_share_calls(engine: calotype.Engine) -> None:
    size = {"width": 64, "height": 64}
    requests = [
        Request("a red fox", steps=3, guidance=4.0, seed=1, n=2, **size),
        Request("", steps=1, guidance=8.0, seed=7, **size),
        Request("a dog", steps=2, guidance=3.0, seed=0, sampler="ddim", **size),
    ]
    unet = Counted(engine.parts)
    made = together(unet, [prepare(engine.parts, engine.resolve(request)) for request in requests])
    assert unet.batches == [4, 3, 2]
    for latents, request in zip(made, requests, strict=True):
        assert len(latents) == request.n
        assert distance(latents, alone(engine, request)) < 1e-5


def test_two_encoders_and_sizes_share_calls(tiny_sdxl: Path) -> None:
    """Pooled text and size numbers are rows of the batch as well. Without guidance: that would be a second call."""
    engine = calotype.load(tiny_sdxl, device="cpu", dtype="float32")
    size = {"width": 64, "height": 64, "guidance": 1.0}
    requests = [Request("a red fox", steps=2, seed=1, **size), Request("snow", steps=3, seed=2, **size)]
    unet = Counted(engine.parts)
    made = together(unet, [prepare(engine.parts, engine.resolve(request)) for request in requests])
    assert unet.batches == [2, 2, 1]
    for latents, request in zip(made, requests, strict=True):
        assert distance(latents, alone(engine, request)) < 1e-5
