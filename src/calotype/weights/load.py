"""Fills networks from files: headers are compared with the network first, and a load succeeds whole or explains.

Networks are built on the meta device, where they take no memory. A tensor whose dtype is right stays a view of the
mapped file; any other is converted, one at a time. So anonymous memory grows by no more than the converted weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from calotype.errors import CalotypeWarning, CheckpointError, ModelNotFoundError
from calotype.families import family_of
from calotype.nn.clip import CLIPText
from calotype.nn.tiny_vae import AutoencoderTiny
from calotype.nn.unet import UNet
from calotype.nn.vae import AutoencoderKL
from calotype.parts import Parts
from calotype.schedule import NoiseSchedule
from calotype.text.encode import TextEncoder
from calotype.text.tokenizer import Tokenizer
from calotype.weights import configs, source
from calotype.weights.compare import check
from calotype.weights.files import (
    PICKLES,
    STEMS,
    TensorInfo,
    header,
    is_finite,
    read,
    read_json,
    shards,
    shown,
    unsafe,
    variants,
)
from calotype.weights.names import Kind
from calotype.weights.pipeline import read_defaults, read_pipeline, repaired_schedule

CPU = torch.device("cpu")
Vae = AutoencoderKL | AutoencoderTiny
Network = TypeVar("Network", UNet, AutoencoderKL, AutoencoderTiny, Vae, CLIPText)


def load_unet(
    folder: Path, *, variant: str | None = None, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> UNet:
    """The U-Net of a folder with config.json and weights. Raises CheckpointError."""
    return _load(unet_on_meta(folder), "unet", folder, variant, device, dtype)


def load_vae(
    folder: Path, *, variant: str | None = None, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> Vae:
    """The autoencoder of a folder with config.json and weights. Raises CheckpointError.

    One whose config says force_upcast overflows in float16: it is loaded in float32 then.
    """
    network = vae_on_meta(folder)
    return _load(network, "vae", folder, variant, device, _vae_dtype(network, dtype))


def load_text_encoder(
    folder: Path, *, variant: str | None = None, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> CLIPText:
    """The CLIP text encoder of a folder with config.json and weights. Raises CheckpointError."""
    return _load(text_encoder_on_meta(folder), "text_encoder", folder, variant, device, dtype)


def load_parts(
    model: str | Path | None = None,
    *,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    variant: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Parts:
    """Every part of a model, checked against each other. `unet` and `vae` replace the model's own.

    `model`, `unet` and `vae` are what `source.resolve` takes; `revision` belongs to `model`, `variant` to all three.
    Raises ModelNotFoundError, CheckpointError.
    """
    overrides = {name: ref for name, ref in (("unet", unet), ("vae", vae)) if ref is not None}
    root = source.resolve(model, revision=revision, variant=variant, offline=offline, without=tuple(overrides))
    _refuse_file(root)
    pipeline = read_pipeline(root)
    folders = {part: root / part for part in pipeline.classes}
    for name, ref in overrides.items():
        folders[name] = source.resolve(ref, subfolder=name, variant=variant, offline=offline)
        _refuse_file(folders[name])
    check_variant(folders, variant)

    # All configs first: they are cheap, and say whether the parts belong together.
    scheduler = read_json(folders["scheduler"] / "scheduler_config.json")
    schedule = NoiseSchedule.from_config(repaired_schedule(pipeline, scheduler))
    unet_, vae_ = unet_on_meta(folders["unet"]), vae_on_meta(folders["vae"])
    encoders = [text_encoder_on_meta(folders[encoder]) for _, encoder in pipeline.text_parts]
    check_fit(unet_, vae_, encoders)
    family = family_of(unet_.config)
    defaults = read_defaults(root, family, unet_.config, schedule, vae_.config.downscale)
    text = TextEncoder([Tokenizer.load(folders[tokenizer]) for tokenizer, _ in pipeline.text_parts], encoders)

    for (_, name), encoder in zip(pipeline.text_parts, encoders, strict=True):
        _load(encoder, "text_encoder", folders[name], variant, device, dtype)
    return Parts(
        family=family.name,
        text=text,
        unet=_load(unet_, "unet", folders["unet"], variant, device, dtype),
        vae=_load(vae_, "vae", folders["vae"], variant, device, _vae_dtype(vae_, dtype)),
        schedule=schedule,
        defaults=defaults,
        zero_empty_negative=pipeline.zero_empty_negative,
        source=str(root),
    )


def _vae_dtype(network: Vae, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 and network.config.force_upcast else dtype


# ---- building ----

INITIALISERS = {nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, Tensor.normal_, Tensor.fill_, Tensor.zero_}


class _Uninitialised(TorchFunctionMode):
    """Leaves new parameters as they are: they will be replaced. PyTorch takes seconds to "initialise" them on meta."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"), _Uninitialised():
        yield


def unet_on_meta(folder: Path) -> UNet:
    """The U-Net that a folder's config.json describes, without weights."""
    path = folder / "config.json"
    config = configs.unet_config(read_json(path), str(path))
    with _on_meta():
        return UNet(config)


def vae_on_meta(folder: Path) -> Vae:
    """The autoencoder that a folder's config.json describes, without weights."""
    path = folder / "config.json"
    raw = read_json(path)
    kind = configs.check_class(raw, ("AutoencoderKL", "AutoencoderTiny"), str(path))
    if kind == "AutoencoderTiny":
        tiny = configs.tiny_vae_config(raw, str(path))
        with _on_meta():
            return AutoencoderTiny(tiny)
    config = configs.vae_config(raw, str(path))
    with _on_meta():
        return AutoencoderKL(config)


