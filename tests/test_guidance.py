"""How a request's evaluations are put together: guidance, controls and when they act, by hand and without a network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calotype import Request
from calotype.generate import Guidance, Job, Steering
from calotype.nn.unet import Conditioning, Residuals
from calotype.sampling import Eval
from calotype.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.from_config({"_class_name": "LCMScheduler"})
SCALE = 3.0


def says(number: float, rows: int = 1) -> Conditioning:
    """A conditioning that the networks below multiply by."""
    return Conditioning(torch.full((rows, 1, 1), number))


def times(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """A network whose output is its input, as often as the text says."""
    return x * conditioning.context[..., None]


def evaluation(index: int, t: int, seed: int) -> Eval:
    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    return Eval(index, torch.tensor([t]), x)


def test_guidance_is_counted_from_the_negative_prompt() -> None:
    guide, ev = Guidance(SCHEDULE, SCALE, says(-1.0)), evaluation(0, 999, 0)
    torch.testing.assert_close(guide(times, ev, says(2.0)), (-1 + SCALE * (2 - -1)) * ev.x)
    assert guide.evaluations(0) == guide.evaluations(7) == 2


def test_once_remembers_what_the_negative_prompt_saw() -> None:
    """Equation: the clean latent of the first step's negative output stands for the later ones."""
    guide = Guidance(SCHEDULE, SCALE, says(-1.0), mode="once")
    first, later = evaluation(0, 999, 0), evaluation(1, 499, 1)
    guide(times, first, says(2.0))
    alpha, sigma = SCHEDULE.alpha, SCHEDULE.sigma
    seen = (first.x - sigma[999] * -first.x) / alpha[999]  # x0 of the output -x
    negative = (later.x - alpha[499] * seen) / sigma[499]
    torch.testing.assert_close(guide(times, later, says(2.0)), negative + SCALE * (2 * later.x - negative))
    assert [guide.evaluations(i) for i in range(3)] == [2, 1, 1]


def test_guidance_ends_after_its_steps() -> None:
    guide, ev = Guidance(SCHEDULE, SCALE, says(-1.0), steps=2), evaluation(2, 499, 0)
    torch.testing.assert_close(guide(times, ev, says(2.0)), 2 * ev.x)
    assert [guide.evaluations(i) for i in range(4)] == [2, 2, 1, 1]


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
    seen: list[int] = []

    def unet(
        x: Tensor, t: Tensor, conditioning: Conditioning, residuals: Residuals | None, frames: int | None
    ) -> Tensor:
        assert residuals is not None
        seen.append(len(residuals.down))
        return x

    steering = Steering(start, end, 1.0, None, residuals=Residuals(down=(torch.ones(1, 1, 1, 1),)))
    sampler = iter(())
    job = Job(
        Request("x"), (999, 749, 499, 249), sampler, says(1.0), Guidance(SCHEDULE, 1.0, None), controls=(steering,)
    )  # type: ignore[arg-type]
    for index, t in enumerate((999, 749, 499, 249)):
        job.evaluate(unet, evaluation(index, t, index))
    assert [index for index, count in enumerate(seen) if count] == acts
