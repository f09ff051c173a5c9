"""Textual inversion: parity with diffusers, files of every kind, and nothing left behind."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from calotype.cli import main
from calotype.errors import CalotypeError, CheckpointError, ModelNotFoundError, UnsafeFileError, UsageError
from calotype.nn.clip import CLIPText, CLIPTextConfig
from calotype.text.encode import TextEncoder
from calotype.text.inversion import Inversion, add, added, load_inversion, remove
from calotype.text.tokenizer import Tokenizer
from calotype.weights.load import load_text_encoder
from checkpoints import write_text_encoder, write_tokenizer

WIDTH = 32
PROMPTS = ["a fox", "<toy>", "a <toy> in the snow", "<toy><toy>, <toy>!", "dog <toy>astronaut <fur> of <toy>", "x" * 90]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokenizers with their text encoders, as SDXL has them; the first pair alone is a Stable Diffusion's."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("text")
    for suffix, pad, changes in (("", "<|endoftext|>", {}), ("_2", "!", {"projection": 32, "hidden_size": 48})):
        write_tokenizer(path / f"tokenizer{suffix}", pad=pad)
        write_text_encoder(path / f"text_encoder{suffix}", num_hidden_layers=2, **changes)
    return path


def load(folder: Path, *suffixes: str) -> TextEncoder:
    tokenizers = [Tokenizer.load(folder / f"tokenizer{suffix}") for suffix in suffixes]
    return TextEncoder(tokenizers, [load_text_encoder(folder / f"text_encoder{suffix}") for suffix in suffixes])


@pytest.fixture
def one(folder: Path) -> TextEncoder:
    return load(folder, "")


@pytest.fixture
def two(folder: Path) -> TextEncoder:
    return load(folder, "", "_2")


def vectors(count: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def state(text: TextEncoder) -> list[Any]:
    """All that adding a word may change."""
    tables = [model.text_model.embeddings.token_embedding.weight.clone() for model in text.models]
    return [*tables, *(tokenizer.ids("a <toy> <fur> fox") for tokenizer in text.tokenizers), added(text)]


def same(before: list[Any], after: list[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after, strict=True))


# ---- parity ----


class Theirs(TextualInversionLoaderMixin):
    """As much of a pipeline as textual inversion takes."""

    hf_device_map = None
    components: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, folder: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()

    def __call__(self, prompt: str) -> tuple[list[int], Tensor]:
        converted = self.maybe_convert_prompt(prompt, self.tokenizer)
        ids = self.tokenizer(converted, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        return ids.input_ids[0].tolist(), self.text_encoder(ids.input_ids).last_hidden_state


@torch.inference_mode()
def test_features_equal_diffusers(folder: Path, one: TextEncoder, tmp_path: Path) -> None:
    """Words of one and of several vectors, in diffusers' files and in AUTOMATIC1111's."""
    save_file({"<toy>": vectors(1)[0]}, tmp_path / "learned_embeds.safetensors")
    save_file({"emb_params": vectors(3, seed=1)}, tmp_path / "fur.safetensors")
    theirs = Theirs(folder)
    with torch.inference_mode(False):
        theirs.load_textual_inversion(str(tmp_path))
        theirs.load_textual_inversion(str(tmp_path), weight_name="fur.safetensors", token="<fur>")
    add(one, load_inversion(tmp_path))
    add(one, load_inversion(tmp_path, "<fur>", weight_name="fur.safetensors"))
    for prompt in PROMPTS:
        ids, features = theirs(prompt)
        ours, _ = one.encode([prompt])
        framed = [one.tokenizers[0].bos, *one.tokenizers[0].ids(prompt)[:75], one.tokenizers[0].eos]
        assert framed == ids[: len(framed)]
        assert ((ours[:, :77] - features).norm() / features.norm()).item() < 1e-5


# ---- what it means ----


def test_a_word_is_its_vectors(one: TextEncoder) -> None:
    size = one.models[0].config.vocab_size
    add(one, Inversion("<toy>", (vectors(1),)))
    add(one, Inversion("Fur-3", (vectors(3, seed=1),)))
    fox = one.tokenizers[0].ids("fox")
    assert one.tokenizers[0].ids("fox <TOY>fur-3 fox") == [*fox, size, size + 1, size + 2, size + 3, *fox]
    embedded = one.models[0].text_model.embeddings.token_embedding(torch.arange(size, size + 4))
    assert torch.equal(embedded, torch.cat([vectors(1), vectors(3, seed=1)]))
    assert added(one) == ("<toy>", "fur-3")


def test_the_longest_word_is_found(one: TextEncoder) -> None:
    size = one.models[0].config.vocab_size
    add(one, Inversion("toy", (vectors(1),)))
    add(one, Inversion("toys-2", (vectors(1),)))
    assert one.tokenizers[0].ids("toys-2") == [size + 1]
    assert one.tokenizers[0].ids("toy-2")[0] == size


def test_emphasis_weighs_all_vectors_of_a_word(one: TextEncoder) -> None:
    add(one, Inversion("<fur>", (vectors(3),)))
    with torch.inference_mode():
        plain, _ = one.encode(["a <fur>"])
        strong, _ = one.encode(["a (<fur>:1.5)"], emphasis=True)
    ratio = (strong / plain)[0].median(dim=-1).values
    assert torch.allclose(ratio[2:5] / ratio[1], torch.full((3,), 1.5), atol=1e-4)


def test_other_prompts_stay_bit_for_bit(two: TextEncoder) -> None:
    prompts = ["a fox", "toy", "", "<to y>"]
    with torch.inference_mode():
        context, pooled = two.encode(prompts)
        add(two, Inversion("<toy>", (vectors(2), vectors(2, 48))))
        again, pooled_again = two.encode(prompts)
    assert torch.equal(context, again)
    assert pooled is not None
    assert pooled_again is not None
    assert torch.equal(pooled, pooled_again)


def test_two_encoders_have_their_own_vectors(two: TextEncoder, tmp_path: Path) -> None:
    save_file({"clip_g": vectors(2, 48), "clip_l": vectors(2)}, tmp_path / "my toy.safetensors")
    inversion = load_inversion(tmp_path / "my toy.safetensors")
    assert inversion.token == "my toy"
    assert inversion.widths == (32, 48)
    add(two, inversion)
    for tokenizer, model, width in zip(two.tokenizers, two.models, (32, 48), strict=True):
        rows = torch.tensor(tokenizer.ids("My Toy"))
        assert torch.equal(model.text_model.embeddings.token_embedding(rows), vectors(2, width))
    with torch.inference_mode():
        context, _ = two.encode(["a my toy", "a fox"])
    assert (context[0] - context[1]).abs().max() > 0.1


def test_the_end_of_text_is_not_an_added_row() -> None:
    """Configs with eos_token_id 2 take the highest id for the end: SDXL's have it, and pool there."""
    config = {"vocab_size": 20, "width": 8, "intermediate": 8, "layers": 1, "heads": 2, "positions": 8}
    model = CLIPText(CLIPTextConfig(**config, eos_token_id=2))
    assert model.end_of_text(torch.tensor([[18, 3, 20, 21, 19, 0, 0], [18, 19, 0, 0, 0, 0, 0]])).tolist() == [4, 1]


