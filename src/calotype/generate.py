"""The one loop for every task: a request becomes Step, Step, ..., each a little clearer than the one before.

`prepare` turns a request into a Job (its sampler, its noise, its conditioning); `generate` drives one. A batcher drives
many: it takes an Eval from each job's sampler, runs the network once for all, and sends each its share.

Shapes: n pictures of a request, latents (n, C, h, w).
"""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from calotype import sampling
from calotype.errors import CalotypeError, CalotypeWarning, UsageError
from calotype.images import grid, to_pil
from calotype.nn.unet import Conditioning
from calotype.parts import Parts
from calotype.request import Request
from calotype.sampling import Eval, Sampler, draw_noise, draws_needed, grid_for, guided

DECODE_PIXELS = 2**20  # pixels decoded at a time: the decoder's memory must not grow with n


@dataclass(frozen=True, eq=False)
class Step(sampling.Step):
    """One step of a request: index, t, x (latents after the update) and x0 (denoised latents), both (n, C, h, w)."""

    total: int  # how many steps there will be
    parts: Parts

    def preview(self) -> Image.Image:
        """What the picture looks like so far: x0 decoded; several pictures as a sheet."""
        images = decode(self.parts, self.x0)
        return images[0] if len(images) == 1 else grid(images, columns=math.ceil(math.sqrt(len(images))))


@dataclass(frozen=True, eq=False)
class Job:
    """A request that is ready to be denoised."""

    request: Request  # resolved
    grid: tuple[float, ...]  # timesteps
    sampler: Sampler
    conditioning: Conditioning  # n rows
    negative: Conditioning | None  # n rows, where guidance takes a second evaluation of the network

    def evaluate(self, unet: Callable[[Tensor, Tensor, Conditioning], Tensor], ev: Eval) -> Tensor:
        """The network's output for one Eval, guided if this request asks for it."""
        request = self.request
        scale = 1.0 if request.guidance is None else request.guidance
        guided_here = request.guidance_steps is None or ev.index < request.guidance_steps
        return run_guided(unet, ev, self.conditioning, self.negative if guided_here else None, scale)


def run_guided(
    unet: Callable[[Tensor, Tensor, Conditioning], Tensor],
    ev: Eval,
    conditioning: Conditioning,
    negative: Conditioning | None,
    scale: float,
) -> Tensor:
    """The network's output for an Eval, guided away from `negative`, if there is one, by a batch of twice the size."""
    if negative is None:
        return unet(ev.x, ev.t, conditioning)
    both = Conditioning.cat([negative, conditioning])
    uncond, cond = unet(torch.cat([ev.x, ev.x]), torch.cat([ev.t, ev.t]), both).chunk(2)
    return guided(cond, uncond, scale)


def resolve(parts: Parts, request: Request) -> Request:
    """The request with everything that it leaves open filled in from the model: steps, guidance, size, sampler, seed.

    Raises UsageError for what this model cannot do; warns (CalotypeWarning) of what it will do badly.
    """
    defaults = parts.defaults
    sampler = defaults.sampler if request.sampler is None else request.sampler
    steps = defaults.steps if request.steps is None else request.steps
    if request.timesteps is not None:
        steps = len(request.timesteps)
    resolved = replace(
        request,
        sampler=sampler,
        steps=steps,
        guidance=defaults.guidance if request.guidance is None else request.guidance,
        width=defaults.width if request.width is None else request.width,
        height=defaults.height if request.height is None else request.height,
        seed=secrets.randbelow(2**32) if request.seed is None else request.seed,
    )
    grid_for(sampler, parts.schedule, steps, resolved.timesteps)  # raises where the grid has no such steps
    _check_size(parts, resolved)
    _check_guidance(parts, resolved)
    if parts.unet.config.in_channels != parts.vae.config.latent_channels:
        raise UsageError(
            f"this model's U-Net takes {parts.unet.config.in_channels} channels: it is made for inpainting",
            hint="text to image needs a U-Net with 4 input channels",
        )
    return resolved


def _check_size(parts: Parts, request: Request) -> None:
    multiple = parts.vae.config.downscale
    for name in ("width", "height"):
        pixels = getattr(request, name)
        if pixels % multiple:
            raise UsageError(
                f"{name} is {pixels}: must be a multiple of {multiple} for this model",
                hint=f"try {max(1, round(pixels / multiple)) * multiple}",
            )


def _check_guidance(parts: Parts, request: Request) -> None:
    embedded, guidance = parts.unet.config.guidance_dim is not None, request.guidance
    trained = parts.defaults.guidance_range
    assert guidance is not None
    messages = []
    if embedded and trained is not None and not trained[0] <= guidance <= trained[1]:
        messages.append(
            f"guidance {guidance:g} is outside what this model was trained for ({trained[0]:g} to {trained[1]:g})"
        )
    if request.negative_prompt and embedded:
        messages.append("the negative prompt has no effect: this model takes its guidance as an embedding")
    elif request.negative_prompt and guidance <= 1:
        messages.append(f"the negative prompt has no effect at guidance {guidance:g}: give more than 1")
    if request.guidance_steps is not None and embedded:
        messages.append("guidance_steps has no effect: this model takes its guidance as an embedding")
    for message in messages:
        warnings.warn(message, CalotypeWarning, stacklevel=4)


