"""Controls in single files: where in a file one is, and those that the U-Net of the model completes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_control import T2I, WEIGHTS, adapters, same, tencent  # noqa: F401
from torch import Tensor

import calotype
from calotype.errors import CheckpointError
from calotype.nn.controlnet import ControlNet, ControlNetConfig
from calotype.nn.t2i_adapter import T2IAdapter
from calotype.parts import Parts
from calotype.weights.control import load_control
from calotype.weights.control_files import pools
from calotype.weights.inspect import inspect_model
from calotype.weights.ldm import control_table
from calotype.weights.load import load_parts
from checkpoints import randomise, write_model, write_unet

Tensors = dict[str, Tensor]


def write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    path.unlink(missing_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A model with what no tensor says as in the real ones: the width of sizes and crops, the number of heads."""
    folder, xl = tmp_path_factory.mktemp("model") / request.param, request.param == "sdxl"
    write_model(folder, xl=xl)
    more = {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 32 + 6 * 256} if xl else {}
    with torch.random.fork_rng():
        write_unet(folder / "unet", xl=xl, **more, attention_head_dim=1 if xl else 8)
    return load_parts(folder)


@pytest.fixture
def whole(model: Parts) -> ControlNet:
    """A ControlNet for the model, no tensor of which is the U-Net's."""
    kept = vars(model.unet.config)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = ControlNet(ControlNetConfig(**kept, hint_channels=(8, 8, 16, 16)))
        randomise(network)
    return network.eval().requires_grad_(False)


def named(network: ControlNet, tensors: Mapping[str, Tensor], prefix: str = "") -> Tensors:
    """Tensors by LDM's names."""
    table = control_table(network.state_dict(), network.config)
    return {prefix + table[name]: tensor for name, tensor in tensors.items()}


def near(a: ControlNet | T2IAdapter, b: ControlNet) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.allclose(mine[n], other[n], atol=1e-5) for n in mine)


def load(path: Path, model: Parts, **options: Any) -> ControlNet | T2IAdapter:
    return load_control(path, unet=model.unet.config, base=model.stored["unet"], **options)


# ---- Shuffle ----


@pytest.mark.parametrize(
    ("name", "yes"),
    [
        ("control_v11e_sd15_shuffle.safetensors", True),
        ("control_v11e_sd15_shuffle_fp16.safetensors", True),
        ("SHUFFLE.safetensors", True),
        ("ControlNetShuffle-2.safetensors", True),
        ("my Shuffle (1).safetensors", True),
        ("control_v11p_sd15_canny.safetensors", False),
        ("unshuffled.safetensors", False),
        ("Pixelshuffler.safetensors", False),
    ],
)
def test_shuffle_is_known_by_its_name(tmp_path: Path, name: str, yes: bool) -> None:
    assert pools(tmp_path / "shuffle" / name) == yes


def test_shuffle_takes_the_means_of_its_maps(whole: ControlNet, model: Parts, tmp_path: Path) -> None:
    for tensors in (whole.state_dict(), named(whole, whole.state_dict(), "control_model.")):
        network = load(write(tmp_path / "control_shuffle.safetensors", tensors), model)
        assert isinstance(network.config, ControlNetConfig)
        assert network.config.global_pool
        assert not load(write(tmp_path / "control_canny.safetensors", tensors), model).config.global_pool  # type: ignore[union-attr]


