"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): words that a text encoder learnt later, as further rows of its
table of token embeddings. A word of several vectors stands for that many tokens of a prompt.

The rows come behind the vocabulary and the tokenizer finds the words before it splits a text into its own, so that
everything else is as before, and taking a word out again leaves nothing behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from calotype.errors import CheckpointError, UsageError
from calotype.hashes import File
from calotype.nn.clip import CLIPText
from calotype.rules import shown
from calotype.text.encode import TextEncoder
from calotype.weights.files import PICKLES, is_finite, read, unsafe
from calotype.weights.source import resolve_file

MAX_TOKEN = 100  # characters
MAX_VECTORS = 75  # tokens of a chunk

UNNAMED = ("emb_params", "*")  # keys that say nothing of the word: it is the file's name then, as in AUTOMATIC1111
XL = ("clip_l", "clip_g")  # keys of the two encoders, in their order
FAMILIES = {(768,): "Stable Diffusion 1", (1024,): "Stable Diffusion 2", (768, 1280): "SDXL"}


@dataclass(frozen=True, eq=False)
class Inversion:
    """A word and what it means."""

    token: str  # as it is written in prompts, where upper or lower case makes no difference
    vectors: tuple[Tensor, ...]  # for each text encoder (k, width)
    file: File | None = None  # where it was read

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(vectors.shape[1] for vectors in self.vectors)


def load_inversion(
    ref: str | Path,
    token: str | None = None,
    *,
    weight_name: str | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> Inversion:
    """The textual inversion of a .safetensors file, or of the file `weight_name` of a folder or Hub id.

    It may be diffusers' (its key is the word), kohya's and AUTOMATIC1111's (emb_params), or SDXL's (clip_l and clip_g).
    `token` is another word for it. Raises ModelNotFoundError, CheckpointError, UsageError for an impossible word.
    """
    path = resolve_file(ref, weight_name, preferred=("learned_embeds.safetensors",), revision=revision, offline=offline)
    if path.suffix.lower() in PICKLES:
        raise unsafe(path)
    tensors = read([path])
    keys = tuple(tensors)
    if set(keys) == set(XL):
        name, vectors = path.stem, [tensors[key] for key in XL]
    elif len(keys) == 1:
        name, vectors = path.stem if keys[0] in UNNAMED else keys[0], list(tensors.values())
    else:
        raise CheckpointError(
            f"{path} is not a textual inversion: it holds {shown(list(keys[:5]))}",
            "one has a single tensor, or clip_l and clip_g",
        )
    word, learnt = check_word(name if token is None else token), tuple(rows(path, each) for each in vectors)
    return Inversion(word, learnt, File.of(ref, path))


def check_word(token: str) -> str:
    """The word, if it can be written in a prompt. Raises UsageError."""
    if not isinstance(token, str) or not token.isprintable() or token != token.strip() or not token:
        raise UsageError(f"the token {shown(token)} cannot be written in a prompt", "give another: token='<mine>'")
    if len(token) > MAX_TOKEN:
        raise UsageError(f"the token {shown(token)} has {len(token)} characters: must be at most {MAX_TOKEN}")
    return token


def rows(where: Path | str, vectors: Tensor) -> Tensor:
    """The vectors as (k, width) in float32. Raises CheckpointError."""
    found = vectors[None] if vectors.ndim == 1 else vectors
    if found.ndim != 2 or not found.is_floating_point() or not 1 <= len(found) <= MAX_VECTORS or not found.shape[1]:
        raise CheckpointError(
            f"{where} holds {shown(list(vectors.shape))} of {str(vectors.dtype).removeprefix('torch.')}: a textual "
            f"inversion has 1 to {MAX_VECTORS} vectors"
        )
    if not is_finite(found):
        raise CheckpointError(f"{where} holds numbers that are not finite")
    return found.float()


# ---- in and out of a text encoder ----


def check_widths(text: TextEncoder, inversion: Inversion) -> None:
    """Raises CheckpointError where a word was learnt by another family's encoder."""
    token, widths = inversion.token, tuple(model.config.width for model in text.models)
    if inversion.widths != widths:
        family = FAMILIES.get(inversion.widths, "another model")
        raise CheckpointError(
            f"{shown(token)} has vectors of width {_listed(inversion.widths)} ({family}): "
            f"this model's text encoding has {_listed(widths)}",
            "take one that was made for this model's family",
        )


def check(text: TextEncoder, inversion: Inversion) -> None:
    """Raises what `add` would."""
    check_widths(text, inversion)
    token = inversion.token
    for tokenizer in text.tokenizers:
        if token.lower() in tokenizer.added:
            raise UsageError(f"the token {shown(token)} is added already", "remove it first, or give another token")
        if len(tokenizer.ids(token)) == 1:
            raise UsageError(f"the token {shown(token)} is a word that this model knows", f"try token='<{token}>'")


def add(text: TextEncoder, inversion: Inversion) -> None:
    """Teaches the text encoder a word. All or nothing.

    Raises CheckpointError where it was learnt by another family's encoder, UsageError for a word that is known already.
    """
    check(text, inversion)
    token = inversion.token
    for tokenizer, model, vectors in zip(text.tokenizers, text.models, inversion.vectors, strict=True):
        table = _table(model).weight.detach()
        tokenizer.added[token.lower()] = tuple(range(len(table), len(table) + len(vectors)))
        _set_table(model, [table, vectors.to(table.device, table.dtype)])


def remove(text: TextEncoder, token: str) -> None:
    """Takes a word out again. Raises UsageError where it was never added."""
    word = token.lower()
    if word not in added(text):
        raise UsageError(f"the token {shown(token)} is not added: {', '.join(added(text)) or 'none'} is")
    for tokenizer, model in zip(text.tokenizers, text.models, strict=True):
        own, table = tokenizer.added.pop(word), _table(model).weight.detach()
        _set_table(model, [table[: own[0]], table[own[-1] + 1 :]])
        for other, theirs in tokenizer.added.items():
            if theirs[0] > own[0]:  # what lay behind it moves up
                tokenizer.added[other] = tuple(row - len(own) for row in theirs)


def added(text: TextEncoder) -> tuple[str, ...]:
    """The words that were added, in lower case."""
    return tuple(text.tokenizers[0].added)


def _table(model: CLIPText) -> nn.Embedding:
    return model.text_model.embeddings.token_embedding


def _set_table(model: CLIPText, pieces: list[Tensor]) -> None:
    table = _table(model)
    with torch.inference_mode(False):  # else it could never be trained again
        table.weight.data = torch.cat(pieces)  # the same parameter: an adapter may have changed it, and knows it
    table.num_embeddings = len(table.weight)


def _listed(widths: tuple[int, ...]) -> str:
    return " and ".join(map(str, widths))
