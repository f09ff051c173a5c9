"""The samplers against mathematics: golden numbers, an ideal denoiser, invariances, and many requests in one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from calotype.errors import UsageError
from calotype.sampling import SAMPLERS, Eval, Source, Update, draw_noise, draws_needed, grid_for, guided, lcm, tcd
from calotype.schedule import NoiseSchedule

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
Network = Callable[[Tensor, Tensor], Tensor]


def schedule(kind: str = "DDIMScheduler", **fields: object) -> NoiseSchedule:
    return NoiseSchedule.from_config({"_class_name": kind, **LATENT, **fields})


def run(
    name: str, levels: NoiseSchedule, grid: Sequence[float], noise: Sequence[Tensor], network: Network
) -> list[Update]:
    steps, sampler = [], SAMPLERS[name](levels, grid, noise)
    for ev in sampler:
        assert isinstance(ev, Eval)
        steps.append(sampler.send(network(ev.x, ev.t)))
    assert all(isinstance(step, Update) for step in steps)
    return steps


def column(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1)


def wavy(x: Tensor, t: Tensor) -> Tensor:
    """A network that depends on every value of x and on t, and on nothing else in the batch."""
    return torch.sin(2 * x + column(t) / 300) + 0.1 * x.mean((1, 2, 3), keepdim=True)


def ideal(levels: NoiseSchedule, data: Tensor) -> Network:
    """The best denoiser of a data set (k, C, h, w): the posterior mean of x0, as the prediction of `levels`."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = levels.at(t, x)
        distance = ((x[:, None] - alpha[:, None] * data) ** 2).flatten(2).sum(2)
        weight = torch.softmax(-distance / (2 * sigma.view(-1, 1) ** 2), dim=1)
        x0 = torch.einsum("bk,kchw->bchw", weight, data)
        eps = (x - alpha * x0) / sigma
        return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[levels.prediction]

    return network


# ---- the reference's golden numbers ----