def test_a_config_decides_and_no_name(tiny_sd15: Path, tmp_path: Path) -> None:
    """Also where the folder's file is given instead of the folder."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    hint = (8, 8, 16, 16)
    unet = UNet2DConditionModel.from_pretrained(tiny_sd15 / "unet")
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=hint)
    network.save_pretrained(tmp_path / "shuffle")
    network.register_to_config(global_pool_conditions=True)
    network.save_pretrained(tmp_path / "plain")
    for name, yes in (("shuffle", False), ("plain", True)):
        for path in (tmp_path / name, tmp_path / name / WEIGHTS):
            assert load_control(path).config.global_pool == yes  # type: ignore[union-attr]


# ---- a difference ----


@pytest.mark.parametrize("prefix", ["control_model.", "", "module.control_model."])
def test_the_unet_is_added_to_a_difference(whole: ControlNet, model: Parts, tmp_path: Path, prefix: str) -> None:
    base = model.stored["unet"]()
    shared = whole.state_dict().keys() & base.keys()
    assert {"conv_in.weight", "time_embedding.linear_1.bias", "mid_block.resnets.0.norm1.weight"} <= shared
    less = {name: tensor - base[name] if name in shared else tensor for name, tensor in whole.state_dict().items()}
    for tensors in (named(whole, less, prefix), {f"{prefix}{name}": tensor for name, tensor in less.items()}):
        path = write(tmp_path / "diff_control.safetensors", tensors | {"difference": torch.tensor(1.0)})
        assert near(load(path, model), whole)
        assert not near(load(write(path, tensors), model), whole)
        assert inspect_model(write(path, tensors | {"difference": torch.zeros(0)}))["looks_like"].startswith(
            "a ControlNet as a difference"
        )
        with pytest.raises(CheckpointError, match="is a ControlNet as a difference: it holds only what it changes"):
            load_control(path, unet=model.unet.config)


def test_a_difference_in_half_precision(whole: ControlNet, model: Parts, tmp_path: Path) -> None:
    """It is added up in float32."""
    base = model.stored["unet"]()
    less = {n: t - base[n] if n in base else t for n, t in whole.state_dict().items()}
    halves = {name: tensor.half() for name, tensor in named(whole, less).items()}
    network = load(write(tmp_path / "d.safetensors", halves | {"difference": torch.zeros(0)}), model)
    name = "conv_in.weight"
    assert torch.equal(network.get_parameter(name), less[name].half().float() + base[name].float())


def test_a_spoilt_difference(whole: ControlNet, model: Parts, tmp_path: Path) -> None:
    tensors = named(whole, whole.state_dict()) | {"difference": torch.zeros(0)}
    path = write(
        tmp_path / "d.safetensors", tensors | {"middle_block.0.in_layers.2.bias": torch.full((64,), torch.nan)}
    )
    with pytest.raises(CheckpointError, match=r"mid_block\.resnets\.0\.conv1\.bias' has NaN"):
        load(path, model)
    path = write(path, tensors | {"middle_block.0.in_layers.2.bias": torch.zeros(32)})
    with pytest.raises(CheckpointError, match="of another shape"):
        load(path, model)


def test_loras_do_not_get_into_it(tiny_sd15: Path, tmp_path: Path) -> None:
    """The U-Net's weights are those of its file, whatever is merged into it."""
    engine = calotype.load(tiny_sd15, device="cpu", dtype="float32")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = ControlNet(ControlNetConfig(**vars(engine.parts.unet.config), hint_channels=(8, 8, 16, 16)))
        randomise(network)
    tensors = named(network, network.state_dict()) | {"difference": torch.zeros(0)}
    path = write(tmp_path / "d.safetensors", tensors)
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(32, 2)}
    engine.add_control(path, name="before")
    before = engine.parts.unet.state_dict()[f"{key.removeprefix('unet.')}.weight"].clone()
    engine.add_lora(write(tmp_path / "lora.safetensors", lora), name="lora")
    assert not torch.equal(before, engine.parts.unet.state_dict()[f"{key.removeprefix('unet.')}.weight"])
    engine.add_control(path, name="after")
    assert same(engine.parts.controls["before"], engine.parts.controls["after"])


# ---- Control-LoRAs ----


def low_rank(whole: ControlNet, base: Mapping[str, Tensor], rank: int = 4) -> tuple[Tensors, Tensors]:
    """A Control-LoRA as ComfyUI's ControlLoraSave writes one, and the ControlNet that it stands for: weights of layers
    are products, all else is the ControlNet's own.
    """
    generator = torch.Generator().manual_seed(2)
    table = control_table(whole.state_dict(), whole.config)
    file: Tensors = {"lora_controlnet": torch.zeros(0)}
    meant: Tensors = {}
    for name, tensor in whole.state_dict().items():
        if name not in base or tensor.ndim < 2:
            file[table[name]] = meant[name] = tensor
            continue
        rows, columns, *kernel = tensor.shape
        up, down = (
            torch.randn(rows, rank, generator=generator),
            torch.randn(rank, columns, *kernel, generator=generator),
        )
        layer = table[name].removesuffix(".weight")
        file[f"{layer}.up"] = up[:, :, None, None] if kernel else up
        file[f"{layer}.down"] = down
        meant[name] = base[name] + torch.einsum("or,r...->o...", up, down)
    return file, meant


