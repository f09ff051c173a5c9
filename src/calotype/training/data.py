"""A folder of captioned pictures, encoded once: what the trainer draws its batches from.

DATA is a folder with pictures and either `metadata.jsonl` (lines of {"file_name": ..., "text": ...}; a text may be a
list of captions, of which each visit takes one) or a `.txt` beside each picture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file, save_file
from torch import Tensor

from calotype.errors import CheckpointError, UsageError
from calotype.images import on_white, to_tensor
from calotype.parts import Parts

PICTURES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True)
class Example:
    """One picture and the captions that fit it."""

    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """Everything that training reads, in memory: latents, and the embedding of each caption once."""

    latents: Tensor  # (N, C, h, w) float16, scaled
    context: Tensor  # (captions, L, D)
    pooled: Tensor | None  # (captions, P)
    captions: tuple[tuple[int, ...], ...]  # for each picture, the rows of `context` that describe it
    null: int  # the row of the empty caption

    def __len__(self) -> int:
        return len(self.latents)


def read_folder(folder: Path) -> list[Example]:
    """The captioned pictures of a folder, in a fixed order. UsageError if there are none or a picture is missing."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", hint="DATA is a folder of pictures with captions")
    metadata = folder / "metadata.jsonl"
    examples = list(_from_metadata(metadata)) if metadata.exists() else list(_from_texts(folder))
    if not examples:
        raise UsageError(
            f"{folder} has no captioned pictures",
            hint="put a metadata.jsonl there, or a .txt with the caption beside each picture",
        )
    return examples


def _from_metadata(path: Path) -> Iterator[Example]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
            captions = (text,) if isinstance(text, str) else tuple(text)
            valid = isinstance(name, str) and len(captions) > 0 and all(isinstance(c, str) for c in captions)
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} line {number} is not a caption: {error}", hint=_LINE) from error
        if not valid:
            raise UsageError(f"{path} line {number} is not a caption: {line[:60]}", hint=_LINE)
        picture = path.parent / name
        if not picture.is_file():
            raise UsageError(f"{path} line {number} names {name}, which is not there")
        yield Example(picture, captions)


_LINE = 'each line looks like {"file_name": "a.png", "text": "a red apple"}'


def _from_texts(folder: Path) -> Iterator[Example]:
    for picture in sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES):
        caption = picture.with_suffix(".txt")
        if caption.is_file():
            yield Example(picture, (caption.read_text(encoding="utf-8").strip(),))


def load_picture(path: Path, resolution: int) -> Image.Image:
    """A square RGB picture: transparency on white, the shorter side scaled to `resolution`, the centre cut out."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as file:
            picture = on_white(file)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} cannot be read as a picture: {error}", hint="remove it, or save it anew") from error
    scale = resolution / min(picture.size)
    if scale != 1:
        size = (max(resolution, round(picture.width * scale)), max(resolution, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = (picture.width - resolution) // 2, (picture.height - resolution) // 2
    return picture.crop((left, top, left + resolution, top + resolution))


@torch.inference_mode()
def encode_pictures(parts: Parts, examples: list[Example], resolution: int, batch: int = 16) -> Iterator[Tensor]:
    """The latents (b, C, h, w) float16 of the pictures, batch by batch.

    The mean of each posterior is taken: its spread is far below the noise that training adds.
    """
    config = parts.vae.config
    for start in range(0, len(examples), batch):
        pictures = torch.cat([to_tensor(load_picture(e.path, resolution)) for e in examples[start : start + batch]])
        mean, _ = parts.vae.encode(pictures)
        yield ((mean - config.shift_factor) * config.scaling_factor).half().contiguous()


@torch.inference_mode()
def encode_captions(parts: Parts, captions: list[str], batch: int = 64) -> tuple[Tensor, Tensor | None]:
    """Text embeddings (n, L, D) and, where the model has them, pooled ones (n, P). Captions are cut to one chunk."""
    contexts, pooleds = [], []
    for start in range(0, len(captions), batch):
        context, pooled = parts.text.encode(captions[start : start + batch], chunks=1)
        contexts.append(context)
        pooleds.append(pooled)
    pooled = None if pooleds[0] is None else torch.cat([p for p in pooleds if p is not None])
    return torch.cat(contexts), pooled


def prepare(parts: Parts, folder: Path, resolution: int, cache: Path) -> Iterator[int | Dataset]:
    """Yields how many pictures are encoded so far, at last the Dataset.

    Latents are kept in `cache` under a key made of the pictures' content, the resolution and the encoder's weights.
    """
    examples = read_folder(folder)
    file = cache / f"latents-{_fingerprint(parts, examples, resolution)}.safetensors"
    if file.exists():
        latents = load_file(file)["latents"]
        yield len(examples)
    else:
        chunks: list[Tensor] = []
        for chunk in encode_pictures(parts, examples, resolution):
            chunks.append(chunk)
            yield sum(map(len, chunks))
        latents = torch.cat(chunks)
        cache.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".part")
        save_file({"latents": latents}, temporary)
        temporary.replace(file)
    if not torch.isfinite(latents).all():
        bad = examples[int((~torch.isfinite(latents)).flatten(1).any(dim=1).int().argmax())].path
        raise CheckpointError(f"{bad} encodes to numbers that are not finite", hint="remove the picture")
    texts = sorted({caption for example in examples for caption in example.captions} | {""})
    row = {text: i for i, text in enumerate(texts)}
    context, pooled = encode_captions(parts, texts)
    captions = tuple(tuple(row[caption] for caption in example.captions) for example in examples)
    yield Dataset(latents, context, pooled, captions, row[""])


def _fingerprint(parts: Parts, examples: list[Example], resolution: int) -> str:
    digest = hashlib.sha256(f"{resolution} {parts.vae.config}".encode())
    for parameter in parts.vae.encoder.parameters():
        digest.update(parameter.detach().flatten()[:64].float().numpy().tobytes())
    for example in examples:
        digest.update(hashlib.sha256(example.path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def pick(dataset: Dataset, seed: int, step: int, batch: int) -> tuple[Tensor, Tensor]:
    """Which pictures (batch,) and which captions (batch,) a step sees.

    A pure function of seed and step, so that a run can be resumed exactly. Each pass is a fresh permutation.
    """
    pictures, captions = [], []
    for i in range(step * batch, (step + 1) * batch):
        lap, place = divmod(i, len(dataset))
        picture = int(_permutation(seed, lap, len(dataset))[place])
        rows = dataset.captions[picture]
        pictures.append(picture)
        captions.append(rows[int(np.random.default_rng((seed, i)).integers(len(rows)))])
    return torch.tensor(pictures), torch.tensor(captions)


@lru_cache(maxsize=2)
def _permutation(seed: int, lap: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, lap, 1)).permutation(size)
