"""A request: what to draw, in one value. The engine, the command, the server and a picture's metadata all speak it."""

from __future__ import annotations

import base64
import binascii
import difflib
import hashlib
import io
import itertools
import operator
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from numbers import Real
from typing import Any, cast

from PIL import Image

from calotype import images
from calotype.errors import UsageError
from calotype.samplers import SAMPLERS

SPACINGS = ("leading", "linspace", "trailing")
RESIZES = ("stretch", "crop", "pad")
GUIDANCE_MODES = ("full", "once")
MAX_PROMPT = 20_000  # characters
MAX_STEPS = 1000  # the length of every schedule that we know
MAX_GUIDANCE = 100.0
MAX_SEED = 2**64 - 1  # what torch's generator takes, and other programs write
MAX_N = 64
MAX_FRAMES = 512  # of a clip; and n clips share the memory
MAX_CONTROLS = 16
MAX_SCALE = 100.0  # of a LoRA
MAX_PADDING, MAX_FEATHER = 4096, 256  # pixels
SIZE_STEP, MAX_SIDE = 8, 8192  # one latent is 8 x 8 pixels
MAX_PIXELS = 4096 * 4096

# What other programs call our fields, for the hint.
ELSEWHERE = {
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "num_inference_steps": "steps",
    "num_images_per_prompt": "n",
    "sampler_name": "sampler",
    "init_image": "image",
    "mask_image": "mask",
    "num_frames": "frames",
    "padding_mask_crop": "mask_crop",
    "control_image": "controls",
    "lora": "loras",
    "eta": "gamma",
    "timestep_spacing": "spacing",
}

Picture = Image.Image | tuple[Image.Image, ...]  # one; or one for each frame


@dataclass(frozen=True)
class Control:
    """A picture that steers the composition, through a ControlNet or T2I-Adapter that the engine has.

    name: what `engine.add_control` called it.               image: a picture, or one for each frame.
    scale: 0 to 10; 0 is off.                               start, end: the share of the steps in which it acts.
    """

    name: str
    image: Picture = field(hash=False)
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise UsageError(f"a control's name is {_shown(self.name)}: must be text")
        object.__setattr__(self, "image", _picture(f"control {self.name!r}: image", self.image))
        object.__setattr__(self, "scale", _number(f"control {self.name!r}: scale", self.scale, 0, 10))
        object.__setattr__(self, "start", _number(f"control {self.name!r}: start", self.start, 0, 1))
        object.__setattr__(self, "end", _number(f"control {self.name!r}: end", self.end, 0, 1))
        if self.start >= self.end:
            raise UsageError(f"control {self.name!r}: start is {self.start:g} and end {self.end:g}: must be before it")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Control:
        """The control that `Request.to_json` wrote among the request's. Raises UsageError."""
        return cls(**_fields_of(cls, values, "a control", ("name", "image")))