def test_a_control_lora(whole: ControlNet, model: Parts, tmp_path: Path) -> None:
    base = model.stored["unet"]()
    file, meant = low_rank(whole, base)
    assert {"input_blocks.0.0.up", "time_embed.0.down", "middle_block.0.out_layers.3.up"} <= file.keys()
    whole.load_state_dict(meant)
    path = tmp_path / "control-lora-canny-rank128.safetensors"
    for prefix, marked in (("", True), ("", False), ("control_model.", True)):
        held = {f"{prefix}{name}": t for name, t in file.items() if name != "lora_controlnet"}
        network = load(write(path, held | ({"lora_controlnet": torch.zeros(0)} if marked else {})), model)
        assert near(network, whole)
        assert isinstance(network, ControlNet)
        assert network.config.hint_channels == whole.config.hint_channels
        assert inspect_model(path)["looks_like"] == "a Control-LoRA"
    with pytest.raises(CheckpointError, match="is a Control-LoRA: it holds only what it changes"):
        load_control(path)


def test_a_control_lora_of_flat_products_and_what_it_leaves_out(
    whole: ControlNet, model: Parts, tmp_path: Path
) -> None:
    """Convolutions may be matrices; a layer that is not in the file is the U-Net's."""
    base = model.stored["unet"]()
    file, meant = low_rank(whole, base)
    kept = {n: t.flatten(1) if n.endswith(".down") else t for n, t in file.items() if not n.startswith("time_embed.")}
    kept["input_blocks.0.0.weight"] = whole.state_dict()["conv_in.weight"]  # a layer that is whole in the file
    del kept["input_blocks.0.0.up"], kept["input_blocks.0.0.down"]
    meant["conv_in.weight"] = whole.state_dict()["conv_in.weight"]
    meant |= {name: base[name] for name in meant if name.startswith("time_embedding.")}
    whole.load_state_dict(meant)
    assert near(load(write(tmp_path / "c.safetensors", kept), model), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f | {"input_blocks.0.0.up": torch.zeros(32, 3, 1, 1)}, r"input_blocks\.0\.0: \[32, 3, 1, 1\] and"),
        (lambda f: f | {"input_blocks.0.0.up": torch.zeros(32)}, r"input_blocks\.0\.0: \[32\] and"),
        (lambda f: f | {"input_blocks.0.0.down": torch.zeros(4, 7)}, r"for \[32, 4, 3, 3\]"),
        (lambda f: {n: t for n, t in f.items() if n != "input_blocks.0.0.down"}, r"0\.0\.up: no such layer"),
        (lambda f: f | {"input_blocks.77.0.in_layers.2.up": torch.zeros(4, 4)}, r"77.*: no such layer"),
        (lambda f: f | {"input_blocks.0.0.up": torch.full((32, 4), torch.nan)}, r"'conv_in\.weight' has NaN"),
        (lambda f: {n: t for n, t in f.items() if n != "zero_convs.0.0.bias"}, r"missing \(controlnet_down_blocks\.0"),
    ],
    ids=range(7),
)
def test_a_spoilt_control_lora(
    whole: ControlNet, model: Parts, tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    file, _ = low_rank(whole, model.stored["unet"]())
    with pytest.raises(CheckpointError, match=message) as caught:
        load(write(tmp_path / "c.safetensors", change(file)), model)
    assert "\n" not in str(caught.value)


def test_a_control_lora_of_another_family(tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    models = [load_parts(folder) for folder in (tiny_sd15, tiny_sdxl)]
    for one, other in (models, models[::-1]):
        network = ControlNet(ControlNetConfig(**vars(one.unet.config), hint_channels=(8, 8, 16, 16)))
        path = write(tmp_path / "c.safetensors", low_rank(network, one.stored["unet"]())[0])
        with pytest.raises(CheckpointError, match="is a Control-LoRA that does not fit"):
            load(path, other)


# ---- where in a file it is ----


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "control_model.", "_orig_mod.", "controlnet.", "state_dict.module."]
)
def test_a_controlnet_behind_a_prefix(whole: ControlNet, model: Parts, tmp_path: Path, prefix: str) -> None:
    tensors = whole.state_dict()
    for held in (tensors, named(whole, tensors)):
        behind = {f"{prefix}{name}": tensor for name, tensor in held.items()}
        beside = {"model.diffusion_model.out.2.bias": torch.zeros(4), "global_step": torch.tensor(3)}
        assert same(load(write(tmp_path / "c.safetensors", behind | beside), model), whole)
        strange = {"other.weight": torch.zeros(1)}
        with pytest.raises(CheckpointError, match=r"'other\.weight', which is no part of it|unexpected"):
            load(write(tmp_path / "c.safetensors", behind | strange), model)


