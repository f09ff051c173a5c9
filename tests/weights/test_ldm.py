"""The tables of LDM's names, at the sizes of the real models and without weights, against diffusers' converters."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders import single_file_utils as peer
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from calotype.families import FAMILIES, Family, family_of
from calotype.nn.controlnet import ControlNet, ControlNetConfig
from calotype.nn.unet import UNet, UNetConfig
from calotype.weights import ldm, load
from calotype.weights.texts import family_texts, texts_of

Tensors = dict[str, Tensor]


def tensors(network: nn.Module) -> Tensors:
    return dict(network.state_dict())


def as_file(table: ldm.Table, ours: Tensors, prefix: str) -> Tensors:
    """The tensors under a file's names; no two may share one."""
    assert len(set(table.values())) == len(table)
    return {prefix + table[name]: tensor for name, tensor in ours.items()}


def same(ours: Tensors, theirs: Tensors) -> bool:
    """Whether the very same tensors have the same names."""
    return ours.keys() == theirs.keys() and all(theirs[name] is tensor for name, tensor in ours.items())


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param  # type: ignore[no-any-return]


# ---- the shipped configs ----


def test_shipped_configs_are_their_familys(family: Family) -> None:
    texts = family_texts(family)
    unet = load.unet_of(texts["unet/config.json"], "")
    assert family_of(unet.config) is family
    vae = load.vae_of(texts["vae/config.json"], "")
    encoders = [load.text_encoder_of(texts[f"{name}/config.json"], "") for name in ENCODERS[family.name]]
    load.check_fit(unet, vae, encoders)


ENCODERS = {
    "sd15": ["text_encoder"],
    "sd21": ["text_encoder"],
    "sdxl": ["text_encoder", "text_encoder_2"],
    "ssd1b": ["text_encoder", "text_encoder_2"],
}
# Of the U-Net, as their makers give them.
PARAMETERS = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684, "ssd1b": 1_334_000_000}


def test_shipped_configs_have_the_real_sizes(family: Family) -> None:
    unet = load.unet_of(family_texts(family)["unet/config.json"], "")
    count = sum(tensor.numel() for tensor in unet.parameters())
    assert count == pytest.approx(PARAMETERS[family.name], rel=1e-2 if family.name == "ssd1b" else 0)


# ---- against diffusers ----


def test_unets(family: Family) -> None:
    config = family_texts(family)["unet/config.json"]
    network = load.unet_of(config, "")
    ours = tensors(network)
    with load.on_meta():
        theirs = UNet2DConditionModel.from_config(config)
    assert {name: tensor.shape for name, tensor in ours.items()} == {k: v.shape for k, v in tensors(theirs).items()}
    file = as_file(ldm.unet_table(ours, network.config), ours, "model.diffusion_model.")
    assert same(ours, peer.convert_ldm_unet_checkpoint(file, config))


def test_autoencoders(family: Family) -> None:
    config = family_texts(family)["vae/config.json"]
    network = load.vae_of(config, "")
    assert not isinstance(network, load.AutoencoderTiny)
    ours = tensors(network)
    with load.on_meta():
        theirs = AutoencoderKL.from_config(config)
    assert {name: tensor.shape for name, tensor in ours.items()} == {k: v.shape for k, v in tensors(theirs).items()}
    table = ldm.vae_table(ours, network.config)
    assert "encoder.mid.attn_1.proj_out.weight" in table.values()
    assert "decoder.up.1.block.0.nin_shortcut.weight" in table.values()
    assert same(ours, peer.convert_ldm_vae_checkpoint(as_file(table, ours, "first_stage_model."), config))


