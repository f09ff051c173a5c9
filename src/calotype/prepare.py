"""From a request to a Job: everything that is encoded and drawn before the first step of a resolved request.

Noise is drawn in the reference's order, for each task its own (see `_draw`): the same seed, the same picture.
Shapes: n pictures of a request, or n clips of F frames: n F rows, clip by clip; latents (n F, C, h, w).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from calotype import images, latents, masks
from calotype.generate import Guidance, Job, Steering
from calotype.nn.controlnet import ControlNet
from calotype.nn.t2i_adapter import T2IAdapter
from calotype.nn.tiny_vae import AutoencoderTiny
from calotype.nn.unet import Conditioning, Residuals
from calotype.nn.windows import LENGTH, OVERLAP, context_windows
from calotype.parts import Parts
from calotype.request import Control, Request
from calotype.resolve import grid_of, schedule_of
from calotype.sampling import GAMMA, Source, draw, draws_needed, generators_for, sampler_for

CHUNK = 16  # frames whose posteriors the reference draws in one call, and that controls embed at a time


# ---- drawing ----


@dataclass(frozen=True, eq=False)
class _Draws:
    """All noise of a request, in rows; each a tensor (n F, C, h, w) float32 on the CPU."""

    posterior: Tensor | None  # of the picture to start from
    masked: Tensor | None  # of the picture with the mask's hole
    steps: list[Tensor]  # the start, and what is added between steps


def _draw(parts: Parts, request: Request, steps: int) -> _Draws:
    """Text: start, steps. Picture: its posterior, start, steps. Mask: posterior (with 9 channels only at a strength
    below 1), start, the masked picture's posterior (drawn even where it has no use), steps. Clips: each draw has
    frames inside; but the posteriors of frames to start from, 16 at a time, and their start have them outside.
    """
    config, generators = parts.vae.config, generators_for(seeds(request))
    assert request.width is not None
    assert request.height is not None
    C, h, w = config.latent_channels, request.height // config.downscale, request.width // config.downscale
    frames = request.frames

    def rows(inside: bool = True) -> Tensor:
        if frames is None:
            return draw(generators, (C, h, w))
        if inside:
            return draw(generators, (C, frames, h, w)).transpose(1, 2).flatten(0, 1)
        return draw(generators, (frames, C, h, w)).flatten(0, 1)

    def posterior() -> Tensor | None:
        if isinstance(parts.vae, AutoencoderTiny):  # it encodes to a point
            return None
        if frames is None:
            return draw(generators, (C, h, w))
        sizes = [min(CHUNK, frames - i) for i in range(0, frames, CHUNK)]
        return torch.cat([draw(generators, (some, C, h, w)) for some in sizes], dim=1).flatten(0, 1)

    picture = masked = None
    if request.image is not None and (_plain(parts) or request.strength != 1):
        picture = posterior()
    start = rows(inside=request.image is None)
    if request.mask is not None:
        masked = posterior()
    return _Draws(picture, masked, [start, *(rows() for _ in range(steps - 1))])


def _plain(parts: Parts) -> bool:
    """Whether the network takes latents and nothing beside them."""
    return parts.unet.config.in_channels == parts.vae.config.latent_channels


# ---- preparing ----


@torch.inference_mode()
def prepare(parts: Parts, request: Request) -> Job:
    """Encodes text and pictures, and draws all noise, of a resolved request."""
    assert request.sampler is not None, "the request is not resolved"
    assert request.guidance is not None
    assert request.width is not None
    assert request.height is not None
    size = (request.width, request.height)
    schedule, windows = schedule_of(parts, request), tuple[range, ...]()
    if request.frames is not None and parts.motion is not None:
        windows = _windows(request.frames, parts.motion.adapter.config.max_frames)
    times, gamma = grid_of(request, schedule), GAMMA if request.gamma is None else request.gamma
    draws = _draw(parts, request, draws_needed(request.sampler, len(times), gamma))
    noise = [each.to(parts.device, parts.dtype) for each in draws.steps]
    rows = len(noise[0])

    conditioning, negative = condition(
        parts,
        [request.prompt] * request.n,
        request.negative_prompt,
        request.guidance,
        size,
        clip_skip=request.clip_skip,
        emphasis=request.emphasis,
    )
    if request.frames is not None:
        each = torch.arange(request.n, device=parts.device).repeat_interleave(request.frames)
        conditioning = conditioning.select(each)
        negative = None if negative is None else negative.select(each)
    guidance = Guidance(schedule, request.guidance, negative, request.guidance_steps, request.guidance_mode)

    region = _region(request, size)
    source = beside = finish = None
    if request.image is not None:
        task = _picture_task(parts, request, size, region, rows, draws)
        source, beside, finish = task.source, task.beside, task.finish
    sampler = sampler_for(request.sampler, schedule, times, noise, source, gamma)
    acting = [control for control in request.controls if control.scale]
    controls = tuple(_steering(parts, control, request, size, region, rows) for control in acting)
    return Job(request, times, sampler, conditioning, guidance, controls, windows, beside, finish)


def _windows(frames: int, longest: int) -> tuple[range, ...]:
    """A clip as a whole where the motion adapter knows positions for it, else in windows as it was trained on."""
    if frames <= longest:
        return (range(frames),)
    length = min(LENGTH, longest)
    return tuple(context_windows(frames, length, min(OVERLAP, length - 1)))


def seeds(request: Request) -> list[int]:
    """The seed of each picture: they count up from the request's."""
    assert request.seed is not None
    return [request.seed + i for i in range(request.n)]


