"""What the text encoders make of prompts (parity: parity/test_clip_text.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from calotype.errors import CheckpointError, UsageError
from calotype.nn.clip import CLIPText, CLIPTextConfig
from calotype.text.encode import TextEncoder
from calotype.text.prompt import chunk
from calotype.text.tokenizer import Tokenizer

LETTERS = "!acdegort"
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>"), ("!", "!</w>")]
END = "<|endoftext|>"
TOKENS = [*LETTERS, *(letter + "</w>" for letter in LETTERS), *(a + b for a, b in MERGES), "<|startoftext|>", END]
VOCAB = {token: index for index, token in enumerate(TOKENS)}


def load(path: Path, length: int = 8, pad: str = END, added: dict[str, int] | None = None) -> Tokenizer:
    """A tokenizer of these tables, written to a folder and read from it."""
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps(VOCAB))
    (path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in MERGES))
    (path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": length, "pad_token": pad}))
    (path / "added_tokens.json").write_text(json.dumps(added if added is not None else {}))
    return Tokenizer.load(path)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load(tmp_path / "first")


def clip(
    width: int = 16, layers: int = 3, *, projection: int | None = None, positions: int = 8, seed: int = 0
) -> CLIPText:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(VOCAB),
        width=width,
        intermediate=32,
        layers=layers,
        heads=2,
        positions=positions,
        projection_dim=projection,
        eos_token_id=VOCAB[END],
    )
    model = CLIPText(config).eval()
    for parameter in model.parameters():  # a plain initialisation has norms of ones and biases of zeros
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def one(tokenizer: Tokenizer) -> TextEncoder:
    return TextEncoder([tokenizer], [clip()])


@pytest.fixture
def two(tokenizer: Tokenizer, tmp_path: Path) -> TextEncoder:
    second = load(tmp_path / "second", pad="!")
    return TextEncoder([tokenizer, second], [clip(), clip(24, 4, projection=20, seed=1)])


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_one_encoder_gives_its_last_layer(one: TextEncoder) -> None:
    context, pooled = one.encode(["red cat"])
    ids = torch.tensor([chunk(one.tokenizers[0], "red cat")[0].ids])
    assert torch.equal(context, one.models[0](ids).last)
    assert context.shape == (1, 8, 16)
    assert pooled is None


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_with_one_encoder_normalises(one: TextEncoder, skip: int) -> None:
    context, _ = one.encode(["red cat"], clip_skip=skip)
    out = one.models[0](torch.tensor([chunk(one.tokenizers[0], "red cat")[0].ids]))
    assert torch.equal(context, one.models[0].final_norm(out.hidden[-(skip + 1)]))


@pytest.mark.parametrize("skip", [None, 0, 1, 2])
def test_two_encoders_give_their_last_layer_but_one(two: TextEncoder, skip: int | None) -> None:
    context, pooled = two.encode(["red cat!"], clip_skip=skip)
    outs = [
        model(torch.tensor([chunk(tokenizer, "red cat!")[0].ids]))
        for tokenizer, model in zip(two.tokenizers, two.models, strict=True)
    ]
    wanted = torch.cat([out.hidden[-2 if skip is None else -(skip + 2)] for out in outs], dim=-1)
    assert torch.equal(context, wanted)
    assert context.shape == (1, 8, 40)
    assert pooled is not None
    assert torch.equal(pooled, outs[1].pooled)
    assert pooled.shape == (1, 20)


@pytest.mark.parametrize("skip", [-1, 4, 10**6])
def test_clip_skip_out_of_range(one: TextEncoder, skip: int) -> None:
    with pytest.raises(UsageError, match=f"clip_skip is {skip}: must be 0 to 3"):
        one.encode(["cat"], clip_skip=skip)


def test_clip_skip_of_two_encoders_is_bounded_by_the_smaller(two: TextEncoder) -> None:
    with pytest.raises(UsageError, match="clip_skip is 3: must be 0 to 2"):
        two.encode(["cat"], clip_skip=3)


def test_long_prompts_are_chunks_side_by_side(two: TextEncoder) -> None:
    words = ["red cat dog red cat dog", "dog cat red"]
    context, pooled = two.encode([" ".join(words)])
    first, first_pooled = two.encode([words[0]])
    second, _ = two.encode([words[1]])
    assert context.shape == (1, 16, 40)
    torch.testing.assert_close(context, torch.cat([first, second], dim=1))
    assert pooled is not None
    assert first_pooled is not None
    torch.testing.assert_close(pooled, first_pooled)


def test_chunks_makes_positive_and_negative_agree(two: TextEncoder) -> None:
    count = two.chunks("cat " * 13)
    assert count == 3
    context, _ = two.encode(["dog"], chunks=count)
    alone, _ = two.encode(["dog"])
    empty, _ = two.encode([""])
    torch.testing.assert_close(context, torch.cat([alone, empty, empty], dim=1))
    both, _ = two.encode(["cat " * 13, "dog"])
    torch.testing.assert_close(both[1:], context)


def test_too_few_chunks(two: TextEncoder) -> None:
    with pytest.raises(UsageError, match="chunks is 1: the longest prompt takes 2"):
        two.encode(["cat", "cat " * 7], chunks=1)


def test_tokenizers_that_count_differently(two: TextEncoder) -> None:
    """Where `!` is the padding it is a token wherever it stands, so that the second tokenizer counts more here."""
    text = "!! !! !! !!"
    assert [len(chunk(tokenizer, text)) for tokenizer in two.tokenizers] == [1, 2]
    assert two.chunks(text) == 2
    context, _ = two.encode([text])
    empty, _ = two.encode([""])
    assert context.shape == (1, 16, 40)
    torch.testing.assert_close(context[:, 8:, :16], empty[:, :, :16])


def test_equal_prompts_are_encoded_once(one: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    forward = one.models[0].forward
    monkeypatch.setattr(one.models[0], "forward", lambda ids: rows.append(len(ids)) or forward(ids))
    context, _ = one.encode(["cat", "dog", "cat", "", "dog"], chunks=3)
    assert rows == [3]
    assert torch.equal(context[0], context[2])
    assert torch.equal(context[1], context[4])
    assert not torch.equal(context[0], context[1])


def test_order_of_the_batch_is_kept(two: TextEncoder) -> None:
    prompts = ["cat", "dog", "", "red dog", "cat " * 9]
    context, pooled = two.encode(prompts)
    assert pooled is not None
    for index, prompt in enumerate(prompts):
        alone, alone_pooled = two.encode([prompt], chunks=2)
        assert alone_pooled is not None
        torch.testing.assert_close(context[index : index + 1], alone)
        torch.testing.assert_close(pooled[index : index + 1], alone_pooled)


def test_emphasis_scales_tokens_and_keeps_the_mean(one: TextEncoder) -> None:
    plain, _ = one.encode(["red cat dog"])
    strong, _ = one.encode(["red (cat:1.5) dog"], emphasis=True)
    ratio = strong / plain
    torch.testing.assert_close(ratio[0, 2], 1.5 * ratio[0, 1], rtol=1e-4, atol=0)
    for row in (0, 1, 3, 4, 7):
        torch.testing.assert_close(ratio[0, row], ratio[0, 0, :1].expand(16), rtol=1e-4, atol=0)
    assert float(strong.mean()) == pytest.approx(float(plain.mean()), rel=1e-4)


def test_emphasis_is_a_matter_of_its_own_prompt_and_chunk(one: TextEncoder) -> None:
    text = "red red red red red red (dog:1.4)"
    context, _ = one.encode(["cat", text, "cat"], emphasis=True)
    plain, _ = one.encode(["cat", text.replace("(", "").replace(":1.4)", ""), "cat"])
    assert torch.equal(context[0], plain[0])
    assert torch.equal(context[1, :8], plain[1, :8])
    assert not torch.allclose(context[1, 8:], plain[1, 8:])
    alone, _ = one.encode([text], emphasis=True)
    torch.testing.assert_close(context[1:2], alone)


def test_emphasis_option_without_emphasis_changes_no_bit(two: TextEncoder) -> None:
    for prompt in ("red cat", "", r"(cat:1.0) \(dog\)"):
        plain = prompt.replace("(cat:1.0)", "cat").replace("\\", "")
        assert torch.equal(two.encode([prompt], emphasis=True)[0], two.encode([plain])[0])


def test_weights_of_zero_are_finite(one: TextEncoder) -> None:
    context, _ = one.encode(["(red cat dog:0)"], emphasis=True)
    assert context.isfinite().all()
    assert (context[0, 1:4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_have_the_encoders_dtype(tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    encoder = TextEncoder([tokenizer] * 2, [clip().to(dtype), clip(projection=20).to(dtype)])
    for prompt in ("cat", "(cat:1.2)"):
        context, pooled = encoder.encode([prompt], emphasis=True)
        assert pooled is not None
        assert context.dtype == pooled.dtype == dtype


def test_tokenizer_and_encoder_of_different_models(tokenizer: Tokenizer, tmp_path: Path) -> None:
    larger = load(tmp_path / "larger", added={"<mine>": len(VOCAB)})
    shorter = load(tmp_path / "shorter", length=7)
    with pytest.raises(CheckpointError, match=f"has {len(VOCAB) + 1} tokens and its text encoder knows {len(VOCAB)}"):
        TextEncoder([larger], [clip()])
    with pytest.raises(CheckpointError, match="length is 8: its encoder has 7 positions"):
        TextEncoder([tokenizer], [clip(positions=7)])
    with pytest.raises(CheckpointError, match="differ in length"):
        TextEncoder([tokenizer, shorter], [clip(), clip()])
    with pytest.raises(CheckpointError, match="2 tokenizers and 1 text encoders"):
        TextEncoder([tokenizer] * 2, [clip()])
    with pytest.raises(CheckpointError, match="0 tokenizers and 0 text encoders"):
        TextEncoder([], [])
