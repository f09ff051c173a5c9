"""The tiny autoencoder as its author publishes it (github.com/madebyollin/taesd): two files of numbered layers.

In his decoder a clamp without weights is layer 0, so its numbers are one more than diffusers'. ComfyUI keeps the two in
one file, behind "taesd_encoder." and "taesd_decoder."; his own class calls them "encoder." and "decoder.".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from calotype.errors import CheckpointError, ModelNotFoundError
from calotype.weights.detect import Shapes, shapes_of
from calotype.weights.files import PICKLES, header, unsafe

Side = Literal["encoder", "decoder"]
OTHER: dict[Side, Side] = {"encoder": "decoder", "decoder": "encoder"}
LAYER = re.compile(r"(?P<number>\d{1,3})\.(?P<rest>(conv\.\d\.)?(weight|bias))")
PREFIXED = re.compile(rf"(?P<prefix>(?:\w+\.)?)(?:taesd_)?(?P<side>encoder|decoder)\.{LAYER.pattern}")
FIRST: dict[Side, str] = {"encoder": "0.weight", "decoder": "1.weight"}  # what each begins with
CLAMP: dict[Side, int] = {"encoder": 0, "decoder": 1}  # layers before its first, that diffusers does not count


def side_of(shapes: Shapes) -> Side | None:
    """Which half a file of numbered layers is: it begins with a convolution, and then come blocks of three."""
    if not shapes or not all(LAYER.fullmatch(name) for name in shapes):
        return None
    if len(shapes.get("0.weight", ())) == 4 and "1.conv.0.weight" in shapes:
        return "encoder"
    return "decoder" if len(shapes.get("1.weight", ())) == 4 and "3.conv.0.weight" in shapes else None


def renamed(name: str, side: Side | None = None) -> str:
    """diffusers' name of a layer of one half, or of one that says its half; others stay as they are."""
    if side is not None:
        name = f"{side}.{name}"
    match = PREFIXED.fullmatch(name)
    if match is None:
        return name
    half: Side = "encoder" if match["side"] == "encoder" else "decoder"
    return f"{match['prefix']}{half}.layers.{int(match['number']) - CLAMP[half]}.{match['rest']}"


def pair(path: Path, side: Side) -> dict[str, tuple[Path, str]]:
    """diffusers' names -> the file and its own, of a half and of the other, if that is beside it.

    A decoder alone decodes; an encoder alone is nothing. Raises CheckpointError.
    """
    found = {renamed(name, side): (path, name) for name in header(path)}
    other = OTHER[side]
    beside = path.with_name(re.sub(rf"{side}(?!.*{side})", other, path.name))
    if beside != path and beside.is_file():
        shapes = shapes_of(header(beside))
        if side_of(shapes) != other:
            raise CheckpointError(f"{beside} is not the {other} that belongs to {path.name}")
        return found | {renamed(name, other): (beside, name) for name in shapes}
    if side == "encoder":
        name = beside.name if beside != path else "its decoder"
        raise CheckpointError(f"{path} is the encoder of a tiny autoencoder alone", f"{name} is missing beside it")
    return found


def decoder_in(folder: Path) -> Path | None:
    """The decoder's file in a folder that has no config.json.

    Raises ModelNotFoundError where there are several, UnsafeFileError where it is a pickle.
    """
    try:
        if not folder.is_dir() or any((folder / name).is_file() for name in ("config.json", "vae/config.json")):
            return None
    except OSError:  # such as a name that is too long for the file system
        return None
    files = [path for path in sorted(folder.iterdir()) if re.search(r"tae.*decoder|decoder.*tae", path.name)]
    whole = [path for path in files if path.suffix == ".safetensors"]
    if len(whole) > 1:
        names = ", ".join(path.name for path in whole)
        raise ModelNotFoundError(
            f"{folder} has several decoders: {names}", f"give one of the files, such as {whole[0]}"
        )
    if not whole and (left := [path for path in files if path.name.endswith(PICKLES)]):
        raise unsafe(left[0])
    return whole[0] if whole else None


def raw_config(shapes: Shapes, prefix: str = "") -> dict[str, Any] | None:
    """AutoencoderTiny's config by its tensors under diffusers' names; None for another autoencoder.

    It speaks the U-Net's own, scaled latents, whatever the family: its scaling_factor is 1, the default.
    """
    first = shapes.get(f"{prefix}decoder.layers.0.weight", ())
    if len(first) != 4:
        return None
    width = next(iter(shapes.get(f"{prefix}encoder.layers.0.weight", ())), 0)
    raw: dict[str, Any] = {"_class_name": "AutoencoderTiny", "latent_channels": first[1]}
    raw["decoder_block_out_channels"] = [first[0]] * 4
    raw |= (
        {"encoder_block_out_channels": [width] * 4}
        if width
        else {"num_encoder_blocks": [], "encoder_block_out_channels": []}
    )
    return raw
