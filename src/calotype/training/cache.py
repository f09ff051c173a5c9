"""Pictures and captions, encoded once. A shard's name is made of what is in it and what encoded it, so that a changed
picture or another autoencoder is noticed, and an interrupted run goes on at the shard it was at.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from calotype.errors import CalotypeError, CheckpointError, UsageError
from calotype.images import to_tensor
from calotype.latents import encode
from calotype.parts import Parts
from calotype.training.pictures import Size, View, hole, sizes_for, views
from calotype.training.shards import SHARD, Broken, Cache, Contents, Making, Pictures, Row, Shard, contents, load
from calotype.training.sources import Example, write_json
from calotype.weights.files import is_finite

FORMAT = 1  # of the shards; another one makes them anew
BATCH = 16  # pictures of one size that are encoded together
CAPTIONS = 64  # captions that are
THREADS = 4  # that decode pictures
CHARACTERS = 1000  # of a caption that are read: one chunk of 75 tokens is far shorter, and 64 chunks are the limit


@dataclass(frozen=True)
class Encoding:
    """How pictures become latents."""

    resolution: int  # pixels: about the square root of a picture's area
    unit: int  # pixels that both sides of a bucket are multiples of
    buckets: bool = True  # pictures keep their proportions; False: the square in their middle
    flip: bool = False  # the mirror image is encoded too: the autoencoder is not symmetric

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The buckets, in pixels. Raises UsageError where the resolution is too low for one."""
        return sizes_for(self.resolution, self.unit, self.buckets)


def unit_of(parts: Parts) -> int:
    """What both sides of a picture must be multiples of so that each level of the U-Net halves it evenly, in pixels."""
    return int(parts.vae.config.downscale * 2 ** (len(parts.unet.config.channels) - 1))


def inpaints(parts: Parts) -> bool:
    """Whether the U-Net sees a mask and a masked picture beside the latents. CheckpointError for any other input."""
    channels, latent = parts.unet.config.in_channels, parts.vae.config.latent_channels
    if channels not in (latent, 2 * latent + 1):
        raise CheckpointError(
            f"the U-Net takes {channels} channels: must be {latent}, or {2 * latent + 1} for inpainting",
            hint="other models cannot be distilled",
        )
    return parts.inpaints


# ---- pictures ----


class PictureCache(Cache):
    """The latents of some examples, in a folder."""

    def __init__(self, parts: Parts, examples: Sequence[Example], encoding: Encoding, folder: Path) -> None:
        """Raises UsageError where the resolution is too low for the model, CheckpointError where it has no use for
        latents.
        """
        super().__init__(len(examples))
        assert encoding.sizes  # raises
        self._parts, self._examples, self._encoding, self._folder = parts, examples, encoding, folder
        encoders = [parts.vae.encoder, getattr(parts.vae, "quant_conv", None)]
        self._facts = [
            fingerprint([each for each in encoders if each is not None], parts.vae.config),
            asdict(encoding),
            inpaints(parts),
        ]

    def read(self, leave_out: Collection[int] = ()) -> Pictures:
        """What all processes have encoded, without the examples `leave_out`; mapped, not read into memory.

        It knows of the broken pictures, which are no error in `fill`.
        """
        return Pictures(self.paths(), leave_out)

    def _shard(self, rows: range) -> Shard:
        some = self._examples[rows.start : rows.stop]
        digests = _digests(some, self._folder / "digests")
        path = self._folder / "latents" / f"{key_of([*self._facts, digests])}.safetensors"
        return Shard(path, lambda: _encode(self._parts, some, digests, self._encoding))


def fingerprint(modules: Sequence[nn.Module], *facts: object) -> str:
    """A hash of networks, by some numbers of each weight, and of facts that have a repr."""
    digest = hashlib.sha256(repr((FORMAT, facts)).encode())
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def key_of(facts: object) -> str:
    """A file's name that stands for facts in JSON."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _digests(examples: Sequence[Example], folder: Path) -> list[str]:
    """The sha256 of each picture's bytes; "" where they cannot be read.

    Kept under the files' names, sizes and times, so that a second run need not read all pictures again.
    """
    stamps: list[object] = []
    for example in examples:
        try:
            status = example.file.stat()
            stamp = [status.st_size, status.st_mtime_ns]
        except OSError:
            stamp = []
        stamps.append([str(example.file.resolve()), example.offset, example.length, stamp])
    file = folder / f"{key_of(stamps)}.json"
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, list) and len(found) == len(examples):
            return found
    digests: list[str] = []
    for example in examples:
        try:
            digests.append(hashlib.sha256(example.read()).hexdigest())
        except UsageError:
            digests.append("")
    if all(digests):
        write_json(file, digests)
    return digests


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A picture, ready to be encoded."""

    position: int
    name: str
    digest: str  # of its bytes
    bucket: Size
    views: list[tuple[Image.Image, View]]


def _load(example: Example, position: int, digest: str, encoding: Encoding) -> _Loaded | Broken:
    try:
        found = views(example, example.read(), encoding.sizes, encoding.flip)
    except UsageError as error:
        return Broken(position, example.name, error.message)
    picture = found[0][0]
    return _Loaded(position, example.name, digest, (picture.height, picture.width), found)


