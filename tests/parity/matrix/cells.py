"""The cells of the matrix: the product of its axes, less what diffusers lacks, each with the reason."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import diffusers

FAMILIES = ("sd15", "sdxl", "ssd1b")
MODELS = ("lcm", "lora")  # with a guidance embedding; the base model with an LCM-LoRA
TASKS = {  # name -> strength
    "text": None,
    "image": 0.75,
    "inpaint 9": 1.0,  # channels of the U-Net
    "inpaint 9, part": 0.75,
    "inpaint 4": 1.0,
    "inpaint 4, part": 0.75,
}
ADAPTERS = (
    "none",
    "style",
    "styles",
    "control",
    "controls",
    "t2i",
    "t2is",
    "motion",
    "motion, lora",
    "motion, control",
)
GUIDANCES = {  # name -> guidance, negative prompt
    "embedded": (8.0, ""),
    "off": (1.0, ""),
    "cfg": (1.5, ""),
    "negative": (1.5, "dog, cat"),
}
GUIDANCES_OF = {  # of the adapters with an LCM-LoRA; the others have no guidance and some
    "none": ("off", "cfg", "negative"),
    "control": ("off", "cfg", "negative"),
    "styles": ("off",),
    "controls": ("cfg",),
    "t2is": ("cfg",),
    "motion, lora": ("off",),
}
SAMPLERS = ("lcm", "tcd", "ddim", "euler")
NAMINGS = ("kohya", "peft", "diffusers")  # of the LCM-LoRA's file

SD = {
    ("text", "none"): "StableDiffusionPipeline",
    ("image", "none"): "StableDiffusionImg2ImgPipeline",
    ("inpaint", "none"): "StableDiffusionInpaintPipeline",
    ("text", "control"): "StableDiffusionControlNetPipeline",
    ("image", "control"): "StableDiffusionControlNetImg2ImgPipeline",
    ("inpaint", "control"): "StableDiffusionControlNetInpaintPipeline",
    ("text", "t2i"): "StableDiffusionAdapterPipeline",
    ("text", "motion"): "AnimateDiffPipeline",
    ("text", "motion, control"): "AnimateDiffControlNetPipeline",
    ("image", "motion"): "AnimateDiffVideoToVideoPipeline",
    ("image", "motion, control"): "AnimateDiffVideoToVideoControlNetPipeline",
}
XL = {
    ("text", "none"): "StableDiffusionXLPipeline",
    ("image", "none"): "StableDiffusionXLImg2ImgPipeline",
    ("inpaint", "none"): "StableDiffusionXLInpaintPipeline",
    ("text", "control"): "StableDiffusionXLControlNetPipeline",
    ("image", "control"): "StableDiffusionXLControlNetImg2ImgPipeline",
    ("inpaint", "control"): "StableDiffusionXLControlNetInpaintPipeline",
    ("text", "t2i"): "StableDiffusionXLAdapterPipeline",
    ("text", "motion"): "AnimateDiffSDXLPipeline",
}
# The two pipelines that diffusers has for latent consistency models alone.
LCM = {("text", "none"): "LatentConsistencyModelPipeline", ("image", "none"): "LatentConsistencyModelImg2ImgPipeline"}


@dataclass(frozen=True)
class Cell:
    """One combination; the fields are names of the axes above."""

    family: str
    model: str
    task: str
    adapter: str
    guidance: str
    sampler: str = "lcm"
    naming: str = "kohya"

    def __str__(self) -> str:
        return " | ".join(astuple(self))

    @property
    def channels(self) -> int:
        """What the U-Net takes in."""
        return 9 if self.task.startswith("inpaint 9") else 4

    @property
    def strength(self) -> float | None:
        return TASKS[self.task]

    @property
    def moves(self) -> bool:
        return self.adapter.startswith("motion")

    @property
    def stack(self) -> dict[str, float]:
        """The LoRAs by name, with their scales."""
        few_steps = {"lcm": 0.55 if self.moves else 1.0} if self.model == "lora" else {}
        others = {"style": {"style": 0.8}, "styles": {"style": 0.8, "other": -0.4}, "motion, lora": {"motion": 1.2}}
        return few_steps | others.get(self.adapter, {})

    @property
    def controls(self) -> tuple[int, ...]:
        """Which of the family's ControlNets or T2I-Adapters act."""
        if self.adapter in ("controls", "t2is"):
            return 1, 2
        return (1,) if "control" in self.adapter or self.adapter == "t2i" else ()

    @property
    def pipeline(self) -> str | None:
        """The class of diffusers that does this."""
        kind = {"style": "none", "styles": "none", "controls": "control", "t2is": "t2i"}
        kind |= {"motion, lora": "motion"}
        key = self.task.split()[0], kind.get(self.adapter, self.adapter)
        ordinary = (SD if self.family == "sd15" else XL).get(key)
        return LCM.get(key, ordinary) if (self.family, self.model) == ("sd15", "lcm") else ordinary

    @property
    def folded(self) -> bool:
        """Whether that class leaves the guidance embedding out; it then gets a U-Net with one guidance in a bias."""
        return self.model == "lcm" and self.pipeline is not None and not embeds_guidance(self.pipeline)

    @property
    def cuts(self) -> bool:
        """Whether that class begins late in the grid of a full run, where ours spreads the steps over what is left."""
        return self.strength not in (None, 1.0) and self.pipeline != LCM["image", "none"]


def candidates() -> Iterator[Cell]:
    """The axes multiplied; those of the LoRA models (guidance, sampler, naming) not in full."""
    for family, model, task, adapter in itertools.product(FAMILIES, MODELS, TASKS, ADAPTERS):
        if task.endswith("part") and adapter not in ("none", "control"):
            continue
        if model == "lcm":
            yield Cell(family, model, task, adapter, "embedded")
            continue
        for guidance in GUIDANCES_OF.get(adapter, ("off", "cfg")):
            yield Cell(family, model, task, adapter, guidance)
    for family, task, sampler in itertools.product(FAMILIES, TASKS, SAMPLERS[1:]):
        yield Cell(family, "lora", task, "none", "cfg", sampler)
    for family, naming in itertools.product(FAMILIES, NAMINGS[1:]):
        yield Cell(family, "lora", "text", "none", "off", naming=naming)


def lacking(cell: Cell) -> str | None:
    """Why diffusers cannot do a cell; None where it can."""
    if cell.pipeline is None:
        return "diffusers has no such pipeline"
    if cell.moves and cell.family == "ssd1b":
        return "diffusers' UNetMotionModel knows no middle block without attention"
    return None


@cache
def embeds_guidance(pipeline: str) -> bool:
    """Whether the installed version of a pipeline passes a guidance embedding to its U-Net."""
    call: Any = getattr(diffusers, pipeline).__call__
    return "timestep_cond=" in inspect.getsource(inspect.unwrap(call))


CANDIDATES = tuple(candidates())
LACKING = {cell: reason for cell in CANDIDATES if (reason := lacking(cell)) is not None}
FOLDED = tuple(cell for cell in CANDIDATES if cell not in LACKING and cell.folded)
CELLS = tuple(cell for cell in CANDIDATES if cell not in LACKING and not cell.folded)