# ---- text ----


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
    n, config, device, dtype = len(prompts), parts.unet.config, parts.device, parts.dtype
    embedded = config.guidance_dim is not None
    time_ids = None
    if config.addition_in_dim is not None:  # SDXL: original size, crop, target size
        height_width = (float(size[1]), float(size[0]))
        time_ids = torch.tensor([*height_width, 0.0, 0.0, *height_width], device=device).expand(n, 6)
    w = torch.full((n,), guidance - 1.0, device=device) if embedded else None

    twice = not embedded and guidance > 1
    texts = {*prompts, negative} if twice else set(prompts)
    chunks = max(parts.text.chunks(text, emphasis=emphasis) for text in texts)
    context, pooled = parts.text.encode(prompts, clip_skip=clip_skip, emphasis=emphasis, chunks=chunks)
    pooled = None if pooled is None else pooled.to(device, dtype)
    text = Conditioning(context.to(device, dtype), pooled, time_ids, w)
    if not twice:
        return text, None
    # The negative prompt is read to the text encoder's end, without CLIP skip, as diffusers does.
    context, pooled = parts.text.encode([negative], emphasis=emphasis, chunks=chunks)
    if parts.zero_empty_negative and negative == "":  # SDXL was trained so: no text is zeros, not the embedding of ""
        context, pooled = torch.zeros_like(context), None if pooled is None else torch.zeros_like(pooled)
    pooled = None if pooled is None else pooled.to(device, dtype).expand(n, -1)
    return text, Conditioning(context.to(device, dtype).expand(n, -1, -1), pooled, time_ids)


# ---- pictures ----


@dataclass(frozen=True, eq=False)
class _PictureTask:
    source: Source
    beside: Tensor | None
    finish: Callable[[list[Image.Image]], list[Image.Image]] | None