def text_encoder_on_meta(folder: Path) -> CLIPText:
    """The text encoder that a folder's config.json describes, without weights."""
    path = folder / "config.json"
    config = configs.text_config(read_json(path), str(path))
    with _on_meta():
        return CLIPText(config)


def check_fit(unet: UNet, vae: Vae, encoders: Sequence[CLIPText]) -> None:
    """Whether networks speak the same widths. Raises CheckpointError, saying which do not."""
    config, latent = unet.config, vae.config.latent_channels
    width = sum(encoder.config.width for encoder in encoders)
    if config.context_dim != width:
        raise CheckpointError(
            f"the U-Net takes text of width {config.context_dim}, the text encoders give {width}", FIT
        )
    if config.out_channels != latent or config.in_channels not in (latent, 2 * latent + 1):
        raise CheckpointError(
            f"the U-Net has {config.in_channels} channels in and {config.out_channels} out, the autoencoder {latent}",
            FIT,
        )
    if config.addition_in_dim is not None and config.addition_time_dim is not None:
        pooled = encoders[-1].config.projection_dim if len(encoders) == 2 else None
        numbers = 6 * config.addition_time_dim  # original height and width, crop top and left, target height and width
        if pooled is None or pooled + numbers != config.addition_in_dim:
            given = (
                "no pooled text" if pooled is None else f"pooled text of width {pooled} and {numbers} for six numbers"
            )
            raise CheckpointError(
                f"the U-Net takes {config.addition_in_dim} added inputs, the model gives {given}", FIT
            )


FIT = "these parts come from models of different families"


def _refuse_file(path: Path) -> None:
    if path.is_file():
        if path.name.endswith(PICKLES):
            raise unsafe(path)
        raise CheckpointError(
            f"{path} is a single file; a folder in the diffusers layout is needed",
            "single files are not read by this release; `calotype inspect` says what it holds",
        )


# ---- which files ----


def available(folder: Path) -> dict[str | None, tuple[str, str]]:
    """The variants of a part's weights (None is the plain one) -> (stem, the file to start from)."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    for stem in STEMS:
        if found := variants(names, stem):
            return {variant: (stem, entry) for variant, entry in found.items()}
    if pickled := sorted(name for name in names if name.endswith(PICKLES)):
        raise unsafe(folder / pickled[0])
    sharded = sorted(name for name in names if name.endswith(".safetensors"))
    detail = f"; {sharded[0]} is not one of theirs" if sharded else ""
    raise CheckpointError(
        f"{folder} holds no weights: {' or '.join(stem + '.safetensors' for stem in STEMS)} is needed{detail}",
        "if it is a download that was cut short, load it once more with a network",
    )


def check_variant(folders: Mapping[str, Path], variant: str | None) -> None:
    """A variant that no part has is refused; parts without it fall back to their plain weights, with a warning."""
    if variant is None:
        return
    weightless = ("tokenizer", "tokenizer_2", "scheduler")
    found = {part: available(folder) for part, folder in folders.items() if part not in weightless}
    lacking = [part for part, there in found.items() if variant not in there]
    if len(lacking) == len(found):
        there = sorted({name for variants_ in found.values() for name in variants_ if name is not None})
        raise ModelNotFoundError(
            f"no part of the model has the variant {shown(variant)}; there are: {', '.join(there) or 'none'}",
            "leave the variant out for the plain weights",
        )
    if lacking:
        message = f"{', '.join(lacking)}: no {variant} weights, the plain ones are used"
        warnings.warn(message, CalotypeWarning, stacklevel=2)


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files of one part's weights: the variant's; else the plain ones; else the only ones there are."""
    found = available(folder)
    chosen = next((key for key in (variant, None) if key in found), None)
    if chosen is None and None not in found:
        if len(found) > 1:
            names = ", ".join(str(name) for name in sorted(found, key=str))
            raise ModelNotFoundError(f"{folder} has only variants ({names})", "say which by variant")
        chosen = next(iter(found))
    return shards(folder, found[chosen][1])


# ---- filling ----


def _load(
    network: Network, kind: Kind, folder: Path, variant: str | None, device: torch.device, dtype: torch.dtype
) -> Network:
    """Gives a network on the meta device the weights of a folder."""
    paths = weight_files(folder, variant)
    shapes = network_shapes(network)
    matched = check(kind, merged_header(paths), shapes, folder)
    tensors = read(paths)
    weights = {}
    for name, ours in matched.items():
        tensor = tensors.pop(name)
        weight = tensor.reshape(shapes[ours]).to(device, dtype)
        if not is_finite(weight):
            raise _not_finite(f"{folder}: {shown(name)}", tensor, dtype)
        weights[ours] = weight
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _not_finite(which: str, tensor: Tensor, dtype: torch.dtype) -> CheckpointError:
    """The error for a weight that is NaN or infinite: in the file, or only after its conversion to `dtype`."""
    if is_finite(tensor):
        return CheckpointError(f"{which} has values beyond {str(dtype).removeprefix('torch.')}", "choose a wider dtype")
    return CheckpointError(
        f"{which} has NaN or infinite values", "the checkpoint is damaged: download or train it again"
    )


def network_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """A network's tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def merged_header(paths: Sequence[Path]) -> dict[str, TensorInfo]:
    """The headers of a part's files as one."""
    merged: dict[str, TensorInfo] = {}
    for path in paths:
        found = header(path)
        if twice := found.keys() & merged.keys():
            raise CheckpointError(f"{path} holds {shown(min(twice))}, which another file of the model holds too")
        merged |= found
    return merged
