"""What else adapters' files have: other programs' wrappers around names, training's bookkeeping, words."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import calotype
from adapters import normal, save
from calotype.errors import CalotypeError, CalotypeWarning, CheckpointError, UsageError
from calotype.lora import load_lora
from calotype.lora.names import Names, kohya_name, ldm_names, networks
from calotype.parts import Parts
from calotype.weights.load import load_parts

MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
LDM = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
KOHYA = MODULE.replace(".", "_")
LAYER = "text_model.encoder.layers.1.self_attn.q_proj"

Keys = dict[str, Tensor]


@pytest.fixture(scope="module")
def parts(tiny_sd15: Path) -> Parts:
    return load_parts(tiny_sd15)


@pytest.fixture(scope="module")
def xl(tiny_sdxl: Path) -> Parts:
    return load_parts(tiny_sdxl)


@pytest.fixture(scope="module")
def names(parts: Parts) -> Names:
    return Names.of(parts)


# ---- names ----


@pytest.mark.parametrize(
    "path",
    [
        MODULE,
        f"unet.{MODULE}",
        f"base_model.model.{MODULE}",
        f"base_model.model.unet.{MODULE}",
        f"unet.base_model.model.{MODULE}",
        f"module.unet.{MODULE}",
        f"unet.module.{MODULE}",
        f"_orig_mod.unet.{MODULE}",
        f"unet._orig_mod.{MODULE}",
        f"module._orig_mod.base_model.model.unet._orig_mod.module.{MODULE}",
        f"unet._fsdp_wrapped_module.{MODULE}",
        f"model.unet.{MODULE}",
        f"unet.{MODULE}._orig_mod",
        "unet." + MODULE.replace("attentions.0", "_orig_mod.attentions.0._orig_mod"),
        "unet." + MODULE.replace("attentions.0", "attentions._fsdp_wrapped_module.0._checkpoint_wrapped_module"),
        f"model.diffusion_model.{LDM}",
        f"diffusion_model.{LDM}",
        f"diffusion_model.{MODULE}",
        f"base_model.model.diffusion_model.{LDM}",
        f"unet.diffusion_model.{LDM}",
        f"lora_unet_{KOHYA}",
        f"oft_unet_{KOHYA}",
        f"lycoris_{KOHYA}",
        f"lycoris_unet_{KOHYA}",
        f"lora_unet__orig_mod_{KOHYA}",
        f"lora_unet_module_{KOHYA}",
        f"lora_unet_base_model_model_{KOHYA}",
        f"lora_unet_model_diffusion_model_{LDM}".replace(".", "_"),
        f"lora_unet_diffusion_model_{LDM}".replace(".", "_"),
        "lora_unet_" + KOHYA.replace("attentions_0", "_orig_mod_attentions_0__orig_mod"),
        f"lora_unet_{KOHYA}__orig_mod",
        f"_orig_mod.lora_unet_{KOHYA}",
        f"unet.{MODULE}".replace("attn2.", "attn2.processor."),
    ],
)
def test_a_layer_by_any_name(names: Names, path: str) -> None:
    assert names.find(path) == ("unet", MODULE)


@pytest.mark.parametrize(
    "path",
    [
        f"text_encoder.{LAYER}",
        f"text_encoder.{LAYER.removeprefix('text_model.')}",
        f"text_encoder.transformer.{LAYER}",
        f"text_encoder._orig_mod.{LAYER}",
        f"_orig_mod.text_encoder.module.{LAYER}",
        f"base_model.model.text_encoder.{LAYER}",
        f"text_encoder.base_model.model.{LAYER}",
        f"text_encoders.clip_l.transformer.{LAYER}",
        f"text_encoders.clip_h.transformer.{LAYER}",
        f"clip_l.transformer.{LAYER}",
        f"cond_stage_model.transformer.{LAYER}",
        f"lora_te_{LAYER}".replace(".", "_"),
        f"lora_te1_{LAYER}".replace(".", "_"),
        f"lora_te_transformer_{LAYER}".replace(".", "_"),
        f"lora_te__orig_mod_{LAYER}".replace(".", "_"),
        f"text_encoder_1.{LAYER}",
        "text_encoder.text_model.encoder.layers.1._orig_mod.self_attn.q_proj",
        "text_encoder.text_model.encoder.layers.1.self_attn.to_q",
    ],
)
def test_a_text_encoder_by_any_name(names: Names, path: str) -> None:
    assert names.find(path) == ("text_encoder", LAYER)


@pytest.mark.parametrize(
    "path",
    [
        f"text_encoder_2.{LAYER}",
        f"text_encoder_2.transformer.{LAYER}",
        f"_orig_mod.text_encoder_2.{LAYER}",
        f"text_encoders.clip_g.transformer.{LAYER}",
        f"clip_g.transformer.{LAYER}",
        f"lora_te2_{LAYER}".replace(".", "_"),
        f"lora_te2__orig_mod_{LAYER}".replace(".", "_"),
        f"conditioner.embedders.1.model.{LAYER}",
    ],
)
def test_the_second_text_encoder_by_any_name(xl: Parts, names: Names, path: str) -> None:
    assert Names.of(xl).find(path) == ("text_encoder_2", LAYER)
    assert names.find(path) is None, "a model with one has no second"


@pytest.mark.parametrize(
    "path",
    [
        f"unet.text_encoder.{MODULE}",
        f"lora_unet_{LAYER}".replace(".", "_"),
        f"text_encoder.{MODULE}",
        f"diffusion_model.{LAYER}",
        f"lora_te3_{LAYER}".replace(".", "_"),
        f"controlnet.{MODULE}",
        MODULE.replace("attn2", "attn3"),
        "module",
        "_orig_mod",
        "",
        "unet.",
        "lora_unet_",
    ],
)
def test_what_names_nothing(names: Names, path: str) -> None:
    assert names.find(path) is None


def test_no_name_of_ours_is_taken_for_a_wrapper(parts: Parts, xl: Parts) -> None:
    """Every module is found by every way that it is called, and no two share one."""
    for model in (parts, xl):
        names = Names.of(model)
        for network, module in networks(model).items():
            ldm = ldm_names(module) if network == "unet" else {}  # type: ignore[arg-type]
            found = list(dict.fromkeys(names.tables[network].values()))
            for name in found:
                spellings = [f"{network}.{name}", f"_orig_mod.{network}.base_model.model.{name}", f"{network}_{name}"]
                spellings += [kohya_name(network, name, table) for table in (ldm, {})]
                assert {names.find(path) for path in spellings} == {(network, name)}
        unsaid = [path for network in names.tables for path in names.tables[network] if network != "text_encoder_2"]
        assert len({*unsaid}) == len(unsaid)


@pytest.mark.parametrize(
    "ending",
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_A.my-style_2.weight", "lora_B.my-style_2.weight"),
        ("lora_A", "lora_B"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        ("_orig_mod.lora_A.default._orig_mod.weight", "_orig_mod.lora_B.default._orig_mod.weight"),
    ],
)
def test_endings(parts: Parts, tmp_path: Path, ending: tuple[str, str]) -> None:
    tensors = {f"unet.{MODULE}.{part}": normal(*shape) for part, shape in zip(ending, ((3, 32), (32, 3)), strict=True)}
    assert set(load_lora(save(tmp_path / "it.safetensors", tensors), parts).deltas["unet"]) == {f"{MODULE}.weight"}


@pytest.mark.parametrize(
    "shapes",
    [
        {"hada_w1_a": (32, 3), "hada_w1_b": (3, 32), "hada_w2_a": (32, 3), "hada_w2_b": (3, 32)},
        {"lokr_w1": (4, 4), "lokr_w2": (8, 8)},
        {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)},
        {"ia3_l": (32, 1)},
    ],
)
def test_adapter_names_of_peft(parts: Parts, tmp_path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """With the adapter's name behind the tensor's, and without: the same change."""
    base, made = parts.unet.get_parameter(f"{MODULE}.weight"), []
    for name in ("", ".default", ".style-2"):
        tensors = {f"base_model.model.{MODULE}.{part}{name}": normal(*shape) for part, shape in shapes.items()}
        lora = load_lora(save(tmp_path / "it.safetensors", tensors), parts)
        made.append(lora.deltas["unet"][f"{MODULE}.weight"](base, 1.0))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def low(name: str = f"lora_unet_{KOHYA}", seed: int = 0) -> Keys:
    return {f"{name}.lora_down.weight": normal(3, 32, seed=seed), f"{name}.lora_up.weight": normal(32, 3, seed=seed)}


def test_two_names_of_one_layer_are_refused(parts: Parts, tmp_path: Path) -> None:
    tensors = low() | low(f"unet._orig_mod.{MODULE}")
    with pytest.raises(CheckpointError, match="a second time"):
        load_lora(save(tmp_path / "it.safetensors", tensors), parts)


# ---- bookkeeping ----


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epoch", torch.tensor(3)),
        ("global_step", torch.tensor(1000)),
        ("iter_num", torch.tensor([7])),
        ("step", torch.tensor(1, dtype=torch.int32)),
        ("steps", torch.tensor(1.0)),
        ("num_updates", torch.tensor(1)),
        ("state", torch.zeros(1)),
        ("ddim_sigmas", torch.ones(50)),
        ("sigmas", torch.ones(1000)),
        ("embedding_manager.string_to_param_dict.*", torch.ones(1, 32)),
        ("_aux.5f3c", torch.ones(4)),
    ],
)
def test_bookkeeping_is_ignored(parts: Parts, tmp_path: Path, key: str, value: Tensor) -> None:
    assert load_lora(save(tmp_path / "it.safetensors", {**low(), key: value}), parts).deltas.keys() == {"unet"}


@pytest.mark.parametrize("key", ["epochal", "x.stepped", "steps.weight", "state.unet", "optimized.lora"])
def test_what_is_not_on_the_list_is_an_error(parts: Parts, tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match="name nothing in it"):
        load_lora(save(tmp_path / "it.safetensors", {**low(), key: torch.ones(2)}), parts)


def test_bookkeeping_alone_is_no_adapter(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no adapter"):
        load_lora(save(tmp_path / "it.safetensors", {"epoch": torch.ones(2)}), parts)


def test_a_lora_of_stable_cascade_is_told(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="looks made for Stable Cascade"):
        load_lora(save(tmp_path / "it.safetensors", low("lora_prior_unet_down_blocks_0_1")), parts)


# ---- words ----

KINDS = ["string_to_param.*", "emb_params", "clip_l", "*", "clip_h"]
WORDS = [(word, kind) for word in ("mystyle", "my style", "ema.person", "<style-1>") for kind in KINDS]


def vectors(count: int = 2, width: int = 32, seed: int = 0) -> Tensor:
    return normal(count, width, seed=seed)


def context(engine: calotype.Engine, text: str) -> Tensor:
    return engine.parts.text.encode([text])[0]


def ids(engine: calotype.Engine, text: str) -> list[int]:
    return engine.parts.text.tokenizers[0].ids(text)


@pytest.fixture
def engine(tiny_sd15: Path) -> calotype.Engine:
    return calotype.load(tiny_sd15, device="cpu", dtype="float32")


# A name of one's own begins at the first dot, as in AUTOMATIC1111.
@pytest.mark.parametrize(("word", "kind"), [*WORDS, ("mystyle", "<other>"), ("mystyle", "a.b")])
def test_a_word_is_learnt_and_forgotten_with_its_lora(
    engine: calotype.Engine, tmp_path: Path, word: str, kind: str
) -> None:
    before, plain = ids(engine, f"a {word}"), context(engine, f"a {word}")
    path = save(tmp_path / "it.safetensors", {**low(), f"bundle_emb.{word}.{kind}": vectors(3)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.add_lora(path, "it")
    assert len(ids(engine, word)) == len(ids(engine, word.upper())) == 3
    table = engine.parts.text.models[0].text_model.embeddings.token_embedding.weight
    assert torch.equal(table[ids(engine, word)], vectors(3))
    assert engine.describe()["loras"]["it"]["ref"] == str(path)
    assert "embeddings" not in engine.describe()
    engine.set_loras({})
    assert len(ids(engine, word)) == 3, "it goes when the LoRA is forgotten"
    engine.remove_lora("it")
    assert ids(engine, f"a {word}") == before
    assert torch.equal(context(engine, f"a {word}"), plain)


def test_words_of_sdxl_have_vectors_of_both(tiny_sdxl: Path, tmp_path: Path) -> None:
    engine = calotype.load(tiny_sdxl, device="cpu", dtype="float32")
    one, two = vectors(seed=1), vectors(seed=2)
    tensors = {**low_xl(), "bundle_emb.mystyle.clip_g": two, "bundle_emb.mystyle.clip_l": one}
    engine.add_lora(save(tmp_path / "it.safetensors", tensors), "it")
    for model, wanted in zip(engine.parts.text.models, (one, two), strict=True):
        assert torch.equal(model.text_model.embeddings.token_embedding.weight[-2:], wanted)
    engine.remove_lora("it")
    for missing in ("clip_g", "clip_l"):
        held = {key: value for key, value in tensors.items() if not key.endswith(missing)}
        with pytest.raises(CheckpointError, match="mystyle"):
            engine.add_lora(save(tmp_path / "half.safetensors", held), "half")
    assert engine.loras == {}


def low_xl() -> Keys:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    return {f"{name}.lora_down.weight": normal(3, 64), f"{name}.lora_up.weight": normal(64, 3)}


def test_what_is_described_can_be_loaded_again(engine: calotype.Engine, tiny_sd15: Path, tmp_path: Path) -> None:
    """Also out of the mix, where the word is still known; and beside an embedding of the same name, which wins."""
    path = save(tmp_path / "it.safetensors", {**low(), "bundle_emb.mystyle.emb_params": vectors()})
    own = save(tmp_path / "mystyle.safetensors", {"emb_params": vectors(5, seed=5)})
    other = save(tmp_path / "other.safetensors", {**low(seed=3), "bundle_emb.mystyle.emb_params": vectors(4, seed=4)})

    def again() -> calotype.Engine:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalotypeWarning)
            return calotype.load_from(engine.describe())

    def same(fresh: calotype.Engine) -> bool:
        assert fresh.describe() == engine.describe()
        return torch.equal(context(fresh, "a mystyle fox"), context(engine, "a mystyle fox"))

    engine.add_lora(path, "it", scale=0.5)
    assert same(again())
    engine.set_loras({})
    assert len(ids(engine, "mystyle")) == 2
    assert same(again())
    with pytest.warns(CalotypeWarning, match="'mystyle' is added already"):
        engine.add_lora(other, "other")
    assert same(again())
    with pytest.warns(CalotypeWarning, match="now means this"):
        engine.add_embedding(own)
    assert len(ids(engine, "mystyle")) == 5
    assert same(again())
    engine.remove_lora("it")
    assert len(ids(engine, "mystyle")) == 5
    assert same(again())


def test_the_next_lora_takes_over_a_word(engine: calotype.Engine, tmp_path: Path) -> None:
    for name, count in (("one", 2), ("two", 3)):
        path = save(tmp_path / f"{name}.safetensors", {**low(), "bundle_emb.mystyle.clip_l": vectors(count)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalotypeWarning)
            engine.add_lora(path, name)
    assert len(ids(engine, "mystyle")) == 2
    engine.remove_lora("one")
    assert len(ids(engine, "mystyle")) == 3
    engine.remove_lora("two")
    assert len(ids(engine, "mystyle")) > 3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"bundle_emb.fox.clip_l": vectors()}, "'fox' is a word that this model knows"),
        ({"bundle_emb.a1b2.clip_l": vectors(), "bundle_emb.A1B2.clip_l": vectors()}, "is in it twice"),
        ({"bundle_emb.mystyle.clip_l_out": vectors()}, "clip_l_out goes behind the text encoder"),
        ({"bundle_emb.mystyle.clip_l": vectors(), "bundle_emb.mystyle.clip_l_out": vectors()}, "goes behind the text"),
        ({"emb_params": vectors()}, "vectors of a word and not the word"),
        ({"clip_l": vectors(), "clip_g": vectors()}, "vectors of a word and not the word"),
    ],
)
def test_a_word_that_is_left_out(engine: calotype.Engine, tmp_path: Path, more: Keys, said: str) -> None:
    """The LoRA works all the same."""
    weight = engine.parts.unet.get_parameter(f"{MODULE}.weight")
    base = weight.clone()
    with pytest.warns(CalotypeWarning, match=said):
        engine.add_lora(save(tmp_path / "it.safetensors", {**low(), **more}), "it")
    assert not torch.equal(weight, base)
    engine.remove_lora("it")
    assert torch.equal(weight, base)


def test_what_belongs_to_a_textual_inversion_is_no_word(engine: calotype.Engine, tmp_path: Path) -> None:
    more = {"bundle_emb.my.string_to_param.*": vectors(), "bundle_emb.my.string_to_token.*": torch.tensor(265)}
    engine.add_lora(save(tmp_path / "it.safetensors", {**low(), **more, "bundle_emb.my.step": torch.tensor(9)}), "it")
    assert len(ids(engine, "my")) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"bundle_emb.mystyle.clip_l": vectors() * float("nan")}, "not finite"),
        ({"bundle_emb.mystyle.clip_l": vectors(width=31)}, "vectors of width 31"),
        ({"bundle_emb.mystyle.clip_l": vectors(), "bundle_emb.mystyle.clip_g": vectors()}, "width 32 and 32"),
        ({"bundle_emb.mystyle.clip_l": vectors(76)}, "1 to 75 vectors"),
        ({"bundle_emb.mystyle.clip_l": torch.zeros(0, 32)}, "1 to 75 vectors"),
        ({"bundle_emb.mystyle.clip_l": torch.zeros(2, 32, dtype=torch.int64)}, "int64"),
        ({"bundle_emb.mystyle.clip_l": vectors()[None]}, "1 to 75 vectors"),
        ({"bundle_emb.my\nstyle.clip_l": vectors()}, "cannot be written in a prompt"),
        ({"bundle_emb. mystyle.clip_l": vectors()}, "cannot be written in a prompt"),
        ({f"bundle_emb.{'long' * 30}.clip_l": vectors()}, "120 characters"),
        ({"bundle_emb.mystyle": vectors()}, "says no word"),
        ({"bundle_emb..clip_l": vectors()}, "says no word"),
        ({"bundle_emb.mystyle.t5": vectors(), "bundle_emb.mystyle.clip_l": vectors()}, "needs one tensor, or clip_l"),
        ({"bundle_emb.mystyle.emb_params": vectors(), "bundle_emb.mystyle.clip_l": vectors()}, "needs one tensor"),
    ],
)
def test_bad_words(engine: calotype.Engine, tmp_path: Path, more: Keys, said: str) -> None:
    """One line, and nothing is loaded."""
    weight, described = engine.parts.unet.get_parameter(f"{MODULE}.weight"), engine.describe()
    base, before = weight.clone(), ids(engine, "mystyle my style")
    sound = {"bundle_emb.another.clip_l": vectors()}
    with pytest.raises(CalotypeError, match=said) as caught:
        engine.add_lora(save(tmp_path / "it.safetensors", {**low(), **sound, **more}), "it")
    assert "\n" not in str(caught.value)
    assert torch.equal(weight, base)
    assert ids(engine, "mystyle my style") == before
    assert len(ids(engine, "another")) > 2
    assert engine.describe() == described


def test_a_lora_that_cannot_be_added_teaches_nothing(engine: calotype.Engine, tmp_path: Path) -> None:
    path = save(tmp_path / "it.safetensors", {**low(), "bundle_emb.mystyle.clip_l": vectors()})
    engine.add_lora(path, "it")
    engine.remove_lora("it")
    engine.add_lora(save(tmp_path / "plain.safetensors", low()), "it")
    for scale, name in ((float("nan"), "other"), (1.0, "it")):
        with pytest.raises(UsageError):
            engine.add_lora(path, name, scale=scale)
    assert len(ids(engine, "mystyle")) > 2


def test_words_and_a_changed_table_of_tokens(engine: calotype.Engine, tmp_path: Path) -> None:
    """An adapter may change the model's own rows while words come and go behind them."""
    table = engine.parts.text.models[0].text_model.embeddings.token_embedding.weight
    base = table.detach().clone()
    name = "text_encoder.text_model.embeddings.token_embedding"
    up, down = normal(len(base), 2), normal(2, 32)
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    engine.add_lora(save(tmp_path / "table.safetensors", tensors), "table")
    engine.add_lora(save(tmp_path / "it.safetensors", {**low(), "bundle_emb.mystyle.clip_l": vectors()}), "it")
    table = engine.parts.text.models[0].text_model.embeddings.token_embedding.weight
    torch.testing.assert_close(table[:-2], base + up @ down)
    assert torch.equal(table[-2:], vectors())
    merged = context(engine, "a mystyle fox")
    engine.set_loras({"it": 1.0})
    assert torch.equal(table[:-2], base)
    assert torch.equal(table[-2:], vectors())
    with engine.live_loras({"table": 1.0}):
        torch.testing.assert_close(context(engine, "a mystyle fox"), merged)
    engine.set_loras({"it": 1.0, "table": 1.0})
    engine.remove_lora("it")
    engine.remove_lora("table")
    table = engine.parts.text.models[0].text_model.embeddings.token_embedding.weight
    assert torch.equal(table, base)
