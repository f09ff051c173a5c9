"""ControlNets and T2I-Adapters from files: folders in the diffusers layout, and single .safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from calotype.errors import CheckpointError
from calotype.families import CUSTOM, SD15, SD21, family_of, recognise
from calotype.nn.controlnet import ControlNet, ControlNetConfig
from calotype.nn.t2i_adapter import T2IAdapter, T2IAdapterConfig
from calotype.nn.unet import UNetConfig, skip_channels
from calotype.parts import Stored
from calotype.rules import shown
from calotype.weights import source
from calotype.weights.adapter_configs import (
    controlnet_config,
    raw_controlnet,
    raw_hint,
    raw_t2i_adapter,
    t2i_adapter_config,
)
from calotype.weights.compare import check
from calotype.weights.configs import check_class
from calotype.weights.control_files import (
    ControlFile,
    base_weights,
    opened,
    pools,
    whole_of_difference,
    whole_of_low_rank,
)
from calotype.weights.detect import looks_like
from calotype.weights.files import DTYPES, STEMS, TensorInfo, read, read_json
from calotype.weights.folder import check_variant, merged_header, weight_files
from calotype.weights.ldm import control_names
from calotype.weights.load import CPU, fill, network_shapes, on_meta

ControlNetwork = ControlNet | T2IAdapter
ControlConfig = ControlNetConfig | T2IAdapterConfig

CLASSES = ("ControlNetModel", "T2IAdapter")


def load_control(
    ref: str | Path,
    *,
    unet: UNetConfig | None = None,
    base: Stored | None = None,
    downscale: int = 8,
    subfolder: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> ControlNetwork:
    """A ControlNet or a T2I-Adapter, whichever it is; with `unet`, only one that fits (see `check_control`).

    `base` reads the U-Net's weights, which Control-LoRAs and differences are completed from.

    `ref` is a folder with config.json, a Hub id "org/name[@revision]", or a .safetensors file; `subfolder` says where
    in a folder or repository it is. Raises ModelNotFoundError, CheckpointError.
    """
    # A repository that is a whole model is not wanted: nothing of it is downloaded.
    path = source.resolve(
        ref, subfolder=subfolder, revision=revision, variant=variant, offline=offline, without=source.FOLDERS
    )
    if path.is_file() and not _has_config(path):
        tensors = read([path])
        return control_from_tensors(
            tensors, path, unet=unet, base=base, downscale=downscale, device=device, dtype=dtype
        )
    folder = path.parent if path.is_file() else path
    config = _config(folder)
    if unet is not None:
        check_control(config, unet, downscale)
    network = control_on_meta(config)
    if path.is_file():
        paths = [path]
    else:
        check_variant({"the control": path}, variant)
        paths = weight_files(path, variant)
    # The names are a U-Net's and a few more, so they need no further translation than a U-Net's do.
    matched = check("unet", merged_header(paths), network_shapes(network), path)
    return fill(network, matched, read(paths), path, device, dtype)


def _has_config(file: Path) -> bool:
    """Whether a file is the weights of a control's folder, whose config.json says more than its tensors."""
    return file.name.startswith(STEMS[0]) and _is_control(file.with_name("config.json"))


