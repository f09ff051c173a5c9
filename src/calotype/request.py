"""A request: what to draw, in one value. The engine, the command, the server and a picture's metadata all speak it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import itertools
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from calotype.errors import UsageError
from calotype.rules import Choice, Flag, Number, Text, Whole, blaming, described, listed, nearest, option, settle, shown
from calotype.samplers import SAMPLERS

if TYPE_CHECKING:  # the command's options are made of a request's fields, and its help waits for nothing
    from PIL import Image

SPACINGS = ("leading", "linspace", "trailing")
RESIZES = ("stretch", "crop", "pad")
GUIDANCE_MODES = ("full", "once")
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

Picture: TypeAlias = "Image.Image | tuple[Image.Image, ...]"  # one; or one for each frame


# ---- the rules of single fields ----


def _control_name(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"a control's name is {shown(value)}: must be text")
    return value


def _picture(name: str, value: object) -> Picture:
    """A picture, or several: as they are, or out of data URIs. Never a path: a request may come from a stranger."""
    from PIL import Image

    from calotype import images

    if isinstance(value, list | tuple):
        if not 1 <= len(value) <= MAX_FRAMES:
            raise UsageError(f"{name} is a list of {len(value)} pictures: must be 1 to {MAX_FRAMES}")
        pictures = tuple(_picture(name, each) for each in value)
        if any(isinstance(each, tuple) for each in pictures):
            raise UsageError(f"{name} is a list of lists: must be pictures")
        flat = cast("tuple[Image.Image, ...]", pictures)
        if len({each.size for each in flat}) > 1:
            raise UsageError(f"{name} has pictures of different sizes: must be equal")
        return flat
    if isinstance(value, Image.Image):
        return images.checked(value, name)
    if isinstance(value, str):
        return _from_uri(name, value)
    raise UsageError(
        f"{name} is of type {type(value).__name__}: must be a picture", "open a file with calotype.open_image"
    )


def _mask(name: str, value: object) -> Image.Image:
    picture = _picture(name, value)
    if isinstance(picture, tuple):
        raise UsageError(f"{name} is a list of pictures: must be one picture")
    return picture


def _strength(name: str, value: object) -> float:
    strength = Number(0, 1)(name, value)
    if strength == 0:
        raise UsageError(f"{name} is 0: must be above 0", "nothing would be painted")
    return strength


def _timesteps(name: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, list | tuple | range):
        raise UsageError(f"{name} is {shown(values)}: must be a list of whole numbers")
    if not 1 <= len(values) <= MAX_STEPS:
        raise UsageError(f"{name} has {len(values)} entries: must have 1 to {MAX_STEPS}")
    numbers = []
    for value in values:
        number = Whole(0).plain(value)
        if number is None:
            raise UsageError(f"{name} has {shown(value)}: must be whole numbers of at least 0")
        numbers.append(number)
    for before, after in itertools.pairwise(numbers):
        if after >= before:
            raise UsageError(
                f"{name} has {shown(after)} after {shown(before)}: must descend",
                "from noise to picture: 999 comes first",
            )
    return tuple(numbers)


def _loras(name: str, mix: object) -> dict[str, float]:
    if not isinstance(mix, Mapping) or not all(isinstance(each, str) for each in mix):
        raise UsageError(f"{name} is {shown(mix)}: must be names with their scales", '{"papercut": 0.8}')
    scale = Number(-MAX_SCALE, MAX_SCALE)
    return {each: scale(f"{name}: {each!r}", value) for each, value in mix.items()}


def _controls(name: str, values: object) -> tuple[Control, ...]:
    if not isinstance(values, list | tuple):
        raise UsageError(f"{name} is {shown(values)}: must be a list of controls")
    if len(values) > MAX_CONTROLS:
        raise UsageError(f"there are {len(values)} controls: must be at most {MAX_CONTROLS}")
    controls = []
    for i, each in enumerate(values):
        with blaming(str(i)):
            control = Control.from_json(each) if isinstance(each, dict) else each
            if not isinstance(control, Control):
                raise UsageError(f"{name} has {shown(control)}: must be a Control")
            controls.append(control)
    return tuple(controls)


# ---- a request ----


@listed
@dataclass(frozen=True)
class Control:
    """A picture that steers the composition, through a ControlNet or T2I-Adapter that the engine has.

    Raises UsageError, naming the field and what is allowed. The fields:
    """

    name: str = field(metadata=described("What `engine.add_control` called it.", _control_name, more=""))
    image: Picture = field(hash=False, metadata=described("A picture, or one for each frame.", _picture, more=""))
    scale: float = option(1.0, "How strongly it acts; 0 is off.", Number(0, 10))
    start: float = option(0.0, "The share of the steps after which it begins.", Number(0, 1))
    end: float = option(1.0, "The share of the steps after which it ends, above start.", Number(0, 1))

    def __post_init__(self) -> None:
        settle(self, Control, f"control {shown(self.name)}: ")
        if self.start >= self.end:
            message = f"control {self.name!r}: start is {self.start:g} and end {self.end:g}: must be before it"
            raise UsageError(message, field="start")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Control:
        """The control that `Request.to_json` wrote among the request's. Raises UsageError."""
        return cls(**_fields_of(cls, values, "a control", ("name", "image")))


