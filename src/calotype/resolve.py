"""What a request leaves open is filled in, and what the model cannot do is refused, before anything is computed."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from PIL import Image

from calotype import images, masks
from calotype.errors import UsageError
from calotype.parts import Habit, Parts
from calotype.request import Request
from calotype.samplers import CONSISTENCY
from calotype.sampling import GAMMA, grid_for
from calotype.schedule import NoiseSchedule, Spacing

IMAGE_STRENGTH = 0.5  # of image to image, where a request leaves it open; inpainting paints anew: 1
FAR = 2.5  # times the pixels that a model was trained for: 768 px are near 512 px
MOST_PIXELS = 4  # a picture gives its size to a request that has none, up to so many times the model's own pixels

Habits = Mapping[str, Habit]  # of the few-step adapters that are in force, by what to call each in a sentence


@dataclass(frozen=True, eq=False)
class Resolved:
    """A request that leaves nothing open, and what it comes to on its model."""

    request: Request  # every default filled in: what its pictures' files say
    schedule: NoiseSchedule
    sampler: str
    grid: tuple[float, ...]  # timesteps
    guidance: float  # diffusers' guidance_scale
    gamma: float  # of "tcd"
    width: int  # pixels
    height: int
    seeds: tuple[int, ...]  # of each picture: they count up from the request's


def resolve(parts: Parts, request: Request, habits: Habits | None = None) -> tuple[Resolved, list[str]]:
    """The request with everything that it leaves open filled in: steps, guidance, size, sampler, seed. What was given
    comes first, then what few-step adapters (or the few-step model) like, then the model's defaults.

    With it come notes: a line for each few-step model or adapter that decided something, and for what this model will
    do badly. Raises UsageError for what it cannot do.
    """
    liked = _liked(parts, request, habits or {})
    said = _decided(parts, liked, habits or {})
    request = replace(request, **liked)
    defaults, strength = parts.defaults, _strength(request)
    width, height = _size(parts, request)
    sampler = defaults.sampler if request.sampler is None else request.sampler
    steps = defaults.steps if request.steps is None else request.steps
    if request.timesteps is not None:
        steps = len(request.timesteps)
    guidance = defaults.guidance if request.guidance is None else request.guidance
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    filled = replace(
        request,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        width=width,
        height=height,
        strength=strength,
        seed=seed,
    )
    schedule = _schedule(parts, filled)
    grid = tuple(grid_for(sampler, schedule, steps, request.timesteps, 1.0 if strength is None else strength))
    gamma = GAMMA if request.gamma is None else request.gamma
    seeds = tuple(seed + i for i in range(request.n))
    resolved = Resolved(filled, schedule, sampler, grid, guidance, gamma, width, height, seeds)
    _check_size(parts, resolved)
    _check_task(parts, resolved)
    return resolved, [*said, *_cautions(parts, resolved)]


def _strength(request: Request) -> float | None:
    if request.image is None or request.strength is not None:
        return request.strength
    return IMAGE_STRENGTH if request.mask is None else 1.0


# ---- few-step models and adapters ----


def _decided(parts: Parts, liked: Mapping[str, Any], habits: Habits) -> Iterator[str]:
    """A line for each few-step model or adapter that decides something which the request leaves open."""
    for name, habit in _in_force(parts, habits).items():
        said = [f"{field} {_shown(value)}" for field, value in liked.items() if getattr(habit, field) == value]
        if said:
            yield f"{name} is {habit.title}: {', '.join(said)}, as nothing else was asked for"


def _in_force(parts: Parts, habits: Habits) -> Habits:
    """An adapter is put on a model to change how that is used, so the model's own habit comes after."""
    return habits if habits or parts.habit is None else {"the model": parts.habit}


def _liked(parts: Parts, request: Request, habits: Habits) -> dict[str, Any]:
    """The fields that a request leaves open and few-step models or adapters decide. UsageError where they disagree."""
    open_steps = request.steps is None and request.timesteps is None
    found: dict[str, Any] = {}
    for field in ("sampler", "timesteps", "steps", "guidance", "spacing", "gamma"):
        wanted = {name: getattr(habit, field) for name, habit in _in_force(parts, habits).items()}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        if getattr(request, field) is not None or (field in ("steps", "timesteps") and not open_steps) or not wanted:
            continue
        sampler = found.get("sampler", request.sampler)
        if (field == "spacing" and sampler in CONSISTENCY) or (field == "gamma" and sampler != "tcd"):
            continue
        if field == "timesteps" and _strength(request) not in (None, 1):  # they begin at pure noise
            continue
        if field == "steps" and "timesteps" in found:
            continue
        (name, value), *others = wanted.items()
        for other, another in others:
            if another != value:
                wants = f"{name} wants {field} {_shown(value)}, {other} wants {_shown(another)}"
                raise UsageError(
                    f"{wants}: they contradict each other", f"say {field}, or take one of them out", field=field
                )
        found[field] = value
    return found


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- what the model can do ----