@torch.inference_mode()
def prepare(parts: Parts, request: Request) -> Job:
    """Encodes the prompt and draws all noise of a resolved request."""
    assert request.sampler is not None, "the request is not resolved"
    assert request.steps is not None
    assert request.guidance is not None
    assert request.width is not None
    assert request.height is not None
    weight = next(parts.unet.parameters())
    times = tuple(grid_for(request.sampler, parts.schedule, request.steps, request.timesteps))
    downscale = parts.vae.config.downscale
    shape = (parts.vae.config.latent_channels, request.height // downscale, request.width // downscale)
    draws = draw_noise(seeds(request), shape, draws_needed(request.sampler, len(times)))
    noise = [draw.to(weight.device, weight.dtype) for draw in draws]
    conditioning, negative = condition(
        parts,
        [request.prompt] * request.n,
        request.negative_prompt,
        request.guidance,
        (request.width, request.height),
        clip_skip=request.clip_skip,
        emphasis=request.emphasis,
    )
    sampler = sampling.SAMPLERS[request.sampler](parts.schedule, times, noise)
    return Job(request, times, sampler, conditioning, negative)


def seeds(request: Request) -> list[int]:
    """The seed of each picture: they count up from the request's."""
    assert request.seed is not None
    return [request.seed + i for i in range(request.n)]


def condition(
    parts: Parts,
    prompts: Sequence[str],
    negative: str,
    guidance: float,
    size: tuple[int, int],
    *,
    clip_skip: int | None = None,
    emphasis: bool = False,
) -> tuple[Conditioning, Conditioning | None]:
    """What steers the network, a row for each prompt; and the negative prompt's rows, for a second evaluation.

    size: width and height in pixels. A guidance embedding takes the scale itself: there is no second evaluation then.
    """
    n, config, weight = len(prompts), parts.unet.config, next(parts.unet.parameters())
    embedded = config.guidance_dim is not None
    time_ids = None
    if config.addition_in_dim is not None:  # SDXL: original size, crop, target size
        height_width = (float(size[1]), float(size[0]))
        time_ids = torch.tensor([*height_width, 0.0, 0.0, *height_width], device=weight.device).expand(n, 6)
    w = torch.full((n,), guidance - 1.0, device=weight.device) if embedded else None

    twice = not embedded and guidance > 1
    texts = {*prompts, negative} if twice else set(prompts)
    chunks = max(parts.text.chunks(text, emphasis=emphasis) for text in texts)
    context, pooled = parts.text.encode(prompts, clip_skip=clip_skip, emphasis=emphasis, chunks=chunks)
    pooled = None if pooled is None else pooled.to(weight)
    text = Conditioning(context.to(weight), pooled, time_ids, w)
    if not twice:
        return text, None
    # The negative prompt is read to the text encoder's end, without CLIP skip, as diffusers does.
    context, pooled = parts.text.encode([negative], emphasis=emphasis, chunks=chunks)
    if parts.zero_empty_negative and negative == "":  # SDXL was trained so: no text is zeros, not the embedding of ""
        context, pooled = torch.zeros_like(context), None if pooled is None else torch.zeros_like(pooled)
    pooled = None if pooled is None else pooled.to(weight).expand(n, -1)
    return text, Conditioning(context.to(weight).expand(n, -1, -1), pooled, time_ids)


@torch.inference_mode()
def generate(parts: Parts, job: Job) -> Iterator[Step]:
    """The steps of a prepared request. The last step's x0 are the latents to decode."""
    for ev in job.sampler:
        step = job.sampler.send(job.evaluate(parts.unet, ev))
        last = step.index + 1 == len(job.grid)
        # The reference decodes what the last update gave; DDIM may leave a little noise in it (set_alpha_to_one false).
        yield Step(step.index, step.t, step.x, step.x if last else step.x0, len(job.grid), parts)


@torch.inference_mode()
def decode(parts: Parts, x0: Tensor) -> list[Image.Image]:
    """Pictures of the latents x0 (n, C, h, w), a few at a time."""
    config, weight = parts.vae.config, next(parts.vae.parameters())
    latents = (x0.float() / config.scaling_factor + config.shift_factor).to(weight.device, weight.dtype)
    pixels = latents.shape[-2] * latents.shape[-1] * config.downscale**2
    images: list[Image.Image] = []
    for some in torch.split(latents, max(1, DECODE_PIXELS // pixels)):
        decoded = parts.vae.decode(some)
        if not torch.isfinite(decoded).all():
            raise CalotypeError(
                f"the decoder gave numbers that are not finite in {str(weight.dtype).removeprefix('torch.')}",
                hint='load the model with dtype="float32"',
            )
        images += to_pil(decoded)
    return images