@listed
@dataclass(frozen=True)
class Request:
    """One picture, or `n` of them, to be drawn. Frozen; `dataclasses.replace` makes variants, checked again.

    None leaves a field to the model's own default. Raises UsageError, naming the field and what is allowed. The fields:
    """

    prompt: str = field(metadata=described("What to draw.", Text(), more="The empty text is a prompt, too."))
    _: KW_ONLY
    negative_prompt: str = option("", "What not to draw.", Text(), "TEXT")
    steps: int | None = option(None, "Network evaluations, usually 1 to 8.", Whole(1, MAX_STEPS), "N")
    guidance: float | None = option(
        None,
        "Guidance scale; 1 is none.",
        Number(0, MAX_GUIDANCE, "1 is no guidance"),
        "G",
        "That of diffusers, 0 to 100.",
    )
    seed: int | None = option(
        None,
        "Seed of the first picture (random).",
        Whole(0, MAX_SEED, advice="for a random one, which is -1 elsewhere, leave seed out"),
        "S",
        "0 to 2^64 - 1.",
    )
    # All pictures of a request are in memory at once, so there are not arbitrarily many.
    n: int = option(
        1,
        "How many pictures: seeds S, S+1, ...",
        Whole(1, MAX_N, advice="one request's pictures share the memory: make further requests"),
        "N",
        "Each is the one that its seed alone would give; 1 to 64.",
    )
    width: int | None = option(None, "Pixels from left to right.", Whole(SIZE_STEP, MAX_SIDE, SIZE_STEP))
    height: int | None = option(
        None, "Pixels from top to bottom.", Whole(SIZE_STEP, MAX_SIDE, SIZE_STEP), more="As width; 4096 x 4096 at most."
    )
    sampler: str | None = option(None, "lcm, tcd, ddim or euler.", Choice(SAMPLERS), "NAME", "")
    timesteps: tuple[int, ...] | None = option(
        None, "An explicit grid, such as 999,499.", _timesteps, "T,T,...", "Whole numbers that descend."
    )
    spacing: str | None = option(
        None, "Of ddim's and euler's steps: leading, linspace, trailing.", Choice(SPACINGS), "NAME", ""
    )
    guidance_steps: int | None = option(None, "Guide only the first N steps.", Whole(0, MAX_STEPS), "N")
    clip_skip: int | None = option(None, "Skip the last N layers of CLIP.", Whole(0, MAX_STEPS), "N")
    emphasis: bool = option(False, "Read (word:1.2) as emphasis.", Flag(), more="Also (word), [word] and BREAK.")
    gamma: float | None = option(None, "Of tcd, 0 to 1 (0.3).", Number(0, 1), "G", "0 is deterministic.")
    guidance_mode: str = option(
        "full",
        "full, or once: one evaluation of the negative prompt.",
        Choice(GUIDANCE_MODES),
        "MODE",
        "In the first step; the others remember it.",
    )
    # Pillow's pictures can be compared, but have no hash.
    image: Picture | None = field(
        default=None,
        hash=False,
        metadata=described(
            "A picture to start from; a clip for video to video.", _picture, "FILE", "A tuple of pictures is a clip."
        ),
    )
    mask: Image.Image | None = field(
        default=None,
        hash=False,
        metadata=described("White is repainted, black is kept.", _mask, "FILE", "A picture of the image's size."),
    )
    strength: float | None = option(
        None, "How much of it may change, up to 1.", _strength, "S", "Of the image; a number above 0."
    )
    mask_feather: int = option(
        0, "Blend the mask's edge.", Whole(0, MAX_FEATHER), "PIXELS", "Over so many pixels of the result, 0 to 256."
    )
    mask_crop: int | None = option(
        None,
        "Work on the mask and so much around it.",
        Whole(0, MAX_PADDING),
        "PIXELS",
        "Pixels, 0 to 4096; it is drawn at the request's size, and put back.",
    )
    resize: str = option(
        "stretch",
        "Pictures to size: stretch, crop, pad.",
        Choice(RESIZES),
        "MODE",
        "Pictures keep their shape where it is filled and the rest cut off (crop), or the rest filled (pad).",
    )
    controls: tuple[Control, ...] = option((), "Pictures that steer the composition.", _controls, more="See Control.")
    loras: Mapping[str, float] | None = field(
        default=None,
        hash=False,
        metadata=described(
            "A mix of its own of LoRAs that the engine has, {name: scale}.", _loras, more="{} is none of them."
        ),
    )
    frames: int | None = option(
        None, "Make a clip: .gif, .webp, .mp4.", Whole(1, MAX_FRAMES), "N", "Of so many frames, 1 to 512."
    )
    fps: int = option(8, "Frames a second (8).", Whole(1, 60), "N", "In the clip's file, 1 to 60.")

    def __post_init__(self) -> None:
        settle(self, Request)
        if self.seed is not None:
            with blaming("seed"):
                Whole(0, MAX_SEED - (self.n - 1), advice="picture i takes the seed + i")("seed", self.seed)
        if self.width is not None and self.height is not None and self.width * self.height > MAX_PIXELS:
            raise UsageError(
                f"the size is {self.width}x{self.height}: must be at most {MAX_PIXELS} pixels",
                f"with this width, a height of at most {MAX_PIXELS // self.width // SIZE_STEP * SIZE_STEP}",
                field="height",
            )
        if self.timesteps is not None and self.steps is not None and self.steps != len(self.timesteps):
            message = f"steps is {self.steps}: must be the number of timesteps, {len(self.timesteps)}"
            raise UsageError(message, "leave steps out", field="steps")
        if self.frames is not None:
            with blaming("frames"):
                Whole(1, MAX_FRAMES // self.n)("frames", self.frames)
        self._check_picture()
        for i, control in enumerate(self.controls):
            self._check_frames(f"control {control.name!r}", control.image, f"controls.{i}.image")

    def _check_picture(self) -> None:
        """What only makes sense with a picture to start from, or with a mask."""
        if self.image is None:
            for name in ("mask", "strength"):
                if getattr(self, name) is not None:
                    message = f"there is a {name} but no image"
                    raise UsageError(message, "give the picture to start from as image", field=name)
        else:
            self._check_frames("image", self.image, "image")
        if self.mask is None:
            if self.mask_crop is not None or self.mask_feather:
                name = "mask_crop" if self.mask_crop is not None else "mask_feather"
                raise UsageError(f"there is a {name} but no mask", "white in the mask is repainted", field=name)
            return
        first = self.image[0] if isinstance(self.image, tuple) else self.image
        assert first is not None
        if self.mask.size != first.size:
            (mw, mh), (w, h) = self.mask.size, first.size
            message = f"the mask is {mw}x{mh} and the image {w}x{h}: must be equal"
            raise UsageError(message, "resize one of them first", field="mask")
        if self.mask_crop is not None and isinstance(self.image, tuple):
            message = "mask_crop works on one picture, not on frames"
            raise UsageError(message, "crop the frames first", field="mask_crop")

    def _check_frames(self, what: str, pictures: Picture, field: str) -> None:
        if isinstance(pictures, tuple) and len(pictures) != self.frames:
            told = "no frames are asked for" if self.frames is None else f"{self.frames} frames are asked for"
            message = f"{what} has {len(pictures)} pictures and {told}"
            raise UsageError(message, f"give frames={len(pictures)}", field=field)

    def to_json(self, *, pictures: bool = True) -> dict[str, Any]:
        """The fields that differ from their default, as values of JSON; the prompt always.

        Pictures are data URIs (PNG, base64); or, without `pictures`, only a digest that tells them apart.
        """
        from PIL import Image

        show = _to_uri if pictures else digest

        def plain(value: Any) -> Any:
            if isinstance(value, Image.Image):
                return show(value)
            if isinstance(value, Control):
                return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
            if isinstance(value, Mapping):
                return dict(value)
            return [plain(each) for each in value] if isinstance(value, tuple) else value

        values = {field.name: getattr(self, field.name) for field in fields(Request)}
        return {
            field.name: plain(values[field.name])
            for field in fields(Request)
            if field.name == "prompt" or values[field.name] != field.default
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Request:
        """The request that `to_json` wrote. Raises UsageError, for an unknown field with the nearest known one."""
        if not isinstance(values, Mapping):
            raise UsageError(f"a request is {shown(values)}: must be an object with a prompt")
        return cls(**_fields_of(cls, values, "a request", ("prompt",)))


def adapter_name(ref: object) -> str:
    """What an adapter is called that gets no name: the last part of what it was loaded from."""
    return re.split(r"[/\\]", str(ref).rstrip("/"))[-1].partition("@")[0].removesuffix(".safetensors")


def _fields_of(kind: type, values: Mapping[str, Any], what: str, needed: tuple[str, ...]) -> Mapping[str, Any]:
    """The values, once all are known to be fields of that dataclass, and none that is needed is missing."""
    known = [field.name for field in fields(kind)]
    for name in values:
        if name not in known:
            hint = nearest(ELSEWHERE.get(name, name), known)
            message = f"{what} has no field {shown(name)}: it has {', '.join(known)}"
            raise UsageError(message, hint, field=name if isinstance(name, str) else None)
    for name in needed:
        if name not in values:
            hint = "the empty text is a prompt" if name == "prompt" else None
            raise UsageError(f"{what} must have {'an' if name == 'image' else 'a'} {name}", hint, field=name)
    return values


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


def _from_uri(name: str, text: str) -> Image.Image:
    from calotype import images

    if text.startswith("sha256:"):
        raise UsageError(f"{name} was a picture that is not in the file", "give the same picture again")
    head, comma, content = text.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise UsageError(f"{name} is {shown(text)}: must be a data URI with base64", f"it begins with {URI}")
    try:
        return images.open_image(base64.b64decode(content, validate=True))
    except binascii.Error:
        raise UsageError(f"{name} is a data URI that is not base64") from None
