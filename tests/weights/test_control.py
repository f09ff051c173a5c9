"""ControlNets and T2I-Adapters from folders and single files; which model each is for; and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calotype.errors import CheckpointError, ModelNotFoundError, UnsafeFileError
from calotype.nn.controlnet import ControlNet, ControlNetConfig
from calotype.nn.t2i_adapter import T2IAdapter, T2IAdapterConfig
from calotype.nn.unet import Conditioning, UNetConfig
from calotype.weights.adapter_configs import controlnet_config, raw_controlnet, raw_t2i_adapter, t2i_adapter_config
from calotype.weights.control import check_control, control_on_meta, load_control, made_for
from calotype.weights.ldm import control_table
from calotype.weights.load import network_shapes
from checkpoints import CONTROLNET, save

Copy = Callable[[Path], Path]
WEIGHTS = "diffusion_pytorch_model.safetensors"
T2I: dict[str, dict[str, Any]] = {
    "full": {"channels": [8, 16, 24, 24]},
    "light": {"channels": [8, 16, 24], "num_res_blocks": 4, "adapter_type": "light_adapter"},
    "full_xl": {"channels": [8, 16, 24, 24], "downscale_factor": 16, "adapter_type": "full_adapter_xl"},
}

# The configs of published ones: of Stable Diffusion 1.5, 2.1 and SDXL.
SD15 = {"_class_name": "ControlNetModel", "cross_attention_dim": 768}
SD21 = SD15 | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL = {
    "_class_name": "ControlNetModel",
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_SMALL = SDXL | {"down_block_types": ["DownBlock2D"] * 3, "mid_block_type": "UNetMidBlock2D"}
SSD1B = SDXL | {"transformer_layers_per_block": [1, [2, 2], [4, 4]], "mid_block_type": "UNetMidBlock2D"}
FULL_XL = {"adapter_type": "full_adapter_xl", "downscale_factor": 16}
LIGHT = {"adapter_type": "light_adapter", "channels": [320, 640, 1280], "num_res_blocks": 4}


def write_control(folder: Path, network: Callable[..., Any], **config: Any) -> Path:
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # the peers' own
        torch.manual_seed(0)
        save(network(**config), folder)
    return folder


@pytest.fixture(scope="module")
def canny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet's folder."""
    from diffusers import ControlNetModel

    return write_control(tmp_path_factory.mktemp("control") / "canny", ControlNetModel, **CONTROLNET)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind of T2I-Adapter."""
    from diffusers import T2IAdapter as Theirs

    folder = tmp_path_factory.mktemp("adapters")
    return {kind: write_control(folder / kind, Theirs, **config) for kind, config in T2I.items()}


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def write(path: Path, weights: dict[str, Tensor]) -> Path:
    save_file({name: tensor.clone() for name, tensor in weights.items()}, path)
    return path


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


# ---- what loads ----


def test_a_folder_says_what_it_is(canny: Path, adapters: dict[str, Path]) -> None:
    network = load_control(canny)
    assert isinstance(network, ControlNet)
    assert (network.config.hint_channels, network.config.downscale) == ((8, 8, 16, 16), 8)
    for kind, folder in adapters.items():
        adapter = load_control(folder)
        assert isinstance(adapter, T2IAdapter)
        assert adapter.config.kind == kind
        assert adapter.state_dict().keys() == tensors(folder).keys()
        assert not adapter.training
    assert all(not parameter.requires_grad for parameter in network.parameters())


def test_dtypes_and_variants(canny: Path, copy_of: Copy) -> None:
    folder = copy_of(canny)
    halves = {name: tensor.half() for name, tensor in tensors(folder).items()}
    write(folder / WEIGHTS.replace(".", ".fp16.", 1), halves)
    network = load_control(folder, variant="fp16")
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert torch.equal(network.get_parameter("conv_in.weight"), halves["conv_in.weight"].float())
    assert {p.dtype for p in load_control(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    with pytest.raises(ModelNotFoundError, match="has the variant 'bf16'; there are: fp16"):
        load_control(folder, variant="bf16")


def test_a_folder_inside_another(canny: Path, tmp_path: Path) -> None:
    shutil.copytree(canny, tmp_path / "model/controlnet")
    assert same(load_control(tmp_path / "model", subfolder="controlnet"), load_control(canny))


def test_a_single_file_under_diffusers_names(canny: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    for folder in (canny, adapters["full"], adapters["light"], adapters["full_xl"]):
        network = load_control(shutil.copy(folder / WEIGHTS, tmp_path / f"{folder.name}.safetensors"))
        assert same(network, load_control(folder))
        assert isinstance(network, ControlNet) or network.config == load_control(folder).config


@pytest.mark.parametrize("prefix", ["", "control_model."])
def test_a_single_file_under_ldm_names(canny: Path, tmp_path: Path, prefix: str) -> None:
    """As lllyasviel's: some hold the whole model beside."""
    expected = load_control(canny)
    assert isinstance(expected, ControlNet)
    table = control_table(expected.state_dict(), expected.config)
    weights = {prefix + table[name]: tensor for name, tensor in expected.state_dict().items()}
    if prefix:
        weights |= {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1), "betas": torch.zeros(1)}
    network = load_control(write(tmp_path / "canny.safetensors", weights))
    assert same(network, expected)
    x, hint = torch.ones(1, 4, 8, 8), torch.ones(1, 32, 8, 8)
    arguments = x, torch.tensor([9]), Conditioning(torch.ones(1, 3, 32)), hint
    for a, b in zip(network(*arguments).down, expected(*arguments).down, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()  # a file's tensors may lie at odd addresses, and be added up otherwise


def tencent(name: str, light: bool) -> str:
    """What TencentARC call a tensor."""
    name = name.removeprefix("adapter.")
    if light:
        return name.replace("resnets", "body")
    if match := re.fullmatch(r"body\.(\d)\.resnets\.(\d)\.(.*)", name):
        return f"body.{2 * int(match[1]) + int(match[2])}.{match[3]}"
    return re.sub(r"body\.(\d)\.in_conv", lambda match: f"body.{2 * int(match[1])}.in_conv", name)


@pytest.mark.parametrize("kind", T2I)
def test_a_single_file_under_its_authors_names(adapters: dict[str, Path], tmp_path: Path, kind: str) -> None:
    weights = {tencent(name, kind == "light"): tensor for name, tensor in tensors(adapters[kind]).items()}
    assert {"body.0.body.3.block2.bias" if kind == "light" else "body.7.block2.bias"} < weights.keys()
    network, expected = load_control(write(tmp_path / "t2i.safetensors", weights)), load_control(adapters[kind])
    assert same(network, expected)
    assert network.config == expected.config


@pytest.mark.parametrize("raw", [SD15, SD21, SDXL, SSD1B], ids=["sd15", "sd21", "sdxl", "ssd1b"])
def test_tensors_tell_the_config_of_published_controlnets(raw: dict[str, Any]) -> None:
    config = controlnet_config(raw)
    told = controlnet_config(raw_controlnet(network_shapes(control_on_meta(config))))
    assert replace(told, up_depths=config.up_depths) == config  # there is no way up


def test_tensors_tell_what_a_small_controlnet_is() -> None:
    """One without attention: its heads are no question, and the width of the text is none."""
    shapes = network_shapes(control_on_meta(controlnet_config(SDXL_SMALL)))
    assert network_shapes(control_on_meta(controlnet_config(raw_controlnet(shapes)))) == shapes


@pytest.mark.parametrize("changes", [{}, {"in_channels": 1}, FULL_XL, LIGHT], ids=str)
def test_tensors_tell_the_config_of_published_t2i_adapters(changes: dict[str, Any]) -> None:
    config = t2i_adapter_config({"_class_name": "T2IAdapter"} | changes)
    assert t2i_adapter_config(raw_t2i_adapter(network_shapes(control_on_meta(config)))) == config


def test_a_guidance_embedding_is_used(canny: Path, copy_of: Copy) -> None:
    """No published ControlNet has one; the config's field means what it does in a U-Net."""
    folder = copy_of(canny)
    edit(folder, time_cond_proj_dim=16)
    projection = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    write(folder / WEIGHTS, tensors(folder) | {"time_embedding.cond_proj.weight": projection})
    network = load_control(folder)
    outputs = [
        network(
            torch.ones(1, 4, 8, 8), torch.tensor([9]), Conditioning(torch.ones(1, 3, 32), w=w), torch.ones(1, 32, 8, 8)
        )
        for w in (torch.tensor([2.0]), torch.tensor([8.0]))
    ]
    assert not torch.allclose(outputs[0].mid, outputs[1].mid)


# ---- which model it is for ----

UNET15 = UNetConfig()
UNET21 = replace(UNET15, context_dim=1024, linear_projection=True, heads=(5, 10, 20, 20))
UNET_XL = UNetConfig(
    channels=(320, 640, 1280),
    heads=(5, 10, 20),
    down_depths=((None, None), (2, 2), (10, 10)),
    mid_depth=10,
    up_depths=((10,) * 3, (2,) * 3, (None,) * 3),
    context_dim=2048,
    linear_projection=True,
    addition_time_dim=256,
    addition_in_dim=2816,
)
UNET_SSD = replace(UNET_XL, down_depths=((None, None), (2, 2), (4, 4)), mid_depth=None)
CONFIGS = {"sd15": controlnet_config(SD15), "sd21": controlnet_config(SD21), "sdxl": controlnet_config(SDXL)}
FULL, XL = T2IAdapterConfig(), T2IAdapterConfig("full_xl", downscale=16)


@pytest.mark.parametrize(
    ("config", "unet", "title"),
    [
        (CONFIGS["sd15"], UNET15, "Stable Diffusion 1.x"),
        (CONFIGS["sd15"], replace(UNET15, in_channels=9), "Stable Diffusion 1.x"),
        (CONFIGS["sd15"], replace(UNET15, guidance_dim=256), "Stable Diffusion 1.x"),
        (CONFIGS["sd21"], UNET21, "Stable Diffusion 2.x"),
        (CONFIGS["sdxl"], UNET_XL, "SDXL"),
        (CONFIGS["sdxl"], UNET_SSD, "SDXL"),
        (controlnet_config(SDXL_SMALL), UNET_XL, "SDXL"),
        (FULL, UNET15, "Stable Diffusion 1.x or Stable Diffusion 2.x"),
        (FULL, UNET21, "Stable Diffusion 1.x or Stable Diffusion 2.x"),
        (T2IAdapterConfig("light", 3, (320, 640, 1280), 4), UNET15, "Stable Diffusion 1.x or Stable Diffusion 2.x"),
        (XL, UNET_XL, "SDXL"),
        (XL, UNET_SSD, "SDXL"),
    ],
)
def test_those_that_fit(config: ControlNetConfig | T2IAdapterConfig, unet: UNetConfig, title: str) -> None:
    check_control(config, unet)
    assert made_for(config) == title


@pytest.mark.parametrize(
    ("config", "unet", "message"),
    [
        (
            CONFIGS["sd15"],
            UNET21,
            "for Stable Diffusion 1.x, the model is Stable Diffusion 2.x: it takes text of width 768",
        ),
        (CONFIGS["sd15"], UNET_XL, "for Stable Diffusion 1.x, the model is SDXL: it has maps of 320, "),
        (CONFIGS["sdxl"], UNET15, "for SDXL, the model is Stable Diffusion 1.x: it has maps of 320, "),
        (CONFIGS["sdxl"], replace(UNET_XL, addition_in_dim=2560), "takes 2816 added inputs, the U-Net 2560"),
        (CONFIGS["sdxl"], replace(UNET_XL, addition_in_dim=None), "takes 2816 added inputs, the U-Net none"),
        (replace(CONFIGS["sd15"], in_channels=9), UNET15, "latents of 9 channels, the U-Net gives 4"),
        (
            replace(CONFIGS["sd15"], hint_channels=(16, 32, 96)),
            UNET15,
            "4 times as large as the latents, the model's 8",
        ),
        (
            FULL,
            UNET_XL,
            "for Stable Diffusion 1.x or Stable Diffusion 2.x, the model is SDXL: it gives 320 channels at 1/8",
        ),
        (XL, UNET15, "for SDXL, the model is Stable Diffusion 1.x: it gives 320 channels at 1/16"),
        (replace(FULL, channels=(320, 640, 1280, 640)), UNET15, "640 channels at 1/64; the U-Net takes"),
        (T2IAdapterConfig("full", 3, (8, 16)), UNET15, "for a model of its own kind, the model is"),
    ],
)
def test_those_that_do_not(config: ControlNetConfig | T2IAdapterConfig, unet: UNetConfig, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_control(config, unet)
    assert message in caught.value.message
    assert caught.value.hint is not None
    assert "\n" not in str(caught.value)


def test_a_control_is_checked_before_its_weights_are_read(canny: Path, copy_of: Copy, tmp_path: Path) -> None:
    folder = copy_of(canny)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="the ControlNet is for a model of its own kind"):
        load_control(folder, unet=UNET15)
    with pytest.raises(CheckpointError, match="the ControlNet is for a model of its own kind"):
        load_control(shutil.copy(canny / WEIGHTS, tmp_path / "canny.safetensors"), unet=UNET15)


# ---- what does not load ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "ControlNetUnionModel"},
            "'ControlNetUnionModel'; supported here are ControlNetModel, T2IAdapter",
        ),
        ({"controlnet_conditioning_channel_order": "gbr"}, "allowed are rgb, bgr"),
        ({"conditioning_channels": 6}, "conditioning_channels is 6"),
        ({"conditioning_embedding_out_channels": []}, "a list of 1 to 8 entries"),
        ({"global_pool_conditions": 1}, "true or false"),
        ({"encoder_hid_dim_type": "text_proj"}, "only null is supported"),
        ({"block_out_channels": [32, 48]}, "norm_num_groups"),
        ({"cross_attention_dim": 64}, "of another shape"),
        ({"time_cond_proj_dim": 16}, "1 missing (time_embedding.cond_proj.weight)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_of_controlnets_that_are_refused(
    canny: Path, copy_of: Copy, changes: dict[str, Any], message: str
) -> None:
    folder = copy_of(canny)
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_control(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_type": "heavy"}, "allowed are full_adapter, full_adapter_xl, light_adapter"),
        ({"in_channels": 2}, "3 (colour) or 1 (grey)"),
        ({"downscale_factor": 0}, "an integer from 1 to 64"),
        ({"channels": [8, 16, "24"]}, "channels is"),
        ({"channels": [8, 16, 24, 32]}, "of another shape"),
        ({"num_res_blocks": 3}, "missing"),
        ({"num_res_blocks": 1}, "unexpected"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_of_t2i_adapters_that_are_refused(
    adapters: dict[str, Path], copy_of: Copy, changes: dict[str, Any], message: str
) -> None:
    folder = copy_of(adapters["full"])
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_control(folder)


def test_weights_of_the_other_sort(canny: Path, adapters: dict[str, Path], copy_of: Copy) -> None:
    folder = copy_of(canny)
    shutil.copy(adapters["full"] / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="the file looks like a T2I-Adapter"):
        load_control(folder)


def test_a_weight_that_is_no_number(canny: Path, copy_of: Copy) -> None:
    folder = copy_of(canny)
    weights = tensors(folder)
    weights["controlnet_mid_block.bias"] = torch.full_like(weights["controlnet_mid_block.bias"], float("nan"))
    write(folder / WEIGHTS, weights)
    with pytest.raises(CheckpointError, match=r"controlnet_mid_block\.bias' has NaN"):
        load_control(folder)


def test_several_side_by_side(canny: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """As diffusers saves a MultiControlNet or a MultiAdapter beside a model."""
    for name in ("controlnet", "controlnet_1"):
        shutil.copytree(canny, tmp_path / name)
    shutil.copytree(adapters["full"], tmp_path / "adapter")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"inside are adapter, controlnet, controlnet_1 \(") as caught:
        load_control(tmp_path)
    assert caught.value.hint is not None
    assert str(tmp_path / "adapter") in caught.value.hint


def test_what_is_no_control_at_all(tiny_sd15: Path, canny: Path, tmp_path: Path, copy_of: Copy) -> None:
    with pytest.raises(CheckpointError, match="neither a ControlNet nor a T2I-Adapter"):
        load_control(tiny_sd15)
    with pytest.raises(CheckpointError, match="the class is 'UNet2DConditionModel'"):
        load_control(tiny_sd15 / "unet")
    with pytest.raises(CheckpointError, match="it looks like a U-Net of no known family"):
        load_control(tiny_sd15 / "unet" / WEIGHTS)
    with pytest.raises(CheckpointError, match="it looks like nothing known"):
        load_control(write(tmp_path / "empty.safetensors", {}))
    with pytest.raises(ModelNotFoundError, match="no model 'cany'"):
        load_control("cany")
    (tmp_path / "t2i.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(UnsafeFileError, match="is a pickle"):
        load_control(tmp_path / "t2i.pth")
    folder = copy_of(canny)
    torch.save(tensors(folder), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(UnsafeFileError, match="is a pickle"):
        load_control(folder)


@pytest.mark.parametrize("kept", ["controlnet_cond_embedding.conv_in.weight", "adapter.body.0.resnets.0.block1.weight"])
def test_a_file_of_one_tensor(canny: Path, adapters: dict[str, Path], tmp_path: Path, kept: str) -> None:
    """Its config cannot be told: the first impossible field is named, and nothing else is raised."""
    every = tensors(canny) | tensors(adapters["full"])
    with pytest.raises(CheckpointError, match=r"one\.safetensors: \w+ is "):
        load_control(write(tmp_path / "one.safetensors", {kept: every[kept]}))
