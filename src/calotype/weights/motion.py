"""AnimateDiff's motion adapters from files: folders in the diffusers layout, and the authors' single files.

What a motion module was trained with belongs to it as well: the released ones take a schedule of linear betas, and
config.json may name another (ours: diffusers knows no such field).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calotype.errors import CheckpointError
from calotype.families import SD15, SDXL, family_of
from calotype.nn.motion import MotionAdapter, MotionConfig, frame_positions, mismatch
from calotype.nn.unet import UNetConfig
from calotype.rules import shown
from calotype.weights import source
from calotype.weights.compare import check
from calotype.weights.configs import MAX_CHANNELS, MAX_DEPTH, MAX_LAYERS, MAX_LEVELS, check_class
from calotype.weights.detect import Shapes, looks_like, shapes_of
from calotype.weights.fields import Fields
from calotype.weights.files import TensorInfo, read, read_json
from calotype.weights.folder import check_variant, merged_header, weight_files
from calotype.weights.load import CPU, fill, network_shapes, on_meta
from calotype.weights.wrapping import unwrapped

MAX_FRAMES = 1024  # of the table of positions
POSITIONS = ".pos_embed.pe"

# The authors' names -> diffusers', in this order. Their two attentions each have the same table of positions.
OLD_NAMES = (
    (".temporal_transformer.", "."),
    (".attention_blocks.0.pos_encoder.", ".pos_embed."),
    (".attention_blocks.0.", ".attn1."),
    (".attention_blocks.1.", ".attn2."),
    (".norms.0.", ".norm1."),
    (".norms.1.", ".norm2."),
    (".ff_norm.", ".norm3."),
)
SECOND_POSITIONS = ".attn2.pos_encoder.pe"

# Checkpoints of training runs have the U-Net around the modules too; a file with a layer or two of it is another thing.
MODULES = ".motion_modules."
WHOLE = {"conv_in.weight", "time_embedding.linear_1.weight", "conv_out.weight"}
UNET = re.compile(r"(conv_in|conv_norm_out|conv_out|time_embedding|add_embedding|down_blocks|mid_block|up_blocks)\.")

# The levels of the U-Nets that adapters exist for.
MADE_FOR = {(320, 640, 1280, 1280): SD15.title, (320, 640, 1280): SDXL.title}


def load_motion(
    ref: str | Path,
    *,
    unet: UNetConfig | None = None,
    variant: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> MotionAdapter:
    """A motion adapter, ready for `nn.motion.attach`; with `unet`, only one that fits a U-Net of that config.

    `ref` is a folder with config.json (or with motion_adapter/config.json), a Hub id "org/name[@revision]", or a
    .safetensors file. Raises ModelNotFoundError, CheckpointError.
    """
    path = resolve_motion(ref, variant=variant, revision=revision, offline=offline)
    headers = merged_header(_files(path, variant))
    infos = {ours: headers[theirs] for ours, theirs in _names(shapes_of(headers), path).items()}
    config = _config(path, infos)
    if unet is not None:
        check_motion(config, unet)
    with on_meta():
        adapter = MotionAdapter(config)
    # Some writers leave the positions out: they are a constant.
    shapes = network_shapes(adapter)
    computed = {name for name in shapes if name.endswith(POSITIONS) and name not in infos}
    # The names are a U-Net's, so they need no further translation than a U-Net's do.
    matched = check("unet", infos, {name: shapes[name] for name in shapes.keys() - computed}, path)
    tensors = read_motion(path, variant)
    for name in computed:
        tensors[name] = frame_positions(shapes[name][-1], config.max_frames)
    return fill(adapter, matched | {name: name for name in computed}, tensors, path, device, dtype)


def resolve_motion(
    ref: str | Path, *, variant: str | None = None, revision: str | None = None, offline: bool = False
) -> Path:
    """The adapter's folder or file on this machine, downloaded if it must be. Raises ModelNotFoundError."""
    return source.resolve(ref, subfolder="motion_adapter", revision=revision, variant=variant, offline=offline)


def read_motion(path: Path, variant: str | None = None) -> dict[str, Tensor]:
    """An adapter's tensors as views of its mapped file, by the names that they have in a U-Net it is attached to."""
    tensors = read(_files(path, variant))
    names = _names(shapes_of(tensors), path)
    return {ours: tensors[theirs] for ours, theirs in names.items()}


def check_motion(motion: MotionConfig, unet: UNetConfig) -> None:
    """Whether an adapter fits a U-Net. Raises CheckpointError, saying what each is for."""
    fault = mismatch(unet, motion)
    if fault is not None:
        made_for = MADE_FOR.get(motion.channels, "a model of its own kind")
        raise CheckpointError(
            f"the motion adapter is for {made_for}, the model is {family_of(unet).title}: {fault}",
            f"use an adapter that was made for {family_of(unet).title}",
        )


def beta_schedule_of(path: Path) -> str:
    """The kind of betas that an adapter was trained with, as its config.json says; linear where nothing does."""
    return "linear" if path.is_file() else str(read_json(path / "config.json").get("beta_schedule", "linear"))