def _size(parts: Parts, request: Request) -> tuple[int, int]:
    """Width and height: the request's; else those of its first picture, if that is not too large; else the model's."""
    defaults, pictures = parts.defaults, [request.image, *(control.image for control in request.controls)]
    first = next((each[0] if isinstance(each, tuple) else each for each in pictures if each is not None), None)
    width, height = defaults.width, defaults.height
    if first is not None and request.mask_crop is None:
        shrink = min(1.0, math.sqrt(MOST_PIXELS * width * height / (first.width * first.height)))
        multiple = parts.vae.config.downscale
        width, height = (max(1, int(side * shrink) // multiple) * multiple for side in first.size)
    return request.width or width, request.height or height


def _check_size(parts: Parts, resolved: Resolved) -> None:
    multiple = parts.vae.config.downscale
    for name, pixels in (("width", resolved.width), ("height", resolved.height)):
        if pixels % multiple:
            raise UsageError(
                f"{name} is {pixels}: must be a multiple of {multiple} for this model",
                hint=f"try {max(1, round(pixels / multiple)) * multiple}",
                field=name,
            )


def _check_task(parts: Parts, resolved: Resolved) -> None:
    channels, latent, request = parts.unet.config.in_channels, parts.vae.config.latent_channels, resolved.request
    if channels != latent and request.mask is None:
        raise UsageError(
            f"this model's U-Net takes {channels} channels: it is made for inpainting, and there is no mask",
            hint="give an image and a mask; an all-white mask repaints everything",
            field="mask",
        )
    if request.frames is not None and parts.motion is None:
        raise UsageError(
            f"frames is {request.frames}, and the model has no motion adapter",
            hint="engine.set_motion(...) or --motion gives it one",
            field="frames",
        )
    if request.mask is not None:
        _check_mask(request, request.mask, resolved)
    for i, control in enumerate(request.controls):
        if control.name not in parts.controls:
            known = ", ".join(parts.controls) or "none"
            raise UsageError(
                f"there is no control {control.name!r}: the engine has {known}",
                hint="engine.add_control(...) or --control REF=IMAGE adds one",
                field=f"controls.{i}.name",
            )


def _check_mask(request: Request, mask: Image.Image, resolved: Resolved) -> None:
    """The mask as it is put to use: with `mask_crop` at its own size, else at the request's."""
    if request.mask_crop is None:
        mask = images.resize(mask, resolved.width, resolved.height, request.resize)
    else:
        for i, control in enumerate(request.controls):
            first = control.image[0] if isinstance(control.image, tuple) else control.image
            if first.size != mask.size:
                sizes = f"{first.width}x{first.height} and the image {mask.width}x{mask.height}"
                raise UsageError(
                    f"control {control.name!r} is {sizes}: with mask_crop they must be equal",
                    hint="the control is cropped as the image is: resize one of them first",
                    field=f"controls.{i}.image",
                )
    masks.check(mask, request.mask_feather)


def _cautions(parts: Parts, resolved: Resolved) -> Iterator[str]:
    """What this model will do badly, or not at all."""
    request, width, height, own = resolved.request, resolved.width, resolved.height, parts.defaults
    times = max(width * height / (own.width * own.height), (max(width, height) / max(own.width, own.height)) ** 2)
    if request.image is None and not 1 / FAR <= times <= FAR:  # a picture to start from composes what is drawn
        trained = f"{own.width}x{own.height} that this model was trained for"
        yield f"{width}x{height} is far from the {trained}: its pictures may fall apart"
    embedded, guidance = parts.unet.config.guidance_dim is not None, resolved.guidance
    if embedded and own.guidance_range is not None and not own.guidance_range[0] <= guidance <= own.guidance_range[1]:
        low, high = own.guidance_range
        yield f"guidance {guidance:g} is outside what this model was trained for ({low:g} to {high:g})"
    if request.negative_prompt and embedded:
        yield "the negative prompt has no effect: this model takes its guidance as an embedding"
    elif request.negative_prompt and guidance <= 1:
        yield f"the negative prompt has no effect at guidance {guidance:g}: give more than 1"
    if request.guidance_steps is not None and embedded:
        yield "guidance_steps has no effect: this model takes its guidance as an embedding"
    mask = request.mask
    if mask is not None and request.mask_crop is None and mask.size != (width, height):
        message = f"the picture is resized from {mask.width}x{mask.height} to {width}x{height}"
        yield f"{message}, also where the mask keeps it: with mask_crop it keeps its size"


def _schedule(parts: Parts, request: Request) -> NoiseSchedule:
    """The noise levels of a request: clips have those of the motion adapter."""
    schedule = parts.schedule if request.frames is None or parts.motion is None else parts.motion.schedule
    return schedule if request.spacing is None else replace(schedule, spacing=cast(Spacing, request.spacing))