def _encode(parts: Parts, examples: Sequence[Example], digests: Sequence[str], encoding: Encoding) -> Making:
    """Decodes some pictures at a time, in threads, and encodes those of one size together."""
    rows: list[Row] = []
    broken: list[Broken] = []
    waiting: dict[Size, list[_Loaded]] = {}

    def encode_some(some: Sequence[_Loaded]) -> int:
        for found in _rows(parts, some):
            if isinstance(found, Row):
                rows.append(found)
            else:
                broken.append(found)
        return len(rows) + len(broken)

    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(examples), BATCH):
            here = range(start, min(start + BATCH, len(examples)))
            for one in pool.map(lambda i: _load(examples[i], i, digests[i], encoding), here):
                if isinstance(one, Broken):
                    broken.append(one)
                    continue
                same = waiting.setdefault(one.bucket, [])
                same.append(one)
                if len(same) == BATCH:
                    yield encode_some(waiting.pop(one.bucket))
    for bucket in list(waiting):
        yield encode_some(waiting.pop(bucket))
    return contents(rows, broken)


@torch.inference_mode()
def _rows(parts: Parts, pictures: Sequence[_Loaded]) -> list[Row | Broken]:
    """Pictures of one size, encoded; those whose latents are not finite are broken."""
    V, downscale = len(pictures[0].views), parts.vae.config.downscale
    pixels = torch.cat([to_tensor(view) for one in pictures for view, _ in one.views])  # (n V, 3, H, W)
    coded = _latents(parts, pixels)
    masked = None
    if inpaints(parts):
        masks = [hole(f"{one.digest} {view}", one.bucket) for one in pictures for view in range(V)]
        hidden = torch.stack([torch.from_numpy(mask.copy()) for mask in masks])[:, None]
        small = hidden[..., ::downscale, ::downscale].to(coded.dtype)  # each latent takes its first pixel, as sampling
        # Grey, 0 in [-1, 1], is what the network knows for hidden; so has diffusers.
        masked = torch.cat([small, _latents(parts, pixels * ~hidden)], dim=1)
    found: list[Row | Broken] = []
    for i, one in enumerate(pictures):
        here = slice(i * V, (i + 1) * V)
        seen = None if masked is None else masked[here]
        if not is_finite(coded[here]) or not (seen is None or is_finite(seen)):
            found.append(Broken(one.position, one.name, f"{one.name} encodes to numbers that are not finite"))
            continue
        sizes = torch.tensor([(*view.original, *view.crop) for _, view in one.views], dtype=torch.int32)
        found.append(Row(one.position, coded[here], sizes, seen))
    return found


def _latents(parts: Parts, pixels: Tensor) -> Tensor:
    """The means of the posteriors, (n, C, h, w) float16 on the CPU, scaled; NaN where they are not finite.

    The posteriors' spread is far below the noise that training adds.
    """
    try:
        return encode(parts.vae, pixels).half().cpu()
    except CalotypeError:  # one of them is not finite
        if len(pixels) > 1:
            return torch.cat([_latents(parts, one) for one in torch.split(pixels, 1)])
        config = parts.vae.config
        height, width = (side // config.downscale for side in pixels.shape[-2:])
        return torch.full((1, config.latent_channels, height, width), torch.nan, dtype=torch.float16)


# ---- captions ----


def distinct(examples: Sequence[Example]) -> tuple[str, ...]:
    """Each caption once, the empty one first; new ones come last, so that the shards before them stay."""
    return tuple(dict.fromkeys(["", *(caption for example in examples for caption in example.captions)]))


class Captions:
    """The embeddings of captions, in mapped files."""

    def __init__(self, texts: Sequence[str], paths: Sequence[Path]) -> None:
        self._row, self._shards = {text: i for i, text in enumerate(texts)}, [load(path)[0] for path in paths]

    def take(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Context (b, L, D) and, where the model has it, pooled (b, P), both float32."""
        places = [divmod(self._row[text], SHARD) for text in texts]
        context = torch.stack([self._shards[shard]["context"][row].float() for shard, row in places])
        if "pooled" not in self._shards[0]:
            return context, None
        return context, torch.stack([self._shards[shard]["pooled"][row].float() for shard, row in places])


class CaptionCache(Cache):
    """The embeddings of some captions, in a folder."""

    def __init__(self, parts: Parts, texts: Sequence[str], folder: Path) -> None:
        super().__init__(len(texts))
        self._parts, self._texts, self._folder = parts, texts, folder
        tokenizers = [(each.size, each.length, each.bos, each.eos, each.pad) for each in parts.text.tokenizers]
        configs = [model.config for model in parts.text.models]
        self._reader = fingerprint(parts.text.models, tokenizers, configs)

    def read(self) -> Captions:
        """What all processes have encoded."""
        return Captions(self._texts, self.paths())

    def _shard(self, rows: range) -> Shard:
        some = self._texts[rows.start : rows.stop]
        path = self._folder / "captions" / f"{key_of([self._reader, list(some)])}.safetensors"
        return Shard(path, lambda: _encode_texts(self._parts, some))


def _encode_texts(parts: Parts, texts: Sequence[str]) -> Making:
    """Context and pooled of some captions, of each the first chunk."""
    contexts: list[Tensor] = []
    pooleds: list[Tensor] = []
    for start in range(0, len(texts), CAPTIONS):
        with torch.inference_mode():
            context, pooled = parts.text.encode([text[:CHARACTERS] for text in texts[start : start + CAPTIONS]])
        contexts.append(context[:, : parts.text.tokenizers[0].length].float().cpu())
        if pooled is not None:
            pooleds.append(pooled.float().cpu())
        yield min(start + CAPTIONS, len(texts))
    tensors = {"context": torch.cat(contexts)}
    if pooleds:
        tensors["pooled"] = torch.cat(pooleds)
    found: Contents = {name: _compact(tensor) for name, tensor in tensors.items()}, {}
    return found


def _compact(tensor: Tensor) -> Tensor:
    """In float16, where that can hold it."""
    half = tensor.half()
    return half if is_finite(half) else tensor