def with_betas(scheduler: Mapping[str, Any], beta_schedule: str) -> dict[str, Any]:
    """A scheduler config with betas of another kind between the same ends."""
    return {**scheduler, "beta_schedule": beta_schedule, "trained_betas": None}


def motion_config(raw: Mapping[str, Any], where: str = "config.json") -> MotionConfig:
    """MotionAdapter's config as ours; absent fields have diffusers' defaults. Raises CheckpointError."""
    check_class(raw, ("MotionAdapter",), where)
    fields = Fields(raw, where)
    if fields.given("conv_in_channels"):
        raise fields.refuse("conv_in_channels", "adapters that bring another first layer (PIA) are not supported")
    fields.only("motion_mid_block_layers_per_block", 1)
    channels = fields.integers("block_out_channels", MotionConfig.channels, 8, MAX_CHANNELS, (1, MAX_LEVELS))
    levels = len(channels)
    mid_depth = fields.each_level("motion_transformer_layers_per_mid_block", 1, 1, MAX_DEPTH, 1)[0]
    config = MotionConfig(
        channels=channels,
        layers=fields.each_level("motion_layers_per_block", 2, 1, MAX_LAYERS, levels),
        depths=fields.each_level("motion_transformer_layers_per_block", 1, 1, MAX_DEPTH, levels),
        mid_depth=mid_depth if fields.flag("use_motion_mid_block", True) else None,
        heads=fields.each_level("motion_num_attention_heads", 8, 1, 1024, levels),
        norm_groups=fields.integer("motion_norm_num_groups", 32, 1, 1024),
        max_frames=fields.integer("motion_max_seq_length", 32, 1, MAX_FRAMES),
    )
    for count, heads in zip(channels, config.heads, strict=True):
        if count % (2 * heads) or count % config.norm_groups:  # 2: sines and cosines of the positions
            raise CheckpointError(
                f"{where}: {count} channels do not go into {heads} heads of even width and {config.norm_groups} groups"
            )
    return config


def _names(shapes: Shapes, path: Path) -> dict[str, str]:
    """Our names of a file's tensors -> the file's own. A whole U-Net around the modules is left out."""
    bare = {name.removeprefix("unet."): theirs for name, theirs in unwrapped(shapes).items()}
    whole = bare.keys() >= WHOLE and any(MODULES in name for name in bare)
    if whole and shapes[bare["conv_in.weight"]][1:2] == (9,):
        raise CheckpointError(
            f"{path} brings another first layer (PIA), which is not supported", "use AnimateDiff's own"
        )
    found: dict[str, str] = {}
    for ours, theirs in bare.items():
        if whole and UNET.match(ours) and MODULES not in ours:
            continue
        for old, new in OLD_NAMES:
            ours = ours.replace(old, new)
        if ours in found:
            raise CheckpointError(f"{path} holds {shown(ours)} twice, as {shown(found[ours])} and {shown(theirs)}")
        if not ours.endswith(SECOND_POSITIONS):
            found[ours] = theirs
    return found


def _files(path: Path, variant: str | None) -> list[Path]:
    if path.is_file():
        return [path]
    check_variant({"motion_adapter": path}, variant)
    return weight_files(path, variant)


def _config(path: Path, infos: Mapping[str, TensorInfo]) -> MotionConfig:
    if path.is_file():
        return motion_config(_raw_config(shapes_of(infos), path), str(path))
    return motion_config(read_json(path / "config.json"), str(path / "config.json"))


def _raw_config(shapes: Shapes, path: Path) -> dict[str, Any]:
    """What config.json would say of a file that has none, by its tensors. Heads and groups are always the same."""

    def count(pattern: str) -> int:
        found = 0
        while pattern.format(found) in shapes:
            found += 1
        return found

    levels = range(count("down_blocks.{}.motion_modules.0.norm.weight"))
    if not levels:
        raise CheckpointError(
            f"{path} is no motion adapter: it looks like {looks_like(shapes)}",
            "a motion LoRA is loaded as other LoRAs are, beside a motion adapter",
        )
    block = "down_blocks.{}.motion_modules.0.transformer_blocks.{}.norm1.weight"
    positions = shapes.get(f"down_blocks.0.motion_modules.0.transformer_blocks.0{POSITIONS}", ())
    return {
        "_class_name": "MotionAdapter",
        "block_out_channels": [
            next(iter(shapes[f"down_blocks.{level}.motion_modules.0.norm.weight"]), 0) for level in levels
        ],
        "motion_layers_per_block": [count(f"down_blocks.{level}.motion_modules.{{}}.norm.weight") for level in levels],
        "motion_transformer_layers_per_block": [count(block.format(level, "{}")) for level in levels],
        "motion_transformer_layers_per_mid_block": max(1, count("mid_block." + block.split(".", 2)[2])),
        "motion_max_seq_length": positions[1] if len(positions) == 3 else None,
        "use_motion_mid_block": "mid_block.motion_modules.0.norm.weight" in shapes,
    }