@pytest.mark.parametrize("kind", T2I)
@pytest.mark.parametrize("prefix", ["adapter.", "model.", "module.", "body.", "module.adapter.", "_orig_mod."])
def test_a_t2i_adapter_behind_a_prefix(adapters: dict[str, Path], tmp_path: Path, kind: str, prefix: str) -> None:  # noqa: F811
    """Under its authors' names, and under diffusers'."""
    expected = load_control(adapters[kind])
    tensors = load_file(adapters[kind] / WEIGHTS)
    for rename in (lambda name: tencent(name, kind == "light"), lambda name: name.removeprefix("adapter.")):
        path = write(tmp_path / "t.safetensors", {prefix + rename(name): tensor for name, tensor in tensors.items()})
        network = load_control(path)
        assert same(network, expected)
        assert network.config == expected.config
        assert "T2I-Adapter" in inspect_model(path)["looks_like"]


# ---- other kinds ----

KINDS = {
    "ControlNet Union": {"task_embedding": (6, 8), "controlnet_cond_embedding.conv_in.weight": (8, 3, 3, 3)},
    "ControlNet-XS": {
        "control_to_base_for_conv_in.weight": (8, 8, 1, 1),
        "controlnet_cond_embedding.conv_in.weight": (1,),
    },
    "diffusion transformer": {"controlnet_blocks.0.weight": (8, 8), "transformer_blocks.0.attn.to_q.weight": (8, 8)},
    "IP-Adapter": {"image_proj.proj.weight": (8, 8), "ip_adapter.1.to_k_ip.weight": (8, 8)},
    "SparseCtrl": {
        "controlnet_cond_embedding.conv_in.weight": (1,),
        "down_blocks.0.motion_modules.0.norm.weight": (1,),
    },
    "ControlNet-LLLite": {"lllite_unet_input_blocks_4_1.down.0.weight": (8, 8)},
    "T2I style adapter": {"style_embedding": (1, 8, 8), "transformer_layes.0.ln_1.weight": (8,)},
    "CoAdapter fuser": {"task_embedding": (8, 8), "spatial_feat_mapping.0.1.weight": (8, 8)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_by_their_names(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "c.safetensors", {name: torch.zeros(shape) for name, shape in KINDS[kind].items()})
    with pytest.raises(CheckpointError, match=f"is an? .*{kind}.*which is not supported") as caught:
        load_control(path)
    assert caught.value.hint
    assert kind in inspect_model(path)["looks_like"]


def test_pictures_of_other_channels(whole: ControlNet, tmp_path: Path) -> None:
    """Of an inpainting ControlNet that reads a mask as a fourth."""
    tensors = whole.state_dict() | {"controlnet_cond_embedding.conv_in.weight": torch.zeros(8, 4, 3, 3)}
    with pytest.raises(CheckpointError, match=re.escape("conditioning_channels is 4; 3 are needed, the colours")):
        load_control(write(tmp_path / "c.safetensors", tensors))
