"""The distillation loss, against the published algorithm written out, and against mathematics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from calotype.nn.unet import Conditioning
from calotype.schedule import NoiseSchedule
from calotype.training.loss import (
    Batch,
    Denoiser,
    Objective,
    consistency_function,
    consistency_loss,
    expand,
    phase_end,
    solver_grid,
    teacher_step,
    trajectory_function,
)

SCHEDULE = NoiseSchedule.from_config({"_class_name": "LCMScheduler"})
POINT = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)  # a data set of one picture


def linear(seed: int) -> Denoiser:
    """A network that depends on all of its inputs, different for each seed."""
    generator = torch.Generator().manual_seed(seed)
    a, b, c, d = torch.randn(4, generator=generator).tolist()

    def network(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        text = conditioning.context.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        w = 0.0 if conditioning.w is None else conditioning.w.view(-1, 1, 1, 1) / 10
        return a * x.roll(1, -1) + b * t.view(-1, 1, 1, 1) / 1000 + c * text + d * w

    return network


def ideal(schedule: NoiseSchedule) -> Denoiser:
    """The exact denoiser of the data set of one picture: it always knows the noise."""

    def network(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        alpha, sigma = schedule.at(t, x)
        eps = (x - alpha * POINT) / sigma
        return {"epsilon": eps, "v_prediction": alpha * eps - sigma * POINT, "sample": POINT.expand_as(x)}[
            schedule.prediction
        ]

    return network


def batch(size: int = 6, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        x0=torch.randn(size, 1, 4, 4, generator=generator),
        noise=torch.randn(size, 1, 4, 4, generator=generator),
        index=torch.tensor([0, 1, 12, 25, 48, 49])[:size],
        w=3 + 10 * torch.rand(size, generator=generator),
        conditioning=Conditioning(torch.randn(size, 3, 2, generator=generator)),
        null=Conditioning(torch.randn(1, 3, 2, generator=generator).expand(size, -1, -1)),
        share=torch.rand(size, generator=generator),
    )


def published(student: Denoiser, target: Denoiser, teacher: Denoiser, given: Batch, c: float) -> Tensor:
    """Algorithm 1 of arXiv 2310.04378, number by number in float64, one example at a time (epsilon prediction)."""
    bars = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    losses = []
    for i in range(len(given.x0)):
        n, w = int(given.index[i]), float(given.w[i])
        t, s = 20 * n + 19, max(20 * n - 1, 0)
        text = Conditioning(given.conditioning.context[i : i + 1])
        null = Conditioning(given.null.context[i : i + 1])
        embedded = Conditioning(text.context, w=given.w[i : i + 1])

        def f(network: Denoiser, x: Tensor, time: int, conditioning: Conditioning) -> Tensor:
            scaled = 10.0 * time
            skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
            eps = network(x.float(), torch.tensor([time]), conditioning).double()
            return skip * x + out * (x - (1 - bars[time]).sqrt() * eps) / bars[time].sqrt()

        x = bars[t].sqrt() * given.x0[i : i + 1].double() + (1 - bars[t]).sqrt() * given.noise[i : i + 1].double()
        eps_text = teacher(x.float(), torch.tensor([t]), text).double()
        eps_null = teacher(x.float(), torch.tensor([t]), null).double()
        eps = eps_text + w * (eps_text - eps_null)
        x0 = (x - (1 - bars[t]).sqrt() * eps) / bars[t].sqrt()
        x_next = bars[s].sqrt() * x0 + (1 - bars[s]).sqrt() * eps
        gap = f(student, x, t, embedded) - f(target, x_next, s, embedded)
        losses.append(((gap**2 + c**2).sqrt() - c).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("c", [0.001, 0.1])
def test_equals_the_published_algorithm(c: float) -> None:
    student, target, teacher = linear(1), linear(2), linear(3)
    given = batch()
    ours = consistency_loss(student, target, teacher, SCHEDULE, given, Objective(huber_c=c))
    theirs = published(student, target, teacher, given, c)
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-4, atol=1e-6)


def test_grid() -> None:
    assert solver_grid(SCHEDULE, 50).tolist() == [20 * i - 1 for i in range(1, 51)]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ideal_denoiser_is_already_consistent(prediction: str) -> None:
    """Where the data are one picture, every point of every path leads to it: nothing is left to learn."""
    schedule = dataclasses.replace(SCHEDULE, prediction=prediction)
    network = ideal(schedule)
    given = dataclasses.replace(batch(), x0=POINT.expand(6, -1, -1, -1))
    given.index[0] = 2  # at index 0 the target is x at t = 0 itself, which still has that timestep's little noise
    assert consistency_loss(network, network, network, schedule, given).max() < 1e-4
    shifted: Denoiser = lambda x, t, conditioning: network(x, t, conditioning) + 0.1  # noqa: E731
    assert consistency_loss(shifted, network, network, schedule, given).min() > 1e-4


def test_the_teachers_kind_of_prediction_does_not_matter() -> None:
    """Outputs that say the same in noise, in velocity and in latents give the same step of the teacher."""

    def translated(prediction: str) -> tuple[NoiseSchedule, Denoiser]:
        schedule = dataclasses.replace(SCHEDULE, prediction=prediction)

        def network(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            alpha, sigma = schedule.at(t, x)
            eps = linear(3)(x, t, conditioning)
            x0 = (x - sigma * eps) / alpha
            return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[prediction]

        return schedule, network

    given, x = batch(), torch.randn(6, 1, 4, 4)
    t = solver_grid(SCHEDULE, 50)[given.index]
    steps = []
    for prediction in ("epsilon", "v_prediction", "sample"):
        schedule, teacher = translated(prediction)
        steps.append(teacher_step(teacher, schedule, x, t, (t - 20).clamp(min=0), given))
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(steps[2], steps[0], rtol=1e-3, atol=1e-3)


def test_boundary() -> None:
    """f(x, 0) is x itself, whatever the network says: that anchors the whole chain."""
    x, t = torch.randn(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64)
    torch.testing.assert_close(consistency_function(linear(1), SCHEDULE, x, t, batch(3).conditioning), x)


def test_guidance_is_the_papers() -> None:
    """w = 0 is the teacher's text prediction alone; the empty caption then has no say."""
    given = dataclasses.replace(batch(), w=torch.zeros(6))
    other = dataclasses.replace(given, null=Conditioning(given.null.context + 5))
    x, t = torch.randn(6, 1, 4, 4), torch.full((6,), 499)
    steps = [teacher_step(linear(3), SCHEDULE, x, t, t - 20, g) for g in (given, other)]
    torch.testing.assert_close(steps[0], steps[1])
    guided = dataclasses.replace(other, w=torch.ones(6))
    assert not torch.allclose(teacher_step(linear(3), SCHEDULE, x, t, t - 20, guided), steps[0])