def test_half_precision_and_training_state_are_kept(one: TextEncoder) -> None:
    one.models[0].half().requires_grad_(False)
    with torch.inference_mode():
        add(one, Inversion("<toy>", (vectors(2),)))
    table = one.models[0].text_model.embeddings.token_embedding
    assert (table.weight.dtype, table.weight.requires_grad, table.num_embeddings) == (
        torch.float16,
        False,
        one.models[0].config.vocab_size + 2,
    )
    assert not table.weight.is_inference()


# ---- out again ----


def test_removing_leaves_nothing_behind(two: TextEncoder) -> None:
    before = state(two)
    add(two, Inversion("<toy>", (vectors(2), vectors(2, 48))))
    assert not same(before, state(two))
    remove(two, "<TOY>")
    assert same(before, state(two))


@pytest.mark.parametrize("gone", ["<a1>", "<b2>", "<c3>"])
def test_removing_one_of_several(one: TextEncoder, gone: str) -> None:
    for index, (token, count) in enumerate((("<a1>", 1), ("<b2>", 2), ("<c3>", 3))):
        add(one, Inversion(token, (vectors(count, seed=index),)))
    table, tokenizer = one.models[0].text_model.embeddings.token_embedding, one.tokenizers[0]
    meant = {token: table(torch.tensor(tokenizer.ids(token))) for token in added(one)}
    remove(one, gone)
    assert added(one) == tuple(token for token in meant if token != gone)
    for token in added(one):
        assert torch.equal(table(torch.tensor(tokenizer.ids(token))), meant[token])
    assert len(table.weight) == one.models[0].config.vocab_size + 6 - len(meant[gone])
    add(one, Inversion(gone, (vectors(4, seed=9),)))
    assert torch.equal(table(torch.tensor(tokenizer.ids(gone))), vectors(4, seed=9))


