"""Fills networks from files: headers are compared with the network first, and a load succeeds whole or explains.

Networks are built on the meta device, where they take no memory. A tensor whose dtype is right stays a view of the
mapped file; any other is converted, one at a time. So anonymous memory grows by no more than the converted weights.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from calotype.errors import CalotypeWarning, CheckpointError
from calotype.families import CUSTOM, Family, family_of
from calotype.nn.clip import CLIPText
from calotype.nn.clip_vision import CLIP
from calotype.nn.tiny_vae import AutoencoderTiny
from calotype.nn.unet import UNet
from calotype.nn.vae import AutoencoderKL
from calotype.parts import Habit, Parts, Stored, without_memory
from calotype.rules import shown
from calotype.schedule import NoiseSchedule
from calotype.text.encode import TextEncoder
from calotype.weights import configs, source, taesd
from calotype.weights.compare import check
from calotype.weights.detect import shapes_of
from calotype.weights.files import is_finite, read, read_json
from calotype.weights.folder import SCHEDULER, Folder, Model, check_pickles, check_variant, part_header, weight_files
from calotype.weights.habits import habit_of
from calotype.weights.names import Kind
from calotype.weights.pipeline import defaults_of, repaired_schedule, with_class
from calotype.weights.single_file import SingleFile
from calotype.weights.texts import family_texts

CPU = torch.device("cpu")
TINY = "tiny_vae"  # its folder in a model's
Vae = AutoencoderKL | AutoencoderTiny
Part = TypeVar("Part", bound=nn.Module)


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


def load_clip(folder: Path, *, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> CLIP:
    """A whole CLIP of a folder with config.json and weights, as transformers' CLIPModel. Raises CheckpointError."""
    path = folder / "config.json"
    text, vision = configs.clip_config(read_json(path), str(path))
    with on_meta():
        network = CLIP(text, vision)
    return _load(network, "clip", folder, None, device, dtype)


def load_parts(
    model: str | Path | None = None,
    *,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    tiny_vae: str | Path | None = None,
    variant: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    prediction: str | None = None,
    device: torch.device = CPU,
    dtype: torch.dtype | Callable[[int], torch.dtype] = torch.float32,
    unread: Callable[[nn.Module], Collection[str]] = lambda network: (),
) -> Parts:
    """Every part of a model, checked against each other. `unet`, `vae` and `tiny_vae` replace the model's own; a folder
    has a `tiny_vae` beside its `vae`, if any.

    `model`, `unet` and `vae` are what `source.resolve` takes: folders or single files; `revision` belongs to `model`,
    `variant` to all three. `prediction` ("epsilon", "v_prediction" or "sample") overrules what the model says of
    itself. `dtype` can also be what gives it for a U-Net of so many parameters, before weights are read. `unread` names
    those of the U-Net's and the text encoders' parameters that are only checked: they have no memory, and whoever asks
    for that reads them from `Parts.stored`. Raises ModelNotFoundError, CheckpointError.
    """
    whole, owners = _opened(model, unet, vae, variant, revision, offline, prediction)
    pipeline = whole.pipeline()
    for part, remark in pipeline.unused.items():
        warnings.warn(f"{whole.path}: {part} is not used: {remark}", CalotypeWarning, stacklevel=3)

    # All configs first: they are cheap, and say whether the parts belong together.
    scheduler = repaired_schedule(pipeline, whole.json(SCHEDULER))
    habit = None if whole.has("calotype.json") else _habit(whole, owners["unet"], model, unet)
    if habit is not None and habit.prediction is not None and prediction is None:
        scheduler = {**scheduler, "prediction_type": habit.prediction}
    schedule = NoiseSchedule.from_config(scheduler)
    unet_ = unet_of(*config_of(owners["unet"], "unet"))
    if not isinstance(dtype, torch.dtype):
        dtype = dtype(sum(each.numel() for each in unet_.parameters()))
    family = family_of(unet_.config)
    vae_ = vae_of(*_vae_config(owners["vae"], whole, family))
    encoders = {name: text_encoder_of(*config_of(whole, name)) for _, name in pipeline.text_parts}
    check_fit(unet_, vae_, [*encoders.values()])
    tiny = _tiny(tiny_vae, whole, variant, offline)
    if tiny is not None:
        check_fit(unet_, tiny[0], [*encoders.values()])
    own = whole.json("calotype.json") if whole.has("calotype.json") else {}
    place, downscale = whole.where("calotype.json"), vae_.config.downscale
    defaults = defaults_of(own, place, family, unet_.config, schedule, downscale, habit)
    tokenizers = [whole.tokenizer(name) for name, _ in pipeline.text_parts]
    text = TextEncoder(tokenizers, [*encoders.values()])

    stored = {"unet": _stored(owners["unet"], "unet", unet_)}
    stored |= {name: _stored(whole, name, encoder) for name, encoder in encoders.items()}
    for name, encoder in encoders.items():
        _filled(encoder, whole, name, device, dtype, unread(encoder))
    return Parts(
        family=family.name,
        text=text,
        unet=_filled(unet_, owners["unet"], "unet", device, dtype, unread(unet_)),
        vae=_filled(vae_, owners["vae"], "vae", device, _vae_dtype(vae_, dtype)),
        tiny_vae=None if tiny is None else _filled(*tiny, "vae", device, dtype),
        schedule=schedule,
        defaults=defaults,
        zero_empty_negative=pipeline.zero_empty_negative,
        source=str(whole.path),
        habit=habit,
        scheduler=scheduler,
        stored=stored,
    )


