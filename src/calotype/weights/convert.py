"""A model from one layout to another: a diffusers folder, a single file in LDM's layout, and pickles (tensors only)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calotype.atomic import replacing_folder
from calotype.errors import CheckpointError, OutputError, UsageError
from calotype.families import family_of
from calotype.nn.clip import CLIPText
from calotype.nn.tiny_vae import AutoencoderTiny
from calotype.nn.unet import UNet
from calotype.text.tokenizer import TABLES, clip_tables
from calotype.weights import ldm, load, source
from calotype.weights.files import HEADER_LIMIT, PICKLES, header, is_pickle, metadata, no_pickle, read
from calotype.weights.folder import SCHEDULER, Folder, Model
from calotype.weights.names import KINDS
from calotype.weights.pickled_folder import convert_folder, has_pickles
from calotype.weights.single_file import EMBEDDED, SingleFile, table
from calotype.weights.texts import INPAINTING_CHANNELS
from calotype.weights.unpickle import unpickle
from calotype.weights.write import Pending, write_safetensors

SUFFIX = ".safetensors"
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}  # the others' are called "model"
EMBEDDED_LIMIT = HEADER_LIMIT // 4  # of all texts; CLIP's tables, which are left out, would be 2 MB

# What Stability's Model Spec (github.com/Stability-AI/ModelSpec) calls the families.
ARCHITECTURES = {
    "sd15": "stable-diffusion-v1",
    "sd21": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
PREDICTIONS = {"v_prediction": "v"}


def convert(
    ref: str | Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    variant: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    prediction: str | None = None,
) -> Path:
    """Writes a model in another layout and gives `output`, whose name says which: a .safetensors file, or a folder.

    A folder (or Hub id) becomes a single file, a single file a folder, a pickle either, and a folder of pickles one of
    .safetensors files; any .safetensors file can get another `dtype`. `force` lets `output` be replaced; a folder only
    if it is a model's. Whatever fails, nothing is half-written. Raises ModelNotFoundError, CheckpointError, UsageError,
    OutputError.
    """
    if output.suffix.lower() in PICKLES:
        raise UsageError(f"{str(output)!r} would be a pickle", "end it in .safetensors, or name a folder")
    path = source.resolve(ref, revision=revision, variant=variant, offline=offline)
    _check_output(output, path, force)
    if path.is_dir() and output.suffix.lower() != SUFFIX and has_pickles(path):
        convert_folder(path, output, dtype)
    elif path.is_dir():
        if output.suffix.lower() != SUFFIX:
            raise UsageError(f"{str(output)!r} is no name for a single file", f"end it in {SUFFIX}")
        write_single_file(Folder(path, variant, prediction=prediction), output, dtype)
    elif not is_pickle(path):
        _convert_file(path, output, dtype, prediction)
    elif (other := no_pickle(path, path.with_suffix(SUFFIX))) is not None:
        raise other
    else:
        with tempfile.TemporaryDirectory(prefix=".", dir=output.parent) as folder:
            unpickled = Path(folder) / f"{path.stem}{SUFFIX}"
            unpickle(path, unpickled)
            if output.suffix.lower() == SUFFIX and dtype is None:
                unpickled.replace(output)
                return output
            try:
                _convert_file(unpickled, output, dtype, prediction)
            except CheckpointError as error:  # the file that it names is gone
                raise CheckpointError(error.message.replace(str(unpickled), str(path)), error.hint) from None
    return output


def _check_output(output: Path, path: Path, force: bool) -> None:
    """Raises UsageError or OutputError where `output` may not be written."""
    ours, theirs = output.resolve(), path.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise UsageError(f"{str(output)!r} is what it would be made of", "choose another name")
    if not output.parent.is_dir():
        raise OutputError(f"there is no folder {str(output.parent)!r}", f"make it first: mkdir -p {output.parent}")
    if not output.exists():
        return
    if not force:
        raise OutputError(f"{str(output)!r} exists", "--force replaces it")
    if output.is_dir() and (output.suffix.lower() == SUFFIX or not _is_model(output)):
        raise OutputError(f"{str(output)!r} is a folder that is no model's", "choose another name")
    if output.is_file() and output.suffix.lower() != SUFFIX:
        raise OutputError(f"{str(output)!r} is a file, and a folder is to be written", "choose another name")


def _is_model(folder: Path) -> bool:
    return (folder / "model_index.json").is_file() or not any(folder.iterdir())


def _convert_file(path: Path, output: Path, dtype: torch.dtype | None, prediction: str | None) -> None:
    if output.suffix.lower() != SUFFIX:
        write_folder(SingleFile(path, prediction), output, dtype)
    elif dtype is None:
        raise UsageError(f"{str(path)!r} is a single file already", "name a folder, or give --dtype")
    else:
        header(path)
        said = metadata(path)
        write_safetensors(output, {name: Pending.of(tensor, dtype) for name, tensor in read([path]).items()}, said)


# ---- to a single file ----


def write_single_file(model: Model, output: Path, dtype: torch.dtype | None = None) -> None:
    """A model as one file in LDM's layout, its own texts in the header. Raises CheckpointError, OutputError."""
    parts = dict(_networks(model))
    tensors: dict[str, Pending] = {}
    for part, (network, weights) in parts.items():
        prefix, naming = _section(part, network, len(parts) - 2)
        for name, sources in _grouped(table(naming, network.config, weights)).items():
            tensors[prefix + name] = _pending(name, [weights[ours] for ours in sources], dtype, naming, part)
    prediction = model.json(SCHEDULER).get("prediction_type", "epsilon")
    if prediction == "v_prediction":
        tensors["v_pred"] = Pending.of(torch.zeros(0))
        if model.json(SCHEDULER).get("rescale_betas_zero_snr"):
            tensors["ztsnr"] = Pending.of(torch.zeros(0))
    write_safetensors(output, tensors, _metadata(model, parts["unet"][0], prediction))


