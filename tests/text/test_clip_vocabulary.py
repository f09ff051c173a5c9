"""CLIP's own tables, which ship with the package, against transformers' tokenizer and ids that are known."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from calotype.errors import CheckpointError
from calotype.text.tokenizer import Tokenizer, clip_tables, has_clip_tables
from checkpoints import write_tokenizer

TEXTS = (
    "a photo of an astronaut riding a horse",
    "Self-portrait OIL painting, a beautiful cyborg with golden hair, 8k",
    "it's 2023's don't  we've\t\n 12345 ... !!! (masterpiece:1.2)",
    "ünïcödé 日本語 кошка 🦊🎨 ﬁ ½ \u00a0 e\u0301",
    "",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, text in clip_tables().items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_ids_are_those_of_transformers(folder: Path) -> None:
    peer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    ours = Tokenizer.clip({}, folder)
    assert (ours.size, ours.bos, ours.eos, ours.pad, ours.length) == (49408, 49406, 49407, 49407, 77)
    words = list(json.loads(clip_tables()["vocab.json"]))
    draw = random.Random(0)
    mixed = [" ".join(word.removesuffix("</w>") for word in draw.sample(words[:49406], 40)) for _ in range(20)]
    for text in (*TEXTS, *mixed):
        assert ours.ids(text) == peer(text, add_special_tokens=False).input_ids, text


def test_known_ids(folder: Path) -> None:
    """As every program that runs Stable Diffusion has them."""
    assert Tokenizer.clip({}, folder).ids(TEXTS[0]) == [320, 1125, 539, 550, 18376, 6765, 320, 4558]
    vocabulary = json.loads(clip_tables()["vocab.json"])
    assert len(vocabulary) == len(set(vocabulary.values())) == 49408
    assert [vocabulary[token] for token in ("!", "!</w>", "the</w>", "<|startoftext|>")] == [0, 256, 518, 49406]


def test_a_folder_with_these_tables_is_recognised(folder: Path, tmp_path: Path) -> None:
    assert has_clip_tables(folder)
    write_tokenizer(tmp_path / "tiny")
    assert not has_clip_tables(tmp_path / "tiny")


def test_files_may_say_how_to_pad_or_bring_their_own_tables(folder: Path, tmp_path: Path) -> None:
    assert Tokenizer.clip({"tokenizer_config.json": '{"pad_token": "!"}'}, folder).pad == 0
    write_tokenizer(tmp_path / "tiny")
    own = {path.name: path.read_text("utf-8") for path in (tmp_path / "tiny").iterdir()}
    assert Tokenizer.clip(own, folder).ids("a red fox") == Tokenizer.load(tmp_path / "tiny").ids("a red fox")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json is not valid JSON"):
        Tokenizer.clip({"tokenizer_config.json": "{"}, folder)
