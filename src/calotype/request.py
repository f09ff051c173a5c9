"""A request: what to draw, in one value. The engine, the command, the server and a picture's metadata all speak it."""

from __future__ import annotations

import difflib
import itertools
import operator
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields
from numbers import Real
from typing import Any, cast

from calotype.errors import UsageError

SAMPLERS = ("lcm", "ddim", "euler")
MAX_PROMPT = 20_000  # characters
MAX_STEPS = 1000  # the length of every schedule that we know
MAX_GUIDANCE = 100.0
MAX_SEED = 2**63 - 1  # what torch's generator takes
MAX_N = 64
SIZE_STEP, MAX_SIDE = 8, 8192  # one latent is 8 x 8 pixels
MAX_PIXELS = 4096 * 4096

# What other programs call our fields, for the hint.
ELSEWHERE = {
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "num_inference_steps": "steps",
    "num_images_per_prompt": "n",
    "sampler_name": "sampler",
}


@dataclass(frozen=True)
class Request:
    """One picture, or `n` of them, to be drawn. Frozen; `dataclasses.replace` makes variants, checked again.

    prompt, negative_prompt: text, at most 20,000 characters; the empty one is valid.
    steps: evaluations of the network, 1 to 1000.           guidance: diffusers' guidance_scale, 0 to 100; 1 is none.
    seed: that of the first picture; picture i is that of seed + i alone.      n: pictures, 1 to 64.
    width, height: pixels, multiples of 8, 8 to 8192, at most 4096 x 4096 in all.
    sampler: "lcm", "ddim" or "euler".                      timesteps: an explicit grid, strictly descending.
    guidance_steps: guide the first so many steps only.     clip_skip: last layers of the text encoder to leave out.
    emphasis: read (), [], (x:1.3) and BREAK in the prompts as instructions.

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
    guidance_steps: int | None = None
    clip_skip: int | None = None
    emphasis: bool = False

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
        if self.sampler is not None and not (isinstance(self.sampler, str) and self.sampler in SAMPLERS):
            raise UsageError(
                f"sampler is {_shown(self.sampler)}: must be one of {', '.join(SAMPLERS)}",
                _nearest(self.sampler, SAMPLERS),
            )
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

    def _set(self, field: str, value: object) -> None:
        """Store a checked value: of the plain type, whatever kind of number or sequence was given."""
        object.__setattr__(self, field, value)

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their default, as values of JSON; the prompt always."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {field.name: values[field.name] for field in fields(self) if values[field.name] != field.default}
        if self.timesteps is not None:
            changed["timesteps"] = list(self.timesteps)
        return changed

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Request:
        """The request that `to_json` wrote. Raises UsageError, for an unknown field with the nearest known one."""
        if not isinstance(values, Mapping):
            raise UsageError(f"a request is {_shown(values)}: must be an object with a prompt")
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                hint = _nearest(ELSEWHERE.get(name, name), known)
                raise UsageError(f"a request has no field {_shown(name)}: it has {', '.join(known)}", hint)
        if "prompt" not in values:
            raise UsageError("a request must have a prompt", "the empty text is a prompt")
        return cls(**values)


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