def _opened(
    model: str | Path | None,
    unet: str | Path | None,
    vae: str | Path | None,
    variant: str | None,
    revision: str | None,
    offline: bool,
    prediction: str | None,
) -> tuple[Model, dict[str, Model]]:
    """The whole model, and where its U-Net and its autoencoder are."""
    overrides = {name: ref for name, ref in (("unet", unet), ("vae", vae)) if ref is not None}
    root = source.resolve(model, revision=revision, variant=variant, offline=offline, without=tuple(overrides))
    whole = open_model(root, variant, prediction)
    owners = {"unet": whole, "vae": whole}
    for name, ref in overrides.items():
        owners[name] = _owner(name, ref, variant, offline)
    folders = {name: owner.folder(name) for name, owner in owners.items() if isinstance(owner, Folder)}
    if isinstance(whole, Folder):
        folders = {name: whole.folder(name) for _, name in whole.pipeline().text_parts} | folders
    check_pickles(folders, variant)
    check_variant(folders, variant)
    return whole, owners


def _tiny(
    ref: str | Path | None, whole: Model, variant: str | None, offline: bool
) -> tuple[AutoencoderTiny, Model] | None:
    """The tiny autoencoder that is asked for or lies in the model's folder, without weights, and where it is."""
    if ref is None:
        if not isinstance(whole, Folder) or not (whole.path / TINY / "config.json").is_file():
            return None
        owner: Model = Folder(whole.path, parts={"vae": whole.path / TINY})
    else:
        owner = _owner("vae", ref, variant, offline)
    raw, where = owner.json("vae/config.json"), owner.where("vae/config.json")
    network = vae_of(raw, where)
    if not isinstance(network, AutoencoderTiny):
        raise CheckpointError(f"{where} is not a tiny autoencoder (TAESD)", "it may be given as vae instead")
    return network, owner


def _owner(name: str, ref: str | Path, variant: str | None, offline: bool) -> Model:
    """Where a single part is."""
    tiny = taesd.decoder_in(Path(os.path.expanduser(ref))) if name == "vae" else None
    path = source.resolve(ref, subfolder=name, variant=variant, offline=offline) if tiny is None else tiny
    return SingleFile(path) if path.is_file() else Folder(path.parent, variant, {name: path})


def _habit(whole: Model, owner: Model, model: str | Path | None, unet: str | Path | None) -> Habit | None:
    """How the few-step model likes to be used that a U-Net is of, or is."""
    if owner is whole:
        return habit_of("model", model, whole.path)
    return habit_of("model", unet, owner.folder("unet") if isinstance(owner, Folder) else owner.path)


def open_model(root: Path, variant: str | None = None, prediction: str | None = None) -> Model:
    """A folder's or a single file's model, of which nothing but the header was read. Raises CheckpointError."""
    return SingleFile(root, prediction) if root.is_file() else Folder(root, variant, prediction=prediction)


def config_of(owner: Model, part: str) -> tuple[dict[str, Any], str]:
    """A part's config.json, and its place for messages. A text encoder's class may be in model_index.json alone."""
    name = f"{part}/config.json"
    raw = owner.json(name)
    if part.startswith("text_encoder") and owner.has("model_index.json"):
        entry = owner.json("model_index.json").get(part)
        raw = with_class(raw, entry[-1] if isinstance(entry, list) and entry else None)
    return raw, owner.where(name)


def _vae_config(owner: Model, whole: Model, family: Family) -> tuple[dict[str, Any], str]:
    """The config of the autoencoder that `owner` has; a lone one in a single file takes the model's or the family's."""
    name = "vae/config.json"
    for model in (owner, whole):
        if model.has(name) and (model is owner or model.json(name).get("_class_name") == "AutoencoderKL"):
            return model.json(name), model.where(name)
    if isinstance(owner, Folder) or family is CUSTOM:
        return owner.json(name), owner.where(name)  # raises
    return family_texts(family)[name], f"{family.title}'s autoencoder"


