"""Single files: what calotype writes it reads again bit for bit, diffusers' converters read the same, and files of
other programs are told apart by their keys and shapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as peer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calotype.errors import CheckpointError, UnsafeFileError
from calotype.families import SD15
from calotype.nn.tiny_vae import AutoencoderTiny
from calotype.nn.vae import AutoencoderKL
from calotype.weights import texts
from calotype.weights.convert import write_single_file
from calotype.weights.files import metadata
from calotype.weights.folder import Folder
from calotype.weights.inspect import inspect_model
from calotype.weights.load import load_parts
from checkpoints import write_model, write_scheduler, write_text_encoder, write_tiny_vae, write_tokenizer, write_unet

Tensors = dict[str, Tensor]
Shape = tuple[int, ...]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."


def sd15_lcm(folder: Path) -> None:
    write_model(folder, lcm=True)


def inpainting(folder: Path) -> None:
    write_model(folder)
    write_unet(folder / "unet", in_channels=9)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionInpaintPipeline"}))


def sd21(folder: Path) -> None:
    write_model(folder)
    write_unet(folder / "unet", use_linear_projection=True, attention_head_dim=(2, 4))
    write_text_encoder(folder / "text_encoder", hidden_act="gelu", eos_token_id=2)
    for path in (folder / "tokenizer").iterdir():
        path.unlink()
    (folder / "tokenizer").rmdir()
    write_tokenizer(folder / "tokenizer", pad="!")
    write_scheduler(folder / "scheduler", "DDIM", prediction_type="v_prediction", rescale_betas_zero_snr=True)


def sdxl(folder: Path) -> None:
    write_model(folder, xl=True)


def ssd1b(folder: Path) -> None:
    write_model(folder, xl=True)
    depths: dict[str, Any] = {
        "transformer_layers_per_block": [1, [2]],
        "reverse_transformer_layers_per_block": [[1, 2], 1],
        "mid_block_type": "UNetMidBlock2D",
    }
    write_unet(folder / "unet", xl=True, lcm=True, **depths)
    (folder / "calotype.json").write_text('{"steps": 6}')


MODELS = (sd15_lcm, inpainting, sd21, sdxl, ssd1b)


@pytest.fixture(scope="module", params=MODELS, ids=lambda write: write.__name__)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder, and its single file."""
    folder = tmp_path_factory.mktemp("model") / request.param.__name__
    torch.manual_seed(0)
    request.param(folder)
    write_single_file(Folder(folder), folder.with_suffix(".safetensors"))
    return folder, folder.with_suffix(".safetensors")


