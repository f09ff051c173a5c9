"""Pictures to latents and back: parity, any number, any size, half precision that overflows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from calotype import latents
from calotype.errors import CalotypeError
from calotype.images import to_pil
from calotype.weights.load import load_vae
from checkpoints import write_tiny_vae, write_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of four levels (8 pixels a latent), trained on 64 pixels: its tiles have 8 latents."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae")
    write_vae(path, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, shift_factor=0.1)
    return path


@pytest.fixture
def parts(folder: Path) -> Any:
    """Of a model's parts, the one that is asked for here."""
    return SimpleNamespace(vae=load_vae(folder))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoencoderKL.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_vae(path)
    return path


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


# ---- parity ----


@torch.inference_mode()
def test_encoding_equals_diffusers(parts: Any, theirs: Any) -> None:
    """Samples of the posterior, scaled as its pipelines do it; they leave out the shift, which no such model has."""
    pictures = draw(1, 3, 48, 64).clamp(-1, 1)
    posterior = theirs.encode(pictures).latent_dist
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(5))
    ours = latents.encode(parts.vae, pictures, noise)
    assert ours.dtype == torch.float32
    assert apart(ours, (posterior.sample(generator) - 0.1) * theirs.config.scaling_factor) < 1e-5
    assert apart(latents.encode(parts.vae, pictures), (posterior.mode() - 0.1) * theirs.config.scaling_factor) < 1e-5


@torch.inference_mode()
def test_the_tiny_autoencoder_encodes_to_a_point(tiny: Path) -> None:
    theirs: Any = AutoencoderTiny.from_pretrained(tiny).eval()
    parts: Any = SimpleNamespace(vae=load_vae(tiny))
    pictures = draw(2, 3, 32, 40).clamp(-1, 1)
    wanted = theirs.encode(pictures).latents * theirs.config.scaling_factor
    assert apart(latents.encode(parts.vae, pictures), wanted) < 1e-5
    noise = draw(4, 4, 4, 5)
    assert apart(latents.encode(parts.vae, pictures, noise), wanted.repeat(2, 1, 1, 1)) < 1e-5
    found = list(latents.decode(parts.vae, wanted))
    for mine, image in zip(found, to_pil(theirs.decode(wanted).sample), strict=True):
        assert np.abs(np.asarray(mine, int) - np.asarray(image, int)).max() <= 1


@torch.inference_mode()
def test_tiles_equal_diffusers(parts: Any, theirs: Any) -> None:
    """Where the last row or column is more than the quarter that the one before covers already."""
    theirs.enable_tiling()
    try:
        x0, pictures = draw(1, 4, 9, 12), draw(1, 3, 72, 96)
        assert apart(latents.tiled(parts.vae.decode, x0, 8, 1, 8), theirs.decode(x0).sample) < 1e-5
        moments = latents.tiled(lambda x: torch.cat(parts.vae.encode(x), 1), pictures, 8, 8, 1)
        assert apart(moments, theirs.encode(pictures).latent_dist.parameters) < 1e-5
    finally:
        theirs.disable_tiling()


# ---- any number ----


def test_decoding_is_the_same_a_few_at_a_time(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x0, asked = draw(5, 4, 4, 6), []
    decode = parts.vae.decode
    monkeypatch.setattr(parts.vae, "decode", lambda x: asked.append(len(x)) or decode(x))
    together = list(latents.decode(parts.vae, x0))
    for pixels in (2 * 32 * 48 + 1, 1):  # even one is more than the last: one at a time
        monkeypatch.setattr(latents, "DECODE_PIXELS", pixels)
        for mine, image in zip(list(latents.decode(parts.vae, x0)), together, strict=True):
            assert np.abs(np.asarray(mine, int) - np.asarray(image, int)).max() <= 1
    assert asked == [5, 2, 2, 1, 1, 1, 1, 1, 1]
    assert together[0].size == (48, 32)


def test_encoding_is_the_same_a_few_at_a_time(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, noise, asked = draw(3, 3, 32, 48), draw(3, 4, 4, 6), []
    encode = parts.vae.encode
    monkeypatch.setattr(parts.vae, "encode", lambda x: asked.append(len(x)) or encode(x))
    together = latents.encode(parts.vae, pictures, noise)
    monkeypatch.setattr(latents, "DECODE_PIXELS", 1)
    assert apart(latents.encode(parts.vae, pictures, noise), together) < 1e-6
    assert asked == [3, 1, 1, 1]
    for i in range(3):
        assert apart(latents.encode(parts.vae, pictures[i : i + 1], noise[i : i + 1]), together[i : i + 1]) < 1e-6


def test_one_picture_is_encoded_once_for_many_draws(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, noise = draw(2, 3, 32, 48), draw(6, 4, 4, 6)
    wanted = latents.encode(parts.vae, pictures.repeat(3, 1, 1, 1), noise)
    asked: list[int] = []
    encode = parts.vae.encode
    monkeypatch.setattr(parts.vae, "encode", lambda x: asked.append(len(x)) or encode(x))
    assert apart(latents.encode(parts.vae, pictures, noise), wanted) < 1e-6
    assert asked == [2]


def test_a_size_that_has_no_latents(parts: Any) -> None:
    with pytest.raises(ValueError, match="52x48: must be multiples of 8"):
        latents.encode(parts.vae, draw(1, 3, 48, 52))


# ---- any size ----


def doubled(x: Tensor) -> Tensor:
    """A network that sees one pixel at a time: four output pixels each."""
    return (3 * x + 1).repeat_interleave(2, -1).repeat_interleave(2, -2)


def halved(x: Tensor) -> Tensor:
    return x[..., ::2, ::2] * x[..., 1::2, 1::2]


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 8), (13, 14), (14, 15), (16, 20), (21, 37)])
def test_tiles_of_a_local_network_are_the_whole(size: tuple[int, int]) -> None:
    """Wherever the seams lie, a blend of equal values is that value, and each pixel is in its place."""
    x = draw(2, 3, *size)
    assert torch.allclose(latents.tiled(doubled, x, 8, 1, 2), doubled(x), atol=1e-5)
    large = draw(2, 3, 2 * size[0], 2 * size[1])
    assert torch.allclose(latents.tiled(halved, large, 8, 2, 1), halved(large), atol=1e-5)


