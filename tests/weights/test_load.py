"""Folders in the spellings that real files have become the same networks; a load succeeds whole or explains."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calotype.errors import CalotypeWarning, CheckpointError, ModelNotFoundError, UnsafeFileError
from calotype.nn.tiny_vae import AutoencoderTiny
from calotype.nn.unet import Conditioning
from calotype.weights.load import load_parts, load_text_encoder, load_unet, load_vae
from checkpoints import write_scheduler, write_tiny_vae

Copy = Callable[[Path], Path]
Rename = Callable[[str], str]
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Writes a part's weights again, changed."""
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    path.unlink()  # a new file: the old one may be mapped
    save_file({name: tensor.contiguous().clone() for name, tensor in change(tensors).items()}, path)


def edit(path: Path, **changes: Any) -> None:
    """Changes fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(network: torch.nn.Module) -> dict[str, Tensor]:
    return dict(network.state_dict())


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, other = weights(a), weights(b)
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


# ---- whole models ----


def test_a_base_model(tiny_sd15: Path) -> None:
    parts = load_parts(tiny_sd15)
    assert (parts.family, parts.schedule.kind, parts.zero_empty_negative) == ("custom", "DDIMScheduler", False)
    defaults = parts.defaults
    assert (defaults.sampler, defaults.steps, defaults.guidance, defaults.guidance_range) == ("ddim", 25, 7.5, None)
    assert (defaults.width, defaults.height) == (64, 64)
    for network in (parts.unet, parts.vae, *parts.text.models):
        assert not network.training
        assert all(not p.requires_grad and p.device.type == "cpu" for p in network.parameters())


def test_an_lcm(tiny_sd15_lcm: Path) -> None:
    parts = load_parts(tiny_sd15_lcm)
    assert parts.unet.config.guidance_dim == 16
    defaults = parts.defaults
    assert (defaults.sampler, defaults.steps, defaults.guidance) == ("lcm", 4, 8.5)
    assert defaults.guidance_range == (3.0, 15.0)


def test_two_text_encoders(tiny_sdxl: Path) -> None:
    parts = load_parts(tiny_sdxl)
    assert parts.zero_empty_negative
    assert parts.defaults.sampler == "euler"
    context, pooled = parts.text.encode(["a fox", ""])
    assert context.shape == (2, 77, 64)
    assert pooled is not None
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(2, 6)
    out = parts.unet(torch.randn(2, 4, 8, 8), torch.tensor([9, 99]), Conditioning(context, pooled, ids))
    assert out.shape == (2, 4, 8, 8)


NARROW = [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_files_in_fewer_bits_are_widened(dtype: torch.dtype, tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    for part in ("unet", "vae", "text_encoder"):
        rewrite(folder / part, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    narrow, full = load_parts(folder), load_parts(tiny_sd15)
    for name, tensor in weights(narrow.unet).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights(full.unet)[name].to(dtype).float())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_nan_in_fewer_bits_is_found(dtype: torch.dtype, tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)

    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["conv_in.bias"][0] = float("nan")
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    rewrite(folder / "unet", damage)
    with pytest.raises(CheckpointError, match=r"'conv_in\.bias' has NaN or infinite values"):
        load_parts(folder)


def test_a_dtype_is_for_all_but_a_vae_that_overflows(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    parts = load_parts(folder, dtype=torch.bfloat16)
    assert {p.dtype for m in (parts.unet, parts.vae, *parts.text.models) for p in m.parameters()} == {torch.bfloat16}
    parts = load_parts(folder, dtype=torch.float16)
    assert {p.dtype for p in parts.unet.parameters()} == {torch.float16}
    assert {p.dtype for p in parts.vae.parameters()} == {torch.float32}
    edit(folder / "vae" / "config.json", force_upcast=False)
    assert {p.dtype for p in load_parts(folder, dtype=torch.float16).vae.parameters()} == {torch.float16}


def test_overrides_replace_a_part(tiny_sd15: Path, tiny_sd15_lcm: Path, tmp_path: Path) -> None:
    """An LCM's U-Net beside a base model's scheduler still asks for LCM sampling: its embedding says so."""
    for unet in (tiny_sd15_lcm, tiny_sd15_lcm / "unet"):
        parts = load_parts(tiny_sd15, unet=unet)
        assert same(parts.unet, load_unet(tiny_sd15_lcm / "unet"))
        assert (parts.defaults.sampler, parts.defaults.steps) == ("lcm", 4)
    write_tiny_vae(tmp_path / "taesd")
    parts = load_parts(tiny_sd15, vae=tmp_path / "taesd")
    assert isinstance(parts.vae, AutoencoderTiny)
    assert parts.vae.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 64, 64)


def test_an_override_makes_the_models_own_part_unnecessary(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    (folder / "unet" / f"{DIFFUSERS}.safetensors").unlink()
    assert same(load_parts(folder, unet=tiny_sd15).unet, load_unet(tiny_sd15 / "unet"))


# ---- spellings ----


def old_attention(*, convolution: bool) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            new = name
            for ours, old in names.items():
                new = re.sub(rf"\.attentions\.0\.{re.escape(ours)}\.", f".attentions.0.{old}.", new)
            found[new] = tensor[:, :, None, None] if convolution and new != name and tensor.ndim == 2 else tensor
        assert sum(old in name for name in found for old in names.values()) == 16
        return found

    return change


@pytest.mark.parametrize("convolution", [False, True], ids=["linear", "1x1"])
def test_the_vaes_attention_in_its_old_spelling(convolution: bool, tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15) / "vae"
    rewrite(folder, old_attention(convolution=convolution))
    assert same(load_vae(folder), load_vae(tiny_sd15 / "vae"))


def test_the_vaes_attention_in_todays_spelling_as_convolutions(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15) / "vae"
    attention = re.compile(r".*\.attentions\.0\.to_.*weight")
    rewrite(folder, lambda tensors: {n: t[..., None, None] if attention.match(n) else t for n, t in tensors.items()})
    assert same(load_vae(folder), load_vae(tiny_sd15 / "vae"))


def test_text_encoders_with_and_without_the_prefix(tiny_sdxl: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sdxl)
    seen = set()
    for part in ("text_encoder", "text_encoder_2"):
        expected = load_text_encoder(tiny_sdxl / part)
        for prefix in ("text_model.", ""):

            def rename(name: str, prefix: str = prefix) -> str:
                bare = name.removeprefix("text_model.")
                return bare if bare == "text_projection.weight" else prefix + bare

            rewrite(folder / part, lambda tensors: {rename(n): t for n, t in tensors.items()})
            seen |= set(load_file(folder / part / "model.safetensors"))
            assert same(load_text_encoder(folder / part), expected)
    assert {"embeddings.token_embedding.weight", "text_model.embeddings.token_embedding.weight"} <= seen


def test_what_files_carry_along_is_ignored(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    extras: dict[str, dict[str, Tensor]] = {
        "text_encoder": {
            "text_model.embeddings.position_ids": torch.arange(77)[None],
            "text_projection.weight": torch.zeros(32, 32),
            "logit_scale": torch.tensor(4.6),
            "vision_model.embeddings.class_embedding": torch.zeros(8),
            "vision_model.embeddings.position_ids": torch.arange(50)[None],
            "visual_projection.weight": torch.zeros(8, 8),
        },
        "unet": {"model_ema.decay": torch.tensor(0.99), "model_ema.conv_inweight": torch.zeros(3)},
        "vae": {"loss.logvar": torch.zeros(1), "loss.discriminator.main.0.weight": torch.zeros(2)},
    }
    for part, extra in extras.items():
        rewrite(folder / part, lambda tensors, extra=extra: tensors | extra)  # type: ignore[misc]
    ours, expected = load_parts(folder), load_parts(tiny_sd15)
    assert same(ours.unet, expected.unet)
    assert same(ours.vae, expected.vae)
    assert same(ours.text.models[0], expected.text.models[0])


def test_a_whole_clip_is_read_for_its_text_half(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15) / "text_encoder"
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"architectures": ["CLIPModel"], "text_config": text}))
    rewrite(folder, lambda tensors: tensors | {"vision_model.x": torch.zeros(1), "logit_scale": torch.zeros(())})
    assert same(load_text_encoder(folder), load_text_encoder(tiny_sd15 / "text_encoder"))


def test_both_spellings_of_one_tensor_are_refused(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15) / "text_encoder"
    name = "final_layer_norm.weight"
    rewrite(folder, lambda t: t | {name: torch.zeros(32), f"text_model.{name}": torch.zeros(32)})
    with pytest.raises(CheckpointError, match=r"1 unexpected .*final_layer_norm\.weight"):
        load_text_encoder(folder)


# ---- shards and variants ----


def shard(folder: Path, stem: str, variant: str = "") -> None:
    """Replaces a part's one file by two and an index, named as diffusers names them."""
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    dotted = f".{variant}" if variant else ""
    weight_map = {}
    for number, half in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}{dotted}-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, folder / file)
        weight_map |= dict.fromkeys(half, file)
    index = folder / f"{stem}.safetensors.index{dotted}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards(variant: str, tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    shard(folder / "unet", DIFFUSERS, variant)
    shard(folder / "text_encoder", TRANSFORMERS, variant)
    assert same(load_unet(folder / "unet", variant=variant or None), load_unet(tiny_sd15 / "unet"))
    assert same(
        load_text_encoder(folder / "text_encoder", variant=variant or None),
        load_text_encoder(tiny_sd15 / "text_encoder"),
    )


