"""What a single file is, told from its keys and shapes: at the real models' sizes, over files that have no content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from calotype.errors import CheckpointError
from calotype.families import FAMILIES, SD15, SD21, SDXL, Family
from calotype.nn.vae import AutoencoderKL
from calotype.weights import ldm, load, texts
from calotype.weights.detect import looks_like
from calotype.weights.load import load_parts
from calotype.weights.single_file import SingleFile

Shape = tuple[int, ...]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."


def real_shapes(family: Family, *, channels: int = 4, lcm: str | None = None) -> dict[str, Shape]:
    """What a single file of a family holds, as its makers publish it."""
    changed = texts.family_texts(family)
    changed["unet/config.json"]["in_channels"] = channels
    if lcm is not None:
        changed["unet/config.json"]["time_cond_proj_dim"] = 256
    found: dict[str, Shape] = {}
    unet = load.unet_of(changed["unet/config.json"], "")
    shapes = load.network_shapes(unet)
    for ours, theirs in ldm.unet_table(shapes, unet.config).items():
        found[UNET + (lcm if lcm is not None and "cond_proj" in theirs else theirs)] = shapes[ours]
    vae = load.vae_of(changed["vae/config.json"], "")
    assert isinstance(vae, AutoencoderKL)
    shapes = load.network_shapes(vae)
    for ours, theirs in ldm.vae_table(shapes, vae.config).items():
        one_by_one = (1, 1) if ".attn_1." in theirs and len(shapes[ours]) == 2 else ()
        found[VAE + theirs] = (*shapes[ours], *one_by_one)
    xl = "text_encoder_2/config.json" in changed
    first = load.text_encoder_of(changed["text_encoder/config.json"], "")
    if family is SD21:
        found |= open_clip(OPEN_CLIP, 1024, 24)
    else:
        prefix = "conditioner.embedders.0.transformer." if xl else CLIP
        found |= {prefix + name: shape for name, shape in load.network_shapes(first).items()}
        found[f"{prefix}text_model.embeddings.position_ids"] = (1, 77)
    if xl:
        found |= open_clip("conditioner.embedders.1.model.", 1280, 32)
    return found


def open_clip(prefix: str, width: int, layers: int) -> dict[str, Shape]:
    """OpenCLIP's text encoder, by hand."""
    found: dict[str, Shape] = {
        "positional_embedding": (77, width),
        "token_embedding.weight": (49408, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, width),
        "logit_scale": (),
    }
    for i in range(layers):
        for name, shape in {
            "ln_1": (width,),
            "ln_2": (width,),
            "attn.out_proj": (width, width),
            "mlp.c_fc": (4 * width, width),
            "mlp.c_proj": (width, 4 * width),
        }.items():
            found[f"transformer.resblocks.{i}.{name}.weight"] = shape
            found[f"transformer.resblocks.{i}.{name}.bias"] = shape[:1]
        found[f"transformer.resblocks.{i}.attn.in_proj_weight"] = (3 * width, width)
        found[f"transformer.resblocks.{i}.attn.in_proj_bias"] = (3 * width,)
    return {prefix + name: shape for name, shape in found.items()}


def write_sparse(path: Path, shapes: Mapping[str, Shape], said: Mapping[str, str] | None = None) -> dict[str, int]:
    """A float16 file of these shapes, all holes; gives where each tensor's bytes begin."""
    header: dict[str, Any] = {"__metadata__": dict(said)} if said else {}
    offsets, end = {}, 0
    for name, shape in shapes.items():
        offsets[name] = end
        end += 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + begin for name, begin in offsets.items()}