@dataclass(frozen=True)
class Request:
    """One picture, or `n` of them, to be drawn. Frozen; `dataclasses.replace` makes variants, checked again.

    prompt, negative_prompt: text, at most 20,000 characters; the empty one is valid.
    steps: evaluations of the network, 1 to 1000.           guidance: diffusers' guidance_scale, 0 to 100; 1 is none.
    seed: torch's, 0 to 2^64 - 1; picture i is that of seed + i alone, of which the last must be in that range.
    n: pictures, 1 to 64.
    width, height: pixels, multiples of 8, 8 to 8192, at most 4096 x 4096 in all.
    sampler: "lcm", "tcd", "ddim" or "euler".               timesteps: an explicit grid, strictly descending.
    spacing: of ddim's and euler's timesteps: "leading",    "trailing" or "linspace".
    gamma: of "tcd", 0 (deterministic) to 1.                clip_skip: last layers of the text encoder to leave out.
    guidance_steps: guide the first so many steps only.     guidance_mode: "full", or "once": the negative prompt is
    emphasis: read (), [], (x:1.3) and BREAK in the         evaluated in the first step only, and remembered.
    prompts as instructions.
    image: a picture to start from, or one a frame.         strength: how much of it may change, above 0 and up to 1.
    mask: of the image's size; white is repainted.          mask_feather: pixels of the result over which it fades.
    mask_crop: work on the masked part alone, with so many  resize: how pictures come to the size: "stretch", "crop"
    pixels around it, at the request's size.                (fill, cut the rest), "pad" (fit, fill the rest).
    controls: see Control.                                  loras: a mix of its own, {name: scale}, of those that the
                                                            engine has; {} is none.
    frames: make a clip of so many, 1 to 512.               fps: frames a second in the clip's file, 1 to 60.

    None leaves a field to the model's own default. Raises UsageError, naming the field and what is allowed.
    """

    prompt: str
    _: KW_ONLY
    negative_prompt: str = ""
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    n: int = 1
    width: int | None = None
    height: int | None = None
    sampler: str | None = None
    timesteps: tuple[int, ...] | None = None
    spacing: str | None = None
    guidance_steps: int | None = None
    clip_skip: int | None = None
    emphasis: bool = False
    gamma: float | None = None
    guidance_mode: str = "full"
    image: Picture | None = field(default=None, hash=False)  # Pillow's pictures can be compared, but have no hash
    mask: Image.Image | None = field(default=None, hash=False)
    strength: float | None = None
    mask_feather: int = 0
    mask_crop: int | None = None
    resize: str = "stretch"
    controls: tuple[Control, ...] = ()
    loras: Mapping[str, float] | None = field(default=None, hash=False)
    frames: int | None = None
    fps: int = 8

    def __post_init__(self) -> None:
        self._set("prompt", _text("prompt", self.prompt))
        self._set("negative_prompt", _text("negative_prompt", self.negative_prompt))
        # All pictures of a request are in memory at once, so there are not arbitrarily many.
        self._set(
            "n", _integer("n", self.n, 1, MAX_N, "one request's pictures share the memory: make further requests")
        )
        if self.steps is not None:
            self._set("steps", _integer("steps", self.steps, 1, MAX_STEPS))
        if self.guidance is not None:
            self._set("guidance", _guidance(self.guidance))
        if self.seed is not None:
            hint = "picture i takes the seed + i" if self.n > 1 else None
            if _whole(self.seed) == -1:
                hint = "for a random one, which is what -1 means elsewhere, leave seed out"
            self._set("seed", _integer("seed", self.seed, 0, MAX_SEED - (self.n - 1), hint))
        if self.width is not None:
            self._set("width", _side("width", self.width))
        if self.height is not None:
            self._set("height", _side("height", self.height))
        if self.width is not None and self.height is not None and self.width * self.height > MAX_PIXELS:
            raise UsageError(
                f"the size is {self.width}x{self.height}: must be at most {MAX_PIXELS} pixels",
                f"with this width, a height of at most {MAX_PIXELS // self.width // SIZE_STEP * SIZE_STEP}",
            )
        if self.sampler is not None:
            _choice("sampler", self.sampler, tuple(SAMPLERS))
        if self.timesteps is not None:
            self._set("timesteps", _timesteps(self.timesteps))
            if self.steps is not None and self.steps != len(self.timesteps):
                raise UsageError(
                    f"steps is {self.steps}: must be the number of timesteps, {len(self.timesteps)}", "leave steps out"
                )
        if self.guidance_steps is not None:
            self._set("guidance_steps", _integer("guidance_steps", self.guidance_steps, 0, MAX_STEPS))
        if self.clip_skip is not None:
            self._set("clip_skip", _integer("clip_skip", self.clip_skip, 0, MAX_STEPS))
        if not isinstance(self.emphasis, bool):
            raise UsageError(f"emphasis is {_shown(self.emphasis)}: must be true or false")
        if self.gamma is not None:
            self._set("gamma", _number("gamma", self.gamma, 0, 1))
        if self.spacing is not None:
            _choice("spacing", self.spacing, SPACINGS)
        _choice("guidance_mode", self.guidance_mode, GUIDANCE_MODES)
        _choice("resize", self.resize, RESIZES)
        self._set("fps", _integer("fps", self.fps, 1, 60))
        if self.frames is not None:
            self._set("frames", _integer("frames", self.frames, 1, MAX_FRAMES // self.n))
        self._check_picture()
        self._check_controls()
        if self.loras is not None:
            if not isinstance(self.loras, Mapping) or not all(isinstance(name, str) for name in self.loras):
                raise UsageError(f"loras is {_shown(self.loras)}: must be names with their scales", '{"papercut": 0.8}')
            scales = {
                name: _number(f"loras: {name!r}", each, -MAX_SCALE, MAX_SCALE) for name, each in self.loras.items()
            }
            self._set("loras", scales)

    def _check_picture(self) -> None:
        """The picture to start from, and all that only makes sense with one."""
        self._set("mask_feather", _integer("mask_feather", self.mask_feather, 0, MAX_FEATHER))
        if self.mask_crop is not None:
            self._set("mask_crop", _integer("mask_crop", self.mask_crop, 0, MAX_PADDING))
        if self.image is None:
            for name in ("mask", "strength"):
                if getattr(self, name) is not None:
                    raise UsageError(f"there is a {name} but no image", "give the picture to start from as image")
        else:
            self._set("image", _picture("image", self.image))
            self._check_frames("image", self.image)
        if self.strength is not None:
            strength = _number("strength", self.strength, 0, 1)
            if strength == 0:
                raise UsageError("strength is 0: must be above 0", "nothing would be painted")
            self._set("strength", strength)
        if self.mask is None:
            if self.mask_crop is not None or self.mask_feather:
                name = "mask_crop" if self.mask_crop is not None else "mask_feather"
                raise UsageError(f"there is a {name} but no mask", "white in the mask is repainted")
            return
        mask = _picture("mask", self.mask)
        if isinstance(mask, tuple):
            raise UsageError("mask is a list of pictures: must be one picture")
        self._set("mask", mask)
        first = self.image[0] if isinstance(self.image, tuple) else self.image
        assert first is not None
        if mask.size != first.size:
            (mw, mh), (w, h) = mask.size, first.size
            raise UsageError(f"the mask is {mw}x{mh} and the image {w}x{h}: must be equal", "resize one of them first")
        if self.mask_crop is not None and isinstance(self.image, tuple):
            raise UsageError("mask_crop works on one picture, not on frames", "crop the frames first")

    def _check_controls(self) -> None:
        if not isinstance(self.controls, list | tuple):
            raise UsageError(f"controls is {_shown(self.controls)}: must be a list of controls")
        if len(self.controls) > MAX_CONTROLS:
            raise UsageError(f"there are {len(self.controls)} controls: must be at most {MAX_CONTROLS}")
        controls = tuple(Control.from_json(each) if isinstance(each, dict) else each for each in self.controls)
        for control in controls:
            if not isinstance(control, Control):
                raise UsageError(f"controls has {_shown(control)}: must be a Control")
            self._check_frames(f"control {control.name!r}", control.image)
        self._set("controls", controls)

    def _check_frames(self, what: str, pictures: Picture) -> None:
        if isinstance(pictures, tuple) and len(pictures) != self.frames:
            told = "no frames are asked for" if self.frames is None else f"{self.frames} frames are asked for"
            raise UsageError(f"{what} has {len(pictures)} pictures and {told}", f"give frames={len(pictures)}")

    def _set(self, field: str, value: object) -> None:
        """Store a checked value: of the plain type, whatever kind of number or sequence was given."""
        object.__setattr__(self, field, value)

    def to_json(self, *, pictures: bool = True) -> dict[str, Any]:
        """The fields that differ from their default, as values of JSON; the prompt always.

        Pictures are data URIs (PNG, base64); or, without `pictures`, only a digest that tells them apart.
        """
        show = _to_uri if pictures else digest

        def plain(value: Any) -> Any:
            if isinstance(value, Image.Image):
                return show(value)
            if isinstance(value, Control):
                return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
            if isinstance(value, Mapping):
                return dict(value)
            return [plain(each) for each in value] if isinstance(value, tuple) else value

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            field.name: plain(values[field.name])
            for field in fields(self)
            if field.name == "prompt" or values[field.name] != field.default
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Request:
        """The request that `to_json` wrote. Raises UsageError, for an unknown field with the nearest known one."""
        if not isinstance(values, Mapping):
            raise UsageError(f"a request is {_shown(values)}: must be an object with a prompt")
        return cls(**_fields_of(cls, values, "a request", ("prompt",)))


def adapter_name(ref: object) -> str:
    """What an adapter is called that gets no name: the last part of what it was loaded from."""
    return re.split(r"[/\\]", str(ref).rstrip("/"))[-1].partition("@")[0].removesuffix(".safetensors")


def _fields_of(kind: type, values: Mapping[str, Any], what: str, needed: tuple[str, ...]) -> Mapping[str, Any]:
    """The values, once all are known to be fields of that dataclass, and none that is needed is missing."""
    known = [field.name for field in fields(kind)]
    for name in values:
        if name not in known:
            hint = _nearest(ELSEWHERE.get(name, name), known)
            raise UsageError(f"{what} has no field {_shown(name)}: it has {', '.join(known)}", hint)
    for name in needed:
        if name not in values:
            hint = "the empty text is a prompt" if name == "prompt" else None
            raise UsageError(f"{what} must have {'an' if name == 'image' else 'a'} {name}", hint)
    return values


def _text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{field} is of type {type(value).__name__}: must be text")
    if len(value) > MAX_PROMPT:
        raise UsageError(f"{field} has {len(value)} characters: must be at most {MAX_PROMPT}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{field} has a lone surrogate at character {error.start}: must be valid Unicode",
            "half of a character that was cut or decoded wrongly",
        ) from None
    return str(value)


def _integer(field: str, value: object, low: int, high: int, hint: str | None = None) -> int:
    number = _whole(value)
    if number is None or not low <= number <= high:
        raise UsageError(f"{field} is {_shown(value)}: must be a whole number between {low} and {high}", hint)
    return number


def _whole(value: object) -> int | None:
    """A whole number of any library as an int; None for anything else, bools and 4.0 included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _number(field: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= cast(float, value) <= high:
        raise UsageError(f"{field} is {_shown(value)}: must be a number between {low:g} and {high:g}")
    return float(value)


def _choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if not (isinstance(value, str) and value in allowed):
        raise UsageError(f"{field} is {_shown(value)}: must be one of {', '.join(allowed)}", _nearest(value, allowed))


def _picture(field: str, value: object) -> Picture:
    """A picture, or several: as they are, or out of data URIs. Never a path: a request may come from a stranger."""
    if isinstance(value, list | tuple):
        if not 1 <= len(value) <= MAX_FRAMES:
            raise UsageError(f"{field} is a list of {len(value)} pictures: must be 1 to {MAX_FRAMES}")
        pictures = tuple(_picture(field, each) for each in value)
        if any(isinstance(each, tuple) for each in pictures):
            raise UsageError(f"{field} is a list of lists: must be pictures")
        flat = cast(tuple[Image.Image, ...], pictures)
        if len({each.size for each in flat}) > 1:
            raise UsageError(f"{field} has pictures of different sizes: must be equal")
        return flat
    if isinstance(value, Image.Image):
        return images.checked(value, field)
    if isinstance(value, str):
        return _from_uri(field, value)
    raise UsageError(
        f"{field} is of type {type(value).__name__}: must be a picture", "open a file with calotype.open_image"
    )


def _guidance(value: object) -> float:
    # Compared before it is converted: float() of a huge whole number overflows. NaN compares false.
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= cast(float, value) <= MAX_GUIDANCE:
        raise UsageError(
            f"guidance is {_shown(value)}: must be a number between 0 and {MAX_GUIDANCE:g}", "1 is no guidance"
        )
    return float(value)


def _side(field: str, value: object) -> int:
    number = _whole(value)
    if number is None or number % SIZE_STEP or not SIZE_STEP <= number <= MAX_SIDE:
        hint = None
        if number is not None:
            nearest = (number + SIZE_STEP // 2) // SIZE_STEP * SIZE_STEP
            hint = f"{min(max(nearest, SIZE_STEP), MAX_SIDE)} is the nearest"
        raise UsageError(
            f"{field} is {_shown(value)}: must be a multiple of {SIZE_STEP} between {SIZE_STEP} and {MAX_SIDE}", hint
        )
    return number


def _timesteps(values: object) -> tuple[int, ...]:
    if not isinstance(values, list | tuple | range):
        raise UsageError(f"timesteps is {_shown(values)}: must be a list of whole numbers")
    if not 1 <= len(values) <= MAX_STEPS:
        raise UsageError(f"timesteps has {len(values)} entries: must have 1 to {MAX_STEPS}")
    grid = [_whole(value) for value in values]
    for value, number in zip(values, grid, strict=True):
        if number is None or number < 0:
            raise UsageError(f"timesteps has {_shown(value)}: must be whole numbers of at least 0")
    numbers = tuple(number for number in grid if number is not None)
    for before, after in itertools.pairwise(numbers):
        if after >= before:
            raise UsageError(
                f"timesteps has {_shown(after)} after {_shown(before)}: must descend",
                "from noise to picture: 999 comes first",
            )
    return numbers


def _nearest(name: object, known: tuple[str, ...] | list[str]) -> str | None:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5) if isinstance(name, str) and len(name) < 100 else []
    return f"did you mean {near[0]}?" if near else None


def _shown(value: object) -> str:
    """A value for a message: one short line, whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print whole numbers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


# ---- pictures in JSON ----

URI = "data:image/png;base64,"


def digest(picture: Image.Image) -> str:
    """What tells a picture apart from others, short enough for a message: a hash of its mode, size and pixels."""
    content = f"{picture.mode} {picture.size} ".encode() + picture.tobytes()
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _to_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return URI + base64.b64encode(file.getvalue()).decode()


def _from_uri(field: str, text: str) -> Image.Image:
    if text.startswith("sha256:"):
        raise UsageError(f"{field} was a picture that is not in the file", "give the same picture again")
    head, comma, content = text.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise UsageError(f"{field} is {_shown(text)}: must be a data URI with base64", f"it begins with {URI}")
    try:
        return images.open_image(base64.b64decode(content, validate=True))
    except binascii.Error:
        raise UsageError(f"{field} is a data URI that is not base64") from None
