"""The tiny autoencoder as its author, ComfyUI and diffusers keep it: the same weights, the same network."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import calotype
from calotype.errors import CheckpointError, ModelNotFoundError, UnsafeFileError, UsageError
from calotype.nn.tiny_vae import AutoencoderTiny
from calotype.weights.inspect import inspect_model
from calotype.weights.load import load_parts, load_vae
from checkpoints import write_tiny_vae

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AutoencoderTiny's folder."""
    folder = tmp_path_factory.mktemp("taesd") / "tiny"
    write_tiny_vae(folder, encoder_block_out_channels=(16,) * 4)
    return folder


def halves(tiny: Path) -> dict[str, Tensors]:
    """As in taesd_encoder and taesd_decoder: in the decoder a clamp is layer 0."""
    found: dict[str, Tensors] = {"encoder": {}, "decoder": {}}
    for name, tensor in load_file(tiny / "diffusion_pytorch_model.safetensors").items():
        side, _, number, rest = name.split(".", 3)
        found[side][f"{int(number) + (side == 'decoder')}.{rest}"] = tensor
    return found


def write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


def pair(tiny: Path, folder: Path, name: str = "taesd") -> tuple[Path, Path]:
    both = halves(tiny)
    return tuple(write(folder / f"{name}_{side}.safetensors", both[side]) for side in ("encoder", "decoder"))  # type: ignore[return-value]


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def test_two_files(tiny: Path, tiny_sd15: Path, tmp_path: Path) -> None:
    encoder, decoder = pair(tiny, tmp_path / "vae_approx", "taesdxl")
    expected = load_vae(tiny)
    for vae in (decoder, encoder, decoder.parent):
        parts = load_parts(tiny_sd15, vae=vae)
        assert same(parts.vae, expected)
        assert parts.vae.config.scaling_factor == 1
    assert inspect_model(decoder)["looks_like"] == "the decoder of a tiny autoencoder (TAESD)"
    assert inspect_model(encoder)["looks_like"] == "the encoder of a tiny autoencoder (TAESD)"
    with pytest.raises(CheckpointError, match="holds an autoencoder only"):
        load_parts(decoder)


@pytest.mark.parametrize("prefix", ["taesd_", "", "first_stage_model.taesd_", "vae."])
def test_one_file(tiny: Path, tiny_sd15: Path, tmp_path: Path, prefix: str) -> None:
    tensors = {f"{prefix}{side}.{name}": t for side, half in halves(tiny).items() for name, t in half.items()}
    path = write(
        tmp_path / "taesd.safetensors", tensors | {f"{prefix.removesuffix('taesd_')}vae_scale": torch.tensor(1.0)}
    )
    assert same(load_parts(tiny_sd15, vae=path).vae, load_vae(tiny))
    assert "tiny autoencoder" in inspect_model(path)["looks_like"]


def test_a_decoder_alone_decodes(tiny: Path, tiny_sd15: Path, tmp_path: Path) -> None:
    _, decoder = pair(tiny, tmp_path)
    (tmp_path / "taesd_encoder.safetensors").unlink()
    whole = calotype.load(tiny_sd15, vae=tiny, device="cpu")
    half = calotype.load(tiny_sd15, vae=decoder, device="cpu")
    picture = half("a fox", steps=1, seed=1).image
    assert picture.tobytes() == whole("a fox", steps=1, seed=1).image.tobytes()
    assert isinstance(half.parts.vae, AutoencoderTiny)
    with pytest.raises(UsageError, match="without its encoder: it cannot read pictures") as caught:
        half("a fox", steps=1, image=picture)
    assert caught.value.hint is not None