@pytest.mark.parametrize(("name", "text"), [("sd21", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_open_clip(name: str, text: str) -> None:
    """q, k and v are one tensor there, and the projection is transposed."""
    texts = family_texts(next(family for family in FAMILIES if family.name == name))
    network = load.text_encoder_of(texts[f"{text}/config.json"], "")
    config = network.config
    ours = tensors(network)
    with load.on_meta():
        theirs = CLIPTextModelWithProjection(CLIPTextConfig(**texts[f"{text}/config.json"]))
    assert ours.keys() | {"text_projection.weight"} == tensors(theirs).keys()
    table = ldm.open_clip_table(sorted(ours))  # whatever order the names come in
    file: Tensors = {}
    for mine, other in table.items():
        shape = list(ours[mine].shape)
        if other.endswith(("in_proj_weight", "in_proj_bias")):
            shape[0] *= 3
        file["x." + other] = torch.zeros(shape, device="meta")
    made = peer.convert_open_clip_checkpoint(
        SimpleNamespace(config=CLIPTextConfig(hidden_size=config.width)), file, "x."
    )
    assert {name: tensor.shape for name, tensor in made.items()} == {name: t.shape for name, t in ours.items()}
    shared = [mine for mine, other in table.items() if other == "transformer.resblocks.3.attn.in_proj_weight"]
    assert shared == [f"text_model.encoder.layers.3.self_attn.{which}_proj.weight" for which in "qkv"]
    assert len(table) - len(set(table.values())) == 4 * config.layers


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "ssd1b"])
def test_controlnets(name: str) -> None:
    unet = family_texts(next(family for family in FAMILIES if family.name == name))["unet/config.json"]
    base = load.unet_of(unet, "").config
    with load.on_meta():
        network = ControlNet(ControlNetConfig(**{field.name: getattr(base, field.name) for field in fields(base)}))
    ours = tensors(network)
    table = ldm.control_table(ours, network.config)
    assert {"zero_convs.0.0.weight", "middle_block_out.0.bias", "input_hint_block.14.weight"} <= set(table.values())
    file = as_file(table, ours, "control_model.")
    made = peer.convert_controlnet_checkpoint(file, unet)
    left_out = {name: tensor for name, tensor in ours.items() if name.startswith("add_embedding.")}  # as diffusers does
    assert same(ours, made | left_out)
    # The way back needs no config.
    assert ldm.control_names(table.values()) == {theirs: mine for mine, theirs in table.items()}
    assert ldm.control_names(["first_stage_model.encoder.conv_in.weight", "x"]) == {}


# ---- by hand ----


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("sd15", "input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("sd15", "input_blocks.11.0", "down_blocks.3.resnets.1"),
        ("sd15", "output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),  # no attention before it
        ("sd15", "output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
        ("sd15", "output_blocks.11.1", "up_blocks.3.attentions.2"),
        ("sdxl", "input_blocks.4.1", "down_blocks.1.attentions.0"),
        ("sdxl", "middle_block.2", "mid_block.resnets.1"),
        ("sdxl", "output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
        ("sdxl", "output_blocks.8.0", "up_blocks.2.resnets.2"),
        ("ssd1b", "middle_block.0", "mid_block.resnets.0"),
    ],
)
def test_blocks_that_are_known(name: str, theirs: str, ours: str) -> None:
    config = family_texts(next(family for family in FAMILIES if family.name == name))["unet/config.json"]
    assert ldm.unet_blocks(load.unet_of(config, "").config)[theirs] == ours


def test_the_middle_of_ssd1b_is_one_block() -> None:
    config = family_texts(next(family for family in FAMILIES if family.name == "ssd1b"))["unet/config.json"]
    blocks = ldm.unet_blocks(load.unet_of(config, "").config)
    assert [name for name in blocks if name.startswith("middle")] == ["middle_block.0"]


def test_an_attention_that_some_layers_lack_is_counted_by_itself() -> None:
    """diffusers numbers the transformers that exist, LDM the layers."""
    config = UNetConfig(
        channels=(8, 8),
        heads=(1, 1),
        down_depths=((None, 1), (None,)),
        up_depths=((None, None), (1, None, 1)),
        context_dim=8,
        norm_groups=2,
    )
    blocks = ldm.unet_blocks(config)
    assert blocks["input_blocks.2.1"] == "down_blocks.0.attentions.0"
    assert blocks["output_blocks.4.1"] == "up_blocks.1.attentions.1"
    with load.on_meta():
        names = list(tensors(UNet(config)))
    table = ldm.unet_table(names, config)
    assert len(set(table.values())) == len(names)


def test_guidance_embeddings_keep_their_name(family: Family) -> None:
    """The spelling of diffusers' own converter to LDM, which leaves the names alone that it does not know."""
    texts = texts_of(family, {"time_embed.cond_proj.weight": (320, 256)}, "epsilon")
    network = load.unet_of(texts["unet/config.json"], "")
    table = ldm.unet_table(tensors(network), network.config)
    assert table["time_embedding.cond_proj.weight"] == "time_embedding.cond_proj.weight"
    assert ldm.OTHER_NAMES["time_embed.cond_proj.weight"] == "time_embedding.cond_proj.weight"


def test_every_name_is_renamed_whole(family: Family) -> None:
    """No word of ours is left in the file's names, but those that both use."""
    network = load.unet_of(family_texts(family)["unet/config.json"], "")
    words: Any = {
        word for name in ldm.unet_table(tensors(network), network.config).values() for word in name.split(".")
    }
    assert not {"resnets", "attentions", "down_blocks", "up_blocks", "mid_block", "conv_in", "norm_out"} & words
