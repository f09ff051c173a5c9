"""What a step of training sees: a pure function of the seed and the step's number, for any number of processes.

A batch is of one bucket. N pictures in all, counts[b] of them in bucket b; a *round* is N batches. Its labels, b
repeated counts[b] times, are shuffled anew for each round. A batch takes the bucket of its label, and there the next
pictures of the bucket's own stream: one permutation after another. So in a round each picture is seen exactly as often
as a batch has pictures, whatever the buckets' sizes; with one bucket that is epoch after epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calotype.nn.unet import Conditioning
from calotype.parts import Parts
from calotype.training.cache import CaptionCache, Captions, Encoding, PictureCache, distinct, unit_of
from calotype.training.drawn import Drawing, DrawnCache, to_draw
from calotype.training.ranks import Ranks
from calotype.training.settings import Settings
from calotype.training.shards import Pictures, judge
from calotype.training.sources import Example, Source

# The first numbers of the seeds of each kind of choice. numpy takes (seed, 1) and (seed, 1, 0) for the same.
LABELS, ORDER, SAMPLE = 1, 2, 3
ENOUGH = 10  # times as many examples as are held out, or none is: they would be missed


# ---- the order ----


def pick(counts: tuple[int, ...], seed: int, step: int, batch: int) -> tuple[int, np.ndarray]:
    """The bucket of a step and the places (batch,) in it of the pictures that it sees."""
    turn, place = divmod(step, sum(counts))
    labels = _labels(counts, seed, turn)
    bucket = int(labels[place])
    before = turn * counts[bucket] + int(np.count_nonzero(labels[:place] == bucket))  # batches of this bucket so far
    laps, places = np.divmod(np.arange(before * batch, (before + 1) * batch), counts[bucket])
    picked = np.empty(batch, dtype=np.int32)
    for lap in np.unique(laps):
        here = laps == lap
        picked[here] = _permutation(seed, int(lap), bucket, counts[bucket])[places[here]]
    return bucket, picked


@lru_cache(maxsize=2)
def _labels(counts: tuple[int, ...], seed: int, turn: int) -> np.ndarray:
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return np.random.default_rng((LABELS, seed, turn)).permutation(labels)


@lru_cache(maxsize=64)
def _permutation(seed: int, lap: int, bucket: int, size: int) -> np.ndarray:
    return np.random.default_rng((ORDER, seed, lap, bucket)).permutation(size).astype(np.int32)


# ---- the samples ----


@dataclass(frozen=True, eq=False)
class Samples:
    """b pictures of a batch, before noise; on the CPU, in float32."""

    latents: Tensor  # (b, C, h, w), scaled
    conditioning: Conditioning  # of their captions
    null: Conditioning  # of the empty caption
    masked: Tensor | None  # (b, 1 + C, h, w): what an inpainting U-Net sees beside the latents
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Encoded pictures with their captions."""

    pictures: Pictures
    captions: Captions
    examples: Sequence[Example]  # all of the source, also those that are left out
    flip: bool  # every other time, a picture is seen mirrored
    downscale: int  # pixels a latent pixel
    sized: bool  # SDXL: the model is told how large the original was and how it was cut
    zero_null: bool  # SDXL: no caption is zeros, not the embedding of the empty text, as in sampling
    held_out: tuple[str, ...]  # captions to judge by
    held_out_is_seen: bool  # they are captions of training pictures: there were too few to set some aside

    def __len__(self) -> int:
        return sum(self.pictures.counts)

    def samples(self, seed: int, step: int, batch: int, part: slice = slice(None)) -> Samples:
        """The `part` of a step's `batch` pictures: a process' share, or what fits the memory at a time."""
        bucket, places = pick(self.pictures.counts, seed, step, batch)
        rows, texts, names = [], [], []
        for i in range(batch)[part]:
            rng = np.random.default_rng((SAMPLE, seed, step * batch + i))
            example = self.examples[self.pictures.example(bucket, int(places[i]))]
            texts.append(example.captions[int(rng.integers(len(example.captions)))])
            mirrored = bool(rng.integers(2)) and self.flip
            rows.append(self.pictures.row(bucket, int(places[i]), int(mirrored)))
            names.append(example.name)
        masked = [each.float() for _, _, each in rows if each is not None]
        text, null = self._conditioning(texts, torch.stack([sizes for _, sizes, _ in rows]), bucket)
        latents = torch.stack([latents.float() for latents, _, _ in rows])
        return Samples(latents, text, null, torch.stack(masked) if masked else None, tuple(names))

    def _conditioning(self, texts: Sequence[str], sizes: Tensor, bucket: int) -> tuple[Conditioning, Conditioning]:
        """That of the captions and that of none. sizes: (b, 4), see `Row`."""
        time_ids = None
        if self.sized:
            target = torch.tensor([side * self.downscale for side in self.pictures.sizes[bucket]])
            time_ids = torch.cat([sizes, target.expand(len(texts), 2)], dim=1).float()
        context, pooled = self.captions.take(texts)
        empty, empty_pooled = self.captions.take([""])
        if self.zero_null:
            empty = torch.zeros_like(empty)
            empty_pooled = None if empty_pooled is None else torch.zeros_like(empty_pooled)
        null = Conditioning(
            empty.expand_as(context), None if empty_pooled is None else empty_pooled.expand(len(texts), -1), time_ids
        )
        return Conditioning(context, pooled, time_ids), null


