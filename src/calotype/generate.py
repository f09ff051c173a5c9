"""The one loop for every task: a prepared request becomes Step, Step, ..., each a little clearer than the one before.

A Job (calotype.prepare makes it) holds its sampler, its noise and all that steers the network; `generate` drives one. A
batcher drives many: it takes an Eval from each job's sampler, runs the network once for all, and sends each its share.

Shapes: n pictures of a request, or n clips of F frames: n F rows, clip by clip; latents (n F, C, h, w).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from calotype import sampling
from calotype.images import grid
from calotype.latents import decode
from calotype.nn.controlnet import ControlNet
from calotype.nn.unet import Conditioning, Residuals
from calotype.nn.windows import run_windows
from calotype.parts import Parts
from calotype.request import Request
from calotype.sampling import Eval, Sampler, guided
from calotype.schedule import NoiseSchedule

ROWS = 32  # that a ControlNet sees at a time: its memory must not grow with a clip's length

Network = Callable[[Tensor, Tensor, Conditioning], Tensor]
UNetCall = Callable[[Tensor, Tensor, Conditioning, Residuals | None, int | None], Tensor]


@dataclass(frozen=True, eq=False)
class Step(sampling.Step):
    """One step of a request: index, t, x (latents after the update) and x0 (denoised latents), both (n F, C, h, w)."""

    total: int  # how many steps there will be
    parts: Parts

    def preview(self) -> Image.Image:
        """What the picture looks like so far: x0 decoded; several pictures as a sheet."""
        images = decode(self.parts, self.x0)
        return images[0] if len(images) == 1 else grid(images, columns=math.ceil(math.sqrt(len(images))))


@dataclass(frozen=True, eq=False)
class Steering:
    """A control of one request, with all of it that does not change from step to step."""

    start: float  # it acts in step i of n when i / n >= start and (i + 1) / n <= end
    end: float
    scale: float
    network: ControlNet | None  # None: a T2I-Adapter, which is evaluated once a request
    hint: Tensor | None = None  # the ControlNet's embedded picture (n F, C, h, w)
    residuals: Residuals | None = None  # the T2I-Adapter's output for n F rows, scaled

    def at(self, x: Tensor, t: Tensor, conditioning: Conditioning, copies: int) -> Residuals:
        """Its residuals for a batch of `copies` times the request's rows."""
        if self.network is None:
            assert self.residuals is not None
            return self.residuals.repeat(copies)
        assert self.hint is not None
        hint = self.hint.repeat(copies, 1, 1, 1)
        pieces = [slice(i, i + ROWS) for i in range(0, len(x), ROWS)]
        residuals = Residuals.cat(
            [self.network(x[some], t[some], conditioning.select(some), hint[some]) for some in pieces]
        )
        if self.network.config.global_pool and copies == 2:  # these steer what is wanted alone, not the negative prompt
            wanted = torch.arange(len(x), device=x.device) >= len(x) // 2
            return residuals.scaled(self.scale * wanted)
        return residuals.scaled(self.scale)


class Guidance:
    """How a request is guided by real evaluations; without a negative conditioning it is not."""

    def __init__(
        self,
        schedule: NoiseSchedule,
        scale: float,
        negative: Conditioning | None,
        steps: int | None = None,
        mode: str = "full",
    ) -> None:
        self.schedule, self.scale, self.negative, self.mode = schedule, scale, negative, mode
        self.steps = steps  # guide the first so many; None: all
        self.x0: Tensor | None = None  # mode "once": what the negative prompt saw in the first step

    def evaluations(self, index: int) -> int:
        """How often step `index` evaluates the network for each row."""
        off = self.negative is None or (self.steps is not None and index >= self.steps)
        return 1 if off or (self.mode == "once" and index > 0) else 2

    def __call__(self, network: Network, ev: Eval, conditioning: Conditioning) -> Tensor:
        """The guided output for an Eval."""
        if self.negative is None or (self.steps is not None and ev.index >= self.steps):
            return network(ev.x, ev.t, conditioning)
        if self.mode == "once" and ev.index > 0:
            # Residual guidance (Kodaira et al. 2023, arXiv 2312.12491, 3.3, "onetime-negative"): the clean latent
            # that the negative prompt saw at first stands for what it would see now.
            assert self.x0 is not None
            out = network(ev.x, ev.t, conditioning)
            uncond = self.schedule.to_output(ev.x, self.x0, ev.t).to(out.dtype)
            return guided(out, uncond, self.scale)
        both = Conditioning.cat([self.negative, conditioning])
        uncond, cond = network(torch.cat([ev.x, ev.x]), torch.cat([ev.t, ev.t]), both).chunk(2)
        if self.mode == "once":
            self.x0 = self.schedule.to_x0(ev.x, uncond, ev.t)
        return guided(cond, uncond, self.scale)


@dataclass(frozen=True, eq=False)
class Job:
    """A request that is ready to be denoised."""

    request: Request  # resolved
    grid: tuple[float, ...]  # timesteps
    sampler: Sampler
    conditioning: Conditioning  # n F rows
    guidance: Guidance
    controls: tuple[Steering, ...] = ()
    windows: tuple[range, ...] = ()  # of a clip: the frames that the network sees together
    beside: Tensor | None = (
        None  # what an inpainting U-Net sees beside the latents: mask, masked picture (n F, 5, h, w)
    )
    finish: Callable[[list[Image.Image]], list[Image.Image]] | None = None  # puts what was not painted back

    @property
    def evaluations(self) -> float:
        """How often the U-Net is evaluated for each picture, in all; of frames in overlapping windows, on average."""
        windows = sum(map(len, self.windows)) / self.request.frames if self.request.frames and self.windows else 1
        return windows * sum(self.guidance.evaluations(i) for i in range(len(self.grid)))

    def evaluate(self, unet: UNetCall, ev: Eval) -> Tensor:
        """The network's output for one Eval, with everything that steers it."""

        def network(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            copies, residuals = len(x) // len(ev.x), Residuals()
            for control in self.controls:
                if ev.index / len(self.grid) >= control.start and (ev.index + 1) / len(self.grid) <= control.end:
                    residuals = residuals + control.at(x, t, conditioning, copies)
            if self.beside is not None:
                x = torch.cat([x, self.beside.repeat(copies, 1, 1, 1)], dim=1)
            if self.request.frames is None:
                return unet(x, t, conditioning, residuals, None)
            return run_windows(unet, x, t, conditioning, residuals, self.request.frames, self.windows)

        return self.guidance(network, ev, self.conditioning)


@torch.inference_mode()
def generate(parts: Parts, job: Job) -> Iterator[Step]:
    """The steps of a prepared request. The last step's x0 are the latents to decode."""
    for ev in job.sampler:
        step = job.sampler.send(job.evaluate(parts.unet, ev))
        last = step.index + 1 == len(job.grid)
        # The reference decodes what the last update gave; DDIM may leave a little noise in it (set_alpha_to_one false).
        yield Step(step.index, step.t, step.x, step.x if last else step.x0, len(job.grid), parts)


def develop(parts: Parts, job: Job, x0: Tensor) -> list[Image.Image]:
    """The pictures of a job's final latents; what was not to be painted comes back as it was."""
    images = decode(parts, x0)
    return images if job.finish is None else job.finish(images)