def _filled(
    network: Part, owner: Model, part: str, device: torch.device, dtype: torch.dtype, unread: Collection[str] = ()
) -> Part:
    config: Any = network.config
    matched, tensors = owner.weights(part, config, network_shapes(network))
    return fill(network, matched, tensors, Path(owner.where(part)), device, dtype, unread)


def _stored(owner: Model, part: str, network: nn.Module) -> Stored:
    """What reads a part's weights once more; it does not keep the network."""
    config: Any = network.config
    shapes = network_shapes(network)

    def stored() -> dict[str, Tensor]:
        matched, tensors = owner.weights(part, config, shapes)
        return {ours: tensors[name].reshape(shapes[ours]) for name, ours in matched.items()}

    return stored


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
def on_meta() -> Iterator[None]:
    """Networks are built without memory inside it."""
    with torch.device("meta"), _Uninitialised():
        yield


def unet_on_meta(folder: Path) -> UNet:
    """The U-Net that a folder's config.json describes, without weights."""
    path = folder / "config.json"
    return unet_of(read_json(path), str(path))


def vae_on_meta(folder: Path) -> Vae:
    """The autoencoder that a folder's config.json describes, without weights."""
    path = folder / "config.json"
    return vae_of(read_json(path), str(path))


def text_encoder_on_meta(folder: Path) -> CLIPText:
    """The text encoder that a folder's config.json describes, without weights."""
    path = folder / "config.json"
    return text_encoder_of(read_json(path), str(path))


def unet_of(raw: dict[str, Any], where: str) -> UNet:
    """The U-Net that a config.json describes, without weights."""
    config = configs.unet_config(raw, where)
    with on_meta():
        return UNet(config)


def vae_of(raw: dict[str, Any], where: str) -> Vae:
    """The autoencoder that a config.json describes, without weights."""
    if configs.check_class(raw, ("AutoencoderKL", "AutoencoderTiny"), where) == "AutoencoderTiny":
        tiny = configs.tiny_vae_config(raw, where)
        with on_meta():
            return AutoencoderTiny(tiny)
    config = configs.vae_config(raw, where)
    with on_meta():
        return AutoencoderKL(config)


def text_encoder_of(raw: dict[str, Any], where: str) -> CLIPText:
    """The text encoder that a config.json describes, without weights."""
    config = configs.text_config(raw, where)
    with on_meta():
        return CLIPText(config)


def check_fit(unet: UNet, vae: Vae, encoders: Sequence[CLIPText]) -> None:
    """Whether networks speak the same widths. Raises CheckpointError, saying which do not."""
    config, latent = unet.config, vae.config.latent_channels
    width = sum(encoder.config.width for encoder in encoders)
    if config.context_dim != width:
        raise CheckpointError(
            f"the U-Net takes text of width {config.context_dim}, the text encoders give {width}", FIT
        )
    if config.out_channels == latent and config.in_channels - latent in OTHER_INPUTS:
        raise CheckpointError(
            f"the U-Net has {config.in_channels} channels in: beside the {latent} of the latents it takes "
            f"{OTHER_INPUTS[config.in_channels - latent]}, which is not supported",
            "use a model that draws from text",
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


# Channels beside the latents' -> what U-Nets take by them.
OTHER_INPUTS = {
    1: "a map of depths (Stable Diffusion 2's depth2img)",
    3: "a small picture (the x4 upscaler)",
    4: "the latents of a picture (InstructPix2Pix, the latent upscaler)",
}
FIT = "these parts come from models of different families"


# ---- filling ----


def _load(
    network: Part, kind: Kind, folder: Path, variant: str | None, device: torch.device, dtype: torch.dtype
) -> Part:
    """Gives a network on the meta device the weights of a folder."""
    paths = weight_files(folder, variant)
    matched = check(kind, part_header(folder, paths), network_shapes(network), folder)
    return fill(network, matched, read(paths), folder, device, dtype)


def fill(
    network: Part,
    matched: Mapping[str, str],
    tensors: dict[str, Tensor],
    where: Path,
    device: torch.device,
    dtype: torch.dtype,
    unread: Collection[str] = (),
) -> Part:
    """Gives a network on the meta device its weights: `matched` has their names in `tensors` -> the network's.

    What it has used it takes out of `tensors`; of the network's names that are `unread` it only checks the numbers.
    Raises CheckpointError for numbers that are not finite.
    """
    shapes = network_shapes(network)
    weights = {}
    for name, ours in matched.items():
        tensor = tensors.pop(name)
        if ours in unread:
            weight = without_memory(torch.Size(shapes[ours]), device, dtype)
            sound = is_finite(tensor)
        else:
            weight = tensor.reshape(shapes[ours]).to(device, dtype)
            sound = is_finite(weight)
        if not sound:
            raise _not_finite(f"{where}: {shown(name)}", tensor, dtype)
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
    return shapes_of(network.state_dict())