# ---- putting it together ----


def prepare(
    parts: Parts, source: Source, settings: Settings, cache: Path, ranks: Ranks | None = None
) -> Iterator[int | Dataset]:
    """Encodes or draws what is not in `cache` yet; yields how many pictures this process has so far, at last the
    Dataset, which is the same in all processes.

    settings: `resolution` (the teacher's own size if None), `aspect_buckets`, `random_flip`, `validation_samples`; for
    prompts alone also `samples`, `teacher_steps` and `seed`. Warns (CalotypeWarning) of broken pictures; raises
    UsageError where they are too many, OutputError where the cache cannot be written.
    """
    ranks = Ranks() if ranks is None else ranks
    resolution = parts.defaults.width if settings.resolution is None else settings.resolution
    pictures: PictureCache | DrawnCache
    leave_out: tuple[int, ...] = ()
    if source.prompts:
        prompts = tuple(dict.fromkeys(source.prompts))
        chosen, seen = set_aside(prompts, settings.validation_samples)
        held_out = tuple(prompts[i] for i in chosen)
        kept = prompts if seen else tuple(prompt for i, prompt in enumerate(prompts) if i not in set(chosen))
        examples = to_draw(kept, settings.samples, source.path)
        drawing = Drawing(resolution, settings.teacher_steps, parts.defaults.guidance, settings.seed)
        pictures = DrawnCache(parts, examples, drawing, cache)
    else:
        examples = source.examples
        chosen, seen = set_aside([example.name for example in examples], settings.validation_samples)
        held_out = tuple(examples[i].captions[0] for i in chosen)
        # They are encoded all the same, so that another number of them finds the same shards.
        leave_out = () if seen else chosen
        encoding = Encoding(resolution, unit_of(parts), settings.aspect_buckets, settings.random_flip)
        pictures = PictureCache(parts, examples, encoding, cache)
    captions = CaptionCache(parts, distinct(examples), cache)

    done = 0
    for done in pictures.fill(ranks.rank, ranks.world):
        yield done
    for _ in captions.fill(ranks.rank, ranks.world):
        yield done  # so that the caller can say that we live
    ranks.barrier()
    found = pictures.read(leave_out)
    judge(found.broken, len(examples))
    yield Dataset(
        found,
        captions.read(),
        examples,
        flip=settings.random_flip and not source.prompts,
        downscale=parts.vae.config.downscale,
        sized=parts.unet.config.addition_in_dim is not None,
        zero_null=parts.zero_empty_negative,
        held_out=held_out,
        held_out_is_seen=seen,
    )


def set_aside(names: Sequence[str], count: int) -> tuple[tuple[int, ...], bool]:
    """Numbers of `count` examples to judge by, and whether training sees them: where there are too few to spare any.

    They are chosen by a hash of their names, so that more data changes few of them.
    """
    hashes = [hashlib.sha256(name.encode(errors="surrogatepass")).digest() for name in names]
    chosen = sorted(range(len(names)), key=hashes.__getitem__)[:count]
    return tuple(sorted(chosen)), count > 0 and len(names) < ENOUGH * count
