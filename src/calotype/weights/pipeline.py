"""model_index.json, which says what parts a model has, and calotype.json, which says how it likes to be run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calotype.errors import CheckpointError
from calotype.families import LCM_GUIDANCE, LCM_GUIDANCE_RANGE, LCM_STEPS, PLAIN_LCM_GUIDANCE, Family
from calotype.nn.unet import UNetConfig
from calotype.parts import Defaults, Habit
from calotype.rules import shown
from calotype.samplers import CONSISTENCY, SAMPLERS
from calotype.schedule import NoiseSchedule
from calotype.weights.configs import MOTION_UNET, TEXT_CLASSES, names_class
from calotype.weights.fields import Fields
from calotype.weights.files import read_json

# Whatever its task, a pipeline of these has parts of which a picture is drawn from text. By the class's name alone:
# nothing outside the lists of parts is imported or built.
PIPELINES = re.compile(
    r"(CLIPGuided|Semantic|LEditsPPPipeline)?StableDiffusion\w*|LatentConsistencyModel\w*|AnimateDiff\w*"
    r"|(CycleDiffusion|TextToVideoZero|TextToVideoZeroSDXL)Pipeline"
)
# Pipelines among these whose U-Net or autoencoder is of another kind, by what follows in the name -> what it is.
OTHERS = (
    (r"StableDiffusion3", "a diffusion transformer, which is another architecture"),
    (r"StableDiffusion\w*Upscale", "its U-Net takes a small picture as well"),
    (r"StableDiffusion\w*Depth2Img", "its U-Net takes a map of depths as well"),
    (r"StableDiffusion\w*InstructPix2Pix", "its U-Net takes the latents of a picture as well"),
    (r"StableDiffusion\w*GLIGEN", "its U-Net takes places of things as well"),
    (r"StableDiffusion\w*LDM3D", "its autoencoder makes depths as well"),
    (r"StableDiffusion\w*ImageVariation", "its U-Net takes a picture's embedding instead of a text's"),
)
CLASSES: dict[str, Sequence[str]] = {
    "unet": ("UNet2DConditionModel", MOTION_UNET),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": TEXT_CLASSES,
    "text_encoder_2": TEXT_CLASSES,
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
PROJECTING = "CLIPTextModelWithProjection"
LIBRARIES = ("diffusers", "transformers")
REQUIRED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # listed in model_index.json, not part of a picture
# A part by such a name is one of the networks that draw, by another name or one more: no picture is right without it.
NETWORKS = re.compile(r"(unet|vae|transformer|prior|decoder|text_encoder|tokenizer|image_n\w+)(_\w+)?")
# Classes of parts that change nothing that is drawn.
NO_NETWORKS = re.compile(r"\w*(Processor|Extractor|Checker|Watermarker)\w*")
# Parts that are loaded into the model by themselves, by their classes -> how.
ADDED = (
    (
        ("ControlNetModel", "MultiControlNetModel", "T2IAdapter", "MultiAdapter"),
        "add_control(FOLDER, subfolder={part!r})",
    ),
    (("MotionAdapter",), "set_motion(FOLDER)"),
)
MAX_PIXELS = 16384  # of a default width or height


@dataclass(frozen=True)
class Pipeline:
    """What model_index.json says."""

    kind: str  # the pipeline's class name
    classes: dict[str, str]  # part -> class name, for the parts that calotype uses
    zero_empty_negative: bool
    unused: dict[str, str] = field(default_factory=dict)  # parts that would change pictures -> a remark on each

    @property
    def text_parts(self) -> tuple[tuple[str, str], ...]:
        """(tokenizer, text encoder) folder names: one pair, or SDXL's two."""
        pairs = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
        return tuple(pair for pair in pairs if pair[1] in self.classes)


def read_pipeline(folder: Path) -> Pipeline:
    """A model folder's model_index.json. Raises CheckpointError for parts that are missing or not allowed."""
    path = folder / "model_index.json"
    if not path.is_file():
        if (folder / "config.json").is_file():
            message, hint = "holds one part of a model only", "pass it as unet= or vae= next to a whole model"
        else:
            message, hint = (
                "is not a model folder: model_index.json is missing",
                "a folder in the diffusers layout is needed",
            )
        raise CheckpointError(f"{folder} {message}", hint)
    return pipeline_of(read_json(path), str(path))


def pipeline_of(raw: dict[str, Any], path: str) -> Pipeline:
    """What a model_index.json says. Raises CheckpointError for parts that are missing or not allowed."""
    fields = Fields(raw, path)
    kind = _kind(fields)
    classes, unused = {}, {}
    for part, entry in raw.items():
        if part == "_class_name" or not isinstance(entry, list) or part in UNUSED or entry in ([None, None], [None]):
            continue
        if part in CLASSES or part == "scheduler" or NETWORKS.fullmatch(part):
            classes[part] = _part_class(fields, part, entry)
        elif remark := _remark(part, entry):
            unused[part] = remark
    if missing := [part for part in REQUIRED if part not in classes]:
        raise CheckpointError(f"{path} lists no {' and no '.join(missing)}")
    if ("text_encoder_2" in classes) != ("tokenizer_2" in classes):
        raise CheckpointError(f"{path} lists one of text_encoder_2 and tokenizer_2; both or none are needed")
    # SDXL's pipelines zero an empty negative prompt unless told not to; the others have no such option.
    zero = fields.flag("force_zeros_for_empty_prompt", True) if "XL" in kind else False
    return Pipeline(kind, classes, zero, unused)