def test_half_a_pair(tiny: Path, tiny_sd15: Path, tmp_path: Path) -> None:
    encoder, decoder = pair(tiny, tmp_path)
    weights = load_file(decoder)
    decoder.unlink()
    with pytest.raises(CheckpointError, match="is the encoder of a tiny autoencoder alone") as caught:
        load_parts(tiny_sd15, vae=encoder)
    assert caught.value.hint == "taesd_decoder.safetensors is missing beside it"
    write(decoder, {name: tensor for name, tensor in weights.items() if name != "4.conv.2.bias"})
    with pytest.raises(CheckpointError, match=r"1 missing \(decoder\.layers\.3\.conv\.2\.bias"):
        load_parts(tiny_sd15, vae=decoder)
    write(decoder, weights | {"4.conv.2.bias": torch.full_like(weights["4.conv.2.bias"], torch.nan)})
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.3\.conv\.2\.bias' has NaN"):
        load_parts(tiny_sd15, vae=decoder)
    write(decoder, weights)
    write(encoder, {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="is not the encoder that belongs to taesd_decoder"):
        load_parts(tiny_sd15, vae=decoder)


def test_one_for_other_latents(tiny: Path, tiny_sd15: Path, tmp_path: Path) -> None:
    """As taesd3 and taef1 are."""
    write_tiny_vae(tmp_path / "tae", latent_channels=16)
    _, decoder = pair(tmp_path / "tae", tmp_path, "taesd3")
    with pytest.raises(CheckpointError, match="4 out, the autoencoder 16"):
        load_parts(tiny_sd15, vae=decoder)


def test_which_of_a_folder(tiny: Path, tiny_sd15: Path, tmp_path: Path) -> None:
    for name in ("taesd", "taesdxl"):
        pair(tiny, tmp_path, name)
    with pytest.raises(ModelNotFoundError, match=r"several decoders: taesd_decoder\.safetensors, taesdxl") as caught:
        load_parts(tiny_sd15, vae=tmp_path)
    load_parts(tiny_sd15, vae=str(caught.value.hint).rpartition(" ")[2])
    (tmp_path / "old").mkdir()
    torch.save(halves(tiny)["decoder"], tmp_path / "old/taesd_decoder.pth")
    with pytest.raises(UnsafeFileError, match=r"taesd_decoder\.pth is a pickle"):
        load_parts(tiny_sd15, vae=tmp_path / "old")


# ---- beside the autoencoder: for previews, and for results where that is asked for ----


def test_it_decodes_previews_and_results_where_it_is_asked_to(tiny: Path, tiny_sd15: Path) -> None:
    full = calotype.load(tiny_sd15, device="cpu")
    alone = calotype.load(tiny_sd15, vae=tiny, device="cpu")
    engine = calotype.load(tiny_sd15, tiny_vae=tiny, device="cpu")
    request = calotype.Request("a fox", steps=2, seed=1)
    assert engine.decoder == "full"
    *_, step = engine.stream(request)
    assert step.preview().tobytes() == alone(request).image.tobytes() != full(request).image.tobytes()
    assert engine(request).image.tobytes() == full(request).image.tobytes()
    batch = engine.batch()
    batch.add(request)
    engine.decoder = "tiny"
    *_, (_, result) = batch
    assert isinstance(result, calotype.Result)
    assert result.image.tobytes() == full(request).image.tobytes()  # as it was when the request was added
    result = engine(request)
    assert result.image.tobytes() == alone(request).image.tobytes()
    again = calotype.load_from(result.model)
    assert again.decoder == "tiny"
    assert again(request).image.tobytes() == result.image.tobytes()


def test_a_models_folder_may_have_one(tiny: Path, tiny_sd15: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd15, tmp_path / "model"))
    shutil.copytree(tiny, folder / "tiny_vae")
    found = calotype.load(folder, device="cpu").parts.tiny_vae
    assert found is not None
    assert same(found, load_vae(tiny))


def test_the_shipped_models_previews_are_like_its_pictures() -> None:
    engine = calotype.load(device="cpu")
    *_, step = engine.stream(calotype.Request("a red apple", seed=0))
    image = engine("a red apple", seed=0).image
    preview, picture = (np.asarray(each, float) for each in (step.preview(), image))
    assert 20 < 10 * math.log10(255**2 / ((preview - picture) ** 2).mean()) < 60  # dB


def test_what_cannot_be_the_tiny_one(tiny: Path, tiny_sd15: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a tiny autoencoder"):
        calotype.load(tiny_sd15, tiny_vae=tiny_sd15, device="cpu")
    with pytest.raises(UsageError, match="decoder is 'tiny', and the model has no tiny autoencoder"):
        calotype.load(tiny_sd15, decoder="tiny", device="cpu")
    with pytest.raises(UsageError, match=r"decoder is 'small': must be one of full, tiny"):
        calotype.load(tiny_sd15, decoder="small", device="cpu")
    write_tiny_vae(tmp_path / "wide", latent_channels=16)
    with pytest.raises(CheckpointError, match="16"):
        calotype.load(tiny_sd15, tiny_vae=tmp_path / "wide", device="cpu")