@pytest.fixture
def single(tiny_sd15: Path, tmp_path: Path) -> Path:
    """A single file of this test's own."""
    write_single_file(Folder(tiny_sd15), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def same(a: nn.Module, b: nn.Module) -> bool:
    return equal(dict(a.state_dict()), dict(b.state_dict()))


def equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def rewrite(path: Path, change: Callable[[Tensors], Tensors], said: Mapping[str, str] | None = None) -> None:
    """Writes a file again, changed; without `said` its header says what it did."""
    before = metadata(path) if said is None else said
    tensors = {name: tensor.clone().contiguous() for name, tensor in change(load_file(path)).items()}
    path.unlink()  # a new file: the old one may be mapped
    save_file(tensors, path, dict(before))


# ---- what calotype writes ----


def test_a_round_trip_is_exact(both: tuple[Path, Path]) -> None:
    a, b = map(load_parts, both)
    assert same(a.unet, b.unet)
    assert same(a.vae, b.vae)
    assert len(a.text.models) == len(b.text.models)
    assert all(same(mine, other) for mine, other in zip(a.text.models, b.text.models, strict=True))
    for mine, other in zip(a.text.tokenizers, b.text.tokenizers, strict=True):
        assert (mine.ids("a red fox!"), mine.pad, mine.eos) == (other.ids("a red fox!"), other.pad, other.eos)
    assert (a.unet.config, a.vae.config, a.defaults, a.scheduler) == (
        b.unet.config,
        b.vae.config,
        b.defaults,
        b.scheduler,
    )
    assert a.zero_empty_negative == b.zero_empty_negative
    assert b.source == str(both[1])


def test_weights_can_be_read_once_more(both: tuple[Path, Path]) -> None:
    parts = load_parts(both[1])
    networks: dict[str, nn.Module] = {"unet": parts.unet}
    networks |= dict(zip(("text_encoder", "text_encoder_2"), parts.text.models, strict=False))
    assert parts.stored.keys() == networks.keys()
    for name, network in networks.items():
        assert equal(dict(network.state_dict()), parts.stored[name]())


def test_diffusers_reads_the_same(both: tuple[Path, Path]) -> None:
    folder, path = both
    file = load_file(path)

    def config(part: str) -> dict[str, Any]:
        return json.loads((folder / part / "config.json").read_text())  # type: ignore[no-any-return]

    def weights(part: str) -> Tensors:
        return load_file(next((folder / part).glob("*.safetensors")))

    made = peer.convert_ldm_unet_checkpoint(file, config("unet"))
    # It knows no guidance embedding, and counts only layers that have the same number of transformer blocks.
    made |= {name: weights("unet")[name] for name in weights("unet") if name == "time_embedding.cond_proj.weight"}
    assert equal(weights("unet"), made)
    assert equal(weights("vae"), peer.convert_ldm_vae_checkpoint(file, config("vae")))
    for part in (name for name in ("text_encoder", "text_encoder_2") if (folder / name).is_dir()):
        theirs = {re.sub(r"^(?!text_)", "text_model.", name): tensor for name, tensor in weights(part).items()}
        prefix = OPEN_CLIP if part == "text_encoder" else "conditioner.embedders.1.model."
        if any(name.startswith(f"{prefix}transformer.resblocks.") for name in file):
            width = SimpleNamespace(config=SimpleNamespace(hidden_size=32))
            assert equal(theirs, peer.convert_open_clip_checkpoint(width, file, prefix))
        else:
            assert equal(theirs, peer.convert_ldm_clip_checkpoint(file))


def test_velocity_is_marked_for_other_programs(both: tuple[Path, Path]) -> None:
    velocity = both[0].name == "sd21"
    assert {name for name in load_file(both[1]) if "." not in name} == ({"v_pred", "ztsnr"} if velocity else set())
    assert metadata(both[1])["modelspec.prediction_type"] == ("v" if velocity else "epsilon")


def test_a_tiny_autoencoder_has_no_place_in_it(
    tiny_sd15: Path, tmp_path: Path, copy_of: Callable[[Path], Path]
) -> None:
    folder = copy_of(tiny_sd15)
    for path in (folder / "vae").iterdir():
        path.unlink()
    write_tiny_vae(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text()) | {"vae": ["diffusers", "AutoencoderTiny"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="TAESD"):
        write_single_file(Folder(folder), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


# ---- dtypes and memory ----


def test_a_dtype_is_for_all_but_a_vae_that_overflows(single: Path) -> None:
    rewrite(single, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    parts = load_parts(single, dtype=torch.float16)
    assert {p.dtype for m in (parts.unet, *parts.text.models) for p in m.parameters()} == {torch.float16}
    assert {p.dtype for p in parts.vae.parameters()} == {torch.float32}
    assert {p.dtype for p in load_parts(single, dtype=torch.bfloat16).vae.parameters()} == {torch.bfloat16}


def test_q_k_and_v_are_views_of_one_mapped_tensor(tmp_path: Path) -> None:
    sd21(tmp_path / "model")
    write_single_file(Folder(tmp_path / "model"), tmp_path / "x.safetensors")
    parts = load_parts(tmp_path / "x.safetensors")
    weights = parts.stored["text_encoder"]()
    q, k, v = (weights[f"text_model.encoder.layers.0.self_attn.{which}_proj.weight"] for which in "qkv")
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert k.data_ptr() - q.data_ptr() == v.data_ptr() - k.data_ptr() == q.nbytes


# ---- one network alone ----


def test_a_unet_and_a_vae_of_single_files(single: Path, tiny_sd15: Path, tmp_path: Path) -> None:
    base = load_parts(tiny_sd15)
    parts = load_parts(tiny_sd15, unet=single, vae=single)
    assert same(parts.unet, base.unet)
    assert same(parts.vae, base.vae)
    for prefix in (VAE, "vae.", ""):
        lone = tmp_path / "vae.safetensors"
        tensors = {name: t.neg() for name, t in load_file(single).items() if name.startswith(VAE)}
        save_file({prefix + name.removeprefix(VAE): tensor for name, tensor in tensors.items()}, lone)
        parts = load_parts(tiny_sd15, vae=lone)
        assert isinstance(parts.vae, AutoencoderKL)
        assert parts.vae.config == base.vae.config  # scale and all: a lone file does not say
        assert torch.equal(parts.vae.decoder.conv_in.weight, -base.vae.state_dict()["decoder.conv_in.weight"])
    assert same(load_parts(single, vae=tiny_sd15 / "vae" / "diffusion_pytorch_model.safetensors").vae, base.vae)


def test_a_tiny_autoencoder_alone(single: Path, tmp_path: Path) -> None:
    write_tiny_vae(tmp_path / "taesd", encoder_block_out_channels=(64,) * 4, decoder_block_out_channels=(64,) * 4)
    parts = load_parts(single, vae=tmp_path / "taesd" / "diffusion_pytorch_model.safetensors")
    assert isinstance(parts.vae, AutoencoderTiny)


def test_a_model_without_its_autoencoder_needs_one(single: Path, tiny_sd15: Path) -> None:
    rewrite(single, lambda tensors: {name: t for name, t in tensors.items() if not name.startswith(VAE)})
    with pytest.raises(CheckpointError, match="holds no autoencoder") as caught:
        load_parts(single)
    assert caught.value.hint == "give one with vae="
    assert same(load_parts(single, vae=tiny_sd15).vae, load_parts(tiny_sd15).vae)


@pytest.mark.parametrize("prefix", [UNET, "diffusion_model.", ""])
def test_a_lone_unet_is_no_model(single: Path, prefix: str) -> None:
    def change(tensors: Tensors) -> Tensors:
        return {prefix + n.removeprefix(UNET): t for n, t in tensors.items() if n.startswith(UNET)}

    rewrite(single, change)
    with pytest.raises(CheckpointError, match="it holds a U-Net only") as caught:
        load_parts(single)
    assert "unet=" in str(caught.value.hint)


# ---- what other programs write ----


@pytest.fixture
def tiny_family(tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the tiny model's configs the package's own for Stable Diffusion 1.x."""
    known = Folder(tiny_sd15).texts()
    folder = tmp_path / "families"
    folder.mkdir()
    (folder / "sd15.json").write_text(
        json.dumps(
            {name: json.loads(text) for name, text in known.items() if name.endswith(".json") and "vocab" not in name}
        )
    )
    monkeypatch.setattr(texts, "FAMILIES", folder)
    monkeypatch.setattr("calotype.weights.detect.recognise", lambda **signature: SD15)
    tables = {name: text for name, text in known.items() if name.startswith("tokenizer/")}
    monkeypatch.setattr(
        "calotype.text.tokenizer.clip_tables",
        lambda: {name.removeprefix("tokenizer/"): t for name, t in tables.items()},
    )
    return folder


def as_others_do(tensors: Tensors) -> Tensors:
    """A training run's checkpoint: with averages, buffers, and the spellings of other days."""
    names = {
        f"{CLIP}text_model.embeddings.token_embedding.weight": f"{CLIP}embeddings.token_embedding.weight",
        f"{VAE}decoder.mid.attn_1.q.weight": f"{VAE}decoder.mid.attn_1.to_q.weight",
        f"{VAE}decoder.mid.attn_1.proj_out.bias": f"{VAE}decoder.mid.attn_1.to_out.0.bias",
    }
    assert names.keys() <= tensors.keys()
    found = {names.get(name, name): tensor for name, tensor in tensors.items()}
    found[f"{VAE}encoder.mid.attn_1.k.weight"] = found[f"{VAE}encoder.mid.attn_1.k.weight"][:, :, 0, 0]
    extras = (
        "model_ema.decay",
        "model_ema.diffusion_modelinput_blocks00weight",
        "betas",
        "alphas_cumprod_prev",
        "sqrt_recipm1_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "posterior_mean_coef2",
        "scale_factor",
        "loss.logvar",
        f"{VAE}loss.discriminator.main.0.weight",
        f"{VAE}model_ema.decay",
        "cond_stage_model.logit_scale",
        f"{CLIP}text_projection.weight",
        "denoiser.sigmas",
    )
    found |= {name: torch.zeros(2) for name in extras}
    return found | {f"{CLIP}text_model.embeddings.position_ids": torch.arange(77)[None]}


def test_a_file_of_another_program(single: Path, tiny_sd15: Path, tiny_family: Path) -> None:
    rewrite(single, as_others_do, {})
    base, parts = load_parts(tiny_sd15), load_parts(single)
    assert same(parts.unet, base.unet)
    assert same(parts.vae, base.vae)
    assert same(parts.text.models[0], base.text.models[0])
    assert parts.text.tokenizers[0].ids("a red fox") == base.text.tokenizers[0].ids("a red fox")
    assert parts.schedule.prediction == "epsilon"
    assert load_parts(single, prediction="v_prediction").schedule.prediction == "v_prediction"


@pytest.mark.parametrize("name", ["time_embedding.cond_proj.weight", "time_embed.cond_proj.weight"])
def test_an_lcm_of_another_program(name: str, tiny_sd15_lcm: Path, tmp_path: Path, tiny_family: Path) -> None:
    path = tmp_path / "lcm.safetensors"
    write_single_file(Folder(tiny_sd15_lcm), path)
    rewrite(
        path, lambda tensors: {n.replace("time_embedding.cond_proj.weight", name): t for n, t in tensors.items()}, {}
    )
    parts = load_parts(path)
    assert same(parts.unet, load_parts(tiny_sd15_lcm).unet)
    assert (parts.schedule.kind, parts.defaults.sampler, parts.defaults.steps) == ("LCMScheduler", "lcm", 4)
    assert (parts.schedule.alpha == load_parts(tiny_sd15_lcm).schedule.alpha).all()


# ---- what is refused ----


def without(sign: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if sign not in name}


def shapeless(tensors: Tensors) -> Tensors:
    return tensors | {f"{UNET}time_embed.0.bias": torch.zeros(3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("time_embed.0.bias"), r"the U-Net .* 1 missing \(time_embedding.linear_1.bias\)"),
        (without("decoder.norm_out.bias"), r"the autoencoder .* 1 missing \(decoder.conv_norm_out.bias\)"),
        (without("layers.1.mlp"), "the text encoder .* 4 missing"),
        (without("cond_stage_model"), "it holds a U-Net and an autoencoder only"),
        (lambda t: t | {f"{UNET}extra.weight": torch.zeros(1)}, r"1 unexpected \(model.diffusion_model.extra.weight\)"),
        (lambda t: t | {f"{VAE}extra.weight": torch.zeros(1)}, r"1 unexpected \(first_stage_model.extra.weight\)"),
        (lambda t: t | {"stranger": torch.zeros(1)}, r"1 tensors that belong to none of its networks \('stranger'\)"),
        (shapeless, r"1 of another shape \(model.diffusion_model.time_embed.0.bias: \[3\] in the file"),
        (lambda t: {n: x.int() if n.endswith("out.2.bias") else x for n, x in t.items()}, "floating point needed"),
    ],
    ids=range(9),
)
def test_a_file_must_fit_whole(change: Callable[[Tensors], Tensors], message: str, single: Path) -> None:
    rewrite(single, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_parts(single)
    assert "\n" not in caught.value.message


def test_a_spoilt_tensor_is_named_as_the_file_does(tmp_path: Path) -> None:
    sd21(tmp_path / "model")
    path = tmp_path / "x.safetensors"
    write_single_file(Folder(tmp_path / "model"), path)
    name = f"{OPEN_CLIP}transformer.resblocks.1.attn.in_proj_weight"

    def spoil(tensors: Tensors) -> Tensors:
        tensors[name][40, 0] = float("nan")  # of 32 rows each for q, k and v
        return tensors

    rewrite(path, spoil)
    with pytest.raises(CheckpointError, match=re.escape(f"'{name}[1]' has NaN")):
        load_parts(path)
    assert inspect_model(path)["problems"] != []


def test_a_fused_tensor_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    sd21(tmp_path / "model")
    path = tmp_path / "x.safetensors"
    write_single_file(Folder(tmp_path / "model"), path)
    name = f"{OPEN_CLIP}transformer.resblocks.1.attn.in_proj_weight"
    rewrite(path, lambda tensors: tensors | {name: torch.zeros(97, 32)})
    with pytest.raises(CheckpointError, match="3 of another shape"):
        load_parts(path)


def test_a_truncated_file_and_a_huge_header(single: Path, tmp_path: Path) -> None:
    content = single.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match="is truncated"):
        load_parts(tmp_path / "cut.safetensors")
    (tmp_path / "huge.safetensors").write_bytes((10**8).to_bytes(8, "little") + bytes(100))
    with pytest.raises(CheckpointError, match=r"is truncated|claims a header"):
        load_parts(tmp_path / "huge.safetensors")
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x02")
    with pytest.raises(UnsafeFileError):
        load_parts(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("unet/config.json", "{", "unet/config.json is not valid JSON"),
        ("unet/config.json", '{"_class_name": "UNet2DConditionModel", "in_channels": 10000}', "in_channels is 10000"),
        ("unet/config.json", '{"_class_name": "UNet2DConditionModel"}', "text of width 1280"),
        ("model_index.json", "{}", "_class_name"),
        ("scheduler/scheduler_config.json", '{"_class_name": "x"}', "scheduler config"),
        ("tokenizer/vocab.json", '{"a": -1}', "has the id -1"),
        ("calotype.json", '{"step": 1}', "has the field 'step'"),
    ],
)
def test_what_the_header_carries_is_not_trusted(name: str, text: str, message: str, single: Path) -> None:
    rewrite(single, dict, metadata(single) | {f"calotype:{name}": text})
    with pytest.raises(CheckpointError, match=message):
        load_parts(single)


# ---- inspect ----


def test_inspect_describes_it(both: tuple[Path, Path]) -> None:
    folder, path = both
    report, other = inspect_model(path), inspect_model(folder)
    assert report["problems"] == []
    assert {name: report[name] for name in ("family", "pipeline", "scheduler", "defaults", "looks_like")} == {
        name: other[name] for name in ("family", "pipeline", "scheduler", "defaults", "looks_like")
    }
    for name, part in report["parts"].items():
        assert (part["parameters"], part["dtypes"]) == (other["parts"][name]["parameters"], ["F32"])


def test_inspect_lists_every_fault(single: Path) -> None:
    rewrite(single, lambda t: without("out.2.bias")(without("quant_conv.bias")(t)) | {"stranger": torch.zeros(1)})
    problems = inspect_model(single)["problems"]
    assert len(problems) == 3
    assert ["stranger" in problems[0], "U-Net" in problems[1], "autoencoder" in problems[2]] == [True] * 3