@pytest.mark.parametrize(("n", "total", "mean"), [(1, 18.7097, 0.0244), (10, 197.7616, 0.2575)])
def test_goldens_of_the_reference(n: int, total: float, mean: float) -> None:
    """diffusers' own test of its LCM scheduler: its sample, its dummy network, its generator."""
    sample = (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
    generator = torch.Generator().manual_seed(0)
    noise = [sample] + [torch.randn(sample.shape, generator=generator) for _ in range(n - 1)]
    levels = schedule("LCMScheduler")
    x = run("lcm", levels, grid_for("lcm", levels, n), noise, lambda x, t: x * column(t) / (column(t) + 1))[-1].x
    assert x.abs().sum().item() == pytest.approx(total, abs=1e-3)
    assert x.abs().mean().item() == pytest.approx(mean, abs=1e-4)


# ---- against an ideal denoiser ----

DATA = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "euler"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ode_samplers_land_on_the_data(name: str, spacing: str, prediction: str) -> None:
    levels = schedule(prediction_type=prediction, timestep_spacing=spacing)
    noise = draw_noise(range(8), (2, 4, 4), 1)
    x = run(name, levels, grid_for(name, levels, 50), noise, ideal(levels, DATA))[-1].x
    distance = (x[:, None] - DATA).abs().amax((2, 3, 4))
    assert distance.amin(1).max() < 1e-3
    assert len(set(distance.argmin(1).tolist())) > 1, "all pictures are the same one"


def test_one_consistency_step_is_the_posterior_mean() -> None:
    levels = schedule("LCMScheduler", prediction_type="sample")
    noise = draw_noise(range(3), (2, 4, 4), 1)
    (step,) = run("lcm", levels, [999], noise, ideal(levels, DATA))
    mean = ideal(levels, DATA)(noise[0], torch.full((3,), 999))
    torch.testing.assert_close(step.x, mean, atol=1e-5, rtol=1e-5)


def test_consistency_steps_land_on_the_data() -> None:
    """With the posterior mean for a consistency function the last step, at low noise, decides."""
    levels = schedule("LCMScheduler")
    x = run("lcm", levels, [999, 499, 19], draw_noise([0, 1], (2, 4, 4), 3), ideal(levels, DATA))[-1].x
    assert (x[:, None] - DATA).abs().amax((2, 3, 4)).amin(1).max() < 1e-3


@pytest.mark.parametrize("name", ["lcm", "ddim", "euler"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_trajectories_do_not_depend_on_what_is_predicted(name: str, zero_snr: bool) -> None:
    predictions = ["v_prediction", "sample"] if zero_snr else ["epsilon", "v_prediction", "sample"]
    paths = []
    for prediction in predictions:
        levels = schedule(
            "LCMScheduler", prediction_type=prediction, rescale_betas_zero_snr=zero_snr, timestep_spacing="trailing"
        )
        grid = grid_for(name, levels, 4)
        steps = run(name, levels, grid, draw_noise([3], (2, 4, 4), draws_needed(name, 4)), ideal(levels, DATA))
        paths.append(torch.stack([each for step in steps for each in (step.x, step.x0)]))
    assert paths[0].isfinite().all()
    for path in paths[1:]:
        torch.testing.assert_close(path, paths[0], atol=2e-3 if zero_snr else 2e-5, rtol=1e-4)


def test_euler_is_ddim_between_whole_timesteps() -> None:
    """Two ways to write the same update of the probability-flow ODE."""
    levels = schedule(timestep_spacing="leading", steps_offset=1)
    noise = draw_noise([0, 1], (4, 3, 3), 1)
    paths = [run(name, levels, grid_for(name, levels, 10), noise, wavy) for name in ("ddim", "euler")]
    for one, other in zip(*paths, strict=True):
        torch.testing.assert_close(one.x, other.x, atol=1e-5, rtol=1e-4)


# ---- the protocol ----


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_samplers_alternate_and_say_where_they_are(name: str) -> None:
    levels = schedule(timestep_spacing="trailing")
    grid = grid_for(name, levels, 3)
    sampler = SAMPLERS[name](levels, grid, draw_noise([0, 1], (4, 5, 6), draws_needed(name, 3)))
    seen, before = [], None
    for ev in sampler:
        assert ev.x.shape == (2, 4, 5, 6)
        assert ev.t.shape == (2,)
        assert ev.t.dtype == torch.int64
        if before is not None:
            assert torch.equal(ev.x, before.x), "a Update's x is what the network sees next"
        before = sampler.send(wavy(ev.x, ev.t))
        assert torch.equal(before.t, ev.t)
        seen.append((ev.index, before.index, ev.t[0].item()))
    assert seen == [(i, i, grid[i]) for i in range(3)]
    assert before is not None
    if name != "tcd":  # which arrives at timestep 0, a trace of noise above the clean latents
        torch.testing.assert_close(before.x, before.x0, rtol=0, atol=0)


def test_eulers_timesteps_may_lie_between_whole_ones() -> None:
    levels = schedule("EulerDiscreteScheduler", timestep_spacing="linspace")
    steps = run("euler", levels, grid_for("euler", levels, 3), draw_noise([0], (4, 3, 3), 1), wavy)
    assert steps[1].t.dtype == torch.float32
    assert steps[1].t.item() == 499.5


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_half_precision_is_for_the_network_only(name: str) -> None:
    levels = schedule(timestep_spacing="trailing")
    grid = grid_for(name, levels, 4)
    noise = [each.bfloat16() for each in draw_noise([0, 1], (4, 8, 8), 4)]
    seen: list[torch.dtype] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x0_free(x.float(), t).bfloat16()

    def x0_free(x: Tensor, t: Tensor) -> Tensor:
        return 0.9 * x + column(t) / 5000  # smooth, so that rounding stays small

    rounded = run(name, levels, grid, noise, network)
    exact = run(name, levels, grid, [each.float() for each in noise], x0_free)
    assert seen == [torch.bfloat16] * 4
    assert rounded[0].x.dtype == rounded[0].x0.dtype == torch.float32
    first = schedule().alpha[999].item()
    # One rounding of the network's input and one of its output, 2^-9 each, amplified by 1 / alpha in x0.
    torch.testing.assert_close(rounded[0].x0, exact[0].x0, atol=4 * 2**-8 / first, rtol=0)
    assert (rounded[0].x0 - exact[0].x0).abs().max() > 0


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_the_loop_never_looks_at_values(name: str, spacing: str) -> None:
    """On the meta device there are none: a hidden .item(), which would stall a GPU, fails."""
    levels = schedule(timestep_spacing=spacing)
    noise = [torch.empty(2, 4, 8, 8, device="meta") for _ in range(3)]
    steps = run(name, levels, grid_for(name, levels, 3), noise, lambda x, t: x * t.view(-1, 1, 1, 1))
    assert steps[-1].x.device.type == "meta"


def test_two_requests_share_their_network_calls() -> None:
    """Samplers of different kinds, steps and batch sizes in one batch: each is what it is alone."""
    levels = schedule("LCMScheduler", timestep_spacing="trailing")
    requests = [("lcm", 2, [1]), ("lcm", 4, [2, 3]), ("ddim", 3, [4])]

    def sampler(name: str, n: int, seeds: list[int]):  # type: ignore[no-untyped-def]
        return SAMPLERS[name](levels, grid_for(name, levels, n), draw_noise(seeds, (4, 4, 4), draws_needed(name, n)))

    waiting = dict(enumerate(sampler(*request) for request in requests))
    results: dict[int, Tensor] = {}
    calls = 0
    while waiting:
        evals = {i: ev for i, each in waiting.items() if (ev := next(each, None)) is not None}
        waiting = {i: waiting[i] for i in evals}
        if not evals:
            break
        out = wavy(torch.cat([ev.x for ev in evals.values()]), torch.cat([ev.t for ev in evals.values()]))
        calls += 1
        for i, part in zip(evals, out.split([len(ev.x) for ev in evals.values()]), strict=True):
            results[i] = waiting[i].send(part).x
    assert calls == 4
    for i, (name, n, seeds) in enumerate(requests):
        noise = draw_noise(seeds, (4, 4, 4), draws_needed(name, n))
        alone = run(name, levels, grid_for(name, levels, n), noise, wavy)[-1].x
        torch.testing.assert_close(results[i], alone, rtol=1e-5, atol=1e-6)


# ---- what a schedule asks for ----


def test_consistency_sampling_uses_each_draw_once() -> None:
    levels = schedule("LCMScheduler")
    noise = draw_noise([0], (4, 2, 2), 3)
    steps = run("lcm", levels, [999, 499, 259], noise, wavy)
    for step, after, z in zip(steps[:2], [499, 259], noise[1:], strict=True):
        torch.testing.assert_close(step.x, levels.alpha[after] * step.x0 + levels.sigma[after] * z)


def test_the_boundary_condition_holds_at_timestep_0() -> None:
    levels = schedule("LCMScheduler", prediction_type="sample")
    noise = draw_noise([0], (4, 2, 2), 1)
    (step,) = run("lcm", levels, [0], noise, lambda x, t: 1e3 * torch.ones_like(x))
    assert torch.equal(step.x, noise[0])


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_clip_sample(name: str) -> None:
    levels = schedule(timestep_spacing="trailing", clip_sample=True, clip_sample_range=0.5)
    steps = run(name, levels, [999, 499], draw_noise([0], (4, 4, 4), 2), lambda x, t: 0.1 * x)
    largest = max(step.x0.abs().max().item() for step in steps)
    assert largest > 1 if name == "euler" else largest <= 0.5 + 1e-4


@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_ends_clean_or_at_timestep_0(to_one: bool) -> None:
    levels = schedule(timestep_spacing="trailing", set_alpha_to_one=to_one)
    noise = draw_noise([0], (4, 4, 4), 1)
    last = run("ddim", levels, grid_for("ddim", levels, 4), noise, wavy)[-1]
    assert torch.equal(last.x, last.x0) == to_one


def test_ddim_on_an_explicit_grid_goes_to_its_next_timestep() -> None:
    levels = schedule(timestep_spacing="leading")
    eps = torch.ones(1, 4, 2, 2)
    steps = run("ddim", levels, [900, 123], [torch.zeros(1, 4, 2, 2)], lambda x, t: eps)
    torch.testing.assert_close(steps[0].x, levels.alpha[123] * steps[0].x0 + levels.sigma[123] * eps)


def test_ddim_takes_an_explicit_grid_as_long_as_the_schedule() -> None:
    """Where the schedule's own spacing has no such grid: leading with an offset."""
    levels = schedule(num_train_timesteps=10, steps_offset=1)
    assert len(run("ddim", levels, list(range(9, -1, -1)), draw_noise([0], (4, 2, 2), 1), wavy)) == 10


def test_grid_for() -> None:
    levels = schedule("LCMScheduler", timestep_spacing="linspace")
    assert grid_for("lcm", levels, 4) == [999, 759, 499, 259]
    assert grid_for("ddim", levels, 4) == [999, 666, 333, 0]
    assert grid_for("euler", levels, 3) == [999.0, 499.5, 0.0]
    assert grid_for("lcm", levels, 2, timesteps=[800, 3]) == [800, 3]
    assert grid_for("lcm", dataclasses.replace(levels, original_steps=10), 10)[-1] == 99
    with pytest.raises(UsageError, match="steps is 51: allowed are 1 to 50"):
        grid_for("lcm", levels, 51)
    with pytest.raises(UsageError, match="has 1000"):
        grid_for("lcm", levels, 1, timesteps=[1000])
    for function in (lambda: grid_for("heun", levels, 4), lambda: draws_needed("heun", 4)):
        with pytest.raises(UsageError, match="sampler is 'heun': allowed are lcm, tcd, ddim, euler"):
            function()


def test_draws_needed() -> None:
    assert {name: draws_needed(name, 4) for name in SAMPLERS} == {"lcm": 4, "tcd": 4, "ddim": 1, "euler": 1}
    assert draws_needed("tcd", 4, gamma=0.0) == 1


@pytest.mark.parametrize("gamma", [0.3, 0.5, 0.9])  # of 499: 349.3, 249.5, 49.9
def test_tcd_by_hand(gamma: float) -> None:
    """Algorithm 4 of arXiv 2402.19159 for two steps, rounded down as the released sampler does."""
    levels = schedule("LCMScheduler")
    x, z = draw_noise([3], (4, 3, 3), 2)
    steps = []
    sampler = tcd(levels, [999, 499], [x, z], gamma=gamma)
    for ev in sampler:
        steps.append(sampler.send(wavy(ev.x, ev.t)))
    for t, after, step in zip((999, 499), (499, 0), steps, strict=True):
        out = wavy(x, torch.tensor([t]))
        x0 = (x - levels.sigma[t] * out) / levels.alpha[t]
        s = int((1 - gamma) * after)
        x = levels.alpha[s] * x0 + levels.sigma[s] * out
        if after:
            ratio = levels.alpha[after] / levels.alpha[s]
            x = ratio * x + (1 - ratio**2).sqrt() * z
        torch.testing.assert_close(step.x, x)
        torch.testing.assert_close(step.x0, x0)


def test_lcm_skips_as_much_as_the_schedule_says() -> None:
    """At a low timestep and a small scaling the boundary condition shows: c_skip x + c_out x0, and not x0."""
    levels = dataclasses.replace(schedule("LCMScheduler"), timestep_scaling=0.01)
    x = draw_noise([3], (4, 3, 3), 1)[0]
    sampler = lcm(levels, [19], [x])
    ev = next(sampler)
    step = sampler.send(wavy(ev.x, ev.t))
    x0 = (x - levels.sigma[19] * wavy(x, torch.tensor([19]))) / levels.alpha[19]
    scaled = 19 * 0.01
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
    assert skip > 0.8
    torch.testing.assert_close(step.x, skip * x + out * x0)


# ---- a picture to start from ----


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_what_the_mask_keeps_comes_back(name: str) -> None:
    """Outside the mask each step holds the picture under the first noise at the next level, and is clean at the end."""
    levels = schedule(timestep_spacing="trailing")
    noise, kept = draw_noise([0, 1], (4, 6, 6), 4), torch.randn(2, 4, 6, 6, generator=torch.manual_seed(0))
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., :3, :] = 1
    grid = grid_for(name, levels, 4)
    sampler = SAMPLERS[name](levels, grid, noise, Source(kept, mask, noised=False))
    steps = []
    for ev in sampler:
        steps.append(sampler.send(wavy(ev.x, ev.t)))
    below = [step.x[..., 3:, :] for step in steps]
    if name != "euler":  # whose levels lie between timesteps
        for x, t in zip(below, grid[1:], strict=False):
            wanted = levels.alpha[int(t)] * kept + levels.sigma[int(t)] * noise[0]
            torch.testing.assert_close(x, wanted[..., 3:, :])
    assert torch.equal(below[-1], kept[..., 3:, :])
    assert not torch.equal(steps[-1].x[..., :3, :], kept[..., :3, :])


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_an_all_white_mask_is_none_and_a_picture_begins_under_noise(name: str) -> None:
    levels = schedule(timestep_spacing="trailing")
    noise, picture = draw_noise([0], (4, 6, 6), 3), torch.randn(1, 4, 6, 6, generator=torch.manual_seed(0))
    grid = grid_for(name, levels, 3, strength=0.5)

    def last(source: Source | None) -> Tensor:
        sampler = SAMPLERS[name](levels, grid, noise, source)
        for ev in sampler:
            step = sampler.send(wavy(ev.x, ev.t))
        return step.x

    assert torch.equal(last(Source(picture, torch.ones(1, 1, 6, 6), noised=False)), last(None))
    first = next(SAMPLERS[name](levels, grid, noise, Source(picture)))
    at = int(grid[0])
    torch.testing.assert_close(first.x, levels.alpha[at] * picture + levels.sigma[at] * noise[0])


def test_strength_spreads_all_steps_over_the_less_noisy_share() -> None:
    levels = schedule(timestep_spacing="trailing")
    assert grid_for("lcm", levels, 4, strength=0.5) == [499, 379, 259, 139]
    assert grid_for("tcd", levels, 4, strength=0.5) == [499, 379, 259, 139]
    assert grid_for("ddim", levels, 4, strength=0.5) == [499, 374, 249, 124]
    assert grid_for("euler", levels, 2, strength=0.1) == [99.0, 49.0]
    with pytest.raises(UsageError, match="steps is 6: allowed are 1 to 5"):
        grid_for("lcm", levels, 6, strength=0.1)
    with pytest.raises(UsageError, match="steps is 2: allowed are 1 to 1"):
        grid_for("ddim", levels, 2, strength=0.001)


# ---- noise and guidance ----


def test_a_seed_belongs_to_an_image() -> None:
    together = draw_noise([5, 6, 7], (4, 3, 3), 2)
    assert [tuple(draw.shape) for draw in together] == [(3, 4, 3, 3)] * 2
    for i, seed in enumerate([5, 6, 7]):
        alone = draw_noise([seed], (4, 3, 3), 2)
        for draw, one in zip(together, alone, strict=True):
            assert torch.equal(draw[i : i + 1], one)


def test_draws_are_separate_calls_of_one_generator() -> None:
    generator = torch.Generator().manual_seed(0)
    expected = [torch.randn((1, 4, 3, 5), generator=generator) for _ in range(3)]
    for draw, one in zip(draw_noise([0], (4, 3, 5), 3), expected, strict=True):
        assert torch.equal(draw, one)
    assert draw_noise([0], (4, 3, 5), 1)[0].dtype == torch.float32


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32 + 1, 2**63 - 1, 2**63, 2**63 + 12345, 2**64 - 1])
def test_a_seed_means_what_it_means_to_torch(seed: int) -> None:
    """Also to diffusers, where people write torch.manual_seed(seed) or make a generator."""
    (drawn,) = draw_noise([seed], (4, 8, 8), 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        assert torch.equal(drawn, torch.randn(1, 4, 8, 8))
    assert torch.equal(drawn, torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(seed)))


def test_drawing_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    draw_noise([1], (4, 2, 2), 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_guidance() -> None:
    cond, uncond = draw_noise([0, 1], (4, 2, 2), 2)
    assert torch.equal(guided(cond, uncond, 0.0), uncond)
    torch.testing.assert_close(guided(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guided(cond, uncond, 3.0), uncond + 3 * (cond - uncond))
    each = guided(cond, uncond, torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(each[0], cond[0])
    torch.testing.assert_close(each[1], guided(cond, uncond, 3.0)[1])