def test_gradients_reach_the_student_alone() -> None:
    def scaled() -> tuple[Tensor, Callable[[Tensor, Tensor, Conditioning], Tensor]]:
        weight = torch.ones((), requires_grad=True)
        return weight, lambda x, t, conditioning: weight * linear(1)(x, t, conditioning)

    (a, student), (b, target), (c, teacher) = scaled(), scaled(), scaled()
    consistency_loss(student, target, teacher, SCHEDULE, batch()).sum().backward()
    assert a.grad is not None
    assert a.grad.abs() > 0
    assert b.grad is None
    assert c.grad is None


def test_squared_distance() -> None:
    """Pseudo-Huber is half a square near zero, in units of c; with a huge c nothing else is left."""
    networks, given = (linear(1), linear(2), linear(3)), batch()
    given = dataclasses.replace(given, x0=given.x0.double(), noise=given.noise.double())
    squared = consistency_loss(*networks, SCHEDULE, given, Objective(loss="l2"))
    huber = consistency_loss(*networks, SCHEDULE, given, Objective(huber_c=1e5))
    assert (squared > 0).all()
    torch.testing.assert_close(2e5 * huber, squared, rtol=1e-3, atol=0)


OTHERS = [Objective("pcm", phases=4, skip=25, solver_steps=40), Objective("tcd"), Objective("lcf")]


@pytest.mark.parametrize("objective", OTHERS, ids=lambda objective: objective.kind)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ideal_denoiser_satisfies_the_other_objectives(objective: Objective, prediction: str) -> None:
    """Where the data are one picture, every path is what DDIM makes of it in one step, to any place."""
    schedule = dataclasses.replace(SCHEDULE, prediction=prediction)
    network = ideal(schedule)
    index = torch.tensor([2, 5, 12, 25, 38, 39])
    given = dataclasses.replace(batch(), x0=POINT.expand(6, -1, -1, -1), index=index)
    assert consistency_loss(network, network, network, schedule, given, objective).max() < 1e-4
    # wrong where it depends on the time, since a constant error may cancel on both sides
    drifting: Denoiser = lambda x, t, conditioning: (  # noqa: E731
        network(x, t, conditioning) + 0.3 * expand(t, x) / 1000
    )
    assert consistency_loss(drifting, network, network, schedule, given, objective).max() > 1e-4


def test_ends_of_phases() -> None:
    t = torch.tensor([999, 750, 749, 500, 499, 250, 249, 19, 0])
    assert phase_end(SCHEDULE, t, 4).tolist() == [749, 749, 499, 499, 249, 249, 0, 0, 0]
    assert phase_end(SCHEDULE, t, 1).tolist() == [0] * 9


def test_no_solver_step_leaves_its_phase() -> None:
    """The teacher is asked for no place beyond the end of the phase: there the target is x itself."""
    asked: list[int] = []

    def target(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        asked.extend(t.tolist())
        return torch.zeros_like(x)

    objective = Objective("pcm", phases=4, skip=130, solver_steps=40)
    given = dataclasses.replace(batch(), index=torch.tensor([0, 9, 10, 19, 20, 39]))  # 24, 249, 274, 499, 524, 999
    consistency_loss(linear(1), target, linear(3), SCHEDULE, given, objective)
    assert asked == [0, 119, 249, 369, 499, 869]


def test_a_trajectory_to_where_one_is_is_none() -> None:
    x, t = torch.randn(3, 1, 4, 4), torch.tensor([999, 499, 19])
    found = trajectory_function(linear(1), SCHEDULE, x, t, t, batch(3).conditioning)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_an_inpainting_network_sees_its_mask() -> None:
    """All three networks are called with 1 + C more channels, those of their own rows."""
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        seen.append(x[:, 1:])
        return x[:, :1]

    masked = torch.randn(6, 2, 4, 4)
    consistency_loss(network, network, network, SCHEDULE, dataclasses.replace(batch(), masked=masked))
    teacher, target, student = seen
    assert torch.equal(teacher, torch.cat([masked, masked]))
    assert torch.equal(target, masked)
    assert torch.equal(student, masked)
