"""How a request's evaluations are put together: guidance, controls and when they act, by hand and without a network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calotype.generate import Guidance, Job, Steering, generate
from calotype.nn.call import Call
from calotype.nn.unet import Conditioning, Residuals
from calotype.sampling import Eval, Sampler, Update
from calotype.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.from_config({"_class_name": "LCMScheduler"})
SCALE = 3.0
TIMES = (999, 749, 499, 249)


def says(number: float, rows: int = 1) -> Conditioning:
    """A conditioning that the networks below multiply by."""
    return Conditioning(torch.full((rows, 1, 1), number))


def times(x: Tensor, t: Tensor, conditioning: Conditioning, residuals: object, frames: object) -> Tensor:
    """A network whose output is its input, as often as the text says."""
    return x * conditioning.context[..., None]


def job(guidance: Guidance, controls: tuple[Steering, ...] = ()) -> Job:
    """Four steps of a sampler that goes nowhere: the latents of each are drawn anew, each update holds the output."""

    def sampler() -> Sampler:
        for index, t in enumerate(TIMES):
            x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(index))
            output = yield Eval(index, torch.tensor([t]), x)
            yield Update(index, torch.tensor([t]), output, x)

    return Job(TIMES, sampler, says(2.0), guidance, controls)


def outputs(guidance: Guidance) -> list[tuple[Tensor, Tensor]]:
    """The latents that each step evaluates, and its guided output."""
    drawn = list(generate(times, job(guidance)))
    first = [torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(i)) for i in range(len(TIMES))]
    return [(x, update.x) for x, update in zip(first, drawn, strict=True)]


def test_guidance_is_counted_from_the_negative_prompt() -> None:
    guidance = Guidance(SCHEDULE, SCALE, says(-1.0))
    for x, output in outputs(guidance):
        torch.testing.assert_close(output, (-1 + SCALE * (2 - -1)) * x)
    assert guidance.evaluations(0) == guidance.evaluations(3) == 2
    for x, output in outputs(Guidance(SCHEDULE, SCALE)):
        torch.testing.assert_close(output, 2 * x)


def test_once_remembers_what_the_negative_prompt_saw() -> None:
    """Equation: the clean latent of the first step's negative output stands for the later ones."""
    guidance = Guidance(SCHEDULE, SCALE, says(-1.0), mode="once")
    (first, output), *later = outputs(guidance)
    torch.testing.assert_close(output, (-1 + SCALE * (2 - -1)) * first)
    alpha, sigma = SCHEDULE.alpha, SCHEDULE.sigma
    seen = (first - sigma[TIMES[0]] * -first) / alpha[TIMES[0]]  # x0 of the output -x
    for t, (x, output) in zip(TIMES[1:], later, strict=True):
        negative = (x - alpha[t] * seen) / sigma[t]
        torch.testing.assert_close(output, negative + SCALE * (2 * x - negative))
    assert [guidance.evaluations(i) for i in range(3)] == [2, 1, 1]


@pytest.mark.parametrize("mode", ["full", "once"])
def test_guidance_ends_after_its_steps(mode: str) -> None:
    guidance = Guidance(SCHEDULE, SCALE, says(-1.0), steps=2, mode=mode)
    for x, output in outputs(guidance)[2:]:
        torch.testing.assert_close(output, 2 * x)
    assert [guidance.evaluations(i) for i in range(4)] == [2, 2 if mode == "full" else 1, 1, 1]


def test_a_job_runs_as_often_as_one_likes() -> None:
    """It is a value: a second run begins anew, and what "once" remembers is the run's."""
    twice = job(Guidance(SCHEDULE, SCALE, says(-1.0), mode="once"))
    first, second = ([update.x for update in generate(times, twice)] for _ in range(2))
    assert len(first) == len(second) == len(TIMES)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Pooled:
    """A ControlNet whose residuals are ones; `global_pool` as ControlNet Shuffle has it."""

    def __init__(self, global_pool: bool) -> None:
        self.config = type("Config", (), {"global_pool": global_pool})()

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning, hint: Tensor) -> Residuals:
        return Residuals(down=(torch.ones(len(x), 1, 1, 1),))


@pytest.mark.parametrize("pooled", [True, False])
def test_a_pooled_control_steers_what_is_wanted_alone(pooled: bool) -> None:
    """With guidance the negative prompt's rows come first: they see nothing of ControlNet Shuffle."""
    steering = Steering(0.0, 1.0, 0.5, Pooled(pooled), torch.zeros(2, 1, 1, 1))  # type: ignore[arg-type]
    x, t = torch.zeros(4, 4, 2, 2), torch.zeros(4, dtype=torch.int64)
    (found,) = steering.at(x, t, says(0.0, 4), copies=2).down
    assert found.flatten().tolist() == ([0.0, 0.0, 0.5, 0.5] if pooled else [0.5] * 4)
    (alone,) = steering.at(x[:2], t[:2], says(0.0, 2), copies=1).down
    assert alone.flatten().tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("start", "end", "acts"),
    [(0.0, 1.0, [0, 1, 2, 3]), (0.25, 0.75, [1, 2]), (0.0, 0.5, [0, 1]), (0.3, 1.0, [2, 3]), (0.0, 0.7, [0, 1])],
)
def test_a_control_acts_from_its_start_to_its_end(start: float, end: float, acts: list[int]) -> None:
    """In step i of n where i / n >= start and (i + 1) / n <= end."""
    steering = Steering(start, end, 1.0, None, residuals=Residuals(down=(torch.ones(1, 1, 1, 1),)))
    run, seen = job(Guidance(SCHEDULE), (steering,)).run(), []
    said = next(run, None)
    while said is not None:
        if isinstance(said, Call):
            seen.append(len(said.residuals.down))
        said = run.send(said.x) if isinstance(said, Call) else next(run, None)
    assert [index for index, count in enumerate(seen) if count] == acts
