"""A whole CLIP against transformers: embeddings, and what pictures become before them. It loads whole or explains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from calotype.errors import CheckpointError, UnsafeFileError
from calotype.training.clip import Judge, clip_score, prepared
from checkpoints import write_clip

CPU = torch.device("cpu")
PROMPTS = ["a fox", "", "red cat in the snow", "astronaut dog " * 60]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip")


def drawn(count: int, height: int, width: int) -> Tensor:
    """Smooth pictures in uint8, with black and white in them."""
    noise = torch.randn(count, 3, height // 4 + 1, width // 4 + 1, generator=torch.Generator().manual_seed(1))
    pixels = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear") * 100 + 128
    return pixels.clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu", "layer_norm_eps": 1e-3}, {"image_size": 30}])
def test_embeddings_equal_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip", **changes)
    theirs, judge = CLIPModel.from_pretrained(folder).eval(), Judge.load(folder, CPU)
    tokens = CLIPTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    pictures = drawn(4, 40, 50)
    with torch.no_grad():
        out = theirs(**tokens, pixel_values=prepared(pictures, changes.get("image_size", 32)))
        pooled = theirs.get_image_features(prepared(pictures, changes.get("image_size", 32))).pooler_output
    ours = judge.texts(PROMPTS), judge.pictures(pictures)
    assert ours[0].shape == ours[1].shape == (4, 24)
    torch.testing.assert_close(ours[1], pooled, rtol=1e-5, atol=1e-5)
    for own, other in zip(ours, (out.text_embeds, out.image_embeds), strict=True):
        torch.testing.assert_close(own / own.norm(dim=1, keepdim=True), other, rtol=0, atol=1e-5)
    cosines = (out.text_embeds * out.image_embeds).sum(1)
    assert clip_score(*ours).value == pytest.approx(100 * float(cosines.clamp(min=0).mean()), abs=1e-3)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 128), (100, 131), (131, 100), (16, 24), (32, 33)])
def test_pictures_are_prepared_as_transformers_does(height: int, width: int) -> None:
    pictures = drawn(2, height, width)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    assert (prepared(pictures, 32) - expected).abs().max() < 1e-5


def change(folder: Path, how: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    tensors = how({name: tensor.clone() for name, tensor in load_file(path).items()})
    path.unlink()
    save_file(tensors, path)


def test_the_buffers_of_older_files_are_ignored(folder: Path, copy_of: Callable[[Path], Path]) -> None:
    old = copy_of(folder)
    ids = {f"{half}_model.embeddings.position_ids": torch.arange(3)[None] for half in ("text", "vision")}
    change(old, lambda tensors: {**tensors, **ids})
    pictures = drawn(2, 32, 32)
    assert torch.equal(Judge.load(old, CPU).pictures(pictures), Judge.load(folder, CPU).pictures(pictures))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda tensors: {**tensors, "vision_model.extra": torch.zeros(1)}, r"1 unexpected \(vision_model.extra"),
        (
            lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "visual_projection.weight"},
            r"1 missing \(visual_projection.weight",
        ),
        (lambda tensors: {**tensors, "logit_scale": torch.zeros(2)}, "1 of another shape"),
        (lambda tensors: {**tensors, "logit_scale": torch.tensor(torch.inf)}, "NaN or infinite"),
    ],
)
def test_every_tensor_must_fit(
    how: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, folder: Path, copy_of: Callable[[Path], Path]
) -> None:
    broken = copy_of(folder)
    change(broken, how)
    with pytest.raises(CheckpointError, match=message):
        Judge.load(broken, CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["CLIPTextModel"]}, "the class is 'CLIPTextModel'"),
        ({"vision_config": None}, "needs vision_config"),
        ({"vision_config": {"hidden_size": 50}}, "num_attention_heads is None; it must divide hidden_size 50"),
        ({"vision_config": {"image_size": 16}}, "image_size is 16"),
        ({"vision_config": {"hidden_act": "relu"}}, "hidden_act is 'relu'"),
        ({"vision_config": {"hidden_size": 16000, "num_hidden_layers": 128, "num_attention_heads": 8}}, "the limit is"),
        ({"projection_dim": 0}, "projection_dim is 0"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(
    changes: dict[str, Any], message: str, folder: Path, copy_of: Callable[[Path], Path]
) -> None:
    broken = copy_of(folder)
    path = broken / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        Judge.load(broken, CPU)


def test_a_pickle_is_refused(folder: Path, copy_of: Callable[[Path], Path]) -> None:
    pickled = copy_of(folder)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(UnsafeFileError, match="is a pickle"):
        Judge.load(pickled, CPU)


def test_a_tokenizer_of_another_model_is_refused(folder: Path, copy_of: Callable[[Path], Path]) -> None:
    other = copy_of(folder)
    path = other / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 100}))
    with pytest.raises(CheckpointError, match="gives 100 a text, the network takes 537 and 77"):
        Judge.load(other, CPU)