def test_diffusers_own_shards(tiny_sd15: Path, tmp_path: Path) -> None:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet = UNet2DConditionModel.from_pretrained(tiny_sd15 / "unet")
        for variant in (None, "fp16"):
            unet.save_pretrained(tmp_path, max_shard_size="1MB", variant=variant)
    assert len(list(tmp_path.glob("*.safetensors"))) >= 6
    for variant in (None, "fp16"):
        assert same(load_unet(tmp_path, variant=variant), load_unet(tiny_sd15 / "unet"))


def add_variant(folder: Path, stem: str, variant: str, shift: float) -> None:
    tensors = load_file(folder / f"{stem}.safetensors")
    save_file({name: tensor + shift for name, tensor in tensors.items()}, folder / f"{stem}.{variant}.safetensors")


def test_a_variant_is_chosen_and_parts_without_it_fall_back(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    add_variant(folder / "unet", DIFFUSERS, "fp16", 1.0)
    plain = load_parts(folder)
    assert same(plain.unet, load_unet(tiny_sd15 / "unet"))
    with pytest.warns(CalotypeWarning, match="text_encoder, vae: no fp16 weights"):
        parts = load_parts(folder, variant="fp16")
    assert torch.equal(parts.unet.conv_in.bias, plain.unet.conv_in.bias + 1)
    assert same(parts.vae, plain.vae)
    with pytest.raises(ModelNotFoundError, match="no part of the model has the variant 'bf16'; there are: fp16"):
        load_parts(folder, variant="bf16")


def test_the_only_variant_is_taken_but_two_are_a_question(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15) / "unet"
    add_variant(folder, DIFFUSERS, "fp16", 0.0)
    (folder / f"{DIFFUSERS}.safetensors").rename(folder / "aside")
    assert same(load_unet(folder), load_unet(tiny_sd15 / "unet"))
    (folder / "aside").rename(folder / f"{DIFFUSERS}.ema.safetensors")
    with pytest.raises(ModelNotFoundError, match="only variants"):
        load_unet(folder)


# ---- what does not load ----


def test_one_report_of_all_that_differs(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15) / "unet"

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["conv_inn.weight"] = tensors.pop("conv_in.weight")
        tensors["conv_out.bias"] = torch.zeros(9)
        tensors["conv_out.weight"] = tensors["conv_out.weight"].to(torch.int32)
        for i in range(7):
            tensors[f"rubbish\n{i}"] = torch.zeros(1)
        return tensors

    rewrite(folder, spoil)
    with pytest.raises(CheckpointError) as caught:
        load_unet(folder)
    line = caught.value.message
    assert len(line.splitlines()) == 1
    for phrase in (
        "of 208 tensors",
        "1 missing (conv_in.weight)",
        "8 unexpected (conv_inn.weight, perhaps for conv_in.weight, ",
        ", ...)",
        "2 of another shape (conv_out.bias: [9] in the file, [4] by the config, conv_out.weight: I32 in the file",
    ):
        assert phrase in line


def test_another_networks_weights_are_named(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    vae, unet = (folder / part / f"{DIFFUSERS}.safetensors" for part in ("vae", "unet"))
    vae.unlink()
    unet.rename(vae)
    with pytest.raises(CheckpointError, match="the file looks like a U-Net of no known family"):
        load_vae(folder / "vae")


def test_a_mismatch_is_found_before_any_data_is_read(
    tiny_sd15: Path, copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(tiny_sd15) / "unet"
    rewrite(folder, lambda tensors: {name: t for name, t in tensors.items() if name != "conv_in.bias"})
    monkeypatch.setattr("calotype.weights.load.read", lambda paths: pytest.fail("data were read"))
    with pytest.raises(CheckpointError, match="1 missing"):
        load_unet(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float, part: str, tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    spoiled = []

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = sorted(tensors)[len(tensors) // 2]
        tensors[name].view(-1)[-1] = bad
        spoiled.append(name)
        return tensors

    rewrite(folder / part, spoil)
    with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
        load_parts(folder)
    assert repr(spoiled[0]) in caught.value.message


def test_weights_beyond_float16_are_refused_in_float16(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15) / "unet"
    rewrite(folder, lambda tensors: tensors | {"conv_in.bias": torch.full((32,), 1e5)})
    load_unet(folder)
    with pytest.raises(CheckpointError, match=r"'conv_in\.bias' has values beyond float16"):
        load_unet(folder, dtype=torch.float16)


def test_a_truncated_download_says_so(tiny_sd15: Path, copy_of: Copy) -> None:
    path = copy_of(tiny_sd15) / "unet" / f"{DIFFUSERS}.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        load_parts(path.parents[1])


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickles_are_refused_with_a_way_out(part: str, tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    path = next((folder / part).glob("*.safetensors"))
    path.unlink()
    (folder / part / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
    with pytest.raises(UnsafeFileError, match=r"pytorch_model\.bin is a pickle"):
        load_parts(folder)


def test_a_part_without_files_is_refused(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    (folder / "vae" / f"{DIFFUSERS}.safetensors").rename(folder / "vae" / "best.safetensors")
    with pytest.raises(CheckpointError, match="vae holds no weights"):
        load_parts(folder)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_parts(folder)


def test_lone_parts_are_refused_with_a_hint(tiny_sd15: Path, tmp_path: Path) -> None:
    unet = tiny_sd15 / "unet" / f"{DIFFUSERS}.safetensors"  # of no known family, and no config beside it counts
    with pytest.raises(CheckpointError, match="has no configs and is a U-Net of no known family"):
        load_parts(tiny_sd15, unet=unet)
    vae = tiny_sd15 / "vae" / f"{DIFFUSERS}.safetensors"
    with pytest.raises(CheckpointError, match="is not a whole model: it holds an autoencoder only") as caught:
        load_parts(vae)
    assert "vae=" in str(caught.value.hint)
    with pytest.raises(CheckpointError, match="holds no U-Net"):
        load_parts(tiny_sd15, unet=vae)
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02")
    with pytest.raises(UnsafeFileError):
        load_parts(tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="one part of a model only") as caught:
        load_parts(tiny_sd15 / "unet")
    assert "unet=" in str(caught.value.hint)


def test_parts_of_different_families_are_refused(tiny_sd15: Path, tiny_sdxl: Path, copy_of: Copy) -> None:
    with pytest.raises(CheckpointError, match="text of width 64, the text encoders give 32"):
        load_parts(tiny_sd15, unet=tiny_sdxl)
    folder = copy_of(tiny_sdxl)
    edit(folder / "unet" / "config.json", projection_class_embeddings_input_dim=99)
    with pytest.raises(CheckpointError, match="takes 99 added inputs, the model gives pooled text of width 32"):
        load_parts(folder)
    edit(folder / "unet" / "config.json", projection_class_embeddings_input_dim=80)
    edit(folder / "vae" / "config.json", latent_channels=16)
    with pytest.raises(CheckpointError, match="4 channels in and 4 out, the autoencoder 16"):
        load_parts(folder)


def test_a_hostile_scheduler_is_refused(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=10**12)
    with pytest.raises(CheckpointError, match="num_train_timesteps"):
        load_parts(folder)


def test_an_lcm_scheduler_alone_means_four_steps_without_guidance(tiny_sd15: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_sd15)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_scheduler(folder / "scheduler", "LCM")
    defaults = load_parts(folder).defaults
    assert (defaults.sampler, defaults.steps, defaults.guidance, defaults.guidance_range) == ("lcm", 4, 1.0, None)


def test_building_networks_imports_nothing_heavy(tiny_sd15: Path) -> None:
    """PyTorch's own initialisation on the meta device imports some 800 modules and takes seconds."""
    code = (
        "import sys; from calotype.weights.load import load_parts; before = set(sys.modules);"
        f"load_parts({str(tiny_sd15)!r}); print(len(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