def fits(single: SingleFile) -> bool:
    """Whether every network is there, and all of the file is used."""
    networks = {"unet": load.unet_of, "vae": load.vae_of}
    for part in (name for name in single.pipeline().classes if single.has(f"{name}/config.json")):
        network: Any = networks.get(part, load.text_encoder_of)(*load.config_of(single, part))
        single.check(part, network.config, load.network_shapes(network))
    return True


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_families_are_told_apart(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_sparse(path, real_shapes(family))
    single = SingleFile(path)
    assert (single.family, single.prediction) == (family, "epsilon")
    assert fits(single)
    assert single.tokenizer("tokenizer").ids("a photo of an astronaut") == [320, 1125, 539, 550, 18376]
    assert single.tokenizer("tokenizer").pad == (0 if family is SD21 else 49407)
    assert single.json("scheduler/scheduler_config.json")["beta_end"] == 0.012


@pytest.mark.parametrize(("family", "kind"), [(SD15, "StableDiffusionInpaint"), (SDXL, "StableDiffusionXLInpaint")])
def test_inpainting_models(family: Family, kind: str, tmp_path: Path) -> None:
    write_sparse(tmp_path / "x.safetensors", real_shapes(family, channels=9))
    single = SingleFile(tmp_path / "x.safetensors")
    assert single.json("unet/config.json")["in_channels"] == 9
    assert single.pipeline().kind == f"{kind}Pipeline"
    assert fits(single)


@pytest.mark.parametrize("name", ["time_embedding.cond_proj.weight", "time_embed.cond_proj.weight"])
def test_latent_consistency_models(name: str, tmp_path: Path) -> None:
    write_sparse(tmp_path / "x.safetensors", real_shapes(SDXL, lcm=name))
    single = SingleFile(tmp_path / "x.safetensors")
    assert single.json("unet/config.json")["time_cond_proj_dim"] == 256
    assert single.json("scheduler/scheduler_config.json")["_class_name"] == "LCMScheduler"
    assert fits(single)


@pytest.mark.parametrize(
    ("marks", "said", "prediction", "zero_snr"),
    [
        ({"v_pred": (0,)}, {}, "v_prediction", False),
        ({"v_pred": (0,), "ztsnr": (0,)}, {}, "v_prediction", True),
        ({}, {"modelspec.prediction_type": "v"}, "v_prediction", False),
        ({}, {"modelspec.predict_key": "epsilon"}, "epsilon", False),
        ({}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction", False),
        ({}, {"modelspec.title": "velocity"}, "epsilon", False),
    ],
)
def test_a_prediction_that_is_marked(
    marks: dict[str, Shape], said: dict[str, str], prediction: str, zero_snr: bool, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    write_sparse(path, real_shapes(SDXL) | marks, said)
    scheduler = SingleFile(path).json("scheduler/scheduler_config.json")
    assert scheduler["prediction_type"] == prediction
    assert scheduler.get("rescale_betas_zero_snr", False) == zero_snr
    assert SingleFile(path, "epsilon").json("scheduler/scheduler_config.json")["prediction_type"] == "epsilon"


@pytest.mark.parametrize(("spread", "prediction", "side"), [(0.05, "epsilon", 64), (0.2, "v_prediction", 96)])
@pytest.mark.parametrize("prefix", [OPEN_CLIP, "conditioner.embedders.0.model."])
def test_sd2_shows_its_prediction_by_a_norm(
    spread: float, prediction: str, side: int, prefix: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    shapes = {name.replace(OPEN_CLIP, prefix): shape for name, shape in real_shapes(SD21).items()}
    offsets = write_sparse(path, shapes)
    with path.open("r+b") as file:
        file.seek(offsets[f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"])
        file.write((spread * torch.randn(320, generator=torch.manual_seed(0))).half().numpy().tobytes())
    single = SingleFile(path)
    assert single.json("scheduler/scheduler_config.json")["prediction_type"] == prediction
    assert single.json("unet/config.json")["sample_size"] == side
    assert fits(single)


@pytest.mark.parametrize("prefix", ["diffusion_model.", ""])
def test_lone_unets_of_comfyui(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    shapes = {name: shape for name, shape in real_shapes(SDXL).items() if name.startswith(UNET)}
    write_sparse(path, {prefix + name.removeprefix(UNET): shape for name, shape in shapes.items()})
    single = SingleFile(path)
    assert single.family is SDXL
    network = load.unet_of(*load.config_of(single, "unet"))
    assert len(single.check("unet", network.config, load.network_shapes(network))[0]) == len(shapes)
    assert looks_like(single.shapes) == "a single-file (LDM) checkpoint of SDXL"


# ---- what is refused ----

REFINER = {
    f"{UNET}input_blocks.0.0.weight": (384, 4, 3, 3),
    "conditioner.embedders.0.model.token_embedding.weight": (9,),
}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (REFINER, "is SDXL's refiner"),
        ({"model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": (4, 4)}, "diffusion transformer"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (4,)}, "diffusion transformer"),
        (
            {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3), f"{UNET}input_blocks.0.0.weight": (320,)},
            "ControlNet",
        ),
        ({f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3), "edm_mean": (4,)}, "EDM model"),
        ({f"{UNET}input_blocks.0.0.weight": (100, 4, 3, 3)}, "has no configs and is .* of no known family"),
        ({"x": (1,)}, "is not a model: it looks like nothing known"),
        ({}, "is not a model"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_other_files_are_refused_in_one_line(shapes: dict[str, Shape], message: str, tmp_path: Path) -> None:
    write_sparse(tmp_path / "x.safetensors", shapes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_parts(tmp_path / "x.safetensors")
    assert "\n" not in caught.value.message
