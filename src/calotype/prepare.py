"""From a request to a Job: everything that is encoded and drawn before the first step of a resolved request.

Noise is drawn in the reference's order, for each task its own (see `_draw`): the same seed, the same picture.
Shapes: n pictures of a request, or n clips of F frames: n F rows, clip by clip; latents (n F, C, h, w).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from calotype.generate import Guidance, Job, Steering
from calotype.latents import Note
from calotype.nn.tiny_vae import AutoencoderTiny
from calotype.nn.unet import Conditioning, UNetConfig
from calotype.nn.windows import LENGTH, OVERLAP, context_windows
from calotype.parts import Parts
from calotype.picture_inputs import CHUNK, PictureInputs, Start
from calotype.resolve import Resolved
from calotype.sampling import draw, draws_needed, generators_for, sampler_for


@torch.inference_mode()
def prepare(parts: Parts, resolved: Resolved, *, note: Note | None = None) -> Job:
    """Encodes text and pictures, and draws all noise. `note` takes what may surprise on the way."""
    request, grid = resolved.request, resolved.grid
    draws = _draw(parts, resolved)
    noise = [each.to(parts.device, parts.dtype) for each in draws.steps]
    rows = len(noise[0])
    conditioning, negative = condition(
        parts,
        [request.prompt] * request.n,
        request.negative_prompt,
        resolved.guidance,
        (resolved.width, resolved.height),
        clip_skip=request.clip_skip,
        emphasis=request.emphasis,
    )
    windows: tuple[range, ...] = ()
    if request.frames is not None:
        clips = torch.arange(request.n, device=parts.device).repeat_interleave(request.frames)
        conditioning = conditioning.select(clips)
        negative = None if negative is None else negative.select(clips)
        if parts.motion is not None:
            windows = _windows(request.frames, parts.motion.adapter.config.max_frames)
    guidance = Guidance(resolved.schedule, resolved.guidance, negative, request.guidance_steps, request.guidance_mode)

    start, controls = Start(), tuple[Steering, ...]()
    if request.image is not None or request.controls:
        inputs = PictureInputs(parts, resolved, rows, note)
        start = inputs.start(draws.posterior, draws.masked)
        controls = tuple(inputs.steering(control) for control in request.controls if control.scale)
    return Job(
        grid,
        partial(sampler_for, resolved.sampler, resolved.schedule, grid, noise, start.source, resolved.gamma),
        conditioning,
        guidance,
        controls,
        request.frames,
        windows,
        start.beside,
        start.finish,
    )


def _windows(frames: int, longest: int) -> tuple[range, ...]:
    """A clip as a whole where the motion adapter knows positions for it, else in windows as it was trained on."""
    if frames <= longest:
        return (range(frames),)
    length = min(LENGTH, longest)
    return tuple(context_windows(frames, length, min(OVERLAP, length - 1)))


# ---- noise ----


@dataclass(frozen=True, eq=False)
class _Draws:
    """All noise of a request, in rows; each a tensor (n F, C, h, w) float32 on the CPU."""

    posterior: Tensor | None  # of the picture to start from
    masked: Tensor | None  # of the picture with the mask's hole
    steps: list[Tensor]  # the start, and what is added between steps


def _draw(parts: Parts, resolved: Resolved) -> _Draws:
    """Text: start, steps. Picture: its posterior, start, steps. Mask: posterior (with 9 channels only at a strength
    below 1), start, the masked picture's posterior (drawn even where it has no use), steps. Clips: each draw has
    frames inside; but the posteriors of frames to start from, 16 at a time, and their start have them outside.
    """
    request, config, generators = resolved.request, parts.vae.config, generators_for(resolved.seeds)
    C, h, w = config.latent_channels, resolved.height // config.downscale, resolved.width // config.downscale
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
    if request.image is not None and (not parts.inpaints or request.strength != 1):
        picture = posterior()
    first = rows(inside=request.image is None)
    if request.mask is not None:
        masked = posterior()
    further = draws_needed(resolved.sampler, len(resolved.grid), resolved.gamma) - 1
    return _Draws(picture, masked, [first, *(rows() for _ in range(further))])


# ---- text ----


def condition(
    parts: Parts,
    prompts: Sequence[str],
    negative: str,
    guidance: float,
    size: tuple[int, int],
    *,
    unet: UNetConfig | None = None,
    clip_skip: int | None = None,
    emphasis: bool = False,
) -> tuple[Conditioning, Conditioning | None]:
    """What steers the network, a row for each prompt; and the negative prompt's rows, for a second evaluation.

    size: width and height in pixels. A guidance embedding takes the scale itself: there is no second evaluation then.
    unet: of another network than the model's own.
    """
    n, config, device, dtype = len(prompts), unet or parts.unet.config, parts.device, parts.dtype
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