def _networks(model: Model) -> Iterator[tuple[str, tuple[Any, dict[str, Tensor]]]]:
    """A model's networks without weights, and their weights by our names: the parts in the order of the folder."""
    classes = model.pipeline().classes
    for part in (name for name in KINDS if name in classes):
        build = {"unet": load.unet_of, "vae": load.vae_of}.get(part, load.text_encoder_of)
        network = build(*load.config_of(model, part))
        matched, tensors = model.weights(part, network.config, load.network_shapes(network))
        shapes = load.network_shapes(network)
        yield part, (network, {ours: tensors[name].reshape(shapes[ours]) for name, ours in matched.items()})


def _section(part: str, network: UNet | load.Vae | CLIPText, encoders: int) -> tuple[str, str]:
    """Where a single file has a part: prefix and naming. OpenCLIP's encoders are those with an exact GELU."""
    if part == "unet":
        return "model.diffusion_model.", "ldm"
    if part == "vae":
        if isinstance(network, AutoencoderTiny):
            raise CheckpointError(
                "a tiny autoencoder (TAESD) has no place in a single file", "convert the model with its own autoencoder"
            )
        return "first_stage_model.", "ldm"
    if part == "text_encoder_2":
        return "conditioner.embedders.1.model.", "open_clip"
    root = "cond_stage_model." if encoders == 1 else "conditioner.embedders.0."
    assert isinstance(network, CLIPText)
    if encoders == 1 and network.config.activation == "gelu":
        return f"{root}model.", "open_clip"
    return f"{root}transformer.", "clip"


def _grouped(names: Mapping[str, str]) -> dict[str, list[str]]:
    """A table the other way round: a file's name -> ours, of which several may share it."""
    found: dict[str, list[str]] = {}
    for ours, theirs in names.items():
        found.setdefault(theirs, []).append(ours)
    return found


def _pending(name: str, sources: list[Tensor], dtype: torch.dtype | None, naming: str, part: str) -> Pending:
    """A tensor of a single file, of ours that it is made of: only when it is written."""
    first = Pending.of(sources[0], dtype)
    if naming == "open_clip" and name == ldm.TRANSPOSED:
        return Pending(first.dtype, first.shape[::-1], lambda: sources[0].t())
    if part == "vae" and ".attn_1." in name and len(first.shape) == 2:  # there a 1x1 convolution
        return Pending(first.dtype, (*first.shape, 1, 1), lambda: sources[0][:, :, None, None])
    if len(sources) > 1:
        rows = sum(tensor.shape[0] for tensor in sources)
        return Pending(first.dtype, (rows, *first.shape[1:]), lambda: torch.cat(sources))
    return first


def _metadata(model: Model, unet: UNet, prediction: str) -> dict[str, str]:
    texts = model.texts()
    if sum(map(len, texts.values())) > EMBEDDED_LIMIT:
        raise CheckpointError(
            f"the configs and tokenizers of {model.path} have more than {EMBEDDED_LIMIT:,} characters: a single file "
            "cannot carry them"
        )
    said = {"modelspec.sai_model_spec": "1.0.0", "modelspec.prediction_type": PREDICTIONS.get(prediction, prediction)}
    family = family_of(unet.config).name
    if family in ARCHITECTURES:
        velocity = family == "sd21" and prediction == "v_prediction"
        architecture = "stable-diffusion-v2-768-v" if velocity else ARCHITECTURES[family]
        inpainting = "-inpainting" if unet.config.in_channels == INPAINTING_CHANNELS else ""
        said["modelspec.architecture"] = architecture + inpainting
    return said | {f"{EMBEDDED}{name}": text for name, text in texts.items()}


# ---- to a folder ----


def write_folder(single: SingleFile, output: Path, dtype: torch.dtype | None = None) -> None:
    """A single file's model as a folder in the diffusers layout. Raises CheckpointError, OutputError."""
    texts = single.texts()
    for part in single.pipeline().classes:
        if part.startswith("tokenizer") and not any(f"{part}/{name}" in texts for name in TABLES):
            texts |= {f"{part}/{name}": text for name, text in clip_tables().items()}
    with replacing_folder(output) as folder:
        for part, (_, weights) in _networks(single):
            (folder / part).mkdir()
            tensors = {name: Pending.of(tensor, dtype) for name, tensor in weights.items()}
            write_safetensors(folder / part / f"{WEIGHTS.get(part, 'model')}{SUFFIX}", tensors, {})
        for name, text in texts.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
