"""Captions as tokens: a tokenizer of CLIP's kind, byte-level BPE, small, in the languages of the names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from resumable import rng
from scenes import Icons, Names, Scene, caption
from tokenizers import trainers
from torch import Tensor

from calotype.text.prompt import chunk
from calotype.text.tokenizer import END, START, Tokenizer, byte_letters

LENGTH = 32  # tokens of a caption, with start and end: few are longer than 20


def build_tokenizer(texts: Iterable[str], size: int, folder: Path) -> Tokenizer:
    """Learns at most `size` tokens from texts and writes them to a folder, as vocab.json and merges.txt."""
    letters = byte_letters()
    first = [*letters, *(f"{letter}</w>" for letter in letters)]
    start = files(first, [])
    backend = Tokenizer.read(
        start.get, folder
    ).backend  # calotype's own pipeline around the tables, still without merges
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(letters) - 2,  # the trainer counts the plain letters alone
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    learnt = json.loads(backend.to_str())["model"]["merges"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in learnt]
    made = list(dict.fromkeys(["".join(merge) for merge in merges]))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files([*first, *made], [" ".join(merge) for merge in merges]).items():
        (folder / name).write_text(text, encoding="utf-8")
    return Tokenizer.load(folder)


def vocabulary(icons: Icons, names: Names) -> Iterator[str]:
    """All that captions are made of, as often as it is on the list: what the tokenizer learns from."""
    dice = rng(0, 0)
    for i, row in enumerate(icons.rows):
        yield from (caption(icons, Scene((i,)), dice) for _ in range(3))
        for words in names.get(row["hex"] or "", {}).values():
            yield " ".join(words).lower()


def tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (B, L); what is too long is cut."""
    return torch.tensor([chunk(tokenizer, text)[0].ids for text in texts])


def files(entries: list[str], merges: list[str]) -> dict[str, str]:
    vocabulary = {token: index for index, token in enumerate([*entries, START, END])}
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "tokenizer_config.json": json.dumps(CONFIG, indent=2) + "\n",
    }


CONFIG: dict[str, Any] = {
    "tokenizer_class": "CLIPTokenizer",
    "bos_token": START,
    "eos_token": END,
    "pad_token": END,
    "unk_token": END,
    "do_lower_case": True,
    "errors": "replace",
    "model_max_length": LENGTH,
}