def control_from_tensors(
    tensors: Mapping[str, Tensor],
    where: Path,
    *,
    unet: UNetConfig | None = None,
    base: Stored | None = None,
    downscale: int = 8,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> ControlNetwork:
    """The network of tensors without a config, under diffusers' names, LDM's or (a T2I-Adapter's) TencentARC's.

    `where` they are from is for messages. Raises CheckpointError.
    """
    file = opened(tensors, where)
    if file.is_low_rank:
        what = "a Control-LoRA"
        unet, weights = base_weights(base, unet, what, where)
        config: ControlConfig = _low_rank_config(file, unet, where)
    else:
        what = "a ControlNet as a difference"
        config = _config_of(file, where)
    if unet is not None:
        check_control(config, unet, downscale)
    network = control_on_meta(config)
    shapes, whole = network_shapes(network), file.tensors
    if file.is_low_rank:
        assert isinstance(config, ControlNetConfig)
        whole = whole_of_low_rank(whole, weights, config, shapes, where)
    elif file.is_difference:
        whole = whole_of_difference(whole, base_weights(base, unet, what, where)[1])
    spelling = {known: name for name, known in DTYPES.items()}
    infos = {name: TensorInfo(spelling[tensor.dtype], tuple(tensor.shape), 0, 0) for name, tensor in whole.items()}
    return fill(network, check("unet", infos, shapes, where), whole, where, device, dtype)


def control_on_meta(config: ControlConfig) -> ControlNetwork:
    """The network that a config describes, without weights."""
    with on_meta():
        return ControlNet(config) if isinstance(config, ControlNetConfig) else T2IAdapter(config)


# ---- which network ----


def _config(folder: Path) -> ControlConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise _no_config(folder)
    raw = read_json(path)
    if check_class(raw, CLASSES, str(path)) == "ControlNetModel":
        return controlnet_config(raw, str(path))
    return t2i_adapter_config(raw, str(path))


def _no_config(folder: Path) -> CheckpointError:
    """The error for a folder that is no control, saying which are inside: diffusers saves several side by side."""
    inside = [path.parent.name for path in sorted(folder.glob("*/config.json"))[:50] if _is_control(path)]
    if inside:
        return CheckpointError(
            f"{folder} is not one control; inside are {', '.join(inside)}",
            f"load each by itself, such as {folder / inside[0]}, and name all of them in the request",
        )
    return CheckpointError(
        f"{folder} has no config.json: it is neither a ControlNet nor a T2I-Adapter",
        "for one inside a larger repository give subfolder=; a single file is given by its path",
    )


def _is_control(path: Path) -> bool:
    try:
        return read_json(path).get("_class_name") in CLASSES
    except CheckpointError:
        return False


def _config_of(file: ControlFile, where: Path) -> ControlConfig:
    """The config of a network by its tensors' names and shapes."""
    shapes = file.shapes
    if any(name.startswith("controlnet_cond_embedding.") for name in shapes):
        return controlnet_config(raw_controlnet(shapes) | {"global_pool_conditions": pools(where)}, str(where))
    if any(name.startswith("adapter.body.") for name in shapes):
        return t2i_adapter_config(raw_t2i_adapter(shapes), str(where))
    first = ", ".join(shown(name) for name in list(shapes)[:3])
    raise CheckpointError(
        f"{where} is neither a ControlNet nor a T2I-Adapter: it looks like {looks_like(shapes)}",
        f"its first tensors are {first}" if shapes else "the file is empty",
    )


def _low_rank_config(file: ControlFile, unet: UNetConfig, where: Path) -> ControlNetConfig:
    """A Control-LoRA's config: the U-Net's, and of its own what reads the picture."""
    hints = {name: shape for name, shape in file.shapes.items() if name.startswith("input_hint_block.")}
    ours = control_names(hints)
    hint = raw_hint({ours.get(name, name): shape for name, shape in hints.items()})
    read_by = controlnet_config({"_class_name": "ControlNetModel", **hint}, f"{where} (a Control-LoRA)")
    own = file.shapes.get("input_blocks.0.0.weight", ())
    kept = {**vars(unet), "guidance_dim": None, "in_channels": own[1] if len(own) > 1 else unet.in_channels}
    return ControlNetConfig(**kept, hint_channels=read_by.hint_channels, global_pool=pools(where))


# ---- which family ----


def check_control(config: ControlConfig, unet: UNetConfig, downscale: int = 8) -> None:
    """Whether a network's residuals go into a U-Net whose autoencoder makes one latent of `downscale` pixels.

    Raises CheckpointError, saying what each is for. SDXL's fit SSD-1B, whose maps have the same sizes.
    """
    if isinstance(config, ControlNetConfig):
        what, fault = "ControlNet", _controlnet_fault(config, unet, downscale)
    else:
        what, fault = "T2I-Adapter", _t2i_fault(config, unet, downscale)
    if fault is not None:
        title = family_of(unet).title
        raise CheckpointError(
            f"the {what} is for {made_for(config)}, the model is {title}: {fault}", f"use one that was made for {title}"
        )


def made_for(config: ControlConfig) -> str:
    """The family of the U-Net that a network was made for, for sentences."""
    if isinstance(config, ControlNetConfig):
        return recognise(config.channels[0], config.context_dim, config.addition_in_dim is not None, True).title
    if config.channels[0] != SD15.width:
        return CUSTOM.title
    return "SDXL" if config.kind == "full_xl" else f"{SD15.title} or {SD21.title}"


def _controlnet_fault(config: ControlNetConfig, unet: UNetConfig, downscale: int) -> str | None:
    """How a ControlNet's inputs and outputs differ from a U-Net's. An input that it does not take is no difference."""
    attends = any(depth is not None for depths in config.down_depths for depth in depths)
    added = (config.addition_in_dim, config.addition_time_dim)
    if skip_channels(config) != skip_channels(unet):
        return f"it has maps of {_listed(skip_channels(config))} channels, the U-Net {_listed(skip_channels(unet))}"
    if (attends or config.mid_depth is not None) and config.context_dim != unet.context_dim:
        return f"it takes text of width {config.context_dim}, the U-Net {unet.context_dim}"
    if config.addition_in_dim is not None and added != (unet.addition_in_dim, unet.addition_time_dim):
        return f"it takes {config.addition_in_dim} added inputs, the U-Net {unet.addition_in_dim or 'none'}"
    if config.in_channels != unet.out_channels:
        return f"it takes latents of {config.in_channels} channels, the U-Net gives {unet.out_channels}"
    if config.downscale != downscale:
        return f"its pictures are {config.downscale} times as large as the latents, the model's {downscale} times"
    return None


def _t2i_fault(config: T2IAdapterConfig, unet: UNetConfig, downscale: int) -> str | None:
    """How a T2I-Adapter's maps differ from those that the U-Net adds them to."""
    ours, levels = [], len(unet.channels)
    for level, depths in enumerate(unet.down_depths):
        # A level without attention takes it behind its downsampling: see UNetEncoder.encode.
        smaller = level + 1 < levels and all(depth is None for depth in depths)
        ours.append((unet.channels[level], downscale << (level + smaller)))
    if unet.has_mid:
        ours.append((unet.channels[-1], downscale << (levels - 1)))
    theirs = list(config.maps())
    if theirs == ours[: len(theirs)]:
        return None
    return f"it gives {_maps(theirs)}; the U-Net takes {_maps(ours)}"


def _maps(maps: list[tuple[int, int]]) -> str:
    return ", ".join(f"{channels} channels at 1/{factor}" for channels, factor in maps)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