def test_removing_what_is_not_there(one: TextEncoder) -> None:
    with pytest.raises(UsageError, match="'<toy>' is not added: none is"):
        remove(one, "<toy>")


# ---- bad input ----


@pytest.mark.parametrize(
    ("inversion", "message"),
    [
        (
            Inversion("<toy>", (vectors(1, 1024),)),
            r"width 1024 \(Stable Diffusion 2\): this model's text encoding has 32",
        ),
        (Inversion("<toy>", (vectors(1, 768), vectors(1, 1280))), r"width 768 and 1280 \(SDXL\): .* has 32"),
        (Inversion("<toy>", (vectors(1, 33),)), r"width 33 \(another model\)"),
        (Inversion("<FUR>", (vectors(1),)), "'<FUR>' is added already"),
        (Inversion("Fox", (vectors(1),)), "'Fox' is a word that this model knows"),
        (Inversion("!", (vectors(1),)), "'!' is a word that this model knows"),
    ],
)
def test_a_word_that_does_not_fit_changes_nothing(one: TextEncoder, inversion: Inversion, message: str) -> None:
    add(one, Inversion("<fur>", (vectors(2),)))
    before = state(one)
    with pytest.raises(CalotypeError, match=message) as caught:
        add(one, inversion)
    assert caught.value.hint is not None
    assert "\n" not in str(caught.value)
    assert same(before, state(one))


def test_a_file_for_one_encoder_in_a_model_with_two(two: TextEncoder) -> None:
    before = state(two)
    with pytest.raises(CheckpointError, match=r"width 32 .* has 32 and 48"):
        add(two, Inversion("<toy>", (vectors(1),)))
    assert same(before, state(two))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": vectors(1), "b": vectors(1)}, "is not a textual inversion: it holds"),
        ({"clip_l": vectors(1), "clip_g": vectors(1), "t5xxl": vectors(1)}, "is not a textual inversion"),
        ({}, "is not a textual inversion"),
        ({"emb_params": vectors(76)}, "has 1 to 75 vectors"),
        ({"emb_params": torch.zeros(0, 32)}, "has 1 to 75 vectors"),
        ({"emb_params": torch.zeros(1, 1, 32)}, "has 1 to 75 vectors"),
        ({"emb_params": torch.zeros(())}, "has 1 to 75 vectors"),
        ({"emb_params": torch.zeros(1, 32, dtype=torch.int64)}, "of int64: a textual inversion has"),
        ({"emb_params": torch.full((1, 32), torch.inf)}, "numbers that are not finite"),
    ],
)
def test_files_that_are_none(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_inversion(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", ["", " ", " <toy>", "<t\noy>", "<t\0y>", "x" * 101])
def test_words_that_cannot_be_written(tmp_path: Path, token: str) -> None:
    save_file({"emb_params": vectors(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=r"the token .* (cannot be written in a prompt|at most 100)"):
        load_inversion(tmp_path / "x.safetensors", token)


def test_the_file_names_a_word_that_has_no_name(tmp_path: Path) -> None:
    for key in ("emb_params", "*"):
        save_file({key: vectors(1)}, tmp_path / "fur-3.safetensors")
        assert load_inversion(tmp_path / "fur-3.safetensors").token == "fur-3"


def test_pickles_are_refused_with_what_converts_them(tmp_path: Path) -> None:
    """What the hint says works, on diffusers' files and on AUTOMATIC1111's."""
    contents = {
        "a.bin": {"<toy>": vectors(1)[0]},
        "b.pt": {"string_to_param": {"*": vectors(2)}, "name": "x", "step": 1},
    }
    for name, content in contents.items():
        path = tmp_path / name
        torch.save(content, path)
        with pytest.raises(UnsafeFileError, match="is a pickle") as caught:
            load_inversion(path)
        command, *rest = shlex.split(str(caught.value.hint).partition("once: ")[2])
        assert command == "calotype"
        assert main(rest) == 0
        assert load_inversion(path.with_suffix(".safetensors")).token == {"a.bin": "<toy>", "b.pt": "b"}[name]


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        load_inversion(tmp_path / "no.safetensors")
    shutil.rmtree(tmp_path)
    with pytest.raises(ModelNotFoundError):
        load_inversion(tmp_path)
