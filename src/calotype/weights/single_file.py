"""Single-file checkpoints: which networks one holds, told from its keys and shapes, and how to read each of them.

A file in LDM's layout has no configs, no scheduler and no tokenizer: its family's come with the package (texts.py). One
that calotype wrote carries its model's in the header, one key a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from calotype.errors import CheckpointError
from calotype.families import CUSTOM, SD21, Family
from calotype.nn.clip import CLIPTextConfig
from calotype.nn.unet import UNetConfig
from calotype.nn.vae import VAEConfig
from calotype.rules import shown
from calotype.text.tokenizer import Tokenizer
from calotype.weights import ldm, taesd
from calotype.weights.compare import compare
from calotype.weights.configs import Config
from calotype.weights.detect import (
    SINGLE_FILE,
    Shapes,
    is_refiner,
    is_tiny,
    looks_like,
    shapes_of,
    sort_of,
    unet_family,
    unet_prefix,
)
from calotype.weights.files import TensorInfo, header, metadata, parse_json
from calotype.weights.folder import Weights
from calotype.weights.names import BOOKKEEPING, KINDS, Kind, canonical
from calotype.weights.pipeline import Pipeline, pipeline_of
from calotype.weights.texts import said_prediction, texts_of
from calotype.weights.wrapping import unwrapped

EMBEDDED = "calotype:"  # before a model's own files among the header's metadata: "calotype:unet/config.json"
TITLES = {
    "unet": "U-Net",
    "vae": "autoencoder",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
}

DIFFUSERS_PREFIXES = ("unet.", "")  # of U-Nets that diffusers named
VAE_PREFIXES = ("first_stage_model.", "vae.", "")
# Part, prefix and who named it. Stable Diffusion 2.x has two prefixes, one of them in SGM's layout.
TEXT_PREFIXES = (
    ("text_encoder", "cond_stage_model.transformer.", "clip"),
    ("text_encoder", "cond_stage_model.model.", "open_clip"),
    ("text_encoder", "conditioner.embedders.0.transformer.", "clip"),
    ("text_encoder", "conditioner.embedders.0.model.", "open_clip"),
    ("text_encoder_2", "conditioner.embedders.1.model.", "open_clip"),
    # CLIP G under transformers' names, its projection within "transformer." or beside it.
    ("text_encoder_2", "conditioner.embedders.1.", "clip"),
    ("text_encoder", "text_encoder.", "clip"),
    ("text_encoder_2", "text_encoder_2.", "clip"),
)
WITHIN = "transformer."  # what may stand before transformers' names in a section of theirs
CLIP_ROOTS = tuple(f"{within}{root}embeddings." for within in ("", WITHIN) for root in ("", "text_model."))
# In the file, but no weights of a network that makes pictures. v_pred and ztsnr are marks without content.
UNUSED = re.compile(
    r"(model_ema|loss|denoiser|first_stage_model\.(loss|model_ema))\..*"
    r"|betas|alphas_cumprod(_prev)?|sqrt_(one_minus_|recip_|recipm1_)?alphas_cumprod|log_one_minus_alphas_cumprod"
    r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)|lvlb_weights|logvar|scale_factor"
    r"|(cond_stage_model|conditioner\.embedders\.\d)\.(logit_scale|text_projection)"
    r"|v_pred|ztsnr"
    r"|(.*\.)?vae_(scale|shift)"  # ComfyUI's TAESD: from its unscaled latents to TAESD's, which are the U-Net's own
)
PROJECTIONS = re.compile(r"conditioner\.embedders\.1\.(transformer\.)?text_projection(\.weight)?")
OPEN_CLIP_UNUSED = ("logit_scale", "attn_mask")

# Stable Diffusion 2.x predicts either noise or velocity under the same names and shapes. The velocity models' last norm
# has biases that spread more: ComfyUI's rule, which has told its users' files apart since 2023.
V_SIGN, V_SPREAD = "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09


@dataclass(frozen=True)
class Section:
    """Where a file has one network."""

    prefix: str
    naming: str  # "ldm", "open_clip", "clip" (transformers' names) or "diffusers"


@dataclass(frozen=True)
class Slot:
    """Where one of our tensors is: a tensor of the file, one of equal shares of its rows, or its transpose."""

    name: str
    share: int = 0
    shares: int = 1
    transposed: bool = False

    @property
    def label(self) -> str:
        return self.name if self.shares == 1 else f"{self.name}[{self.share}]"

    def seen(self, info: TensorInfo) -> TensorInfo:
        """What the header says of it. Rows that cannot be shared evenly keep the whole's shape, so as not to fit."""
        shape = info.shape[::-1] if self.transposed else info.shape
        if self.shares > 1 and shape and shape[0] % self.shares == 0:
            shape = (shape[0] // self.shares, *shape[1:])
        return replace(info, shape=shape)

    def take(self, tensor: Tensor) -> Tensor:
        """It, from the file's tensor: a view, but for the transpose."""
        if self.transposed:
            return tensor.t().contiguous()
        return tensor if self.shares == 1 else tensor.chunk(self.shares)[self.share]


class SingleFile:
    """A file's networks, and the texts that a model folder would have."""

    def __init__(self, path: Path, prediction: str | None = None) -> None:
        """`prediction` says what its U-Net predicts, where the file does not. Raises UnsafeFileError for a pickle,
        CheckpointError for what has no network of Stable Diffusion's kind.
        """
        self._path = path
        self._places = _places(path)
        headers = {file: header(file) for file in {file for file, _ in self._places.values()}}
        self.infos = {name: headers[file][theirs] for name, (file, theirs) in self._places.items()}
        self.shapes: Shapes = shapes_of(self.infos)
        self.sections = sections(self.shapes)
        sort = sort_of(self.shapes)
        if not self.sections or sort not in (None, SINGLE_FILE):
            hint = "a whole model, a U-Net or an autoencoder is needed" if self.infos else "the file is empty"
            raise CheckpointError(f"{path} is not a model: it looks like {looks_like(self.shapes)}", hint)
        self._metadata = metadata(path)
        self.family = self._family()
        self.prediction = prediction or self._prediction()
        self._texts = self._find_texts(prediction)

    @property
    def path(self) -> Path:
        return self._path

    # ---- what it is ----

    def _family(self) -> Family:
        """The family of its U-Net, or CUSTOM."""
        section = self.sections.get("unet")
        if section is None:
            return CUSTOM
        if section.naming == "ldm" and is_refiner(self.shapes, section.prefix):
            raise CheckpointError(
                f"{self.path} is SDXL's refiner, which is another model than SDXL and is not supported",
                "SDXL's base model makes whole pictures without it",
            )
        return unet_family(self.shapes, section.prefix, ldm=section.naming == "ldm")

    def _prediction(self) -> str:
        """What its U-Net predicts, by its marks, its header, or (SD 2.x, which has neither) its numbers."""
        if "v_pred" in self.infos:
            return "v_prediction"
        said = said_prediction(self._metadata)
        if said is not None or self.family is not SD21:
            return said or "epsilon"
        section = self.sections["unet"]
        name = section.prefix + V_SIGN
        inpaints = self.shapes.get(f"{section.prefix}input_blocks.0.0.weight", (0, 0))[1] != 4  # they all predict noise
        if inpaints or name not in self.infos or self.infos[name].count == 0:
            return "epsilon"
        spread = float(self._tensors([name])[name].float().std(correction=0))
        return "v_prediction" if spread > V_SPREAD else "epsilon"

    @property
    def is_whole(self) -> bool:
        """Whether it is a model, but perhaps for its autoencoder, and not one network alone."""
        return "unet" in self.sections and "text_encoder" in self.sections

    def pipeline(self) -> Pipeline:
        """What parts it has. Raises CheckpointError where it is no whole model, or holds tensors that nothing uses."""
        if not self.is_whole:
            found = " and ".join(f"{'an' if part == 'vae' else 'a'} {TITLES[part]}" for part in self.sections)
            usable = " or ".join(f"{part}=" for part in self.sections if part in ("unet", "vae"))
            hint = f"pass it as {usable} next to a whole model" if usable else "its U-Net is in another file"
            raise CheckpointError(f"{self.path} is not a whole model: it holds {found} only", hint)
        if strangers := self.strangers():
            listed = ", ".join(shown(name) for name in strangers[:5])
            raise CheckpointError(
                f"{self.path} has {len(strangers)} tensors that belong to none of its networks ({listed})",
                "the file is of a kind that is not supported, or holds more than one model",
            )
        return pipeline_of(self.json("model_index.json"), self.where("model_index.json"))

    def strangers(self) -> list[str]:
        """The tensors that belong to no network and are not known to be needless."""
        prefixes = tuple(section.prefix for section in self.sections.values())
        return [name for name in self.infos if not name.startswith(prefixes) and not is_unused(name)]

    def ignored(self) -> list[str]:
        """The tensors, by the file's names, that are a training run's or are known to be needless."""
        return [theirs for name, (_, theirs) in self._places.items() if is_unused(name)]

    # ---- what a folder would have ----

    def _find_texts(self, prediction: str | None) -> dict[str, str]:
        """Those in the header, if all are there; else the family's, changed to what the file shows."""
        own = {name.removeprefix(EMBEDDED): text for name, text in self._metadata.items() if name.startswith(EMBEDDED)}
        tiny = taesd.raw_config(self.shapes, self.sections["vae"].prefix) if "vae" in self.sections else None
        if tiny is not None:
            own["vae/config.json"] = json.dumps(tiny)
        if "unet" not in self.sections:
            return own
        if "unet/config.json" in own:
            if prediction is not None and "scheduler/scheduler_config.json" in own:
                scheduler = self._parsed("scheduler/scheduler_config.json", own)
                own["scheduler/scheduler_config.json"] = json.dumps(scheduler | {"prediction_type": prediction})
            return own
        if self.family is CUSTOM:
            raise CheckpointError(
                f"{self.path} has no configs and is {looks_like(self.shapes)}",
                "use the model's folder in the diffusers layout",
            )
        prefix = self.sections["unet"].prefix
        shapes = {name.removeprefix(prefix): shape for name, shape in self.shapes.items() if name.startswith(prefix)}
        texts = texts_of(self.family, shapes, self.prediction, zero_snr="ztsnr" in self.infos)
        if tiny is not None:
            texts["vae/config.json"] = tiny
            texts["model_index.json"]["vae"] = ["diffusers", "AutoencoderTiny"]
        return {name: json.dumps(text) for name, text in texts.items()}

    def has(self, name: str) -> bool:
        """Whether there is such a text: "unet/config.json", "calotype.json", ..."""
        return name in self._texts

    def where(self, name: str) -> str:
        """A text's place, for messages."""
        return f"{self.path}: {name}"

    def json(self, name: str) -> dict[str, Any]:
        """What a text says. Raises CheckpointError."""
        return self._parsed(name, self._texts)

    def _parsed(self, name: str, texts: Mapping[str, str]) -> dict[str, Any]:
        if name not in texts:
            part = name.partition("/")[0]
            lacking = part in TITLES and part not in self.sections
            raise self._without(part) if lacking else CheckpointError(f"{self.path} lacks {name}")
        return parse_json(texts[name].encode(), self.where(name))

    def texts(self) -> dict[str, str]:
        """All of them, by their names in a folder."""
        return dict(self._texts)

    def tokenizer(self, part: str) -> Tokenizer:
        """The tokenizer `part`: with CLIP's own tables, unless the file brings others."""
        prefix = f"{part}/"
        texts = {name.removeprefix(prefix): text for name, text in self._texts.items() if name.startswith(prefix)}
        return Tokenizer.clip(texts, self.path / part)

    # ---- its networks ----

    def section(self, part: str) -> dict[str, TensorInfo]:
        """What of the file belongs to a part."""
        section = self.sections[part]
        return {name: info for name, info in self.infos.items() if name.startswith(section.prefix)}

    def check(self, part: str, config: Config, shapes: Shapes) -> tuple[dict[str, str], dict[str, Slot]]:
        """What fills a network of this config, whose tensors are `shapes`: a name -> ours, and a name -> where it is.

        Raises CheckpointError for all that is missing, unexpected or of another shape.
        """
        if part not in self.sections:
            raise self._without(part)
        ours = self._slots(part, config, shapes)
        slots = {slot.label: slot for slot in ours}
        infos = {label: slot.seen(self.infos[slot.name]) for label, slot in slots.items()}
        comparison = compare(KINDS[part], infos, shapes, {slot.label: name for slot, name in ours.items()})
        if comparison.faults:
            family = "its config" if self.family is CUSTOM else f"{self.family.title}'s"
            raise CheckpointError(
                f"the {TITLES[part]} in {self.path} does not fit {family}: of {len(shapes)} tensors "
                f"{'; '.join(comparison.faults)}",
                "the file is damaged, or of a kind that is not supported",
            )
        return comparison.matched, slots

    def weights(self, part: str, config: Config, shapes: Shapes) -> Weights:
        """A part's weights, as in a folder; a share of a tensor is called name[i]. Raises CheckpointError."""
        matched, slots = self.check(part, config, shapes)
        tensors = self._tensors({slots[label].name for label in matched})
        return matched, {label: slots[label].take(tensors[slots[label].name]) for label in matched}

    def _without(self, part: str) -> CheckpointError:
        hint = f"give one with {part}=" if part in ("unet", "vae") else "the file is not a whole model"
        return CheckpointError(f"{self.path} holds no {TITLES[part]}", hint)

    def _slots(self, part: str, config: Config, shapes: Shapes) -> dict[Slot, str]:
        """What of the file belongs to a part -> our name of it, or "" where we have none."""
        section = self.sections[part]
        ours: dict[str, list[str]] = {}
        for name, theirs in table(section.naming, config, shapes).items():
            ours.setdefault(theirs, []).append(name)
        found: dict[Slot, str] = {}
        for name in self.infos:
            if not name.startswith(section.prefix):
                continue
            rest = name.removeprefix(section.prefix)
            if _is_no_weight(section, name) or (
                section.prefix and _is_needless(section.naming, rest, config, KINDS[part])
            ):
                continue
            theirs = _spelt(section.naming, rest, KINDS[part])
            shared = ours.get(theirs, [""])
            for i, mine in enumerate(shared):
                found[Slot(name, i, len(shared), rest.removeprefix(WITHIN) == ldm.TRANSPOSED)] = mine
        return found

    def _tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of the file's tensors, as views of the mapped file."""
        found: dict[str, Tensor] = {}
        wanted = [*names]
        for path in {self._places[name][0] for name in wanted}:
            try:
                with safe_open(path, framework="pt") as file:
                    own = {name: self._places[name][1] for name in wanted if self._places[name][0] == path}
                    found |= {name: file.get_tensor(theirs) for name, theirs in own.items()}
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
        return found


# ---- where the networks are ----


def _places(path: Path) -> dict[str, tuple[Path, str]]:
    """The names that a file's tensors go by here -> which file has them under which name: TAESD is often two files."""
    shapes = shapes_of(header(path))
    if (side := taesd.side_of(shapes)) is not None:
        return taesd.pair(path, side)
    return {taesd.renamed(name): (path, theirs) for name, theirs in unwrapped(shapes).items()}


def sections(shapes: Shapes) -> dict[str, Section]:
    """The networks that a file holds, by the parts of a model that they are."""
    found: dict[str, Section] = {}
    prefix = unet_prefix(shapes)
    if prefix is not None:
        found["unet"] = Section(prefix, "ldm")
    for prefix in DIFFUSERS_PREFIXES:
        if f"{prefix}conv_in.weight" in shapes and f"{prefix}time_embedding.linear_1.weight" in shapes:
            found.setdefault("unet", Section(prefix, "diffusers"))
    for prefix in VAE_PREFIXES:
        if f"{prefix}decoder.norm_out.weight" in shapes:
            found.setdefault("vae", Section(prefix, "ldm"))
        elif f"{prefix}decoder.conv_norm_out.weight" in shapes or is_tiny(shapes, prefix):
            found.setdefault("vae", Section(prefix, "diffusers"))
    for part, prefix, naming in TEXT_PREFIXES:
        roots = ("",) if naming == "open_clip" else CLIP_ROOTS
        if any(f"{prefix}{root}token_embedding.weight" in shapes for root in roots):
            found.setdefault(part, Section(prefix, naming))
    return found


def table(naming: str, config: Config, names: Iterable[str]) -> ldm.Table:
    """A network's names -> those of a file's section."""
    if naming == "open_clip":
        return ldm.open_clip_table(names)
    if naming == "ldm" and isinstance(config, UNetConfig):
        return ldm.unet_table(names, config)
    if naming == "ldm" and isinstance(config, VAEConfig):
        return ldm.vae_table(names, config)
    return {name: name for name in names}


def _is_needless(naming: str, name: str, config: Config, kind: Kind) -> bool:
    """Whether a tensor of a section, without the prefix, is one that networks of this config do without."""
    if naming != "open_clip":
        projects = isinstance(config, CLIPTextConfig) and config.projection_dim is not None
        return canonical(kind, _clip_name(name) if naming == "clip" else name, projection=projects) is None
    assert isinstance(config, CLIPTextConfig)
    layer = re.match(r"transformer\.resblocks\.(\d{1,9})\.", name)
    if layer is not None:  # SD 2.x takes the last layer but one, so its networks are built without the last
        return int(layer[1]) >= config.layers
    projection = ldm.OTHER_NAMES.get(name, name) == ldm.TRANSPOSED
    return name in OPEN_CLIP_UNUSED or (projection and config.projection_dim is None)


def _spelt(naming: str, name: str, kind: Kind) -> str:
    """A tensor's name in a section as our tables have it, out of the spellings that occur."""
    if naming == "clip":
        name = _clip_name(name)
    if naming in ("clip", "diffusers"):
        return canonical(kind, name) or name
    if kind == "vae":
        name = ldm.VAE_ATTENTION_OTHER.sub(lambda match: ldm.VAE_ATTENTION[match[0]], name)
    return ldm.OTHER_NAMES.get(name, name)


def _clip_name(name: str) -> str:
    """A name of transformers', without what LDM puts before it."""
    name = name.removeprefix(WITHIN)
    return f"{name}.weight" if name == ldm.TRANSPOSED else name


def is_unused(name: str) -> bool:
    """Whether a tensor is known to be no weight of a network that makes pictures."""
    return (UNUSED.fullmatch(name) or BOOKKEEPING.fullmatch(name)) is not None


def _is_no_weight(section: Section, name: str) -> bool:
    projection = section.naming == "clip" and PROJECTIONS.fullmatch(name)
    return is_unused(name) and not projection