def _picture_task(
    parts: Parts, request: Request, size: tuple[int, int], region: masks.Box | None, rows: int, draws: _Draws
) -> _PictureTask:
    """Image to image and inpainting: what the sampler starts from, what the network sees beside, what is put back."""
    device, dtype = parts.device, parts.dtype
    assert request.image is not None
    pictures = request.image if isinstance(request.image, tuple) else (request.image,)
    plain, noised = _plain(parts), request.mask is None or request.strength != 1
    if request.mask is None:
        pixels = torch.cat([images.to_tensor(images.resize(each, *size, request.resize)) for each in pictures])
        x0 = latents.encode(parts, pixels, draws.posterior)
        return _PictureTask(Source(_rows(x0, rows).to(device, dtype)), None, None)

    *scaled, mask = [_to_size(each, request, size, region) for each in (*pictures, request.mask)]
    hole = masks.to_tensor(mask)  # (1, 1, H, W), 0 or 1
    pixels = torch.cat([images.to_tensor(each) for each in scaled])
    small = masks.to_latents(hole, parts.vae.config.downscale).to(device, dtype)

    beside = None
    if not plain:
        seen = _rows(latents.encode(parts, pixels * (hole < 0.5), draws.masked), rows).to(device, dtype)
        beside = torch.cat([small.expand(rows, -1, -1, -1), seen], dim=1)
    x0 = torch.zeros_like(draws.steps[0])
    if plain or noised:
        x0 = _rows(latents.encode(parts, pixels, draws.posterior), rows)
    source = Source(x0.to(device, dtype), small if plain else None, noised)
    finish = partial(_put_back, request=request, scaled=scaled, mask=mask, region=region)
    return _PictureTask(source, beside, finish)


def _region(request: Request, size: tuple[int, int]) -> masks.Box | None:
    """The part of the pictures to work on; None is all of them."""
    if request.mask is None or request.mask_crop is None:
        return None
    return masks.crop_box(request.mask, size, request.mask_crop)


def _to_size(picture: Image.Image, request: Request, size: tuple[int, int], region: masks.Box | None) -> Image.Image:
    """A picture, or its part, as the networks see it."""
    if region is None:
        return images.resize(picture, *size, request.resize)
    # A part keeps its proportions whatever the mode: `masks.paste` takes the margins away again.
    return images.resize(picture.crop(region), *size, "pad")


def _put_back(
    painted: list[Image.Image],
    *,
    request: Request,
    scaled: list[Image.Image],
    mask: Image.Image,
    region: masks.Box | None,
) -> list[Image.Image]:
    """The painted pictures with all that the mask leaves black as it was, bit for bit."""
    if region is None:
        soft = masks.feather(mask, request.mask_feather)
        return [masks.composite(scaled[i % len(scaled)], each, soft) for i, each in enumerate(painted)]
    assert isinstance(request.image, Image.Image)
    assert request.mask is not None
    soft = masks.feather(request.mask, request.mask_feather)
    return [masks.paste(request.image, each, region, soft) for each in painted]


def _steering(
    parts: Parts, control: Control, request: Request, size: tuple[int, int], region: masks.Box | None, rows: int
) -> Steering:
    """A control of the request: its picture embedded, and a T2I-Adapter evaluated."""
    network = parts.controls[control.name]
    weight = next(network.parameters())
    pictures = control.image if isinstance(control.image, tuple) else (control.image,)
    if isinstance(network, T2IAdapter) and network.config.in_channels == 1:
        pictures = tuple(each.convert("L") for each in pictures)
    pixels = torch.cat([images.to_unit(_to_size(each, request, size, region)) for each in pictures])
    if isinstance(network, T2IAdapter):
        pixels = pixels[:, : network.config.in_channels]  # of grey, all are equal
        residuals = Residuals.cat([network(some.to(weight)) for some in torch.split(pixels, CHUNK)]).scaled(
            control.scale
        )
        return Steering(
            control.start, control.end, control.scale, None, residuals=residuals.repeat(rows // len(pixels))
        )
    assert isinstance(network, ControlNet)
    hints = [network.embed_hint(some.to(weight)) for some in torch.split(pixels, CHUNK)]
    hint = _rows(torch.cat(hints), rows)
    return Steering(control.start, control.end, control.scale, network, hint)


def _rows(x: Tensor, rows: int) -> Tensor:
    """(1 or F, ...) as (n F, ...): the same for each clip."""
    return x.repeat(rows // len(x), *(1 for _ in x.shape[1:]))
