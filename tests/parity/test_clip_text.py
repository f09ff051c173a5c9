"""Token ids and text features against transformers and diffusers, with a small BPE trained here and random weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextConfig as TheirConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from calotype.nn.clip import CLIPText, CLIPTextConfig
from calotype.text.encode import TextEncoder
from calotype.text.prompt import chunk
from calotype.text.tokenizer import Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"

CORPUS = [
    "a red fox in the snow, oil painting",
    "an astronaut's portrait, they'll see it's 1024 pixels!!",
    "señor, café, naïve façade; Übergröße, straße",
    "مرحبا بالعالم، صورة قطة",
    "привет мир, картина лисы",
    "日本語の絵、狐と雪",
    "fox fox foxes, snowy snow, painting paintings",
]

TEXTS = [
    "",
    " ",
    "a fox",
    "A FOX in the SNOW",
    "they'll don't I've we're it's o'clock 'tis 'LL",
    "snow!!! ... -- ?! hello!world !",
    "12345 3.14 ½ ² ٣ 四",
    "tabs\tand\nnew\r\nlines  \u00a0\u2003\u3000 spaces \u200b\u200d\ufeff",
    "\x00\x01\x07\x1b[0m\x7f\x85",
    "cafe\u0301 café \u212b \ufb01 \u1e9e ß İ ı ǅ",
    "مرحبا بالعالم، صورة قطة ١٢٣",
    "שלום עולם हिन्दी ไทย 한국어 日本語の絵",
    "😀 👩‍🚀 🏳️‍🌈 🇩🇪 👍🏽 \U0001f9ff\U000e0041",
    "\ue000 \U0010ffff \ufffd \ufffe",
    f"a {END} b {START}{END}c <|EndOfText|> <|endoftext <||>",
    "(fox:1.3) [snow] BREAK \\( {a|b} <lora:x:1> #$%^&*_+=~`",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "fox" * 40,
    "a fox " * 60,
    "</w> ca</w> Ġfox ĉ",
]


def random_texts(count: int) -> list[str]:
    """Characters from many blocks in any order, with pieces that mean something to the tokenizer."""
    chance = random.Random(7)
    blocks = [(32, 127), (0, 32), (0xA0, 0x180), (0x300, 0x370), (0x600, 0x700), (0x2000, 0x2070), (0x1F300, 0x1F700)]
    pieces = ["'s", "'ll", "!", " ", "  ", END, START, "fox", "1", "</w>", "\u0301"]
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(chance.randint(1, 30)):
            low, high = chance.choice(blocks)
            parts.append(chance.choice(pieces) if chance.random() < 0.3 else chr(chance.randrange(low, high)))
        texts.append("".join(parts))
    return texts


@pytest.fixture(scope="module")
def tables() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary laid out as CLIP's: bytes, bytes that end a word, merges, the two markers."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    trained.normalizer = tokenizers.normalizers.Lowercase()
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator(CORPUS * 3, trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    assert len(merges) > 100
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in merges), START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def marker(text: str, **flags: Any) -> dict[str, Any]:
    return {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False, **flags}


# What real folders say about their special tokens: tokenizer_config.json and special_tokens_map.json.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "plain": ({"model_max_length": 77}, None),
    "short": ({"model_max_length": 16, "pad_token": END, "bos_token": START, "eos_token": END}, None),
    "objects": (
        {"model_max_length": 77, "bos_token": {"__type": "AddedToken", **marker(START)}, "pad_token": END},
        {"bos_token": marker(START), "eos_token": marker(END), "pad_token": END, "unk_token": marker(END)},
    ),
    "exclamation": (  # Stable Diffusion 2: the two files disagree about the padding
        {"model_max_length": 77, "pad_token": END},
        {"bos_token": marker(START), "eos_token": marker(END), "pad_token": "!", "unk_token": marker(END)},
    ),
    "listed": (  # SDXL's second tokenizer, as newer libraries write it
        {"model_max_length": 77, "pad_token": "!", "bos_token": START, "eos_token": END, "added_tokens_decoder": {}},
        {"pad_token": END},
    ),
    "stripping": ({"model_max_length": 77}, {"pad_token": marker("!", rstrip=True, lstrip=True, normalized=False)}),
}


@pytest.fixture(params=[(name, layout) for name in VARIANTS for layout in ("text", "json")], ids="-".join)
def folder(
    request: pytest.FixtureRequest, tmp_path: Path, tables: tuple[dict[str, int], list[tuple[str, str]]]
) -> Path:
    name, layout = request.param
    vocab, merges = tables
    config, special = VARIANTS[name]
    if "added_tokens_decoder" in config:
        listed = {str(vocab[text]): marker(text, normalized=text != "!", special=True) for text in ("!", START, END)}
        config = config | {"added_tokens_decoder": listed}
    write(tmp_path, vocab, merges, layout, config, special)
    return tmp_path


def write(
    path: Path,
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    layout: str = "text",
    config: dict[str, Any] | None = None,
    special: dict[str, Any] | None = None,
) -> None:
    path.mkdir(exist_ok=True)
    if layout == "json":
        model = {"type": "BPE", "end_of_word_suffix": "</w>", "unk_token": END, "vocab": vocab, "merges": merges}
        added = [marker(text, normalized=False, special=True, id=vocab[text]) for text in (START, END)]
        content = {"version": "1.0", "model": model, "added_tokens": added}
        (path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    else:
        (path / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "CLIPTokenizer"}))
    if special is not None:
        (path / "special_tokens_map.json").write_text(json.dumps(special))


# ---- token ids ----


def test_ids_and_chunks_equal_transformers(folder: Path) -> None:
    ours, theirs = Tokenizer.load(folder), CLIPTokenizer.from_pretrained(folder)
    assert (ours.bos, ours.eos, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.length == theirs.model_max_length
    assert ours.size == len(theirs)
    short = 0
    for text in TEXTS + random_texts(150):
        assert ours.ids(text) == theirs(text, add_special_tokens=False).input_ids, repr(text)
        padded = theirs(text, padding="max_length", max_length=ours.length, truncation=True).input_ids
        parts = chunk(ours, text)
        if len(parts) == 1:
            short += 1
            assert list(parts[0].ids) == padded, repr(text)
        else:
            assert list(parts[0].ids[:-1]) == padded[:-1], repr(text)  # theirs is cut, ours goes on
    assert short > 30


def test_a_saved_tokenizer_loads(folder: Path, tmp_path: Path) -> None:
    """What the installed transformers writes itself, added tokens and all."""
    theirs = CLIPTokenizer.from_pretrained(folder)
    theirs.add_tokens(["<my-cat>", "<my dog>"])
    theirs.save_pretrained(tmp_path / "saved")
    ours = Tokenizer.load(tmp_path / "saved")
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "saved")
    assert (ours.bos, ours.eos, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.size == len(theirs)
    for text in [*TEXTS, "a <my-cat>, <MY-CAT> <my dog>fox", *random_texts(30)]:
        assert ours.ids(text) == theirs(text, add_special_tokens=False).input_ids, repr(text)


# ---- features ----


def pair(path: Path, seed: int, *, projection: int | None = None, activation: str = "quick_gelu") -> tuple[Any, ...]:
    """A tokenizer and a random text encoder, both theirs and ours."""
    theirs_tokenizer, tokenizer = CLIPTokenizer.from_pretrained(path), Tokenizer.load(path)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = TheirConfig(
        **shape,
        vocab_size=tokenizer.size,
        max_position_embeddings=tokenizer.length,
        hidden_act=activation,
        projection_dim=projection or 32,
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eos,
        pad_token_id=tokenizer.pad,
    )
    torch.manual_seed(seed)
    theirs = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = CLIPText(
        CLIPTextConfig(
            vocab_size=tokenizer.size,
            width=32,
            intermediate=64,
            layers=4,
            heads=4,
            positions=tokenizer.length,
            activation=activation,
            projection_dim=projection,
            eos_token_id=tokenizer.eos,
        )
    ).eval()
    if not hasattr(theirs, "text_model"):  # transformers 5 dropped the level that diffusers' clip_skip reaches through
        object.__setattr__(theirs, "text_model", theirs)
    weights = {
        name if name.startswith("text_") else f"text_model.{name}": value for name, value in theirs.state_dict().items()
    }
    ours.load_state_dict({name: value for name, value in weights.items() if not name.endswith("position_ids")})
    return theirs_tokenizer, theirs, tokenizer, ours


PROMPTS = ["a red fox in the snow!", "", "an astronaut's portrait 😀", f"fox {END} snow"]


@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2])
def test_one_encoder_equals_stable_diffusion(tmp_path: Path, tables: Any, clip_skip: int | None) -> None:
    write(tmp_path, *tables, config={"model_max_length": 40})
    theirs_tokenizer, theirs, tokenizer, ours = pair(tmp_path, 0)
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=theirs,
        tokenizer=theirs_tokenizer,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with torch.inference_mode():
        wanted, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False, clip_skip=clip_skip)
        context, pooled = TextEncoder([tokenizer], [ours]).encode(PROMPTS, clip_skip=clip_skip)
    assert pooled is None
    torch.testing.assert_close(context, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2])
def test_two_encoders_equal_stable_diffusion_xl(tmp_path: Path, tables: Any, clip_skip: int | None) -> None:
    write(tmp_path / "1", *tables, config={"model_max_length": 40})
    write(tmp_path / "2", *tables, config={"model_max_length": 40, "pad_token": "!"})
    theirs_tokenizer, theirs, tokenizer, ours = pair(tmp_path / "1", 1)
    theirs_tokenizer_2, theirs_2, tokenizer_2, ours_2 = pair(tmp_path / "2", 2, projection=24, activation="gelu")
    pipeline = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=theirs,
        text_encoder_2=theirs_2,
        tokenizer=theirs_tokenizer,
        tokenizer_2=theirs_tokenizer_2,
        unet=None,
        scheduler=None,
        add_watermarker=False,
    )
    with torch.inference_mode():
        wanted, _, wanted_pooled, _ = pipeline.encode_prompt(
            PROMPTS, device="cpu", do_classifier_free_guidance=False, clip_skip=clip_skip
        )
        context, pooled = TextEncoder([tokenizer, tokenizer_2], [ours, ours_2]).encode(PROMPTS, clip_skip=clip_skip)
    torch.testing.assert_close(context, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, wanted_pooled, rtol=1e-5, atol=1e-5)