def _kind(fields: Fields) -> str:
    """The pipeline's class. A community pipeline's is [its module, class]: the module is never looked at."""
    name = fields.raw.get("_class_name")
    if isinstance(name, list) and len(name) == 2:
        name = name[1]
    if not isinstance(name, str) or not PIPELINES.fullmatch(name):
        kinds = "StableDiffusion..., LatentConsistencyModel..., AnimateDiff..."
        raise fields.refuse("_class_name", f"supported here are {kinds}")
    for pattern, what in OTHERS:
        if re.match(pattern, name):
            raise fields.refuse("_class_name", f"{what}: not supported")
    return name


def _remark(part: str, entry: list[object]) -> str:
    """What there is to say of a part that is not loaded with the model; nothing of what is no network."""
    name = entry[-1]
    if not isinstance(name, str) or NO_NETWORKS.fullmatch(name):
        return ""
    how = next((how for classes, how in ADDED if name in classes), None)
    return f"{name} is not supported" if how is None else f"{name}, load it by {how.format(part=part)}"


def with_class(raw: dict[str, Any], name: object) -> dict[str, Any]:
    """A text encoder's config with the class that model_index.json gives it, where it says none or does not project."""
    if name in CLASSES["text_encoder"] and (not names_class(raw) or name == PROJECTING) and "text_config" not in raw:
        return {**raw, "architectures": [name]}
    return raw


def _part_class(fields: Fields, part: str, entry: list[object]) -> str:
    if len(entry) != 2 or entry[0] not in LIBRARIES or not isinstance(entry[1], str):
        raise fields.refuse(part, f"[library, class] is needed, the library one of {', '.join(LIBRARIES)}")
    name = entry[1]
    if part == "scheduler":  # its classes are NoiseSchedule's business
        return name
    if part not in CLASSES:
        raise fields.refuse(part, f"known parts are {', '.join((*CLASSES, 'scheduler', *UNUSED))}")
    if name not in CLASSES[part]:
        flax = "; Flax weights cannot be read" if name.startswith("Flax") else ""
        raise fields.refuse(part, f"supported here are {', '.join(CLASSES[part])}{flax}")
    return name


def repaired_schedule(pipeline: Pipeline, config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's config as the pipeline takes it. Stable Diffusion's pipelines in diffusers overrule two fields that
    early checkpoints had wrong: whatever the file says, a leading grid begins at 1 and x0 is not clipped.
    """
    if pipeline.kind.startswith("StableDiffusion") and "XL" not in pipeline.kind:
        return {**config, "steps_offset": 1, "clip_sample": False}
    return config


def default_sampler(unet: UNetConfig, schedule: NoiseSchedule) -> str:
    """A guidance embedding is only ever trained by consistency distillation, whatever scheduler lies beside it."""
    if unet.guidance_dim is not None and schedule.default_sampler not in CONSISTENCY:
        return "lcm"
    return schedule.default_sampler


def defaults_of(
    raw: dict[str, Any],
    path: str,
    family: Family,
    unet: UNetConfig,
    schedule: NoiseSchedule,
    downscale: int,
    habit: Habit | None = None,
) -> Defaults:
    """The model's defaults: what calotype.json gives; else its habit, if it is a few-step model; else the family's.

    `downscale` is the autoencoder's pixels a latent. Raises CheckpointError for unknown fields and values out of range.
    """
    fields = Fields(raw, path)
    known = ("sampler", "steps", "guidance", "width", "height", "guidance_range")
    if unknown := [name for name in raw if name not in known]:
        raise CheckpointError(f"{path} has the field {shown(unknown[0])}; known are {', '.join(known)}")
    own = Habit() if habit is None else habit
    sampler = fields.one_of("sampler", own.sampler or default_sampler(unet, schedule), [*SAMPLERS])
    steps, guidance, side = family.steps, family.guidance, own.size or unet.sample_size * downscale
    if sampler in CONSISTENCY:
        steps, guidance = LCM_STEPS, PLAIN_LCM_GUIDANCE if unet.guidance_dim is None else LCM_GUIDANCE
    steps = steps if own.steps is None else own.steps
    guidance = guidance if own.guidance is None else own.guidance

    def pixels(name: str) -> int:
        if not fields.given(name):
            return side
        value = fields.integer(name, side, downscale, MAX_PIXELS)
        if value % downscale:
            raise fields.refuse(name, f"a multiple of {downscale} is needed")
        return value

    return Defaults(
        sampler=sampler,
        steps=fields.integer("steps", steps, 1, schedule.T),
        guidance=fields.number("guidance", guidance, 0.0, 100.0),
        width=pixels("width"),
        height=pixels("height"),
        guidance_range=_guidance_range(fields, unet),
    )


def _guidance_range(fields: Fields, unet: UNetConfig) -> tuple[float, float] | None:
    """The guidance that the embedding was trained for; nothing where guidance is real (two evaluations a step)."""
    if unet.guidance_dim is None:
        return None
    low, high = fields.items("guidance_range", LCM_GUIDANCE_RANGE, 2, 2)
    if any(type(bound) not in (int, float) for bound in (low, high)) or not 0 <= low <= high <= 100:
        raise fields.refuse("guidance_range", "[lowest, highest] from 0 to 100 is needed")
    return float(low), float(high)
