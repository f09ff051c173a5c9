"""Configs of diffusers and transformers become ours: with the tensors that they have, or a refusal of the field."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from calotype.errors import CheckpointError
from calotype.families import SD15, SD21, SDXL, SSD1B, family_of
from calotype.nn.unet import UNetConfig
from calotype.weights import configs, load
from calotype.weights.files import read_json
from checkpoints import write_text_encoder, write_tiny_vae, write_unet, write_vae

UNET = {"_class_name": "UNet2DConditionModel"}
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
FOUR: dict[str, Any] = {
    "block_out_channels": (16, 32, 48, 48),
    "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
    "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP),
    "layers_per_block": 2,
}
THREE: dict[str, Any] = {
    "block_out_channels": (16, 32, 48),
    "down_block_types": (PLAIN, CROSS, CROSS),
    "up_block_types": (CROSS_UP, CROSS_UP, PLAIN_UP),
    "layers_per_block": 2,
    "attention_head_dim": (1, 2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "SD 1.5": FOUR | {"attention_head_dim": 8},
    "SD 1.5 LCM": FOUR | {"time_cond_proj_dim": 256},
    "SD 1.5 inpainting": FOUR | {"in_channels": 9},
    "SD 2.1": FOUR | {"attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True, "upcast_attention": True},
    "SDXL": THREE | {"transformer_layers_per_block": (1, 2, 10)},
    "SSD-1B": THREE
    | {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "no middle": FOUR | {"mid_block_type": None},
    "layers by level": FOUR | {"layers_per_block": (1, 2, 3, 1)},
    "no blocks in a transformer": FOUR | {"transformer_layers_per_block": (1, 0, 1, 0)},
    "attention on one way only": FOUR | {"up_block_types": (CROSS_UP, PLAIN_UP, CROSS_UP, PLAIN_UP)},
    "one level": {"block_out_channels": (16,), "down_block_types": (CROSS,), "up_block_types": (CROSS_UP,)},
}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_unet_has_the_tensors_that_diffusers_writes(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_unet(tmp_path, **TOPOLOGIES[name])
    network = load.unet_on_meta(tmp_path)
    infos = load.part_header(tmp_path, load.weight_files(tmp_path, None))
    assert load.network_shapes(network) == {key: info.shape for key, info in infos.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mid_block_add_attention": False},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 4},
    ],
)
def test_a_vae_has_the_tensors_that_diffusers_writes(changes: dict[str, Any], tmp_path: Path) -> None:
    write_vae(tmp_path, **changes)
    infos = load.part_header(tmp_path, load.weight_files(tmp_path, None))
    assert load.network_shapes(load.vae_on_meta(tmp_path)) == {key: info.shape for key, info in infos.items()}


def test_a_tiny_vae_has_the_tensors_that_diffusers_writes(tmp_path: Path) -> None:
    write_tiny_vae(tmp_path)
    infos = load.part_header(tmp_path, load.weight_files(tmp_path, None))
    assert load.network_shapes(load.vae_on_meta(tmp_path)) == {key: info.shape for key, info in infos.items()}


def test_the_defaults_are_those_of_diffusers() -> None:
    from diffusers import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    def defaults(kind: Any) -> dict[str, Any]:
        import inspect

        parameters = inspect.signature(kind.__init__).parameters.values()
        given = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        return {"_class_name": kind.__name__, **json.loads(json.dumps(given))}

    assert configs.unet_config(UNET) == configs.unet_config(defaults(UNet2DConditionModel))
    assert configs.vae_config({"_class_name": "AutoencoderKL"}) == configs.vae_config(defaults(AutoencoderKL))


def test_attention_head_dim_is_the_number_of_heads() -> None:
    assert configs.unet_config(UNET | {"attention_head_dim": 4}).heads == (4, 4, 4, 4)
    assert configs.unet_config(UNET | {"attention_head_dim": [5, 10, 20, 20]}).heads == (5, 10, 20, 20)
    assert configs.unet_config(UNET | {"attention_head_dim": 64, "num_attention_heads": 5}).heads == (5, 5, 5, 5)


SDXL_CONFIG = UNET | {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": [PLAIN, CROSS, CROSS],
    "up_block_types": [CROSS_UP, CROSS_UP, PLAIN_UP],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
SSD1B_CONFIG = SDXL_CONFIG | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}


def test_real_configs_in_our_words() -> None:
    sdxl = configs.unet_config(SDXL_CONFIG)
    assert sdxl.down_depths == ((None, None), (2, 2), (10, 10))
    assert sdxl.up_depths == ((10, 10, 10), (2, 2, 2), (None, None, None))
    assert (sdxl.mid_depth, sdxl.addition_time_dim, sdxl.addition_in_dim) == (10, 256, 2816)
    ssd = configs.unet_config(SSD1B_CONFIG)
    assert ssd.down_depths == ((None, None), (2, 2), (4, 4))
    assert ssd.up_depths == ((4, 4, 10), (2, 1, 1), (None, None, None))
    assert ssd.mid_depth is None
    assert ssd.has_mid
    assert configs.unet_config(UNET | {"cross_attention_dim": 768}) == UNetConfig()
    assert configs.unet_config(UNET | {"sample_size": [96, 64]}).sample_size == 96


def test_families_are_told_apart() -> None:
    assert family_of(configs.unet_config(UNET | {"cross_attention_dim": 768})) is SD15
    assert family_of(configs.unet_config(UNET | {"cross_attention_dim": 1024})) is SD21
    assert family_of(configs.unet_config(SDXL_CONFIG)) is SDXL
    assert family_of(configs.unet_config(SSD1B_CONFIG)) is SSD1B
    assert family_of(configs.unet_config(UNET)).name == "custom"


REFUSED_UNET: dict[str, Any] = {
    "_class_name": ["UNet3DConditionModel", "FlaxUNet2DConditionModel", "os.system", None, 3, ["UNet2DConditionModel"]],
    "class_embed_type": ["timestep"],
    "num_class_embeds": [10],
    "dual_cross_attention": [True],
    "only_cross_attention": [True, [False, True, False, False]],
    "resnet_time_scale_shift": ["scale_shift"],
    "encoder_hid_dim": [32],
    "encoder_hid_dim_type": ["text_proj"],
    "act_fn": ["gelu", None],
    "time_embedding_type": ["fourier"],
    "time_embedding_dim": [64],
    "timestep_post_act": ["silu"],
    "addition_embed_type": ["text", "image"],
    "mid_block_type": ["UNetMidBlock2DSimpleCrossAttn", 1],
    "conv_in_kernel": [5],
    "attention_type": ["gated"],
    "center_input_sample": [True, 0],
    "resnet_out_scale_factor": [2.0],
    "block_out_channels": [[], [0, 1], "320", [320] * 9, [320.0] * 4, [True] * 4, [10**12] * 4, [330] * 4],
    "layers_per_block": [0, 10**9, -1, 2.5, True, [1, 2], "2"],
    "transformer_layers_per_block": [10**9, -1, [1, 1], [[1, 1]] * 4, "1", 1.0, True, {"a": 1}],
    "reverse_transformer_layers_per_block": [[1], [[1]] * 4, [[10**9] * 3] * 4],
    "attention_head_dim": [0, 7, -8, [8], [7, 8, 8, 8], 10**9],
    "cross_attention_dim": [0, 10**9, [768, 768, 768, 1024], []],
    "down_block_types": [[CROSS], ["KDownBlock2D"] * 4, "CrossAttnDownBlock2D", [None] * 4],
    "up_block_types": [[CROSS_UP] * 3, [CROSS] * 4],
    "norm_num_groups": [0, 7, 10**9],
    "norm_eps": [0, -1, "1e-5"],
    "in_channels": [0, 10**6],
    "time_cond_proj_dim": [0, -1, 10**9],
    "sample_size": [0, -1, [64], "64"],
    "use_linear_projection": [1, "true"],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in REFUSED_UNET.items() for v in values])
def test_a_unet_that_is_not_built_is_refused_by_its_field(field: str, value: Any) -> None:
    started = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        configs.unet_config(UNET | {"cross_attention_dim": 768} | {field: value})
    assert time.monotonic() - started < 0.1
    line = caught.value.message
    assert "class is" in line if field == "_class_name" else field in line
    assert len(line.splitlines()) == 1
    assert len(line) < 600


def test_a_network_of_a_billion_layers_is_refused_by_arithmetic() -> None:
    """Within the bounds of each field, but not of all together."""
    for changes in (
        {"block_out_channels": [8192] * 8, "layers_per_block": 8, "transformer_layers_per_block": 24},
        {"block_out_channels": [8192] * 8, "layers_per_block": 8, "transformer_layers_per_block": 1},
        {"block_out_channels": [32] * 8, "layers_per_block": 8, "transformer_layers_per_block": 24},
    ):
        types = {"down_block_types": [CROSS] * 8, "up_block_types": [CROSS_UP] * 8}
        started = time.monotonic()
        with pytest.raises(CheckpointError, match=r"that makes .* (parameters|blocks)"):
            configs.unet_config(UNET | types | changes)
        assert time.monotonic() - started < 0.1


def test_sdxl_is_within_the_bounds_and_weighed_rightly() -> None:
    from calotype.nn.unet import UNet

    with load.on_meta():
        network = UNet(configs.unet_config(SDXL_CONFIG))
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_567_463_684


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "relu"), ("latents_mean", [0.0]), ("block_out_channels", [10**9]), ("layers_per_block", 10**9),
        ("norm_num_groups", 7), ("scaling_factor", 0), ("scaling_factor", "1"), ("in_channels", 4),
        ("latent_channels", 0), ("down_block_types", ["AttnDownEncoderBlock2D"]), ("force_upcast", 1),
    ],
)  # fmt: skip
def test_a_vae_that_is_not_built_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=field):
        configs.vae_config({"_class_name": "AutoencoderKL", field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "silu"), ("upsample_fn", "bilinear"), ("num_decoder_blocks", [10**9]), ("num_encoder_blocks", "3"),
        ("decoder_block_out_channels", [64, 64, 32, 64]), ("encoder_block_out_channels", [64]),
    ],
)  # fmt: skip
def test_a_tiny_vae_that_is_not_built_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=field):
        configs.tiny_vae_config({"_class_name": "AutoencoderTiny", field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 10**9), ("num_hidden_layers", 10**9), ("num_attention_heads", 7), ("hidden_act", "relu"),
        ("vocab_size", -1), ("vocab_size", 10**9), ("max_position_embeddings", 10**9), ("layer_norm_eps", "0"),
        ("architectures", ["T5EncoderModel"]), ("architectures", "CLIPTextModel"), ("architectures", []),
    ],
)  # fmt: skip
def test_a_text_encoder_that_is_not_built_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match="class" if field == "architectures" else field):
        configs.text_config({"architectures": ["CLIPTextModel"], field: value})


def test_only_a_model_with_projection_projects(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_text_encoder(tmp_path / "plain")
        write_text_encoder(tmp_path / "projected", projection=32)
    assert configs.text_config(read_json(tmp_path / "plain" / "config.json")).projection_dim is None
    assert configs.text_config(read_json(tmp_path / "projected" / "config.json")).projection_dim == 32
    whole = {"architectures": ["CLIPModel"], "text_config": {"hidden_size": 64}, "vision_config": {}}
    assert configs.text_config(whole).width == 64
    with pytest.raises(CheckpointError, match="text_config"):
        configs.text_config({"architectures": ["CLIPModel"]})