def test_tiles_are_few_and_none_is_a_sliver() -> None:
    for side in range(9, 80):
        widths: list[int] = []
        latents.tiled(lambda x: widths.append(x.shape[-1]) or x, torch.zeros(1, 1, 4, side), 8, 1, 1)  # noqa: B023
        assert widths[:-1] == [8] * (len(widths) - 1)
        assert 2 < widths[-1] <= 8
        assert 6 * (len(widths) - 1) + widths[-1] == side


@torch.inference_mode()
def test_one_tile_is_the_network_itself(parts: Any) -> None:
    x0 = draw(1, 4, 8, 6)
    assert torch.equal(latents.tiled(parts.vae.decode, x0, 8, 1, 8), parts.vae.decode(x0))


def test_large_pictures_are_tiled(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "TILE_PIXELS", 64 * 96)
    monkeypatch.setattr(latents, "TILE_SIDE", 32)  # the autoencoder's own 64 are more
    shapes: list[tuple[int, ...]] = []

    def watched(network: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return lambda x: (shapes.append(tuple(x.shape[-2:])), network(x))[1]

    monkeypatch.setattr(parts.vae, "decode", watched(parts.vae.decode))
    monkeypatch.setattr(parts.vae, "encode", watched(parts.vae.encode))
    assert next(latents.decode(parts.vae, draw(1, 4, 8, 12))).size == (96, 64)  # as large as may be
    assert next(latents.decode(parts.vae, draw(1, 4, 8, 13))).size == (104, 64)
    assert latents.encode(parts.vae, draw(1, 3, 64, 104), draw(2, 4, 8, 13)).shape == (2, 4, 8, 13)
    assert shapes == [(8, 12), (8, 8), (8, 7), (64, 64), (64, 56)]


# ---- numbers that are not finite ----


def overflowing(parts: Any, name: str) -> None:
    """The autoencoder in float16 with a layer whose output passes 65504."""
    with torch.no_grad():
        getattr(parts.vae, name).weight.mul_(3e4)
    parts.vae.half()


@torch.inference_mode()
def test_a_picture_that_overflows_is_decoded_in_float32_and_changes_no_other(parts: Any) -> None:
    """Neither its neighbours in the batch nor what comes after it: the autoencoder stays as it was."""
    small, large = 1e-3 * draw(1, 4, 2, 3), 10 * draw(1, 4, 2, 3)
    overflowing(parts, "post_quant_conv")
    (before,) = list(latents.decode(parts.vae, small))
    notes: list[str] = []
    neighbour, found = latents.decode(parts.vae, torch.cat([small, large]), note=notes.append)
    (note,) = notes
    assert note.startswith("the decoder gave numbers that are not finite in float16")
    assert {weight.dtype for weight in parts.vae.parameters()} == {torch.float16}
    (after,) = list(latents.decode(parts.vae, small))
    assert before.tobytes() == after.tobytes()
    apart = np.asarray(before, int) - np.asarray(neighbour, int)  # as for any two pictures in a call
    assert np.abs(apart).max() <= 1
    wide = copy.deepcopy(parts.vae).float()
    wanted = to_pil(wide.decode(large / parts.vae.config.scaling_factor + 0.1))[0]
    assert found.tobytes() == wanted.tobytes()
    assert len(set(found.tobytes())) > 10


def test_an_encoder_that_overflows_goes_on_in_float32(parts: Any) -> None:
    pictures = draw(1, 3, 16, 24)
    with torch.no_grad():
        parts.vae.encoder.conv_out.weight.mul_(100)
    overflowing(parts, "quant_conv")
    notes: list[str] = []
    for _ in range(2):
        found = latents.encode(parts.vae, pictures, note=notes.append)
    assert [note.partition(" in ")[0] for note in notes] == ["the encoder gave numbers that are not finite"] * 2
    assert torch.isfinite(found).all()
    assert {weight.dtype for weight in parts.vae.parameters()} == {torch.float16}


def test_half_precision_that_fits_stays(parts: Any) -> None:
    parts.vae.half()
    list(latents.decode(parts.vae, draw(1, 4, 2, 3)))
    assert {weight.dtype for weight in parts.vae.parameters()} == {torch.float16}


def test_not_finite_in_float32(parts: Any) -> None:
    with torch.no_grad():
        parts.vae.decoder.conv_out.bias[0] = float("nan")
        parts.vae.encoder.conv_out.bias[0] = float("inf")
    for task, name in (
        (lambda: list(latents.decode(parts.vae, draw(1, 4, 2, 3))), "decoder"),
        (lambda: latents.encode(parts.vae, draw(1, 3, 16, 24)), "encoder"),
    ):
        with pytest.raises(CalotypeError, match=f"the {name} gave numbers that are not finite in float32") as caught:
            task()
        assert caught.value.hint is not None


def test_latents_that_are_not_finite_are_not_the_decoders_fault(parts: Any) -> None:
    parts.vae.half()
    x0 = draw(1, 4, 2, 3)
    x0[0, 0, 0, 0] = float("nan")
    with pytest.raises(CalotypeError, match="the latents are not finite"):
        list(latents.decode(parts.vae, x0))
    assert {weight.dtype for weight in parts.vae.parameters()} == {torch.float16}
