"""The one loop for every task: a prepared request becomes one update after another, each a little clearer.

A Job (calotype.prepare makes it) asks for calls of the U-Net and is sent their outputs: guidance, controls, inpainting
and windows are in what it asks. `generate` drives one job; `calotype.batch` drives many, with one call of the network
for all that fit together.

Shapes: n pictures of a request, or n clips of F frames: n F rows, clip by clip; latents (n F, C, h, w).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from calotype.nn.call import Call, Network
from calotype.nn.controlnet import ControlNet
from calotype.nn.unet import Conditioning, Residuals
from calotype.nn.windows import by_windows
from calotype.sampling import Sampler, Update, guided
from calotype.schedule import NoiseSchedule

ROWS = 32  # that a ControlNet sees at a time: its memory must not grow with a clip's length

# Asks for a call and takes its output, again and again; then yields the update that follows, and goes on.
Asking = Generator[Call | Update, Tensor | None, None]


@dataclass(frozen=True, eq=False)
class Guidance:
    """How a request is guided by real evaluations; without a negative conditioning it is not."""

    schedule: NoiseSchedule
    scale: float = 1.0  # diffusers' guidance_scale
    negative: Conditioning | None = None
    steps: int | None = None  # guide the first so many; None: all
    mode: str = "full"  # or "once": the negative prompt is evaluated in the first step only

    def evaluations(self, index: int) -> int:
        """How often step `index` evaluates the network for each row."""
        return 1 if not self.acts(index) or (self.mode == "once" and index > 0) else 2

    def acts(self, index: int) -> bool:
        """Whether step `index` is guided."""
        return self.negative is not None and (self.steps is None or index < self.steps)


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


@dataclass(frozen=True, eq=False)
class Job:
    """A request that is ready to be denoised. It is a value: every run of it is the same."""

    grid: tuple[float, ...]  # timesteps
    sampler: Callable[[], Sampler]  # begins it
    conditioning: Conditioning  # n F rows
    guidance: Guidance
    controls: tuple[Steering, ...] = ()
    frames: int | None = None  # of a clip
    windows: tuple[range, ...] = ()  # of a clip: the frames that the network sees together
    beside: Tensor | None = (
        None  # what an inpainting U-Net sees beside the latents (n F, 5, h, w): mask, masked picture
    )
    finish: Callable[[int, Image.Image], Image.Image] | None = None  # puts back what was not to be painted

    @property
    def evaluations(self) -> float:
        """How often the U-Net is evaluated for each picture, in all; of frames in overlapping windows, on average."""
        windows = sum(map(len, self.windows)) / self.frames if self.frames and self.windows else 1
        return windows * sum(self.guidance.evaluations(i) for i in range(len(self.grid)))

    def run(self) -> Asking:
        """Asks for each call of the network and is sent its output; then yields the update. The last one's x0 are the
        latents to decode.
        """
        sampler, guidance, negative = self.sampler(), self.guidance, self.guidance.negative
        both = self.conditioning if negative is None else Conditioning.cat([negative, self.conditioning])
        seen: Tensor | None = None  # mode "once": the clean latents that the negative prompt saw in the first step
        for ev in sampler:
            if negative is None or not guidance.acts(ev.index):
                out = yield from self._output(ev.index, ev.x, ev.t, self.conditioning)
            elif seen is None:
                outputs = yield from self._output(ev.index, torch.cat([ev.x, ev.x]), torch.cat([ev.t, ev.t]), both)
                uncond, cond = outputs.chunk(2)
                out = guided(cond, uncond, guidance.scale)
                if guidance.mode == "once":
                    seen = guidance.schedule.to_x0(ev.x, uncond, ev.t)
            else:
                # Residual guidance (Kodaira et al. 2023, arXiv 2312.12491, 3.3, "onetime-negative"): what the negative
                # prompt saw at first stands for what it would see now.
                cond = yield from self._output(ev.index, ev.x, ev.t, self.conditioning)
                uncond = guidance.schedule.to_output(ev.x, seen, ev.t).to(cond.dtype)
                out = guided(cond, uncond, guidance.scale)
            update = sampler.send(out)
            # The reference decodes what the last update gave; DDIM may leave a little noise in it (set_alpha_to_one).
            yield update if ev.index + 1 < len(self.grid) else replace(update, x0=update.x)

    def _output(self, index: int, x: Tensor, t: Tensor, conditioning: Conditioning) -> Generator[Call, Tensor, Tensor]:
        """The network's output for the request's rows, once or twice over, with everything that steers it."""
        copies, residuals = len(x) // len(self.conditioning.context), Residuals()
        total = len(self.grid)
        for control in self.controls:
            if index / total >= control.start and (index + 1) / total <= control.end:
                residuals = residuals + control.at(x, t, conditioning, copies)
        if self.beside is not None:
            x = torch.cat([x, self.beside.repeat(copies, 1, 1, 1)], dim=1)
        call = Call(x, t, conditioning, residuals, self.frames)
        return (yield from by_windows(call, self.windows)) if len(self.windows) > 1 else (yield call)


@torch.inference_mode()
def generate(unet: Network, job: Job) -> Iterator[Update]:
    """The updates of a job, each of its calls answered by the network at once."""
    run = job.run()
    said = next(run, None)
    while said is not None:
        if isinstance(said, Call):
            said = run.send(said.answered_by(unet))
        else:
            yield said
            said = next(run, None)
